"""Tight epsilon where few draws are expected or losses are small: the search for cuts and lines.

In a run of rare sampling most steps lose next to nothing, and a step may lose thousands of times as much.
No single tilt suits both: small losses need a large abscissa, where jumps would swamp them, and a small one
drowns the jumps in the near-atom of all other runs. So losses are parted by size (:mod:`.parted`). Where
they are cut and which lines are used decides how tight the bound is, never whether it holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr, ndtr

from per_instance_accountant.divergence.dots import place_of, representable
from per_instance_accountant.divergence.parted import Runs, Total, enough
from per_instance_accountant.divergence.tails import Known, Levels, invert, raised_delta

Floats = NDArray[np.float64]

_EXPECTED_DRAWS: Final = 1.5
_SQUARED_RATES: Final = 0.005
_OCTAVES: Final = np.arange(-22, 10)
_TOPS: Final[Floats] = np.exp2(_OCTAVES)
"""Losses at which parts are cut: 2e-7 to 512. Few of them, so that few tables are made."""
_GRID: Final = 2.0 ** (np.arange(-88, 37) / 4)
"""Epsilons at which the first guess is looked up."""
_BEYOND_TOP: Final = 1e-5
"""What may count as an infinite loss, relative to delta."""
_AT_ONCE: Final = 1 << 20
"""Amplitudes held at once."""
_ATTEMPTS: Final = 6
_LEAST: Final = -690.0
"""Smallest logarithm of delta that is aimed at."""
_ALIAS: Final = math.log(1e-4)
_NEAR: Final = 0.15
"""Lines are taken for good ones if they were chosen for an epsilon so near, relatively."""

_Solved = tuple[Floats, Floats, Floats, NDArray[np.bool_]]
"""(n,) each: certified value or inf, epsilon, log delta, and whether what was added raised it too much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Epsilon:
    """Which epsilon belongs to a given delta?"""

    log_delta: float

    def guess(self, logs: Floats, floor: Floats) -> tuple[Floats, Floats]:
        """Epsilon and log delta to begin with, (n,); logs: of delta, on the grid."""
        at = _GRID[np.clip((logs > self.log_delta).sum(axis=1), 0, _GRID.size - 1)]
        return np.where(floor > 0, floor, at), np.full(at.size, self.log_delta)

    def refine(self, runs: Runs, at: Floats, goal: Floats) -> tuple[Floats, Floats]:
        return np.minimum(at, 0.9 * np.maximum(runs.chernoff_epsilon(goal), _GRID[0])), goal

    def solve(self, total: Total, at: Floats, goal: Floats, floor: Floats) -> _Solved:
        epsilon = invert(total, 4 * at, floor, self.log_delta)[0]
        known = np.where(np.isfinite(epsilon), epsilon, 2 * at)
        _, slope, share = total.at(known)
        return epsilon, known, goal, ~(_raised(total, slope, share) <= enough(known))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Delta:
    """Which delta belongs to a given epsilon?"""

    epsilon: float

    def guess(self, logs: Floats, floor: Floats) -> tuple[Floats, Floats]:
        column = int(np.searchsorted(_GRID, self.epsilon).clip(0, _GRID.size - 1))
        return np.full(len(logs), max(self.epsilon, _GRID[0])), np.clip(logs[:, column], _LEAST, 0.0)

    def refine(self, runs: Runs, at: Floats, goal: Floats) -> tuple[Floats, Floats]:
        highest = np.clip(runs.chernoff_delta(at), _LEAST, 0.0)
        return at, np.clip(goal, highest - 4, highest)

    def solve(self, total: Total, at: Floats, goal: Floats, floor: Floats) -> _Solved:
        log_value, slope, share = total.at(np.full(at.size, self.epsilon))
        raised = _raised(total, slope, share)
        loose = ~(raised <= enough(at)) & ~(raised * -slope <= 1e-3)
        return raised_delta(log_value), at, np.clip(log_value, _LEAST, 0.0), loose


def _raised(total: Total, slope: Floats, share: Floats) -> Floats:
    """By how much what was added to delta, and the Gaussian steps, raised epsilon."""
    added = -np.log1p(-np.minimum(share, 1 - 1e-9)) / np.maximum(-slope, 1e-9)
    return np.asarray(added + total.shift(slope))


def parted_epsilons(counts: Floats, levels: Levels, log_delta: float, floor: Floats, *, add: bool) -> Known:
    """(n,) certified epsilons of one direction, inf where none was found. floor: (n,) what need not be
    undercut."""
    return _searched(counts, levels, floor, _Epsilon(log_delta=log_delta), add)


def parted_deltas(counts: Floats, levels: Levels, epsilon: float, floor: Floats, *, add: bool) -> Known:
    """The same for deltas at one epsilon."""
    return _searched(counts, levels, floor, _Delta(epsilon=epsilon), add)


def is_rare(counts: Floats, levels: Levels) -> NDArray[np.bool_]:
    """(n,) whether few draws are expected, or losses are small: parting them is the first thing to try."""
    rates = levels[0]
    return np.asarray((counts @ rates < _EXPECTED_DRAWS) | (counts @ rates**2 < _SQUARED_RATES))


