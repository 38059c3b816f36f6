"""A privacy filter: everybody leaves before the step that would exceed the budget.

python docs/examples/filter.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from per_instance_accountant import PrivacyEngine, PrivacyFilter, Sweep, audit

BUDGET, DELTA = 5.0, 1e-5


def main() -> None:
    """Train until most have left; the budget is certified for everybody."""
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels / 40, dtype=torch.float32), torch.tensor(labels))
    model = torch.nn.Linear(64, 10)
    engine = PrivacyEngine(
        ledger="filtered",
        charging=Sweep(every=5, slack=1.05),
        filter=PrivacyFilter(budget=BUDGET, delta=DELTA, on_spent="drop"),
        groups={"digit": labels},
    )
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=2.0),
        data_loader=DataLoader(data, batch_size=180),
        noise_multiplier=1.0,
        max_grad_norm=1.5,
    )
    for epoch in range(8):
        for inputs, target in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), target).backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: {int(engine.dropped.sum())} of {len(labels)} have left")
    engine.close()

    budgets = audit("filtered", delta=DELTA)
    print(f"certified for everybody: epsilon at most {budgets.certified_budget.max():.3f}")
    print(f"the clip norm alone would allow {budgets.worst_case_tight:.3f}")


if __name__ == "__main__":
    main()
