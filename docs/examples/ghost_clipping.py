"""Ghost clipping: per-instance norms without per-instance gradients, recorded like any other.

python docs/examples/ghost_clipping.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from per_instance_accountant import LastSeen, PrivacyEngine, audit


def main() -> None:
    """Train with ghost clipping; compare the worst case with a score from the recorded norms."""
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels / 40, dtype=torch.float32), torch.tensor(labels))
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    engine = PrivacyEngine(ledger="ghost", groups={"digit": labels})
    model, optimizer, criterion, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(data, batch_size=180),
        noise_multiplier=1.0,
        max_grad_norm=1.5,
        criterion=torch.nn.CrossEntropyLoss(),
        grad_sample_mode="ghost",
    )
    for _ in range(10):
        for inputs, target in loader:
            optimizer.zero_grad()
            criterion(model(inputs), target).backward()
            optimizer.step()
    engine.close()

    print(audit("ghost"))
    scores = audit("ghost", charging=LastSeen())
    print(f"{scores} - a score that ranks, no bound")
    print("largest score:", scores.top(1)[0])


if __name__ == "__main__":
    main()
