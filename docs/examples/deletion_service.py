"""A deletion service in small: a queue of requests, one plan, one run, a certificate, an independent check.

python docs/examples/deletion_service.py
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from per_instance_accountant import FixedThresholds, PrivacyEngine, plan, verify
from per_instance_accountant.finetuning import run_plan
from per_instance_accountant.unlearning import geometric_grid, softmax_regression

SIZE, CLIP = 600, 1.42


def features() -> tuple[torch.Tensor, torch.Tensor]:
    """Digits whose rows have norm at most 1, by a public scale."""
    pixels, labels = load_digits(return_X_y=True)
    rows = pixels[:SIZE] / 80
    rows *= np.minimum(1.0, 0.999 / np.linalg.norm(rows, axis=1))[:, None]
    return torch.tensor(rows, dtype=torch.float32), torch.tensor(labels[:SIZE])


def train(data: TensorDataset, x: torch.Tensor) -> None:
    """Softmax regression whose smoothness is known, so that deletion can be certified."""
    known = softmax_regression(
        feature_norm=1.0, num_instances=SIZE, denominator=SIZE / 2, individual_thresholds=True
    )
    thresholds = 1.4144 * x.norm(dim=1)
    engine = PrivacyEngine(
        ledger="service",
        charging=FixedThresholds(thresholds=thresholds.numpy()),
        assumptions=known.to_dict(),
        ids=np.array([f"customer-{i:04d}" for i in range(SIZE)]),
    )
    model = nn.Linear(64, 10, bias=False)
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.05),
        data_loader=DataLoader(data, batch_size=SIZE // 2),
        noise_multiplier=6.0,
        max_grad_norm=CLIP,
    )
    for _ in range(60):
        for inputs, target in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), target).backward()
            optimizer.step()
    engine.save_checkpoint(path="model.pt", module=model, optimizer=optimizer)
    engine.close()


def main() -> None:
    """Train once, then serve a queue."""
    torch.manual_seed(0)
    x, y = features()
    data = TensorDataset(x, y)
    train(data, x)

    with open("requests.csv", "w", newline="") as file:
        csv.writer(file).writerows([["r-1", "customer-0017"], ["r-2", "customer-0421"]])
    with open("requests.csv", newline="") as file:
        ids = sorted({customer for _, customer in csv.reader(file)})

    # On a public grid: the number of steps then says less about who asked.
    made = plan("service", ids=ids, target_epsilon=0.1, order=8, step_grid=geometric_grid(10_000))
    print(made)
    made.save("plan.json")

    positions = {f"customer-{i:04d}": i for i in range(SIZE)}
    gone = [positions[customer] for customer in ids]
    run = run_plan(
        made,
        ledger="service",
        module=nn.Linear(64, 10, bias=False),
        dataset=Subset(data, np.setdiff1d(np.arange(SIZE), gone).tolist()),
        criterion=nn.CrossEntropyLoss(),
        checkpoint="model.pt",
        output="forgotten",
        progress=False,
    )
    report = verify(run.certificate, ledger="service", checkpoint=run.checkpoint)
    report.raise_if_failed()
    print(f"{run.steps} steps, {len(report.checks)} checks, valid: {report.valid}")
    text = Path(run.certificate).read_text(encoding="utf-8")
    print("names in the certificate:", sum(customer in text for customer in ids))


if __name__ == "__main__":
    main()
