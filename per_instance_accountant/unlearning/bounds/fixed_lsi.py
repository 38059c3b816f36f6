"""R1: contraction at a fixed order by the log-Sobolev constant of the second argument, for comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from per_instance_accountant.divergence import DEFAULT_ORDERS
from per_instance_accountant.unlearning.bounds.interface import Bound, Measure, Tail
from per_instance_accountant.unlearning.bounds.shifted_lsi import Curve, shifted_lsi

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FixedLsi(Bound):
    """``D_a(K) <= P(a) Lambda_K^(1/a)``, ``Lambda_K = C / (C + tau_K)``.

    curve, constant, direction: as in :class:`ShiftedLsi`, which is never above it where ``P(a) / a`` is
    nondecreasing.
    """

    name: ClassVar[str] = "R1 fixed-order LSI"
    assumptions_used: ClassVar[tuple[str, ...]] = ("smoothness", "convexity", "clipping_never_binds")
    measure: Measure
    curve: Curve
    constant: float
    tail: Tail
    direction: str

    def rdp(self, steps: int, orders: Array) -> Array:
        """(m,) upper bounds in nats."""
        tau, loss = self.tail.inverse_noise(steps), self.curve(orders)
        if tau == 0:
            return loss
        left = min(self.constant / (self.constant + tau) * (1 + 1e-14), 1.0) if self.constant else 0.0
        with np.errstate(invalid="ignore"):
            return np.where(np.isfinite(loss), loss * left ** (1 / orders) * (1 + 1e-13), np.inf)

    def mu(self, steps: int) -> None:
        """None: the curve need not be Gaussian."""
        return

    def conversion_orders(self, steps: int) -> Array:
        """``divergence.DEFAULT_ORDERS``."""
        return np.asarray(DEFAULT_ORDERS, dtype=np.float64)


def fixed_lsi(
    *,
    curve: Curve,
    noise_std: ArrayLike,
    contraction: ArrayLike,
    training_steps: int | None = None,
    initial_constant: float = 0.0,
    direction: str = "remove",
    order: float | None = None,
    delta: float | None = None,
    unlearning_noise_std: float | None = None,
    unlearning_contraction: float | None = None,
) -> FixedLsi:
    """R1, arguments as in :func:`shifted_lsi`. The rate of Chien et al. 2024 (Langevin unlearning), with the
    log-Sobolev constant followed step by step; derivation in docs/math/unlearning_bounds.md.

    >>> gaussian = lambda orders: 0.38 * orders
    >>> bound = fixed_lsi(curve=gaussian, noise_std=0.05, contraction=0.9, training_steps=1000, order=8)
    >>> round(bound.value(10), 5)
    2.33604
    """
    shifted = shifted_lsi(
        curve=curve,
        noise_std=noise_std,
        contraction=contraction,
        training_steps=training_steps,
        initial_constant=initial_constant,
        direction=direction,
        order=order,
        delta=delta,
        unlearning_noise_std=unlearning_noise_std,
        unlearning_contraction=unlearning_contraction,
    )
    return FixedLsi(
        measure=shifted.measure,
        curve=curve,
        constant=shifted.constant,
        tail=shifted.tail,
        direction=direction,
    )
