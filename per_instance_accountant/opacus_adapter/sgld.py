"""Stochastic gradient Langevin dynamics: DP-SGD whose noise and step size make a sampler."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from per_instance_accountant.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from per_instance_accountant.opacus_adapter.engine import PrivacyEngine

STEP_KEY = "sgld_step"
"""Where the optimizer's state keeps the number of the next step, so that checkpoints hold it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SGLD:
    """Langevin dynamics ``theta <- theta - eta_t * grad U(theta) + N(0, 2 * eta_t * temperature * I)``.

    U is the sum or the mean of the instances' losses (``potential``), each gradient clipped, plus
    ``prior_precision / 2 * |theta|^2``. ``eta_t = step_size * (1 + t / offset)^-power`` for steps t = 0,
    1, ...: a schedule fixed before training. The noise multiplier follows ``1 / sqrt(eta_t)``. Derivation:
    docs/sgld.md.

    >>> sampler = SGLD(step_size=0.01, power=0.5, offset=1.0)
    >>> sampler.step_size_at(3)
    0.005
    """

    step_size: float
    temperature: float = 1.0
    potential: Literal["sum", "mean"] = "sum"
    prior_precision: float = 0.0
    power: float = 0.0
    offset: float = 1.0

    def __post_init__(self) -> None:
        for name in ("step_size", "temperature", "offset"):
            _check(name, getattr(self, name), zero=False)
        for name in ("prior_precision", "power"):
            _check(name, getattr(self, name), zero=True)
        if self.potential not in ("sum", "mean"):
            _refuse("potential", self.potential, "'sum' or 'mean'")

    def step_size_at(self, step: int) -> float:
        """``eta_t``."""
        return float(self.step_size * (1 + step / self.offset) ** -self.power)

    def drive(self, engine: PrivacyEngine) -> None:
        """Make Langevin steps of the steps of ``engine``'s optimizer, from the next one on.

        Call it after ``make_private`` (whose ``noise_multiplier`` and learning rate are replaced) and before
        ``load_checkpoint``, which continues the schedule. The optimizer must be plain ``torch.optim.SGD``.
        Several processes are accounted for. Raises UnsupportedError PIA060 for another optimizer, for
        clipping that is not flat, and for a second call.
        """
        optimizer, setting = engine.tracker.optimizer, engine.tracker.recorder.setting
        inner = optimizer.original_optimizer
        _check_plain(optimizer)
        drawn = setting.sample_rate * len(engine.dataset)
        # One unit of the clipped sum moves the parameters by eta times this.
        unit = (len(engine.dataset) if self.potential == "sum" else 1) / drawn
        mean = optimizer.loss_reduction == "mean"
        divisor = optimizer.expected_batch_size * getattr(optimizer, "world_size", 1) if mean else 1.0

        def set_step(*_: Any) -> None:
            step = inner.param_groups[0][STEP_KEY]
            eta = self.step_size_at(step)
            spread = math.sqrt(2 * eta * self.temperature)
            optimizer.noise_multiplier = spread / (eta * unit * float(optimizer.max_grad_norm))
            for group in inner.param_groups:
                group["lr"] = eta * unit * divisor
                group["weight_decay"] = self.prior_precision / (unit * divisor)

        def advance(*_: Any) -> None:
            inner.param_groups[0][STEP_KEY] += 1
            set_step()

        inner.param_groups[0][STEP_KEY] = 0
        set_step()
        inner.register_step_post_hook(advance)
        inner.register_load_state_dict_post_hook(set_step)


def _check_plain(optimizer: Any) -> None:
    inner = optimizer.original_optimizer
    plain = type(inner) is torch.optim.SGD and optimizer.clipping == "flat"
    moving = ("momentum", "nesterov", "maximize")
    plain &= not any(STEP_KEY in group or any(map(group.get, moving)) for group in inner.param_groups)
    if not plain:
        raise UnsupportedError(
            "PIA060",
            "Langevin dynamics with an optimizer that is not plain SGD with flat clipping, or driven already",
            "Its steps would not have the law of the dynamics",
            "make_private(optimizer=torch.optim.SGD(model.parameters(), lr=1.0), clipping='flat', ...)",
        )


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
    two gives both numbers (our derivation, docs/sgld.md). The clip norm cancels from the
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
        _check(name, value, zero=False)
    for name, word in {"potential": potential, "loss_reduction": loss_reduction}.items():
        if word not in ("sum", "mean"):
            _refuse(name, word, "'sum' or 'mean'")
    scale = num_instances if potential == "sum" else 1
    per_unit = step_size * scale / expected_batch_size
    learning_rate = per_unit * expected_batch_size if loss_reduction == "mean" else per_unit
    return learning_rate, math.sqrt(2 * step_size * temperature) / (per_unit * max_grad_norm)


def _check(name: str, value: float, *, zero: bool) -> None:
    if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
        _refuse(name, value, "[0, inf)" if zero else "(0, inf)")


def _refuse(name: str, value: object, allowed: str) -> None:
    raise UsageError(
        "PIA070",
        f"{name} is {value!r}, allowed is {allowed}",
        "No Langevin step has such a parameter",
        "sgld_configuration(step_size=1e-4, temperature=1.0, ...)",
    )
