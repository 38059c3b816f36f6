"""A loop of Accelerate, which builds the loader anew and reads a batch ahead.

python docs/examples/accelerate_loop.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from per_instance_accountant import PrivacyEngine, audit
from per_instance_accountant.integrations.accelerate import prepare


def main() -> None:
    """One draw in three accumulated batches."""
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    dataset = TensorDataset(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = torch.nn.Linear(64, 10)
    engine = PrivacyEngine(accountant="rdp", ledger="digits")
    made = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.3),
        # Draws of whole steps: prepare splits them.
        data_loader=DataLoader(dataset, batch_size=90),
        noise_multiplier=1.0,
        max_grad_norm=4.0,
    )
    model, optimizer, loader = prepare(accelerator, engine, *made)
    for _ in range(3):
        for inputs, target in loader:
            with accelerator.accumulate(model):
                accelerator.backward(torch.nn.functional.cross_entropy(model(inputs), target))
                optimizer.step()
                optimizer.zero_grad()
    engine.close()
    print(audit("digits", delta=1e-4))


if __name__ == "__main__":
    main()