@np.errstate(all="ignore")
def _searched(counts: Floats, levels: Levels, floor: Floats, question: _Epsilon | _Delta, add: bool) -> Known:
    """Choose cuts and lines by the epsilons and deltas known so far, solve, and again until they fit."""
    rates, ratios = levels
    strange = np.array([not representable(q, a, 1.0) for q, a in zip(rates, ratios, strict=True)])
    rows = np.flatnonzero(counts @ strange == 0)
    at, goal = question.guess(_guesses(counts, levels, add), floor)
    result, finer = np.full(len(counts), np.inf), np.zeros(len(counts), dtype=np.int64)
    settled = np.zeros(len(counts), dtype=np.bool_)
    for attempt in range(_ATTEMPTS):
        if not rows.size:
            break
        cuts = _cuts(counts[rows], levels, at[rows], goal[rows], add)
        for key, chosen in _grouped(cuts, rows):
            low, top = (2.0**octave for octave in key)
            runs = Runs(counts[chosen], levels, low, top, add=add)
            if attempt == 0:
                at[chosen], goal[chosen] = question.refine(runs, at[chosen], goal[chosen])
            plan = runs.lines(at[chosen], goal[chosen], finer[chosen])
            for lines, inner in _grouped(plan, np.arange(chosen.size)):
                pieces = math.ceil(inner.size * max(1, *lines[[1, 4]]) / _AT_ONCE)
                for piece in np.array_split(inner, pieces):
                    part = chosen[piece]
                    total = runs.total(piece, lines, at[part], goal[part])
                    found = question.solve(total, at[part], goal[part], floor[part])
                    value, epsilon, log_delta, loose = found
                    result[part] = np.minimum(result[part], value)
                    near = np.abs(np.log(epsilon / at[part])) < _NEAR
                    near &= np.abs(log_delta - goal[part]) < 1
                    aliased = ~(total.log_alias(epsilon) <= log_delta + _ALIAS)
                    settled[part] = near & ~loose & ~aliased | (value <= floor[part])
                    settled[part] &= np.isfinite(value)
                    finer[part] += 2 * (near & loose & ~aliased)
                    at[part], goal[part] = np.where(aliased, 0.6, 1.0) * epsilon, log_delta
        rows = rows[~settled[rows] & (finer[rows] < 6)]
    return result, settled


def _grouped(keys: Floats, rows: NDArray[np.intp]) -> list[tuple[Floats, NDArray[np.intp]]]:
    """Rows with equal keys together."""
    kinds, place = np.unique(keys, axis=0, return_inverse=True)
    order = np.argsort(place.ravel(), kind="stable")
    ends = np.cumsum(np.bincount(place.ravel()))[:-1]
    return [(kind, rows[part]) for kind, part in zip(kinds, np.split(order, ends), strict=True)]


def _cuts(counts: Floats, levels: Levels, at: Floats, goal: Floats, add: bool) -> Floats:
    """(n, 2) octaves of the two cuts."""
    if add:
        return np.zeros((len(counts), 2))
    mass = counts @ _masses_beyond(levels[0].tobytes(), levels[1].tobytes())
    top = (mass > _BEYOND_TOP * np.exp(goal)[:, None]).sum(axis=1).clip(0, _TOPS.size - 1)
    low = np.searchsorted(_TOPS, at / 4).clip(0, top)
    return np.stack([_OCTAVES[low], _OCTAVES[top]], axis=1).astype(np.float64)


@lru_cache(maxsize=8)
def _masses_beyond(rates: bytes, ratios: bytes) -> Floats:
    """(k, tops) mass of one step with a loss beyond each cut; an estimate."""
    q, a = np.frombuffer(rates)[:, None], np.frombuffer(ratios)[:, None]
    z = place_of(_TOPS, q, a)
    return np.asarray((1 - q) * ndtr(-z) + q * ndtr(a - z))


def _guesses(counts: Floats, levels: Levels, add: bool) -> Floats:
    """(n, grid) log delta if the largest single step, or a normal law of the small ones, decided alone."""
    single, square = _single_steps(levels[0].tobytes(), levels[1].tobytes(), add)
    normal = -0.5 * _GRID**2 / (counts @ square) - 1
    if add:
        largest = counts @ -np.log1p(-levels[0])
        return np.where(largest[:, None] * 0.99 < _GRID, -np.inf, normal)
    return np.maximum(np.log(counts @ single), np.where(np.isnan(normal), -np.inf, normal))


@lru_cache(maxsize=8)
def _single_steps(rates: bytes, ratios: bytes, add: bool) -> tuple[Floats, Floats]:
    """(k, grid) delta of one step at each level, and its mean squared loss up to half of epsilon; about."""
    q, a = np.frombuffer(rates)[:, None], np.frombuffer(ratios)[:, None]
    z = place_of(_GRID, q, a)
    share = a * z - a * a / 2 + log_ndtr(-z) - log_ndtr(a - z)
    single = np.nan_to_num(np.exp(np.log(q) + log_ndtr(a - z)) * -np.expm1(share)).clip(0.0)
    t = np.linspace(-8, 12, 1001)
    mass = np.exp(-t * t / 2) * (t[1] - t[0]) / math.sqrt(2 * math.pi)
    ratio = 1 + q * np.expm1(np.minimum(a * t - a * a / 2, 600.0))
    square = np.cumsum(np.log(ratio) ** 2 * mass * (1 if add else ratio), axis=1)
    if add:
        return single, np.broadcast_to(square[:, -1:], single.shape)
    place = np.searchsorted(t, place_of(_GRID / 2, q, a)).clip(0, t.size - 1)
    return single, np.take_along_axis(square, place, axis=1)
