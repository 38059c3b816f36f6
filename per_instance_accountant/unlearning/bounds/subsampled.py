"""R4: contractive retain maps, Poisson-sampled training: both directions with amplification by hidden
inclusions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from per_instance_accountant.unlearning.bounds.hidden_sizes import HiddenSizes, hidden_sizes
from per_instance_accountant.unlearning.bounds.inclusion import Inclusions
from per_instance_accountant.unlearning.bounds.interface import Bound, Measure
from per_instance_accountant.unlearning.bounds.schedule import Schedule, schedule

Array = NDArray[np.float64]

_NODES: Final = 512
_DECISIONS: Final = 6_000
_EXACT_STEPS: Final = 256
_NEGLIGIBLE: Final = 1e-4
_MOSTLY: Final = 3.0
_ORDERS: Final = 1 + np.geomspace(0.25, 255.0, 20)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subsampled(Bound):
    """``D_a <= log E_I exp(a (a-1) mu(I)^2 / 2) / (a-1)`` over the hidden inclusions I, by joint convexity.

    (a) all shift is absorbed by the noise of the unlearning steps; (b) every included shift is absorbed
    evenly from its own step on. Both are valid for every contractive map; the value is the smaller one.
    """

    name: ClassVar[str] = "R4 subsampled"
    assumptions_used: ClassVar[tuple[str, ...]] = ("smoothness", "convexity", "clipping_never_binds")
    measure: Measure
    plan: Schedule
    arrivals: Inclusions
    sizes: HiddenSizes | None
    direction: str = "both"

    def rdp(self, steps: int, orders: Array) -> Array:
        """(m,) upper bounds in nats, the smaller of (a) and (b) at every order."""
        tau = self.plan.tail.inverse_noise(steps)
        spread = [spread_evenly(self.plan, tau, a) for a in orders.tolist()]
        return np.minimum(held_until_the_end(self.arrivals, tau, orders), spread)

    def mu(self, steps: int) -> None:
        """None: a mixture of Gaussians over the inclusions."""
        return

    def conversion_orders(self, steps: int) -> Array:
        """The order at which (a) alone gives the smallest epsilon and its neighbours; else a coarse grid."""
        tau = self.plan.tail.inverse_noise(steps)
        if tau == 0 or self.measure.delta is None:
            return _ORDERS[4:17:3]
        held = held_until_the_end(self.arrivals, tau, _ORDERS)
        log_delta = math.log(self.measure.delta)
        epsilon = held + np.log1p(-1 / _ORDERS) - (log_delta + np.log(_ORDERS)) / (_ORDERS - 1)
        best = int(np.argmin(epsilon))
        return _ORDERS[max(0, best - 1) : best + 2]

    def value(self, steps: int) -> float:
        """Upper bound after ``steps`` unlearning steps; at a delta also by (c), the mixture itself."""
        by_moments = self._by_moments(steps)
        if self.sizes is None or self.measure.delta is None:
            return by_moments
        return min(by_moments, self.sizes.epsilon_at(self.measure.delta, self.plan.tail.inverse_noise(steps)))

    def within(self, steps: int, target: float) -> bool:
        """``value(steps) <= target``, without (b) where (a) or (c) suffices."""
        tau = self.plan.tail.inverse_noise(steps)
        if self.measure.order is not None:
            quick = float(held_until_the_end(self.arrivals, tau, np.array([self.measure.order]))[0]) <= target
        else:
            # A little below the target, because value() finds epsilon by bisection and returns the upper end.
            delta = self.measure.delta or 0.0
            quick = self.sizes is not None and self.sizes.delta_at(target * (1 - 1e-9), tau) <= delta
        return quick or self._by_moments(steps) <= target

    def _by_moments(self, steps: int) -> float:
        """The smaller of (a) and (b); at a delta left out when unlearning noise prevails, for (c)."""
        tau = self.plan.tail.inverse_noise(steps)
        if self.sizes is not None and tau > _MOSTLY * float(self.plan.variances().sum()):
            return math.inf
        return Bound.value(self, steps)


def held_until_the_end(arrivals: Inclusions, tau: float, orders: Array) -> Array:
    """(a), (m,): ``mu(I) = sum_t I_t e_t / sqrt(tau_K)`` with arrivals ``e_t``; inf without noise."""
    if not len(arrivals.weights):
        return np.zeros(len(orders))
    if tau == 0 or not np.all(np.isfinite(arrivals.weights)):
        return np.full(len(orders), np.inf)
    return np.array([arrivals.log_square_moment(a * (a - 1) / 2 / tau) / (a - 1) for a in orders.tolist()])


def spread_evenly(plan: Schedule, tau: float, order: float) -> float:
    """(b): ``sum_t var_t R_t^2`` with ``R_t = sum_{j<=t} I_j e_j / (V_N - V_{j-1})``, by a backward
    recursion.

    ``L_t(r)``, the log-moment of the cost after step t, is convex in r, so values between grid nodes are read
    off the chord, which is above. inf when the run is too long for the recursion (6,000 steps that have not
    faded).
    """
    arrivals, variances = plan.arrivals(), plan.variances()
    if not np.any(arrivals):
        return 0.0
    left = np.cumsum(variances[::-1])[::-1] + tau
    scale = math.sqrt(left[0])
    reachable = not np.any((left == 0) & (arrivals.sum(axis=1) > 0))
    if not (reachable and 0 < scale < math.inf and np.all(np.isfinite(arrivals))):
        return math.inf
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        slopes = np.where(arrivals > 0, arrivals * scale / left[:, None], 0.0)
    variances, tau = variances / scale**2, tau / scale**2
    start = _first_step(arrivals, plan.rates)
    if slopes[start:].size > _DECISIONS:
        # The cost is supermodular in the inclusions, so drawing the members of a step together bounds it.
        slopes = slopes.sum(axis=1, keepdims=True)
    if slopes[start:].size > _DECISIONS or not np.all(np.isfinite(slopes)):
        return math.inf
    factor = order * (order - 1) / 2
    earlier = np.cumsum(slopes[:start].sum(axis=1))
    before = factor * float(variances[:start] @ earlier**2)
    offset = float(earlier[-1]) if start else 0.0
    total = before + _recursion(slopes[start:], variances[start:], plan.rates[start:], tau, factor, offset)
    rounding = 1 + 1e-12 + 1e-14 * slopes.size
    return total * rounding / (order - 1) if total < math.inf else math.inf


def _first_step(arrivals: Array, rates: Array) -> int:
    """Steps before this one are treated as if the forget set was always drawn: they have faded to a
    negligible share."""
    if len(rates) <= _EXACT_STEPS:
        return 0
    drawn = np.cumsum(arrivals.sum(axis=1))
    return int(np.searchsorted(drawn, _NEGLIGIBLE * float(rates @ arrivals.sum(axis=1)), side="right"))


def _recursion(
    slopes: Array, variances: Array, rates: Array, tau: float, factor: float, offset: float
) -> float:
    """``L_0(offset)``: backward over steps, and inside a step over the members' independent decisions."""
    top = (offset + float(slopes.sum())) * (1 + 1e-9)
    grid = np.linspace(0.0, top, _NODES)
    square = factor * grid * grid
    value = square * tau
    sure = _Quadratic(0.0, 0.0, tau)
    for shifts, variance, rate in zip(
        slopes[::-1], variances[::-1].tolist(), rates[::-1].tolist(), strict=True
    ):
        value += square * variance
        sure = sure.plus(variance)
        for shift in shifts[shifts > 0].tolist():
            shifted = _read_ahead(value, grid, shift, sure, factor)
            sure = sure.after(shift)
            value = _mixture(value, shifted, rate)
    cell = min(int(offset / top * (_NODES - 1)), _NODES - 2)
    share = (offset - grid[cell]) / (grid[cell + 1] - grid[cell])
    return float((1 - share) * value[cell] + share * value[cell + 1])


