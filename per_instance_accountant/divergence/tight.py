"""Tight (epsilon, delta) of runs of Poisson-sampled Gaussian steps with heterogeneous sensitivities.

With M(s) = E exp(s X), X the privacy loss of the whole run, c > 0 and any epsilon,

    delta(epsilon) = 1 / (2 pi i) int_{Re s = c} M(s) exp(-epsilon s) / (s (s + 1)) ds,   log M =
    sum_j counts_j log phi_j.

The trapezoidal rule errs upwards; what its truncation and the tables may lack is bounded and added
(docs/math/tight_epsilon.md). So every evaluation is a certified upper bound of delta, and an epsilon
is returned only after the bound at that very epsilon was seen not to exceed the delta asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from per_instance_accountant.divergence.contour import UNIT
from per_instance_accountant.divergence.conversions import rdp_to_delta, rdp_to_epsilon
from per_instance_accountant.divergence.gaussian import gaussian_delta, gaussian_epsilon
from per_instance_accountant.divergence.jumps import is_rare, parted_deltas, parted_epsilons
from per_instance_accountant.divergence.orders import (
    DEFAULT_ORDERS,
    as_float_array,
    as_nonnegative,
    as_probability,
    bad_argument,
)
from per_instance_accountant.divergence.sampled_gaussian import sampled_gaussian_rdp
from per_instance_accountant.divergence.tails import (
    Known,
    Levels,
    largest_loss,
    line_deltas,
    line_epsilons,
)

Floats = NDArray[np.float64]

_Method = Callable[[Floats, Levels, Floats, Floats, bool], Known]

_ORDERS: Final = np.array(DEFAULT_ORDERS)
_CHUNK: Final = 4096
_SMALLEST_RATE: Final = 1e-150
_LARGEST_RATIO: Final = 60.0
"""Runs with a larger one keep the conversion of their RDP."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Runs:
    """Checked arguments: only levels that cost something. counts (n, k), rates (k,), ratios (k,)."""

    counts: Floats
    rates: Floats
    ratios: Floats
    infinite: NDArray[np.bool_]
    """(n,) runs with a step of infinite ratio."""

    @property
    def mu(self) -> Floats:
        """(n,) Gaussian-DP parameter without sampling, rounded up: an upper bound for every rate."""
        top = self.ratios.max(initial=np.finfo(np.float64).tiny)
        # Squares of tiny ratios would underflow.
        scaled = np.sqrt(self.counts @ (self.ratios / top) ** 2) * (1 + (self.ratios.size + 8) * UNIT)
        return np.asarray(np.nextafter(scaled * top, np.inf))


def _checked(sample_rate: ArrayLike, ratios: ArrayLike, counts: ArrayLike) -> tuple[_Runs, bool]:
    r = np.atleast_1d(as_nonnegative("ratios", ratios, 1))
    rates = as_float_array("sample_rate", sample_rate, 1)
    if not ((rates >= 0) & (rates <= 1)).all():
        raise bad_argument("sample_rate", "has entries outside the range", "[0, 1]")
    if rates.ndim == 1 and rates.shape != r.shape:
        raise bad_argument("sample_rate", f"has shape {rates.shape}", f"a number or {r.shape}", code="PIA071")
    n = as_nonnegative("counts", counts, 2)
    if n.ndim == 0 or n.shape[-1] != r.size:
        raise bad_argument("counts", f"has shape {n.shape}", f"(n, {r.size}) or ({r.size},)", code="PIA071")
    if not ((n == np.floor(n)) & (n < 2.0**53)).all():
        raise bad_argument("counts", "has entries that are not whole", "whole numbers")
    single, n, rates = n.ndim == 1, np.atleast_2d(n), np.broadcast_to(rates, r.shape)
    costly = (r > 0) & (rates > 0)
    infinite = (n[:, costly & np.isinf(r)] > 0).any(axis=1)
    used = costly & np.isfinite(r) & (n > 0).any(axis=0)
    # The loss grows with the rate, and 1 / rate must be representable.
    raised = np.maximum(rates[used], _SMALLEST_RATE)
    return _Runs(counts=n[:, used], rates=raised, ratios=r[used], infinite=np.asarray(infinite)), single


@np.errstate(all="ignore")
def sampled_gaussian_epsilon(
    sample_rate: ArrayLike, ratios: ArrayLike, counts: ArrayLike, delta: float
) -> float | Floats:
    """Tight upper bound of epsilon at ``delta`` for many runs of sampled Gaussian steps, both
    directions.

    sample_rate: in [0, 1], one number or (k,). ratios: (k,) sensitivity / noise std in [0, inf].
    counts: (n, k) or (k,), whole numbers: run i takes ``counts[i, j]`` steps at level j, in any
    order. Returns (n,) or a float. Never below the exact value of either direction (add, remove),
    never above the conversion of the run's RDP; usually within 2e-5 of the exact value. Exact (Balle
    and Wang 2018) where every step is unsampled. Our derivation, docs/math/tight_epsilon.md. Raises
    UsageError PIA070 or PIA071.

    >>> round(sampled_gaussian_epsilon(0.02, [0.5, 1.0], [600, 400], 1e-5), 4)
    2.7178
    """
    runs, single = _checked(sample_rate, ratios, counts)
    probability = as_probability(delta)
    costs = runs.infinite | (runs.counts > 0).any(axis=1)
    if probability in (0.0, 1.0) or not costs.any():
        result = np.where(costs & (probability < 1), np.inf, 0.0)
    elif (runs.rates == 1).all():
        result = np.asarray(gaussian_epsilon(runs.mu, probability))
    else:
        log_delta = math.log(probability)
        best = _by_rdp(runs, lambda rdp: rdp_to_epsilon(_ORDERS, rdp, probability))
        best = np.minimum(best, gaussian_epsilon(runs.mu, probability))

        def parted(counts: Floats, levels: Levels, start: Floats, floor: Floats, add: bool) -> Known:
            return parted_epsilons(counts, levels, log_delta, floor, add=add)

        def whole(counts: Floats, levels: Levels, start: Floats, floor: Floats, add: bool) -> Known:
            return line_epsilons(counts, levels, start, log_delta, floor, add=add)

        result = _improved(runs, best, (parted, whole), None)
    if probability < 1:
        result = np.where(runs.infinite, np.inf, np.where(costs, result, 0.0))
    return float(result[0]) if single else result


