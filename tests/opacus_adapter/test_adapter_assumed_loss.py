"""Sweeps without a criterion assume Opacus' default, and notice a wrong one before the first release."""

from __future__ import annotations

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from per_instance_accountant import Sweep
from per_instance_accountant.errors import UsageError
from per_instance_accountant.opacus_adapter import PrivacyEngine


def made(targets, *, mode="hooks", reduction="mean", ledger=None, sampling=True, **arguments):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3))
    engine = PrivacyEngine(accountant="rdp", charging=Sweep(every=2), ledger=ledger)
    loader = DataLoader(TensorDataset(torch.randn(60, 10), targets), batch_size=12)
    values = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.05),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=0.5,
        grad_sample_mode=mode,
        loss_reduction=reduction,
        **arguments,
    )
    return engine, values


def train(values, criterion, limit):
    model, optimizer, loader = values[0], values[1], values[-1]
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    try:
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=limit, optimizer=optimizer
        ) as batches:
            for x, y in batches:
                optimizer.zero_grad()
                criterion(model(x), y).backward()
                optimizer.step()
    finally:
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        values[0].moved = not torch.equal(before, after)


CLASSES = torch.arange(60) % 3


@pytest.mark.parametrize("limit", [3, 60])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
def test_cross_entropy_is_assumed(mode, reduction, limit):
    given = {"criterion": nn.CrossEntropyLoss(reduction=reduction)} if mode == "ghost" else {}
    if mode == "ghost" and reduction == "mean":
        given = {}
    engine, values = made(CLASSES, mode=mode, reduction=reduction, **given)
    loss = values[2] if mode == "ghost" else nn.CrossEntropyLoss(reduction=reduction)
    train(values, loss, limit)
    assert values[0].moved and engine.ledger.num_steps == 5


def test_targets_that_cross_entropy_cannot_take():
    engine, values = made(torch.randn(60, 2))
    with pytest.raises(UsageError, match=r"PIA071.*criterion=") as raised:
        next(iter(values[-1]))
    assert raised.value.__cause__ is not None and engine.ledger.num_steps == 0


@pytest.mark.parametrize("limit", [3, 60])
def test_a_loop_with_another_loss(limit):
    engine, values = made(CLASSES)

    def another(output, target):
        return 10 * nn.functional.multi_margin_loss(output, target)

    with pytest.raises(UsageError, match=r"PIA071.*another loss than the loop"):
        train(values, another, limit)
    assert engine.ledger.num_steps == 0 and not values[0].moved
    # The loss that the caller names is not doubted.
    engine, values = made(CLASSES, criterion=nn.MultiMarginLoss())
    train(values, another, limit)
    assert engine.ledger.num_steps == 5
