"""Track an ordinary Opacus loop on scikit-learn's digits, audit it, write the page.

python docs/examples/plain_loop.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from per_instance_accountant import PrivacyEngine, Sweep, audit


def main() -> None:
    """Train, audit, report."""
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 40, dtype=torch.float32), torch.tensor(labels)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
    engine = PrivacyEngine(ledger="digits", charging=Sweep(every=10, slack=1.1), groups={"digit": labels})
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=180),
        noise_multiplier=1.0,
        max_grad_norm=1.5,
        criterion=torch.nn.CrossEntropyLoss(),
    )
    for _ in range(10):
        for inputs, target in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), target).backward()
            optimizer.step()
    engine.close()

    budgets = audit("digits", delta=1e-5)
    print(budgets)
    for row in budgets.by_group("digit")[:3]:
        print(f"digit {row['group']}: median {row['median']:.3f}, largest {row['max']:.3f} ({row['basis']})")
    budgets.report("digits.html", by="digit")
    print("read digits.html")


if __name__ == "__main__":
    main()
