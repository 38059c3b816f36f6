"""Stochastic gradient Langevin dynamics as a DPOptimizer configuration."""

from __future__ import annotations

import math
from typing import Literal

from per_instance_accountant.errors import UsageError


def sgld_configuration(
    *,
    step_size: float,
    temperature: float,
    expected_batch_size: float,
    num_instances: int,
    max_grad_norm: float,
    potential: Literal["sum", "mean"] = "sum",
    loss_reduction: Literal["mean", "sum"] = "mean",
) -> tuple[float, float]:
    """Learning rate of plain SGD and noise multiplier with which a DPOptimizer makes Langevin steps.

    The step is ``theta <- theta - step_size * grad U + N(0, 2 * step_size * temperature * I)``, where U is
    the sum or the mean of the instances' losses (``potential``) and its gradient is estimated without bias
    from a Poisson batch with expected size B of N instances; full batch is ``sample_rate=1``. Opacus moves
    by ``-learning_rate * (S + N(0, (noise_multiplier * max_grad_norm)^2)) / B`` for
    ``loss_reduction="mean"``, without the division for ``"sum"``, where S is the clipped sum; comparing the
    two gives both numbers (our derivation, docs/opacus_integration.md). The clip norm cancels from the
    accounting: one step of an instance with clipped norm c has Renyi divergence ``order * step_size * N^2 *
    c^2 / (4 * temperature * B^2)`` for the sum potential.

    Returns (learning_rate, noise_multiplier). Raises UsageError PIA070.

    >>> sgld_configuration(
    ...     step_size=1e-4, temperature=1.0, expected_batch_size=50, num_instances=100, max_grad_norm=2.0)
    (0.01, 35.35533905932738)
    """
    positive = {
        "step_size": step_size,
        "temperature": temperature,
        "expected_batch_size": expected_batch_size,
        "num_instances": num_instances,
        "max_grad_norm": max_grad_norm,
    }
    for name, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            _refuse(name, value, "(0, inf)")
    for name, word in {"potential": potential, "loss_reduction": loss_reduction}.items():
        if word not in ("sum", "mean"):
            _refuse(name, word, "'sum' or 'mean'")
    scale = num_instances if potential == "sum" else 1
    per_unit = step_size * scale / expected_batch_size
    learning_rate = per_unit * expected_batch_size if loss_reduction == "mean" else per_unit
    return learning_rate, math.sqrt(2 * step_size * temperature) / (per_unit * max_grad_norm)


def _refuse(name: str, value: object, allowed: str) -> None:
    raise UsageError(
        "PIA070",
        f"{name} is {value!r}, allowed is {allowed}",
        "No Langevin step has such a parameter",
        "sgld_configuration(step_size=1e-4, temperature=1.0, ...)",
    )