@dataclass(frozen=True, slots=True)
class _Quadratic:
    """``a + b r + c r^2``: the cost (over ``factor``) from r on if the forget set is drawn at every later
    step."""

    a: float
    b: float
    c: float

    def plus(self, variance: float) -> _Quadratic:
        return _Quadratic(self.a, self.b, self.c + variance)

    def after(self, shift: float) -> _Quadratic:
        return _Quadratic(self.a + (self.b + self.c * shift) * shift, self.b + 2 * self.c * shift, self.c)

    def at(self, r: Array) -> Array:
        return self.a + (self.b + self.c * r) * r


def _read_ahead(value: Array, grid: Array, shift: float, sure: _Quadratic, factor: float) -> Array:
    """Upper bound of ``L(r + shift)`` at the nodes: the chord, and beyond the grid the cost of being drawn
    always."""
    width = grid[1]
    cells = int(shift / width)
    share = shift / width - cells
    inside = max(0, len(grid) - cells - 1)
    shifted = np.empty_like(value)
    shifted[:inside] = value[cells : cells + inside] + share * (
        value[cells + 1 : cells + 1 + inside] - value[cells : cells + inside]
    )
    shifted[inside:] = factor * sure.at(grid[inside:] + shift)
    return shifted


def _mixture(out: Array, drawn: Array, rate: float) -> Array:
    """``log((1 - q) e^out + q e^drawn)`` with relative accuracy for tiny arguments; drawn >= out."""
    if rate >= 1 or rate <= 0:
        return drawn if rate > 0 else out
    gap = np.maximum(drawn - out, 0.0)
    near = np.log1p(rate * np.expm1(np.minimum(gap, 500.0)))
    if gap.max() <= 500:
        return out + near
    return out + np.where(gap > 500, np.logaddexp(math.log1p(-rate), gap + math.log(rate)), near)


def subsampled(
    *,
    sensitivity: ArrayLike,
    noise_std: ArrayLike,
    contraction: ArrayLike,
    sample_rate: ArrayLike,
    training_steps: int | None = None,
    order: float | None = None,
    delta: float | None = None,
    unlearning_noise_std: float | None = None,
    unlearning_contraction: float | None = None,
) -> Subsampled:
    """R4: both directions, Poisson sampling at ``sample_rate`` with coins that stay hidden. Arguments as in
    :func:`schedule`.

    sensitivity (T, f): one column per member of a forget set, each drawn independently. Our derivation,
    docs/math/unlearning_bounds.md.

    >>> subsampled(
    ...     sensitivity=0.5, noise_std=1.0, contraction=0.98, sample_rate=0.02, training_steps=1000, order=8
    ... ).steps(0.1)
    18
    """
    plan = schedule(
        sensitivity=sensitivity,
        noise_std=noise_std,
        contraction=contraction,
        training_steps=training_steps,
        sample_rate=sample_rate,
        unlearning_noise_std=unlearning_noise_std,
        unlearning_contraction=unlearning_contraction,
    )
    return subsampled_from(plan, Measure(order=order, delta=delta))


def subsampled_from(plan: Schedule, measure: Measure) -> Subsampled:
    """R4 for a schedule."""
    arrivals = plan.arrivals()
    rates = np.broadcast_to(plan.rates[:, None], arrivals.shape)
    coins = Inclusions.of(arrivals.ravel(), rates.ravel())
    sizes = None if measure.delta is None else hidden_sizes(coins, measure.delta)
    return Subsampled(measure=measure, plan=plan, arrivals=coins, sizes=sizes)
