"""R5: parameters in a bounded set, no smoothness: every noisy step contracts every divergence."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, erfc

from per_instance_accountant.divergence import DEFAULT_ORDERS, gaussian_delta, rdp_to_delta, rdp_to_epsilon
from per_instance_accountant.errors import UsageError
from per_instance_accountant.unlearning.bounds.interface import MAX_STEPS, Bound, Measure, require
from per_instance_accountant.unlearning.bounds.shifted_lsi import Curve

Array = NDArray[np.float64]

_SINGLE: Final = 512
_GROWTH: Final = 64
_ROUNDS, _POINTS = 6, 16
_LARGEST_EPSILON: Final = 1e3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BoundedDomain(Bound):
    """(a) ``e^((a-1) D_a(K)) - 1 <= eta^K (e^((a-1) P(a)) - 1)``, eta the Dobrushin coefficient of one step;
    (b) at a delta, ``delta <- delta theta(e~)``, ``e^e~ = 1 + (e^e - 1) / delta``, from ``delta_0(e)``.

    curve: P, the loss of training; infinite values are allowed. separations, chances: (b,), distance between
    the noiseless images of any two points over the noise std, with the probability of that batch size
    (rounded so that neither coefficient is below the true one). theta(e): the delta of the Gaussian pair at
    that distance, averaged; ``eta = theta(0)``.
    """

    name: ClassVar[str] = "R5 bounded domain"
    assumptions_used: ClassVar[tuple[str, ...]] = ("projection_radius",)
    measure: Measure
    curve: Curve
    separations: Array
    chances: Array
    direction: str = "both"
    start: tuple[Array, Array] = field(init=False)

    def __post_init__(self) -> None:
        orders = np.asarray(DEFAULT_ORDERS if self.measure.order is None else [self.measure.order])
        object.__setattr__(self, "start", (orders, self.curve(orders)))

    @property
    def log_contraction(self) -> float:
        """``log eta``, upper bound, at most 0."""
        low = np.maximum(self.chances - 1e-12, 0.0) if len(self.chances) > 1 else self.chances
        gap = float(low @ erfc(self.separations / math.sqrt(8))) * (1 - 1e-12)
        return math.log1p(-min(gap, 1.0)) if gap < 1 else -math.inf

    def rdp(self, steps: int, orders: Array) -> Array:
        """(m,) upper bounds by (a) in nats."""
        known, rdp = self.start
        loss = rdp if orders is known else self.curve(orders)
        if steps == 0:
            return loss
        shrunk = steps * self.log_contraction
        grown = (orders - 1) * loss
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            log_excess = np.where(grown > 30, grown, np.log(np.expm1(np.minimum(grown, 30.0))))
            left = log_excess + shrunk
            value = np.logaddexp(0.0, left) / (orders - 1) * (1 + 1e-12)
        value = np.where(left < -30, np.exp(np.minimum(left, 0.0)) / (orders - 1), value)
        return np.where(np.isfinite(loss), np.minimum(value * (1 + 1e-12), loss), np.inf)

    def mu(self, steps: int) -> None:
        """None: the pair is not Gaussian."""
        return

    def conversion_orders(self, steps: int) -> Array:
        """The orders at which the curve is kept."""
        return self.start[0]

    def value(self, steps: int) -> float:
        """The smaller of (a) and (b)."""
        require(steps >= 0 and steps == int(steps), "steps", steps, "the non-negative integers")
        by_renyi = self._converted(steps)
        if self.measure.delta is None:
            return by_renyi
        return min(by_renyi, self._by_hockey_stick(steps, by_renyi))

    def steps(self, target: float, max_steps: int = MAX_STEPS) -> float:
        """As in :class:`Bound`; (b) is followed once at the target instead of being evaluated at every K."""
        by_renyi = Bound.steps(self, target, max_steps)
        if self.measure.delta is None:
            return by_renyi
        within = max_steps if math.isinf(by_renyi) else int(by_renyi)
        return min(by_renyi, self._steps_by_hockey_stick(target, within))

    def within(self, steps: int, target: float) -> bool:
        """``value(steps) <= target`` by (a) alone; :meth:`steps` adds (b)."""
        return self._converted(steps) <= target

    def delta_at(self, epsilon: ArrayLike, steps: int) -> Array:
        """(b): (n,) upper bounds of delta at ``epsilon`` (n,) after ``steps`` unlearning steps."""
        levels = np.atleast_1d(np.asarray(epsilon, dtype=np.float64))
        delta, done = self._delta_before(levels), 0
        while done < steps:
            stride = min(_stride(done), steps - done)
            delta, done = delta * self._coefficient(levels, delta) ** stride, done + stride
        return delta

    def _converted(self, steps: int) -> float:
        orders = self.start[0]
        if self.measure.delta is None:
            return float(self.rdp(steps, orders)[0])
        return float(rdp_to_epsilon(orders, self.rdp(steps, orders), self.measure.delta))

    def _delta_before(self, levels: Array) -> Array:
        orders, rdp = self.start
        return np.array([float(rdp_to_delta(orders, rdp, level)) for level in levels.tolist()])

    def _coefficient(self, levels: Array, delta: Array) -> Array:
        """(n,) upper bounds of ``theta(e~)``; e~ is rounded down."""
        with np.errstate(divide="ignore"):
            grown = levels + np.log(-np.expm1(-levels)) - np.log(np.maximum(delta, 5e-324))
        shifted = np.logaddexp(0.0, grown) * (1 - 1e-13)
        each = np.asarray(gaussian_delta(self.separations[None, :], shifted[:, None]))
        return np.minimum(each @ self.chances * (1 + 1e-13), 1.0)

    def _steps_by_hockey_stick(self, target: float, max_steps: int) -> float:
        # A little below the target, because value() refines epsilon to 3e-6 and returns the upper end.
        level, allowed = np.array([min(target * (1 - 1e-5), _LARGEST_EPSILON)]), self.measure.delta or 0.0
        delta, done = self._delta_before(level), 0
        while done < max_steps and delta[0] > allowed:
            stride = min(_stride(done), max_steps - done)
            factor = float(self._coefficient(level, delta)[0])
            if factor >= 1:
                return math.inf
            log_needed = (math.log(allowed) - math.log(delta[0])) / math.log(factor) if factor > 0 else 0.0
            if log_needed <= stride:
                # The last power is checked, because the quotient of logarithms may round either way.
                needed = max(1, math.ceil(log_needed * (1 - 1e-12)))
                needed += float((delta * factor**needed)[0]) > allowed
                return done + needed if needed <= stride else math.inf
            delta, done = delta * factor**stride, done + stride
        return done if delta[0] <= allowed else math.inf

    def _by_hockey_stick(self, steps: int, ceiling: float) -> float:
        """Least epsilon on a refined grid with ``delta_at(epsilon, steps) <= delta``; inf above 1,000."""
        delta = self.measure.delta or 0.0
        if self.delta_at(0.0, steps)[0] <= delta:
            return 0.0
        top = min(ceiling, _LARGEST_EPSILON)
        if self.delta_at(top, steps)[0] > delta:
            return math.inf
        low, high = 0.0, top
        for turn in range(_ROUNDS):
            spaced = np.linspace(low, high, _POINTS + 1)
            grid = (
                spaced if turn or low > 0 else np.concatenate([[0.0], np.geomspace(1e-9, 1, _POINTS) * top])
            )
            enough = self.delta_at(grid, steps) <= delta
            # delta falls with epsilon; the last point that fails is the lower end.
            first = int(np.max(np.flatnonzero(~enough), initial=-1)) + 1
            low, high = float(grid[max(first - 1, 0)]), float(grid[min(first, len(grid) - 1)])
        return high


def _stride(done: int) -> int:
    """Steps taken at once after ``done``: theta falls along the way, so its first value bounds them all."""
    return 1 if done < _SINGLE else max(1, done // _GROWTH)


def batch_sizes(num_instances: int, sample_rate: float) -> tuple[Array, Array]:
    """(b,) sizes of a Poisson batch, rounded up to at most 42 values, and (b,) upper bounds of their chances.

    >>> sizes, chances = batch_sizes(3, 0.5)
    >>> sizes.tolist(), chances.round(6).tolist()
    ([0.0, 1.0, 2.0, 3.0], [0.125, 0.375, 0.375, 0.125])
    """
    if sample_rate >= 1:
        return np.array([float(num_instances)]), np.ones(1)
    mean, deviation = num_instances * sample_rate, math.sqrt(num_instances * sample_rate)
    grid = np.ceil(mean + np.linspace(-8, 12, 41) * max(deviation, 1.0))
    sizes = np.unique(np.append(np.clip(grid, 0, num_instances), num_instances))
    if num_instances <= len(sizes) + 1:
        sizes = np.arange(num_instances + 1, dtype=np.float64)
    below = bdtr(sizes, num_instances, sample_rate)
    below[-1] = 1.0
    chances = np.diff(below, prepend=0.0) + 1e-13 * below
    return sizes, np.maximum(chances, 0.0)


def bounded_domain(
    *,
    curve: Curve | None = None,
    diameter: ArrayLike,
    noise_std: float,
    chances: ArrayLike | None = None,
    order: float | None = None,
    delta: float | None = None,
) -> BoundedDomain:
    """R5, both directions, for any loss: one step sends any two points to means at most ``diameter`` apart.

    diameter: number, or (b,) one per batch size with ``chances`` (b,), hidden batches of that probability.
    With parameters projected onto a ball of radius R before the step: ``2 (|1 - lr wd| R + lr b clip /
    denominator)``. curve: P(orders), upper bounds on the loss of training; None when nothing is known of it.
    Dobrushin's contraction of f-divergences (classical); the recursion (b) as in Koloskova et al. 2025
    (model clipping); hidden batches are our derivation, docs/math/unlearning_bounds.md. Raises UsageError.

    >>> known = lambda orders: 0.5 * orders
    >>> bound = bounded_domain(curve=known, diameter=2.0, noise_std=0.5, order=2)
    >>> round(bound.value(60), 7), bound.steps(0.1)
    (0.0999447, 60)
    >>> bounded_domain(diameter=2.0, noise_std=1.0, delta=1e-5).steps(1.0)
    6
    """
    widths = np.atleast_1d(np.asarray(diameter, dtype=np.float64))
    weights = np.ones(1) if chances is None else np.asarray(chances, dtype=np.float64)
    if widths.shape != weights.shape or widths.ndim != 1:
        raise UsageError(
            "PIA071",
            f"diameter has shape {widths.shape}, chances {weights.shape}",
            "Each batch size needs its chance",
            "bounded_domain(diameter=[1.0, 2.0], chances=[0.5, 0.5], ...)",
        )
    require(bool(np.all((widths >= 0) & (widths < np.inf))), "diameter", "negative or infinite", "[0, inf)")
    whole = bool(np.all(weights >= 0)) and abs(float(weights.sum()) - 1) < 1e-9
    require(whole, "chances", "not a distribution", "non-negative numbers with sum 1")
    require(0 <= noise_std < math.inf, "noise_std", noise_std, "[0, inf)")
    with np.errstate(divide="ignore", invalid="ignore"):
        separations = np.where(widths > 0, np.nextafter(widths / noise_std, np.inf), 0.0)
    return BoundedDomain(
        measure=Measure(order=order, delta=delta),
        curve=curve if curve is not None else lambda orders: np.full(len(orders), np.inf),
        separations=separations,
        chances=weights,
    )
