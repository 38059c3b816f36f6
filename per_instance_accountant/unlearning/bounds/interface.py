"""What every bound has in common: the measure, the tail of noisy steps, and the least number of them."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.divergence import gaussian_delta, gaussian_epsilon, rdp_to_epsilon
from per_instance_accountant.errors import UsageError

Array = NDArray[np.float64]

MAX_STEPS: Final = 10_000_000
REFERENCE: Final = "retrain-and-continue"
"""The law compared with: retrain without the forget set on the same mechanism, then the same K noisy
steps."""
_TAU_CAP: Final = 1e300
_DOWN: Final = 1 - 1e-12
_BESIDE: Final = 1e-9


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise UsageError PIA070 unless ``ok``."""
    if not ok:
        raise UsageError(
            "PIA070",
            f"{name} is {value!r}, allowed is {allowed}",
            "No bound can be computed from it",
            f"pass {name} in {allowed}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What is bounded: the Renyi divergence at ``order``, or epsilon at ``delta``. Exactly one of the two.

    Raises UsageError PIA070 unless order is in (1, inf) or delta is in (0, 1).
    """

    order: float | None = None
    delta: float | None = None

    def __post_init__(self) -> None:
        one = (self.order is None) != (self.delta is None)
        require(one, "order and delta", (self.order, self.delta), "exactly one of order= and delta=")
        if self.order is not None:
            require(1 < self.order < math.inf, "order", self.order, "(1, inf)")
        if self.delta is not None:
            require(0 < self.delta < 1, "delta", self.delta, "(0, 1)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """The unlearning steps: ``theta <- phi(theta) + N(0, noise_std^2 I)``, the same ``phi`` in both worlds,
    with Lipschitz constant at most ``contraction``."""

    noise_std: float
    contraction: float

    def __post_init__(self) -> None:
        require(0 <= self.noise_std < math.inf, "noise_std", self.noise_std, "[0, inf)")
        require(0 <= self.contraction < math.inf, "contraction", self.contraction, "[0, inf)")

    def inverse_noise(self, steps: int) -> float:
        """``tau_K = sum_{j=1..K} noise_std^2 / contraction^(2 j)``, rounded down: the noise of K steps,
        measured in distances at the end of training. Every bound is a nonincreasing function of it.

        >>> round(Tail(noise_std=1.0, contraction=0.9).inverse_noise(2), 9)
        2.758725804
        """
        require(steps >= 0 and steps == int(steps), "steps", steps, "the non-negative integers")
        c, variance = self.contraction, self.noise_std**2
        if steps == 0 or variance == 0:
            return 0.0
        if c == 0:
            return _TAU_CAP
        growth = -2.0 * steps * math.log(c)
        if growth > 600:
            return min(variance * 1e260, _TAU_CAP)
        total = float(steps) if c == 1 else math.expm1(growth) / ((1 - c) * (1 + c))
        return min(variance * total * _DOWN, _TAU_CAP)


class Bound(abc.ABC):
    """An upper bound on the divergence from retraining after K unlearning steps, as a function of K.

    name: its row in docs/math/unlearning_bounds.md. direction: ``"both"`` (D(P||Q) and D(Q||P)) or
    ``"remove"`` (D(P||Q) only; P trained with the forget set, Q without). reference: the law Q.
    """

    __slots__ = ()
    name: ClassVar[str]
    assumptions_used: ClassVar[tuple[str, ...]]
    reference: ClassVar[str] = REFERENCE
    direction: str
    measure: Measure

    @abc.abstractmethod
    def rdp(self, steps: int, orders: Array) -> Array:
        """(m,) upper bounds in nats on D_order after ``steps`` unlearning steps; may be inf, never NaN."""

    @abc.abstractmethod
    def mu(self, steps: int) -> float | None:
        """Gaussian-DP parameter that bounds the pair (upper bound), or None where the bound is not
        Gaussian."""

    @abc.abstractmethod
    def conversion_orders(self, steps: int) -> Array:
        """Orders whose minimum gives epsilon at a delta."""

    def value(self, steps: int) -> float:
        """Upper bound after ``steps`` unlearning steps, in the measure the bound was built for."""
        if self.measure.order is not None:
            return float(self.rdp(steps, np.array([self.measure.order]))[0])
        mu, delta = self.mu(steps), self.measure.delta or math.nan
        if mu is not None:
            return float(np.asarray(gaussian_epsilon(mu, delta))) if math.isfinite(mu) else math.inf
        orders = self.conversion_orders(steps)
        return float(rdp_to_epsilon(orders, self.rdp(steps, orders), delta))

    def steps(self, target: float, max_steps: int = MAX_STEPS) -> float:
        """Least K <= max_steps with ``value(K) <= target``, an int, or ``math.inf`` where there is none.

        Every value(K) is nonincreasing in K (proof beside the bound), so doubling and bisection find the
        least.
        Raises UsageError PIA070 unless target is in (0, inf).
        """
        require(0 < target < math.inf, "target", target, "(0, inf)")
        require(max_steps >= 0 and max_steps == int(max_steps), "max_steps", max_steps, "[0, inf)")
        return least_steps(lambda k: self.within(k, target), max_steps)

    def within(self, steps: int, target: float) -> bool:
        """``value(steps) <= target``; a bound may answer it more cheaply than by its value."""
        mu, delta = self.mu(steps), self.measure.delta
        if mu is not None and delta is not None and 0 < mu < math.inf:
            # Beside the target one evaluation decides; value() finds epsilon by many, up to 1e-12 of mu^2.
            clear = mu * mu <= 100 * target
            if clear and float(np.asarray(gaussian_delta(mu, target * (1 - _BESIDE)))) <= delta:
                return True
            if float(np.asarray(gaussian_delta(mu, target * (1 + _BESIDE)))) > delta * (1 + _BESIDE):
                return False
        return self.value(steps) <= target


def least_steps(enough: Callable[[int], bool], max_steps: int) -> float:
    """Least k in [0, max_steps] with ``enough(k)``, for a predicate that stays true once it is; inf if none.

    >>> least_steps(lambda k: k * k >= 50, 100), least_steps(lambda k: False, 100)
    (8, inf)
    """
    if enough(0):
        return 0
    low, high = 0, 1
    while high < max_steps and not enough(high):
        low, high = high, 2 * high
    if high >= max_steps:
        high = max_steps
        if high <= low or not enough(high):
            return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
