"""R3: contractive retain maps, the forget set in every step: a Gaussian pair, by shifted interpolation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from per_instance_accountant.unlearning.bounds.interface import Bound, Measure, Tail
from per_instance_accountant.unlearning.bounds.schedule import Schedule, schedule

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contractive(Bound):
    """The taut string under the arrival curve ``F(V)``: cumulative shift against cumulative noise variance.

    ``mu^2`` is the energy (integral of the squared slope) of the greatest convex minorant of ``F``.
    ``knots``: (k, 3) vertices ``(V, F, energy up to V)`` of the part before the last training step, ``end``:
    ``(V_T, F_T)``. The unlearning steps move the end point to ``(V_T + tau_K, F_T)``; a later end never
    raises the energy.
    """

    name: ClassVar[str] = "R3 contractive"
    assumptions_used: ClassVar[tuple[str, ...]] = ("smoothness", "convexity", "clipping_never_binds")
    measure: Measure
    knots: Array
    end: tuple[float, float]
    tail: Tail
    inflation: float
    direction: str = "both"

    def mu(self, steps: int) -> float:
        """Gaussian-DP parameter (upper bound) after ``steps`` unlearning steps; inf if no noise can absorb a
        shift."""
        end_v, end_f = self.end
        if end_f == 0:
            return 0.0
        if not (math.isfinite(end_v) and math.isfinite(end_f)):
            return math.inf
        run = (end_v - self.knots[:, 0]) + self.tail.inverse_noise(steps)
        rise = end_f - self.knots[:, 1]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            slope = np.where(run > 0, rise / run, np.where(rise > 0, np.inf, 0.0))
            last = int(np.argmax(slope))
            square = self.knots[last, 2] + slope[last] * rise[last]
        return math.sqrt(square) * self.inflation if square < math.inf else math.inf

    def rdp(self, steps: int, orders: Array) -> Array:
        """(m,) ``order * mu^2 / 2``."""
        return orders * (self.mu(steps) ** 2 / 2)

    def conversion_orders(self, steps: int) -> Array:
        """Not used: the pair is Gaussian, so epsilon is exact."""
        return np.array([2.0])


def _geometric(x: float, n: int) -> float:
    """``1 + x + ... + x^(n-1)`` without cancellation near 1."""
    if x == 1 or x == 0:
        return float(n if x else 1)
    log = math.log(x)
    return math.expm1(n * log) / math.expm1(log) if n * log < 700 else math.inf


def _knots(variance: Array, arrived: Array) -> Array:
    """Lower convex hull of the points (V_j, F_j), j < T, from the origin, with the energy spent up to
    each."""
    hull: list[tuple[float, float]] = []
    for v, f in zip(variance.tolist(), arrived.tolist(), strict=True):
        if hull and v <= hull[-1][0]:
            continue  # No noise since the last point: the lower point is the binding one.
        while len(hull) >= 2 and _not_below(hull[-2], hull[-1], (v, f)):
            hull.pop()
        hull.append((v, f))
    vertices = np.array(hull)
    run, rise = np.diff(vertices, axis=0).T if len(hull) > 1 else (np.ones(0), np.ones(0))
    energy = np.concatenate([[0.0], np.cumsum(rise**2 / run)])
    return np.column_stack([vertices, energy])


def _not_below(first: tuple[float, float], middle: tuple[float, float], last: tuple[float, float]) -> bool:
    """Whether ``middle`` lies on or above the chord from ``first`` to ``last``."""
    rise = (middle[1] - first[1]) * (last[0] - first[0])
    return rise >= (last[1] - first[1]) * (middle[0] - first[0])


def contractive_from(plan: Schedule, measure: Measure) -> Contractive:
    """R3 for a schedule: closed form when it is constant and contracts, taut string otherwise. Sampling is
    ignored (all drawn)."""
    steps = len(plan.contraction)
    if plan.is_constant and plan.contraction[0] <= 1:
        c, noise, shift = float(plan.contraction[0]), float(plan.noise_std[0]), float(plan.shifts[0].sum())
        end = (noise**2 * _geometric(c * c, steps), shift * _geometric(c, steps))
        # F is concave in V for a factor up to 1, so the minorant is the chord from the origin to the end.
        # Beyond 1 it is convex, and the chord would be too small.
        return Contractive(
            measure=measure, knots=np.zeros((1, 3)), end=end, tail=plan.tail, inflation=1 + 1e-12
        )
    variance = np.concatenate([[0.0], np.cumsum(plan.variances())])
    arrived = np.concatenate([[0.0], np.cumsum(plan.arrivals().sum(axis=1))])
    totals = (float(variance[-1]), float(arrived[-1]))
    knots = _knots(variance[:-1], arrived[:-1]) if np.all(np.isfinite(totals)) else np.zeros((1, 3))
    return Contractive(
        measure=measure, knots=knots, end=totals, tail=plan.tail, inflation=1 + 1e-12 + 1e-15 * steps
    )


def contractive(
    *,
    sensitivity: ArrayLike,
    noise_std: ArrayLike,
    contraction: ArrayLike,
    training_steps: int | None = None,
    order: float | None = None,
    delta: float | None = None,
    unlearning_noise_std: float | None = None,
    unlearning_contraction: float | None = None,
) -> Contractive:
    """R3: both directions, whatever the sampling. Arguments as in :func:`schedule`; order or delta as in
    :class:`Measure`.

    ``mu_K = delta c^K geom(c, T) / (s sqrt(geom(c^2, T + K)))`` for constants; equality for quadratics with
    Hessian cI. Source: the shifted interpolation of Bok, Su and Altschuler 2024; schedules and the unlearning
    steps are our derivation, docs/math/unlearning_bounds.md.

    >>> bound = contractive(sensitivity=0.01, noise_std=0.05, contraction=0.9, training_steps=1000, order=8)
    >>> round(bound.mu(10), 8), round(bound.value(10), 5)
    (0.30397082, 0.36959)
    >>> same = {"sensitivity": 0.01, "noise_std": 0.05, "contraction": 0.9, "training_steps": 1000}
    >>> contractive(**same, delta=1e-5).steps(0.5)
    18
    """
    plan = schedule(
        sensitivity=sensitivity,
        noise_std=noise_std,
        contraction=contraction,
        training_steps=training_steps,
        unlearning_noise_std=unlearning_noise_std,
        unlearning_contraction=unlearning_contraction,
    )
    return contractive_from(plan, Measure(order=order, delta=delta))
