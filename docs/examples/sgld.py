"""Langevin dynamics: step size and temperature in, individual losses out.

python docs/examples/sgld.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import scale
from torch.utils.data import DataLoader, TensorDataset

from per_instance_accountant import FixedThresholds, PrivacyEngine, audit
from per_instance_accountant.opacus_adapter import sgld_configuration


def main() -> None:
    """Full-batch SGLD for logistic regression with thresholds from the input norms."""
    torch.manual_seed(0)
    features, labels = load_breast_cancer(return_X_y=True)
    x = torch.tensor(scale(features), dtype=torch.float32)
    # The scale of the features is taken as public here; with private data it must be.
    x /= x.norm(dim=1).max()
    y = torch.tensor(labels)
    learning_rate, noise_multiplier = sgld_configuration(
        step_size=1.0,
        temperature=1e-4,
        expected_batch_size=len(x),
        num_instances=len(x),
        max_grad_norm=1.42,
        potential="mean",
    )
    # The softmax gradient of a row is at most sqrt(2) times its norm.
    thresholds = 1.4143 * x.norm(dim=1)
    model = torch.nn.Linear(x.shape[1], 2, bias=False)
    engine = PrivacyEngine(ledger="sgld", charging=FixedThresholds(thresholds=thresholds.numpy()))
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=learning_rate),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=len(x)),
        noise_multiplier=noise_multiplier,
        max_grad_norm=1.42,
    )
    for _ in range(60):
        for inputs, target in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), target).backward()
            optimizer.step()
    engine.close()
    print(audit("sgld"))


if __name__ == "__main__":
    main()
