"""Small private trainings inside frameworks, and the norms they must have recorded, computed by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from per_instance_accountant.integrations import desk
from per_instance_accountant.ledger import Step

torch.set_num_threads(1)

CLIP, COUNT = 0.8, 61


def examples(seed: int = 0) -> TensorDataset:
    """Inputs of very different sizes, so that gradients differ and some are clipped."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(COUNT, 6, generator=generator) * torch.exp(torch.randn(COUNT, 1, generator=generator))
    return TensorDataset(x, torch.randint(0, 3, (COUNT,), generator=generator))


def parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def norms_by_hand(
    loss: Callable[[dict[str, torch.Tensor], int], torch.Tensor],
    weights: dict[str, torch.Tensor],
    rows: np.ndarray,
) -> np.ndarray:
    """Norms of the gradients of single instances, one after the other, without Opacus."""
    found = []
    for row in rows.tolist():
        leaves = {name: p.detach().clone().requires_grad_() for name, p in weights.items()}
        gradients = torch.autograd.grad(loss(leaves, row), list(leaves.values()))
        found.append(float(sum(g.double().square().sum() for g in gradients).sqrt()))
    return np.array(found)


def check_steps(
    engine: Any,
    snapshots: list[dict[str, torch.Tensor]],
    loss: Callable[[dict[str, torch.Tensor], int], torch.Tensor],
) -> int:
    """Every recorded step holds exactly the clipped norms at the parameters it was taken at."""
    steps = [event for event in engine.ledger.events() if isinstance(event, Step)]
    assert len(steps) == len(snapshots)
    compared = 0
    for step, weights in zip(steps, snapshots, strict=True):
        expected = np.minimum(norms_by_hand(loss, weights, step.positions), CLIP)
        np.testing.assert_allclose(step.contributions, expected, rtol=3e-5)
        compared += len(expected)
    return compared


@pytest.fixture
def torch_seed() -> None:
    torch.manual_seed(3)


@pytest.fixture(autouse=True)
def fixed_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generators that would be seeded afresh get one number after the other, so that tests repeat."""
    numbers = itertools.count(20)
    monkeypatch.setattr(desk.secrets, "randbits", lambda bits: next(numbers))