@np.errstate(all="ignore")
def sampled_gaussian_delta(
    sample_rate: ArrayLike, ratios: ArrayLike, counts: ArrayLike, epsilon: float
) -> float | Floats:
    """Tight upper bound of delta at ``epsilon`` in [0, inf], in [0, 1]; see
    :func:`sampled_gaussian_epsilon`.

    >>> round(sampled_gaussian_delta(0.02, [0.5, 1.0], [600, 400], 2.717754), 8)
    1e-05
    """
    runs, single = _checked(sample_rate, ratios, counts)
    target = as_nonnegative("epsilon", epsilon, 0).item()
    costs = (runs.counts > 0).any(axis=1)
    if target == np.inf or not costs.any():
        result = np.zeros(len(runs.counts))
    elif (runs.rates == 1).all():
        result = np.asarray(gaussian_delta(runs.mu, target))
    else:
        best = _by_rdp(runs, lambda rdp: rdp_to_delta(_ORDERS, rdp, target))
        best = np.minimum(best, gaussian_delta(runs.mu, target))

        def parted(counts: Floats, levels: Levels, start: Floats, floor: Floats, add: bool) -> Known:
            return parted_deltas(counts, levels, target, floor, add=add)

        def whole(counts: Floats, levels: Levels, start: Floats, floor: Floats, add: bool) -> Known:
            return line_deltas(counts, levels, start, target, floor, add=add)

        result = _improved(runs, best, (parted, whole), target)
    result = np.where(runs.infinite, 1.0, np.where(costs, result, 0.0))
    return float(result[0]) if single else result


def _by_rdp(runs: _Runs, convert: Callable[[Floats], float | Floats]) -> Floats:
    """What the RDP of the runs implies, (n,)."""
    table = _rdp_table(runs.rates.tobytes(), runs.ratios.tobytes())
    parts = [runs.counts[start : start + _CHUNK] @ table for start in range(0, len(runs.counts), _CHUNK)]
    return np.concatenate([np.asarray(convert(np.where(part < 1e299, part, np.inf))) for part in parts])


@lru_cache(maxsize=8)
def _rdp_table(rates: bytes, ratios: bytes) -> Floats:
    """(k, orders): Renyi divergences of one step at each level."""
    q, a = np.frombuffer(rates), np.frombuffer(ratios)
    table = np.empty((a.size, _ORDERS.size))
    for rate in np.unique(q):
        table[q == rate] = sampled_gaussian_rdp(float(rate), a[q == rate], _ORDERS)
    table *= 1 + (a.size + 8) * UNIT
    # A level whose RDP overflows silences an order for the runs that use it, not for the others.
    return np.where(np.isfinite(table), table, 1e300)


def _improved(runs: _Runs, best: Floats, methods: tuple[_Method, _Method], epsilon: float | None) -> Floats:
    """The smaller of ``best`` and what the contours certify, (n,)."""
    result, small = best.copy(), runs.ratios <= _LARGEST_RATIO
    strange = runs.infinite | (runs.counts[:, ~small] > 0).any(axis=1)
    todo, levels = np.flatnonzero((best > 0) & ~strange), (runs.rates[small], runs.ratios[small])
    if todo.size:
        for part in np.array_split(todo, math.ceil(todo.size / _CHUNK)):
            counts = runs.counts[np.ix_(part, small)]
            certified = _both_directions(counts, levels, best[part], methods, epsilon)
            result[part] = np.minimum(result[part], certified)
    return result


def _both_directions(
    counts: Floats,
    levels: Levels,
    start: Floats,
    methods: tuple[_Method, _Method],
    epsilon: float | None,
) -> Floats:
    """(n,) certified values, the larger of both directions. epsilon: at which deltas are asked."""
    parted, whole = methods
    rare, floor = is_rare(counts, levels), np.zeros(len(counts))
    for add in (False, True):
        least = floor if epsilon is None else np.full(len(counts), epsilon)
        # No loss of "add" exceeds the largest one: where that is no more than this, nothing is computed.
        asked = largest_loss(counts, levels[0]) > least if add else np.full(len(counts), True)
        value, tight = np.where(asked, np.inf, 0.0), ~asked
        for method, of_rare, of_others in ((parted, True, False), (whole, True, True), (parted, False, True)):
            rows = np.flatnonzero(~tight & np.where(rare, of_rare, of_others))
            if rows.size:
                found, enough = method(counts[rows], levels, start[rows], floor[rows], add)
                value[rows], tight[rows] = np.minimum(value[rows], found), enough
        floor = np.maximum(floor, value)
    return floor
