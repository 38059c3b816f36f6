"""R6: clipped gradients of any loss on an unbounded domain, from a bounded distance: a Gaussian pair."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.unlearning.bounds.interface import Bound, Measure, require

Array = NDArray[np.float64]
_UP = 1 + 1e-11


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClippedGradients(Bound):
    """``mu_k = (r^k Z + d geom(r, k)) / (s sqrt(geom(r^2, k)))``, as its running minimum over 1 <= k <= K.

    start_distance: Z, distance of the two models before the first unlearning step, almost surely. drift: d,
    distance that one step may add (twice the norm of what it subtracts). decay: r, Lipschitz factor of the
    rest of the step. noise_std: s. ``mu_k`` falls until ``r^k = 1 - Z (1 - r) / d`` and rises after it, so
    more steps than that promise nothing more by this bound; that least value is the floor.
    """

    name: ClassVar[str] = "R6 clipped gradients"
    assumptions_used: ClassVar[tuple[str, ...]] = ("projection_radius",)
    measure: Measure
    start_distance: float
    drift: float
    decay: float
    noise_std: float
    direction: str = "both"

    def mu(self, steps: int) -> float:
        """Gaussian-DP parameter (upper bound), nonincreasing in ``steps``; inf without a step or noise."""
        require(steps >= 0 and steps == int(steps), "steps", steps, "the non-negative integers")
        if self.start_distance == 0 and self.drift == 0:
            return 0.0
        best = self._turning_point()
        if steps < best:
            return self._at(steps)
        return min(self._at(math.floor(best)), self._at(min(steps, math.ceil(best))))

    def rdp(self, steps: int, orders: Array) -> Array:
        """(m,) ``order * mu^2 / 2``."""
        return orders * (self.mu(steps) ** 2 / 2)

    def conversion_orders(self, steps: int) -> Array:
        """Not used: the pair is Gaussian, so epsilon is exact."""
        return np.array([2.0])

    @property
    def floor(self) -> float:
        """Least mu over all numbers of steps (upper bound)."""
        best = self._turning_point()
        return self.mu(math.ceil(best)) if math.isfinite(best) else self._limit()

    def _turning_point(self) -> float:
        """The real k at which the formula is least; inf where it falls for ever."""
        r, z, d = self.decay, self.start_distance, self.drift
        if d == 0:
            return math.inf
        if r == 1:
            return max(z / d, 1.0)
        ratio = 1 - z * (1 - r) / d
        return max(math.log(ratio) / math.log(r), 1.0) if ratio > 0 and r > 0 else math.inf

    def _at(self, k: int) -> float:
        """The formula itself."""
        s, r = self.noise_std, self.decay
        if k == 0 or s == 0:
            return math.inf
        if r == 1:
            return (self.start_distance / k + self.drift) * math.sqrt(k) / s * _UP
        if r == 0:
            return self.drift / s * _UP
        log = k * math.log(r)
        # For r > 1 numerator and denominator are divided by r^k, which overflows.
        left = math.exp(log) if r < 1 else 1.0
        moved = -math.expm1(-abs(log))
        shift = left * self.start_distance + self.drift * moved / abs(1 - r)
        variance = -math.expm1(-2 * abs(log)) / abs((1 - r) * (1 + r))
        if r > 1 and log + math.log(self.drift * variance + 1e-300) > math.log(shift):
            return math.inf  # Late drift cannot use the noise before it; fewer steps give more.
        return shift / (s * math.sqrt(variance)) * _UP

    def _limit(self) -> float:
        s, r = self.noise_std, self.decay
        if s == 0:
            return math.inf
        if r < 1:
            return self.drift / (1 - r) * math.sqrt((1 - r) * (1 + r)) / s * _UP
        return self.start_distance * math.sqrt((r - 1) * (r + 1)) / s * _UP


def clipped_gradients(
    *,
    start_distance: float,
    drift: float,
    decay: float,
    noise_std: float,
    order: float | None = None,
    delta: float | None = None,
) -> ClippedGradients:
    """R6, both directions: ``theta <- decay theta - g + noise``, ``2 |g| <= drift``, from models at most
    ``start_distance`` apart. With ``drift=0`` and decay c: retain maps that are c-Lipschitz, from a distance.

    start_distance: twice the radius when the model is projected onto a ball first, or the cap of a distance
    filter. The setting of Koloskova et al. 2025 (gradient clipping), with the Gaussian pair of shifted
    interpolation: our derivation, docs/math/unlearning_bounds.md. Raises UsageError PIA070.

    >>> bound = clipped_gradients(start_distance=1.0, drift=0.0, decay=0.9, noise_std=1.0, order=2)
    >>> round(bound.mu(10), 8)
    0.16216232
    >>> drifting = clipped_gradients(start_distance=1.0, drift=0.01, decay=1.0, noise_std=1.0, order=2)
    >>> round(drifting.floor, 6), drifting.mu(100) == drifting.mu(10_000)
    (0.2, True)
    """
    named = {"start_distance": start_distance, "drift": drift, "decay": decay, "noise_std": noise_std}
    for name, value in named.items():
        require(0 <= value < math.inf, name, value, "[0, inf)")
    return ClippedGradients(
        measure=Measure(order=order, delta=delta),
        start_distance=start_distance,
        drift=drift,
        decay=decay,
        noise_std=noise_std,
    )
