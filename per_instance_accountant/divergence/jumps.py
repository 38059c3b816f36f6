"""Tight epsilon where hardly any draw is expected: small losses, jumps and the impossible apart.

In a run of rare sampling most steps lose next to nothing, and a step may lose thousands of times as much. No
single tilt suits both: small losses need a large abscissa, where jumps would swamp them, and a small one drowns
the jumps in the near-atom of all other runs. So the dots of each step are parted by size into the rest (b),
the jumps (u) and losses so rare that they may count as infinite:

    prod (b_j + u_j)^n_j = prod b_j^n_j + the runs with a jump.

Either measure is positive and has a line of its own, or is shown negligible by Chernoff's inequality. Nothing
here needs a decay of the transforms: a Gaussian step of negligible size is composed. Derivation:
docs/math/tight_epsilon.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr, ndtr

from per_instance_accountant.divergence.contour import UNIT
from per_instance_accountant.divergence.dots import place_of, representable
from per_instance_accountant.divergence.jump_tables import (
    RUNG_COSTS,
    RUNGS,
    Part,
    beyond,
    log_moments,
    tabulate_parts,
)
from per_instance_accountant.divergence.tails import Known, Levels, Tail, invert

Floats = NDArray[np.float64]
Places = NDArray[np.int64]
Amplitudes = NDArray[np.complex128]

_EXPECTED_DRAWS: Final = 1.5
_SQUARED_RATES: Final = 0.005
_SMALL: Final = math.log(1e-6)
"""What may be left to Chernoff's inequality, to an alias or to what lies beyond the nodes, relative to delta."""
_OCTAVES: Final = np.arange(-22, 10)
_TOPS: Final = 2.0**_OCTAVES
"""Losses at which parts are cut: 2e-7 to 512. Few of them, so that few tables are made."""
_NODES: Final = np.array([64, 144, 256, 576, 1024, 2304, 4096, 9216, 16384, 36864])
"""Nodes by effort; squares."""
_AT_ONCE: Final = 1 << 20
_ATTEMPTS: Final = 6
_LEAST: Final = -690.0
"""Smallest logarithm of delta that is aimed at."""
_NEAR: Final = 0.15
"""Lines are trusted to be good ones if they were chosen for an epsilon so near, relatively."""
_ENOUGH: Final = 2e-5
"""An epsilon is tight enough when what was added raised it by no more than this, and a fiftieth of it per unit,
or a 500th of a small epsilon."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Total:
    """Upper bound of delta: tails, Chernoff bounds ``exp(height - rung epsilon)``, and a mass; n runs."""

    tails: list[Tail]
    chernoffs: list[tuple[Floats, Floats]]
    mass: Floats

    @property
    def shift(self) -> float:
        return max((tail.shift for tail in self.tails), default=0.0)

    def at(self, epsilon: Floats) -> tuple[Floats, Floats, Floats]:
        """log delta, its slope in epsilon, and the share of delta that was added, as a :class:`Tail` has them."""
        found = [tail.at(epsilon) for tail in self.tails]
        found += [
            (height - rung * epsilon, -rung, np.ones_like(epsilon)) for height, rung in self.chernoffs
        ]
        found.append((np.log(self.mass), np.zeros_like(epsilon), np.ones_like(epsilon)))
        logs, slopes, shares = (np.stack(column) for column in zip(*found, strict=True))
        peak = logs.max(axis=0)
        weight = np.exp(logs - peak)
        total = weight.sum(axis=0)
        weight = np.where(weight > 0, weight / total, 0.0)
        value = peak + np.log(total) + 1e-14 * (1 + np.abs(peak))
        return value, (weight * slopes).sum(axis=0), (weight * shares).sum(axis=0)


_Solved = tuple[Floats, Floats, Floats, Floats]
"""(n,) each: certified value or inf, epsilon, log delta, by how much what was added raised epsilon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Epsilon:
    """Which epsilon belongs to a given delta?"""

    log_delta: float

    def guess(self, logs: Floats, floor: Floats) -> tuple[Floats, Floats]:
        """Epsilon and log delta to begin with, (n,); logs: of delta, on the grid."""
        at = _GRID[np.clip((logs > self.log_delta).sum(axis=1), 0, _GRID.size - 1)]
        return np.where(floor > 0, floor, at), np.full(at.size, self.log_delta)

    def refine(self, steps: _Steps, at: Floats, goal: Floats) -> tuple[Floats, Floats]:
        return np.minimum(at, 0.9 * np.maximum(steps.chernoff_epsilon(goal), _GRID[0])), goal

    def solve(self, total: _Total, at: Floats, goal: Floats, floor: Floats) -> _Solved:
        epsilon, waste = invert(total, 4 * at, floor, self.log_delta)
        known = np.where(np.isfinite(epsilon), epsilon, 2 * at)
        return epsilon, known, goal, waste * np.clip(known, 1e-4, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Delta:
    """Which delta belongs to a given epsilon?"""

    epsilon: float

    def guess(self, logs: Floats, floor: Floats) -> tuple[Floats, Floats]:
        column = int(np.searchsorted(_GRID, self.epsilon).clip(0, _GRID.size - 1))
        return np.full(len(logs), max(self.epsilon, _GRID[0])), np.clip(logs[:, column], _LEAST, 0.0)

    def refine(self, steps: _Steps, at: Floats, goal: Floats) -> tuple[Floats, Floats]:
        highest = np.clip(steps.chernoff_delta(at), _LEAST, 0.0)
        return at, np.clip(goal, highest - 4, highest)

    def solve(self, total: _Total, at: Floats, goal: Floats, floor: Floats) -> _Solved:
        log_value, slope, share = total.at(np.full(at.size, self.epsilon))
        value = np.exp(log_value + 1e-11)
        value = np.where(np.isfinite(value), np.maximum(value, np.nextafter(0.0, 1.0)), np.inf)
        raised = -np.log1p(-np.minimum(share, 1 - 1e-9)) / np.maximum(-slope, 1e-9) + total.shift
        return value, at, np.clip(log_value, _LEAST, 0.0), raised


def parted_epsilons(counts: Floats, levels: Levels, log_delta: float, floor: Floats, *, add: bool) -> Known:
    """(n,) certified epsilons of one direction, inf where none was found. floor: (n,) what need not be
    undercut."""
    return _searched(counts, levels, floor, _Epsilon(log_delta=log_delta), add)


def parted_deltas(counts: Floats, levels: Levels, epsilon: float, floor: Floats, *, add: bool) -> Known:
    """The same for deltas at one epsilon."""
    return _searched(counts, levels, floor, _Delta(epsilon=epsilon), add)


def is_rare(counts: Floats, levels: Levels) -> NDArray[np.bool_]:
    """(n,) whether so few draws are expected, or losses so small, that parting them is the first thing to try."""
    rates = levels[0]
    return np.asarray((counts @ rates < _EXPECTED_DRAWS) | (counts @ rates**2 < _SQUARED_RATES))


@np.errstate(all="ignore")
def _searched(
    counts: Floats, levels: Levels, floor: Floats, question: _Epsilon | _Delta, add: bool
) -> Known:
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
            steps = _Steps(counts[chosen], levels, key, add)
            if attempt == 0:
                at[chosen], goal[chosen] = question.refine(steps, at[chosen], goal[chosen])
            plan = steps.lines(at[chosen], goal[chosen], finer[chosen])
            for lines, inner in _grouped(plan, np.arange(chosen.size)):
                for piece in np.array_split(inner, math.ceil(inner.size * max(1, *lines[[1, 4]]) / _AT_ONCE)):
                    part = chosen[piece]
                    total = steps.total(piece, lines, at[part], goal[part])
                    value, epsilon, log_delta, raised = question.solve(total, at[part], goal[part], floor[part])
                    result[part] = np.minimum(result[part], value)
                    near = np.abs(np.log(epsilon / at[part])) < _NEAR
                    near &= np.abs(log_delta - goal[part]) < 1
                    loose = ~(raised <= _enough(epsilon))
                    settled[part] = np.isfinite(value) & (near & ~loose | (value <= floor[part]))
                    finer[part] += 2 * (near & loose)
                    at[part], goal[part] = epsilon, log_delta
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
    top = (mass > np.exp(goal + _SMALL)[:, None]).sum(axis=1).clip(0, _TOPS.size - 1)
    low = np.searchsorted(_TOPS, at / 4).clip(0, top)
    return np.stack([_OCTAVES[low], _OCTAVES[top]], axis=1).astype(np.float64)


@lru_cache(maxsize=8)
def _masses_beyond(rates: bytes, ratios: bytes) -> Floats:
    """(k, tops) mass of one step with a loss beyond each cut; an estimate."""
    q, a = np.frombuffer(rates)[:, None], np.frombuffer(ratios)[:, None]
    z = place_of(_TOPS, q, a)
    return np.asarray((1 - q) * ndtr(-z) + q * ndtr(a - z))


_GRID: Final = 2.0 ** (np.arange(-88, 37) / 4)
"""Epsilons at which the first guess is looked up."""


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
    """(k, grid) delta of one step at each level, and its mean squared loss below half of epsilon; estimates."""
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


class _Steps:
    """Runs with the same cuts."""

    def __init__(self, counts: Floats, levels: Levels, cuts: Floats, add: bool) -> None:
        used = np.flatnonzero((counts > 0).any(axis=0))
        self.counts = counts[:, used]
        low, top = (float(2.0**cut) for cut in cuts)
        pairs = [(float(q), float(a)) for q, a in zip(levels[0][used], levels[1][used], strict=True)]
        self.parts = [
            [Part(rate=q, ratio=a, low=low, top=top, add=add, jumps=jumps) for q, a in pairs]
            for jumps in (False, True)
        ]
        self.known = add or all(representable(q, a, top) for q, a in pairs)
        if not self.known:
            return
        rest, jump = (np.stack([log_moments(part) for part in parts]) for parts in self.parts)
        self.rest = self.counts @ rest
        self.jumps = self.rest + np.log(np.expm1(self.counts @ np.logaddexp(0.0, jump - rest)))

    def chernoff_epsilon(self, goal: Floats) -> Floats:
        """An upper bound of epsilon, (n,): each part has half of delta."""
        if not self.known:
            return np.full(goal.size, np.inf)
        each = [(logs + RUNG_COSTS - goal[:, None] + math.log(2)) / RUNGS for logs in (self.rest, self.jumps)]
        return np.asarray(np.maximum(*(np.where(np.isnan(one), np.inf, one).min(axis=1) for one in each)))

    def chernoff_delta(self, at: Floats) -> Floats:
        """An upper bound of log delta, (n,)."""
        if not self.known:
            return np.zeros(at.size)
        each = [logs - at[:, None] * RUNGS + RUNG_COSTS for logs in (self.rest, self.jumps)]
        return np.asarray(np.logaddexp(*(np.where(np.isnan(one), np.inf, one).min(axis=1) for one in each)))

    def lines(self, at: Floats, goal: Floats, finer: Places) -> Floats:
        """(n, 6): rung, nodes and period times abscissa of the line for the rest and of that for the jumps; 0 nodes
        for Chernoff's inequality at that rung."""
        if not self.known:
            return np.zeros((at.size, 6))
        return np.stack(_line(self.rest, at, goal, finer) + _line(self.jumps, at, goal, finer), axis=1)

    def total(self, rows: NDArray[np.intp], lines: Floats, at: Floats, goal: Floats) -> _Total:
        if not self.known:
            return _Total(tails=[], chernoffs=[], mass=np.full(rows.size, np.inf))
        counts, tails, chernoffs = self.counts[rows], [], []
        for jumps, (rung, nodes, turns) in enumerate(lines.reshape(2, 3)):
            logs, c = (self.jumps if jumps else self.rest)[rows, int(rung)], float(RUNGS[int(rung)])
            if nodes == 0:
                chernoffs.append((logs + RUNG_COSTS[int(rung)], np.full(rows.size, c)))
                continue
            spacing = 2 * math.pi * c / float(turns)
            excess = float((logs - c * at - math.log(c) - goal).max())
            blur = float(_blur(spacing, float(nodes), excess))
            tails.append(self._tail(counts, bool(jumps), (c, spacing, int(nodes), blur), at.max()))
        mass = counts @ np.array([beyond(part) for part in self.parts[0]]) * (1 + 1e-12)
        return _Total(tails=tails, chernoffs=chernoffs, mass=mass)

    def _tail(
        self, counts: Floats, jumps: bool, line: tuple[float, float, int, float], largest: float
    ) -> Tail:
        c, spacing, count, blur = line
        lines = [tabulate_parts(part, c, spacing, count) for part in self.parts[jumps]]
        rest = np.stack([one.rest for one in lines])
        error = np.array([one.error_rest for one in lines])
        log_scale = counts @ np.array([one.base for one in lines])
        size, inexact = counts @ (np.abs(rest).max(axis=1) + 1), counts @ error
        amplitude = np.exp(_product(counts, rest))
        if jumps:
            steps = np.stack([one.jumps for one in lines if one.jumps is not None])
            log_jumps = _product(counts, steps)
            expected = log_jumps[:, 0].real
            whole = np.expm1(expected)
            size += counts @ np.abs(steps).max(axis=1)
            inexact += (1 + expected) * (error.max() + max(one.error_jumps for one in lines)) * 1.01
            amplitude, log_scale = amplitude * _expm1(log_jumps) / whole[:, None], log_scale + np.log(whole)
        size += 2 * largest * spacing * count + 64
        inexact += 16 * UNIT * (counts.shape[1] + 2 * math.isqrt(count) + 16 + size)
        nodes = c + 1j * spacing * np.arange(count)
        weight = np.where(nodes.imag > 0, spacing / math.pi, spacing / (2 * math.pi)) / (nodes * (nodes + 1))
        return Tail(
            abscissa=c,
            period=2 * math.pi / spacing,
            frequencies=nodes.imag,
            amplitude=amplitude * (np.exp(0.5 * blur * (nodes * nodes + nodes - c * c - c)) * weight),
            log_scale=log_scale + 0.5 * blur * (c * c + c),
            added=(_truncated(blur, spacing, count) + np.expm1(inexact) * np.abs(weight).sum()) * (1 + 1e-9),
            blur=blur,
        )


def _blur(spacing: float | Floats, nodes: float | Floats, excess: float | Floats) -> Floats:
    """Squared mean of a Gaussian step that makes what lies beyond the nodes negligible; excess: by how much the
    moment exceeds delta, as a logarithm."""
    return np.asarray(2 * np.maximum(excess - _SMALL, 1.0) / (spacing * nodes) ** 2)


def _truncated(blur: float, spacing: float, count: int) -> float:
    """What lies beyond the nodes, relative to the moment: the Gaussian step bounds every term, and the sum of
    spacing / w^2 over them is at most ``1 / (width - spacing)``."""
    width = spacing * count
    return math.exp(-0.5 * blur * width**2) / (math.pi * (width - spacing))


def _enough(epsilon: Floats) -> Floats:
    return np.asarray(np.minimum(_ENOUGH * (1 + epsilon / 50), 0.002 * epsilon))


def _line(logs: Floats, at: Floats, goal: Floats, finer: Places) -> list[Floats]:
    """Rung, nodes, and period times abscissa, (n,) each."""
    bound = logs - at[:, None] * RUNGS + RUNG_COSTS
    bound = np.where(np.isnan(bound), np.inf, bound)
    cheap = bound.min(axis=1) < goal + _SMALL
    exponent = logs - at[:, None] * RUNGS - np.log(RUNGS * (RUNGS + 1))
    rung = np.where(np.isfinite(exponent), exponent, np.inf).argmin(axis=1)
    # An alias on the left is at most the whole measure, itself at most its moment at the first rung.
    turns = np.maximum(np.minimum(logs[:, 0], 0.0) - goal, 0.0) - _SMALL
    turns = 2.0 ** (np.ceil(4 * np.log2(turns)) / 4)
    for _ in range(8):
        period = turns / RUNGS[rung]
        far = (logs - (at + period)[:, None] * RUNGS + RUNG_COSTS).min(axis=1) + turns
        rung = np.maximum(rung - ~(far <= goal + _SMALL), 0)
    # Octaves only, so that few tables are made, but where every bit of the abscissa counts.
    rung -= (rung % 2) * (RUNGS[rung] > 1)
    c, spacing = RUNGS[rung], 2 * math.pi * RUNGS[rung] / turns
    excess = logs[np.arange(at.size), rung] - c * at - np.log(c) - goal
    shift = _blur(spacing[:, None], _NODES, excess[:, None]) * (c[:, None] + 0.5)
    effort = (shift > 0.9 * _enough(at)[:, None]).sum(axis=1) + finer
    nodes = _NODES[np.minimum(effort, _NODES.size - 1)].astype(float)
    return [np.where(cheap, bound.argmin(axis=1), rung), np.where(cheap, 0.0, nodes), np.where(cheap, 0.0, turns)]


def _product(counts: Floats, logs: Amplitudes) -> Amplitudes:
    return np.asarray((counts @ logs.real) + 1j * (counts @ logs.imag))


def _expm1(x: Amplitudes) -> Amplitudes:
    half = np.sin(x.imag / 2)
    real = np.expm1(x.real) * np.cos(x.imag) - 2 * half * half
    return np.asarray(real + 1j * np.exp(x.real) * np.sin(x.imag))
