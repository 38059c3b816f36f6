"""R2: order-shifting contraction of a whole Renyi curve by the log-Sobolev constant of the second
argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from per_instance_accountant.divergence import DEFAULT_ORDERS, interpolate_rdp
from per_instance_accountant.unlearning.bounds.interface import Bound, Measure, Tail, require
from per_instance_accountant.unlearning.bounds.schedule import schedule

Array = NDArray[np.float64]
Curve = Callable[[Array], Array]
"""(m,) orders above 1 -> (m,) upper bounds in nats, nondecreasing in the order."""

LOWEST_ORDER: Final = 1 + 2.0**-20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShiftedLsi(Bound):
    """``D_a(K) <= (a / a_0) Lambda_K P(a_0)``, ``a_0 = 1 + (a - 1) Lambda_K``, ``Lambda_K = C / (C +
    tau_K)``.

    curve: P, the loss of training. constant: C, log-Sobolev constant (``Ent(f^2) <= 2 C E|grad f|^2``) of the
    SECOND argument at the end of training; N(0, v) has C = v. The order falls from a towards 1 as K grows.
    """

    name: ClassVar[str] = "R2 shifted LSI"
    assumptions_used: ClassVar[tuple[str, ...]] = ("smoothness", "convexity", "clipping_never_binds")
    measure: Measure
    curve: Curve
    constant: float
    tail: Tail
    direction: str

    def rdp(self, steps: int, orders: Array) -> Array:
        """(m,) upper bounds in nats."""
        tau = self.tail.inverse_noise(steps)
        if tau == 0:
            return self.curve(orders)
        left = min(self.constant / (self.constant + tau) * (1 + 1e-14), 1.0) if self.constant else 0.0
        shifted = 1 + (orders - 1) * left
        loss = self.curve(np.maximum(shifted, LOWEST_ORDER))
        # A noiseless reference has constant 0 and infinite loss: infinite, not 0 times infinity.
        with np.errstate(invalid="ignore"):
            return np.where(np.isfinite(loss), orders / shifted * left * loss * (1 + 1e-13), np.inf)

    def mu(self, steps: int) -> None:
        """None: the curve need not be Gaussian."""
        return

    def conversion_orders(self, steps: int) -> Array:
        """``divergence.DEFAULT_ORDERS``."""
        return np.asarray(DEFAULT_ORDERS, dtype=np.float64)


def tabulated(orders: Array, rdp: Array) -> Curve:
    """A :data:`Curve` from upper bounds at some orders: convex interpolation, infinite beyond the last
    order."""

    def curve(at: Array) -> Array:
        return interpolate_rdp(orders, rdp, at)

    return curve


def orders_below(order: float, per_octave: int = 4) -> Array:
    """Orders from just above 1 up to ``order``, dense near 1, for a tabulated curve."""
    octaves = max(1.0, math.log2((order - 1) / (LOWEST_ORDER - 1)))
    count = math.ceil(octaves * per_octave) + 1
    grid = 1 + np.geomspace(LOWEST_ORDER - 1, order - 1, count)
    return np.concatenate([grid[:-1], [order]])


def shifted_lsi(
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
) -> ShiftedLsi:
    """R2 with the log-Sobolev constant of a contractive chain: ``C <- contraction^2 C + noise_std^2`` per
    training step.

    curve: P(order), upper bounds on the loss of training in ``direction``. initial_constant: 0 for a start
    that both worlds share, v for N(., v I). ``direction="both"`` needs the maps WITH the forget set to be
    contractive too, and no hidden sampling. Our derivation, docs/math/unlearning_bounds.md.

    >>> gaussian = lambda orders: 0.38 * orders
    >>> bound = shifted_lsi(curve=gaussian, noise_std=0.05, contraction=0.9, training_steps=1000, order=8)
    >>> round(bound.value(10), 5)
    0.36959
    """
    require(direction in ("both", "remove"), "direction", direction, "('both', 'remove')")
    require(0 <= initial_constant < math.inf, "initial_constant", initial_constant, "[0, inf)")
    plan = schedule(
        sensitivity=0.0,
        noise_std=noise_std,
        contraction=contraction,
        training_steps=training_steps,
        unlearning_noise_std=unlearning_noise_std,
        unlearning_contraction=unlearning_contraction,
    )
    start = (
        initial_constant * float((plan.weights()[0] * plan.contraction[0]) ** 2) if initial_constant else 0.0
    )
    constant = (float(plan.variances().sum()) + start) * (1 + 1e-13)
    measure = Measure(order=order, delta=delta)
    return ShiftedLsi(measure=measure, curve=curve, constant=constant, tail=plan.tail, direction=direction)
