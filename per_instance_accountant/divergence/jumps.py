"""Tight epsilon where hardly any draw is expected: the runs with a large loss in some step, apart
from the others.

A run of rare sampling is almost surely one whose every step loses next to nothing. That near-atom
decides neither epsilon nor delta, but its transform does not decay and drowns what does. So the law
of each step is parted by a smooth window in z into "jumps" (u) and "the rest" (b), both positive:

    prod (b_j + u_j)^n_j = prod b_j^n_j + the runs with a jump.

The second part is integrated on a vertical line; the first is bounded by Chernoff's inequality and
asked to be negligible. Only the direction "remove": no loss of the other exceeds ``-T log(1 - q)``.
Derivation: docs/math/tight_epsilon.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

from per_instance_accountant.divergence.contour import UNIT
from per_instance_accountant.divergence.jump_tables import EDGES, RUNGS, jump_place, tabulate_parts
from per_instance_accountant.divergence.tails import Levels, Tail, invert

Floats = NDArray[np.float64]
Amplitudes = NDArray[np.complex128]

_EXPECTED_DRAWS: Final = 1.5
_LARGEST_RATE: Final = 0.5
_SHARE: Final = 1e-6
"""What the rest may add to delta, relatively."""
_RUNG_COSTS: Final = RUNGS * np.log(RUNGS) - (1 + RUNGS) * np.log1p(RUNGS)
_NODES: Final = (256, 1024, 4096, 16384)
"""Nodes by effort; squares."""
_AT_ONCE: Final = 1 << 20
_ATTEMPTS: Final = 9
_WIDTHS: Final = 100
"""Frequencies to begin with, in inverse ends of the window."""
_FEW_LEVELS: Final = 24
"""Up to so many levels the tables of the last effort are worth their seconds."""
_ENOUGH: Final = 1e-5
"""An epsilon is tight enough when what was added raised it by no more than this, relatively."""
_ALMOST: Final = math.log1p(-2 * _SHARE)
_GRID: Final = np.geomspace(1e-3, 4000.0, 200)


@np.errstate(all="ignore")
def jump_epsilons(counts: Floats, levels: Levels, log_delta: float) -> tuple[Floats, NDArray[np.bool_]]:
    """(n,) certified epsilons of the direction "remove" for runs of rare sampling, inf where none
    was found; and whether they are tight."""
    rare = np.flatnonzero(_is_rare(counts, levels))
    single = _log_single(counts[rare], levels)
    at = _GRID[np.clip((single > log_delta).sum(axis=1), 1, _GRID.size - 2)]

    def solve(line: _Lines, rows: NDArray[np.intp]) -> _Solved:
        epsilon, waste = invert(line.tail, 2 * at[rows] + 1, np.zeros(rows.size), log_delta + _ALMOST)
        rest = ((line.rest + _RUNG_COSTS - log_delta - math.log(_SHARE)) / RUNGS).min(axis=1)
        rest = np.where(np.isnan(rest), np.inf, rest)
        value = np.maximum(epsilon, np.maximum(rest * (1 + 1e-12) + 1e-12, 0.0))
        known = np.where(np.isfinite(epsilon), epsilon, at[rows])
        excess = np.where(value > known + 1e-6, value / known, 1.0)
        return value, known, waste * np.clip(known, 1e-4, 2.0), excess

    return _searched(counts, levels, (rare, at, single, np.full(at.size, -log_delta)), solve)


@np.errstate(all="ignore")
def jump_deltas(counts: Floats, levels: Levels, epsilon: float) -> tuple[Floats, NDArray[np.bool_]]:
    """The same for deltas at one epsilon."""
    rare = np.flatnonzero(_is_rare(counts, levels))
    single = _log_single(counts[rare], levels)
    at = np.full(rare.size, np.clip(epsilon, _GRID[1], _GRID[-2]))
    depth = 4 * np.ceil(np.clip(-single[:, np.searchsorted(_GRID, at[:1])].ravel(), 1, 600) / 4)

    def solve(line: _Lines, rows: NDArray[np.intp]) -> _Solved:
        target = np.full(rows.size, epsilon)
        log_value, _, share = line.tail.at(target)
        rest = np.exp((line.rest + _RUNG_COSTS - epsilon * RUNGS).min(axis=1) + 1e-11)
        value = np.exp(log_value + 1e-11)
        excess = np.where(rest > 1e-5 * value, 2.0, 1.0)
        value = np.where(np.isfinite(value + rest), np.maximum(value + rest, np.nextafter(0.0, 1.0)), np.inf)
        return value, target, share, excess

    return _searched(counts, levels, (rare, at, single, depth), solve)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Lines:
    """The bound of the runs with a jump; log moments of the rest and of all at the rungs, (n, r)."""

    tail: Tail
    rest: Floats
    whole: Floats


_Solved = tuple[Floats, Floats, Floats, Floats]
"""Certified value, the epsilon it is about, what was added to it, and how wide the window is (1: not
too wide)."""


def _searched(
    counts: Floats,
    levels: Levels,
    start: tuple[NDArray[np.intp], Floats, Floats, Floats],
    solve: Callable[[_Lines, NDArray[np.intp]], _Solved],
) -> tuple[Floats, NDArray[np.bool_]]:
    """Try windows, lines and efforts. start: the runs of rare sampling, about their epsilons, log
    deltas on the grid as if one jump decided alone, and depths."""
    rare, at, single, depth = start
    result, tight = np.full(len(counts), np.inf), np.zeros(len(counts), dtype=np.bool_)
    place = np.stack([*_places(at, single, depth), depth], axis=1)
    few = levels[0].size <= _FEW_LEVELS
    last = len(_NODES) - (1 if few else 3)
    # Many levels with costly tables each are left to the contours of the whole law.
    rows = np.flatnonzero(few | (place[:, 2] < last))
    for _ in range(_ATTEMPTS):
        if not rows.size:
            break
        keys, which = np.unique(place[rows], axis=0, return_inverse=True)
        settled = np.zeros(rare.size, dtype=np.bool_)
        for j, key in enumerate(keys):
            chosen = rows[which.ravel() == j]
            for part in np.array_split(chosen, math.ceil(chosen.size * _NODES[int(key[2])] / _AT_ONCE)):
                line = _jump_tail(counts[rare[part]], levels, key, float(2 * at[part].max() + 1))
                solved = solve(line, part)
                result[rare[part]] = np.minimum(result[rare[part]], solved[0])
                move, settled[part] = _moves(line, solved, key)
                place[part, :3] += move
        tight[rare[settled]] = True
        rows = rows[~settled[rows] & (place[rows, 2] <= last)]
    return result, tight


def _moves(line: _Lines, solved: _Solved, key: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """What to change of window, line and effort, (n, 3), and which values are tight."""
    _, at, waste, excess = solved
    abscissa, period = line.tail.abscissa, line.tail.period
    far = (line.whole + _RUNG_COSTS - (at[:, None] + period) * RUNGS).min(axis=1) + key[3]
    aliased = ~(far + abscissa * period <= math.log(_ENOUGH))
    costs = line.whole - at[:, None] * RUNGS - np.log(RUNGS * (RUNGS + 1))
    saddle = np.floor(np.log2(RUNGS[costs.argmin(axis=1)]))
    wide, wasteful = excess > 1, ~(waste <= _ENOUGH)
    narrower = -np.clip(np.ceil(2 * np.log2(excess)), 1, 4) * (wide & ~aliased)
    # A lattice that would be too long has no tables: half the abscissa needs half of it.
    lower = np.where(np.isfinite(line.whole).any(axis=1), np.minimum(saddle - key[1], -1.0), -1.0) * aliased
    more = wasteful & ~aliased & ~(wide & (waste < 1e-2))
    return np.stack([narrower, lower, 1.0 * more], axis=1), ~wasteful & ~wide & ~aliased


def _is_rare(counts: Floats, levels: Levels) -> NDArray[np.bool_]:
    rates = levels[0]
    return np.asarray((counts @ rates < _EXPECTED_DRAWS) & (counts @ (rates > _LARGEST_RATE) == 0))


def _log_single(counts: Floats, levels: Levels) -> Floats:
    return np.asarray(np.log(counts @ _single_jumps(levels[0].tobytes(), levels[1].tobytes()) + 1e-300))


def _places(at: Floats, single: Floats, depth: Floats) -> tuple[Floats, Floats, Floats]:
    """Window (half octaves), abscissa (octaves) and effort to begin with, each (n,)."""
    rows, index = np.arange(at.size), np.clip(np.searchsorted(_GRID, at), 1, _GRID.size - 2)
    slope = (single[rows, index - 1] - single[rows, index + 1]) / (_GRID[index + 1] - _GRID[index - 1])
    power = np.rint(np.log2(np.clip(np.nan_to_num(slope), 2.0**-4, 2.0**10)))
    for _ in range(4):
        period = _period(2.0**power, depth)
        far = np.searchsorted(_GRID, at + period, side="right") - 1
        power -= single[rows, far] + 2.0**power * period > math.log(_SHARE) - depth
    window = np.floor(2 * np.log2(at * 0.95))
    needed = _WIDTHS * _period(2.0**power, depth) / (2 * math.pi * 2.0 ** (window / 2))
    return window, power, np.minimum(np.searchsorted(np.array(_NODES), needed), 2).astype(float)


def _period(abscissa: Floats, depth: Floats) -> Floats:
    return np.asarray((16 + depth) / abscissa)


@lru_cache(maxsize=8)
def _single_jumps(rates: bytes, ratios: bytes) -> Floats:
    """(k, grid) delta of one step at each level, "remove"; an estimate."""
    q, a = np.frombuffer(rates)[:, None], np.frombuffer(ratios)[:, None]
    z = jump_place(_GRID, q, a)
    share = a * z - a * a / 2 + log_ndtr(-z) - log_ndtr(a - z)
    return np.asarray(np.nan_to_num(np.exp(np.log(q) + log_ndtr(a - z)) * -np.expm1(share)).clip(0.0))


def _jump_tail(counts: Floats, levels: Levels, key: Floats, largest: float) -> _Lines:
    """key: window, abscissa, effort and depth; largest: the epsilons at which the tail is asked."""
    top, abscissa, count = 2.0 ** (key[0] / 2), 2.0 ** float(key[1]), _NODES[int(key[2])]
    spacing = 2 * math.pi * abscissa / (16 + float(key[3]))
    used = np.flatnonzero((counts > 0).any(axis=0))
    counts = counts[:, used]
    parts = tabulate_parts(
        levels[0][used].tobytes(), levels[1][used].tobytes(), top, abscissa, spacing, count
    )
    nodes = abscissa + 1j * spacing * np.arange(count)
    jumps = _log1p(parts.quotient)
    log_rest = (counts @ parts.rest.real) + 1j * (counts @ parts.rest.imag)
    log_jumps = (counts @ jumps.real) + 1j * (counts @ jumps.imag)
    whole = np.expm1(log_jumps[:, 0].real)
    weight = np.where(nodes.imag > 0, spacing / math.pi, spacing / (2 * math.pi)) / (nodes * (nodes + 1))
    edges = spacing * count * EDGES
    share = 1 / (math.pi * (edges[:-1] - spacing))
    truncated = np.expm1(counts @ np.log1p(parts.beyond)) @ share / whole
    size = counts @ (np.abs(parts.rest).max(axis=1) + np.abs(jumps).max(axis=1) + 1)
    size += largest * abs(nodes[-1]) + 64
    inexact = counts @ parts.error + 16 * UNIT * (used.size + 2 * math.isqrt(count) + 16 + size)
    tail = Tail(
        abscissa=abscissa,
        period=2 * math.pi / spacing,
        frequencies=nodes.imag,
        amplitude=np.exp(log_rest) * _expm1(log_jumps) / whole[:, None] * weight,
        log_scale=counts @ parts.base + np.log(whole),
        added=(truncated + np.expm1(inexact) * np.abs(weight).sum()) * (1 + 1e-9),
    )
    return _Lines(tail=tail, rest=counts @ parts.rungs, whole=counts @ parts.whole)


def _log1p(x: Amplitudes) -> Amplitudes:
    return np.asarray(
        0.5 * np.log1p(np.maximum(x.real * (2 + x.real) + x.imag**2, -1 + 1e-300))
        + 1j * np.arctan2(x.imag, 1 + x.real)
    )


def _expm1(x: Amplitudes) -> Amplitudes:
    half = np.sin(x.imag / 2)
    real = np.expm1(x.real) * np.cos(x.imag) - 2 * half * half
    return np.asarray(real + 1j * np.exp(x.real) * np.sin(x.imag))
