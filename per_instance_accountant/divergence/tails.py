"""Certified tails: upper bounds of delta on a vertical line, and the search for the line and for
epsilon.

    delta(epsilon) = 1 / (2 pi i) int_{Re s = c} M(s) exp(-epsilon s) / (s (s + 1)) ds,   log M =
    sum_j counts_j log phi_j

for every c > 0. A :class:`Tail` is the trapezoidal sum of the integral, which errs upwards, plus
bounds of all that the sum and the tables leave out (docs/math/tight_epsilon.md). Which line and how
many nodes are used decides how tight the bound is, never whether it holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.divergence.contour import UNIT, Line, tabulate
from per_instance_accountant.divergence.recent import Recent
from per_instance_accountant.divergence.sampled_gaussian import sampled_gaussian_rdp

Floats = NDArray[np.float64]
Levels = tuple[Floats, Floats]
"""Sample rates and ratios, (k,) each."""
Known = tuple[Floats, NDArray[np.bool_]]
"""Of one direction: (n,) certified values or inf, and whether nothing better is wanted."""

_LADDER: Final = 2.0 ** (np.arange(-18, 41) / 3)
"""The abscissas that are used."""
_NODES: Final = (36, 144, 1024)
"""Nodes by effort; squares."""
_EDGES: Final = np.append(1.6 ** np.arange(33), np.inf)
"""Blocks of frequencies beyond the nodes, relative to the first one left out."""
_CHERNOFF: Final = _LADDER * np.log(_LADDER) - (1 + _LADDER) * np.log1p(_LADDER)
"""``log max_x exp(-c x) (1 - exp(-x))``: so delta(epsilon) <= exp(K(c) - c epsilon + this)."""
_GROUP: Final = 8
"""Levels tabulated together, whichever of them a run uses: tables then serve later runs bit for bit."""
_AT_ONCE: Final = 1 << 22
"""Amplitudes held at once."""
_ATTEMPTS: Final = 10
_WASTE: Final = 4e-6
_ALIAS: Final = 3e-5
"""A bound is tight enough when what was added changed it, and an alias delta, by no more than this,
relatively."""
_HUGE: Final = 1e300


class Curve(Protocol):
    """An upper bound of ``log delta`` as a function of epsilon, for n runs."""

    def at(self, epsilon: Floats) -> tuple[Floats, Floats, Floats]:
        """log delta, its slope in epsilon, and the share of delta that was added; epsilon (n,), each
        (n,)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tail:
    """Upper bound of ``log delta`` of one direction as a function of epsilon, for n runs.

    ``log_scale - abscissa epsilon + log(sum_m Re(amplitude_m exp(-i epsilon w_m)) + added)``.
    """

    abscissa: float
    period: float
    frequencies: Floats
    amplitude: NDArray[np.complex128]
    log_scale: Floats
    added: Floats

    def at(self, epsilon: Floats) -> tuple[Floats, Floats, Floats]:
        """log delta, its slope in epsilon, and the share of delta that was added; epsilon (n,), each
        (n,)."""
        fine = math.isqrt(len(self.frequencies))
        rows, steps = self.amplitude.reshape(len(epsilon), -1, fine), self.frequencies[::fine]
        within = np.exp(-1j * epsilon[:, None] * self.frequencies[:fine])
        both = np.stack([within, within * self.frequencies[:fine]], axis=2)
        sums = np.matmul(rows, both) * np.exp(-1j * epsilon[:, None] * steps)[:, :, None]
        total = sums[:, :, 0].sum(axis=1).real + self.added
        turned = (sums[:, :, 0].imag @ steps) + sums[:, :, 1].sum(axis=1).imag
        total = np.where(total > 0, total, np.inf)
        slope = turned / total - self.abscissa
        return self.log_scale - self.abscissa * epsilon + np.log(total), slope, self.added / total

    def bare(self, rows: NDArray[np.bool_]) -> Tail:
        """The sums alone, an estimate, for some of the runs."""
        amplitude, log_scale = self.amplitude[rows], self.log_scale[rows]
        return replace(self, amplitude=amplitude, log_scale=log_scale, added=np.zeros(log_scale.size))


def make_tail(
    counts: Floats, levels: Levels, abscissa: float, depth: float, effort: int, *, add: bool
) -> Tail:
    """The bound on one line for runs with counts (n, k); depth: about ``-log delta``; effort: 0 .. 2."""
    count = _NODES[effort]
    used = np.flatnonzero((counts > 0).any(axis=0))
    counts = counts[:, used]
    spacing = 2 * math.pi * abscissa / (20 + 2 * depth)
    line = _line(levels, used, (abscissa, spacing, count, add))
    nodes, edges = line.nodes, spacing * count * _EDGES
    decay = counts @ line.log_decay(edges)
    # sum of spacing / w^2 over the nodes from an edge on is at most 1 / (edge - spacing).
    share = 1 / (math.pi * (edges[:-1] - spacing))
    log_moment = product(counts, line.log_moment)
    log_scale = log_moment[:, 0].real.copy()
    weight = node_weights(nodes, spacing)
    truncated = np.exp(decay) @ share
    size = counts @ np.abs(line.log_moment).max(axis=1) + 4 * depth * abs(nodes[-1]) / abscissa + 64
    # Sums over the levels, and over the nodes in two stages of at most the root of their number.
    inexact = np.expm1(counts @ line.error + 4 * UNIT * (used.size + 2 * math.isqrt(count) + 16) * size)
    return Tail(
        abscissa=abscissa,
        period=2 * math.pi / spacing,
        frequencies=nodes.imag,
        amplitude=np.exp(log_moment - log_scale[:, None]) * weight,
        log_scale=log_scale,
        added=(truncated + inexact * np.abs(weight).sum()) * (1 + 1e-9),
    )


def product(counts: Floats, logs: NDArray[np.complex128]) -> NDArray[np.complex128]:
    """Real times complex, without the zeros of the counts' imaginary parts."""
    return np.asarray((counts @ logs.real) + 1j * (counts @ logs.imag))


def node_weights(nodes: NDArray[np.complex128], spacing: float) -> NDArray[np.complex128]:
    """(n,) weights of the trapezoidal rule; the real node counts half, others stand for two."""
    width = np.where(nodes.imag > 0, spacing / math.pi, spacing / (2 * math.pi))
    return np.asarray(width / (nodes * (nodes + 1)))


def raised_delta(log_value: Floats) -> Floats:
    """delta of a bound of its logarithm, above the rounding of that and above 0; inf for none."""
    value = np.exp(log_value + 1e-11)
    return np.where(np.isfinite(value), np.maximum(value, np.nextafter(0.0, 1.0)), np.inf)


def _line(levels: Levels, used: NDArray[np.intp], key: tuple[float, float, int, bool]) -> Line:
    """The tables of the levels ``used`` on one line."""
    groups = [_tables(levels, int(group), key) for group in np.unique(used // _GROUP)]
    rows = np.concatenate([np.arange(g * _GROUP, (g + 1) * _GROUP) for g in np.unique(used // _GROUP)])
    kept = np.isin(rows[: sum(len(group.error) for group in groups)], used)
    names = ("log_moment", "error", "second", "fourth", "log_variation")
    columns = {name: np.concatenate([getattr(g, name) for g in groups])[kept] for name in names}
    return Line(abscissa=key[0], spacing=key[1], **columns)


_recent: Recent[Line] = Recent(1 << 28)


def _tables(levels: Levels, group: int, key: tuple[float, float, int, bool]) -> Line:
    part = slice(group * _GROUP, (group + 1) * _GROUP)
    rates, ratios = levels[0][part], levels[1][part]
    abscissa, spacing, count, add = key
    return _recent.get(
        (rates.tobytes(), ratios.tobytes(), *key),
        lambda: tabulate(rates, ratios, abscissa, spacing, count, add=add),
    )


@lru_cache(maxsize=8)
def _ladder(rates: bytes, ratios: bytes, add: bool) -> Floats:
    """(k, rungs): upper bounds of the log moments at the abscissas, ``_HUGE`` where they are not
    computed."""
    q, a = np.frombuffer(rates), np.frombuffer(ratios)
    if add:
        lines = [tabulate(q, a, float(c), float(c), 1, add=True) for c in _LADDER]
        values = np.stack([line.log_moment[:, 0].real * (1 + 1e-13) + line.error for line in lines], axis=1)
    else:
        # phi(c) = E r^(1 + c) is the moment behind the Renyi divergence of order 1 + c.
        values = np.empty((a.size, _LADDER.size))
        for rate in np.unique(q):
            values[q == rate] = sampled_gaussian_rdp(float(rate), a[q == rate], 1 + _LADDER) * _LADDER
        values *= 1 + 1e-15
    return np.clip(np.nan_to_num(values, nan=_HUGE, posinf=_HUGE), 0.0, _HUGE)


def line_epsilons(
    counts: Floats, levels: Levels, start: Floats, log_delta: float, floor: Floats, *, add: bool
) -> Known:
    """(n,) certified epsilons of one direction at most ``start``, inf where none was found.

    floor: (n,) what need not be undercut.
    """
    search = _Search(counts, levels, np.full_like(start, -log_delta), add=add)

    def solve(tail: Tail, rows: NDArray[np.intp]) -> _Found:
        return _epsilons(tail, start[rows], floor[rows], log_delta)

    chernoff = (search.moments + _CHERNOFF - log_delta) / _LADDER
    rung = np.where(floor > 0, _saddle(search.moments, floor), chernoff.argmin(axis=1))
    first = np.maximum(chernoff.min(axis=1) * (1 + 1e-12), 0.0)
    if add:
        first = np.minimum(first, largest_loss(counts, levels[0]))
    return search.run(rung, first, floor, solve)


def line_deltas(
    counts: Floats, levels: Levels, start: Floats, epsilon: float, floor: Floats, *, add: bool
) -> Known:
    """(n,) certified deltas of one direction at ``epsilon``. start: (n,) upper bounds, for the choice of the
    nodes."""

    def solve(tail: Tail, rows: NDArray[np.intp]) -> _Found:
        target = np.full(rows.size, epsilon)
        log_value, _, share = tail.at(target)
        return _Found(value=raised_delta(log_value), epsilon=target, log_delta=log_value, waste=share)

    # Powers of 2, so that few tables are made.
    depth = 2.0 ** np.ceil(np.log2(5 - np.log(np.maximum(start, 1e-290))))
    search = _Search(counts, levels, depth, add=add)
    # What cancels is rounded relative to its own size.
    room = 1e-13 * (search.moments + epsilon * _LADDER)
    chernoff = (search.moments - epsilon * _LADDER + _CHERNOFF + room).min(axis=1)
    first = np.exp(np.minimum(chernoff + 1e-12 * np.abs(chernoff) + 1e-11, 0.0))
    rung = _saddle(search.moments, np.full(start.size, epsilon))
    return search.run(rung, np.maximum(first, np.nextafter(0.0, 1.0)), floor, solve)


def largest_loss(counts: Floats, rates: Floats) -> Floats:
    """(n,) what no loss of the direction "add" exceeds, rounded up, because r is at least 1 - q."""
    with np.errstate(divide="ignore"):
        each = np.where(rates < 1, -np.log1p(-rates), _HUGE)
    return np.asarray(counts @ each * (1 + 1e-12))


def _saddle(moments: Floats, epsilon: Floats) -> NDArray[np.int64]:
    """Rung at which ``M(c) exp(-c epsilon) / (c (c + 1))`` is smallest, (n,)."""
    exponent = moments - epsilon[:, None] * _LADDER - np.log(_LADDER * (_LADDER + 1))
    return np.asarray(exponent.argmin(axis=1), np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Found:
    """What one line gave, (n,) each: certified value or inf, the epsilon it is about (inf: unknown),
    waste."""

    value: Floats
    epsilon: Floats
    log_delta: Floats
    waste: Floats


class _Search:
    """The search for good lines in one direction; a run leaves it as soon as its bound is tight."""

    def __init__(self, counts: Floats, levels: Levels, depth: Floats, *, add: bool) -> None:
        self.counts, self.levels, self.depth, self.add = counts, levels, depth, add
        self.moments = counts @ _ladder(levels[0].tobytes(), levels[1].tobytes(), add)

    def run(self, rung: NDArray[np.int64], first: Floats, floor: Floats, solve: Solve) -> Known:
        """(n,) smallest value that the lines tried certify; ``first``: values certified before.

        A run whose value is at most its ``floor`` is not looked at any more.
        """
        result, effort = first, np.zeros(rung.size, dtype=np.int64)
        settled = result <= floor
        pending = np.flatnonzero(~settled)
        for _ in range(_ATTEMPTS):
            keys = np.stack([rung[pending], effort[pending], self.depth[pending]], axis=1)
            kinds, place = np.unique(keys, axis=0, return_inverse=True)
            for j, (height, work, depth) in enumerate(kinds):
                rows = pending[place.ravel() == j]
                c = float(_LADDER[int(height)])
                for part in np.array_split(rows, math.ceil(rows.size * _NODES[int(work)] / _AT_ONCE)):
                    tail = make_tail(self.counts[part], self.levels, c, float(depth), int(work), add=self.add)
                    found = solve(tail, part)
                    result[part] = np.minimum(result[part], found.value)
                    rung[part], effort[part], tight = self._next(part, tail, found, int(height), int(work))
                    settled[part] = tight | (result[part] <= floor[part])
            pending = pending[~settled[pending] & (effort[pending] < len(_NODES)) & (rung[pending] >= 0)]
        return result, settled

    def _next(
        self, rows: NDArray[np.intp], tail: Tail, found: _Found, rung: int, effort: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Rung and effort to try next, an effort beyond the last one where this line has nothing to gain; and
        whether the bound is tight."""
        last = len(_NODES) - 1
        loose, known = ~(found.waste <= _WASTE), np.isfinite(found.epsilon)
        # An alias raises epsilon by about its share over the abscissa.
        aliased = ~(self._alias(rows, tail, found) <= _ALIAS * min(1.0, tail.abscissa))
        saddle = _saddle(self.moments[rows], np.where(known, found.epsilon, 0.0))
        lower = np.where(aliased, np.minimum(rung - 1, saddle), saddle)
        goal = np.where(known, lower, rung - 4)
        stuck = (goal >= rung) & loose & (effort == last)
        more = np.where(stuck, last + 1, np.minimum(effort + loose, last))
        return goal, more, np.isfinite(found.value) & ~aliased & ~loose

    def _alias(self, rows: NDArray[np.intp], tail: Tail, found: _Found) -> Floats:
        """Upper bound of the first alias on the right relative to delta."""
        far = np.where(np.isfinite(found.epsilon), found.epsilon, 0.0) + tail.period
        log_far = (self.moments[rows] - far[:, None] * _LADDER + _CHERNOFF).min(axis=1)
        return np.asarray(np.exp(np.minimum(log_far + tail.abscissa * tail.period - found.log_delta, 50.0)))


Solve = Callable[[Tail, NDArray[np.intp]], _Found]


def _epsilons(tail: Tail, start: Floats, floor: Floats, log_delta: float) -> _Found:
    epsilon, waste = invert(tail, start, floor, log_delta)
    guess, lost = epsilon.copy(), ~np.isfinite(epsilon)
    if lost.any():
        guess[lost] = invert(tail.bare(lost), start[lost], floor[lost], log_delta)[0]
    return _Found(value=epsilon, epsilon=guess, log_delta=np.full(start.size, log_delta), waste=waste)


def invert(tail: Curve, start: Floats, floor: Floats, log_delta: float) -> tuple[Floats, Floats]:
    """An epsilon in [0, start] at which the tail was seen not to exceed delta, else inf; (n,).

    Close to the smallest one, or at most ``floor``.

    Second: by how much, relatively, what was added raised it. Newton's rule, kept inside a bracket.
    """
    low, high = np.zeros_like(start), start.copy()
    certified, waste = np.full_like(start, np.inf), np.full_like(start, np.inf)
    epsilon, free = np.where(floor > 0, np.minimum(floor, start), start), np.zeros(start.size, dtype=np.bool_)
    for _ in range(16):
        log_value, slope, share = tail.at(epsilon)
        log_value = log_value + 1e-11
        holds = (log_value <= log_delta) & (epsilon <= certified)
        raised = -np.log1p(-np.minimum(share, 1 - 1e-9)) / np.maximum(-slope, 1e-9)
        raised /= np.clip(epsilon, 1e-4, 2.0)
        certified, waste = np.where(holds, epsilon, certified), np.where(holds, raised, waste)
        low, high = np.where(holds, low, np.maximum(low, epsilon)), np.where(holds, epsilon, high)
        free |= holds & (epsilon <= floor)
        step = (log_delta - log_value) / np.minimum(slope, -1e-300)
        near = np.abs(step) <= 1e-9 * (1e-3 + epsilon)
        if (holds & near | free).all():
            break
        # A root from the left is passed a little, so that its right side is certified.
        aim = epsilon + np.where(holds, step * (1 - 1e-10), step * (1 + 1e-6) + 1e-10)
        inside = np.isfinite(aim) & (slope < 0) & (aim < high) & (aim > low)
        below = np.isfinite(aim) & (slope < 0) & (aim <= 0) & (low == 0)
        aim = np.where(inside, aim, np.where(below, 0.0, (low + high) / 2))
        epsilon = np.where(holds & near | free, certified, aim)
    return certified, waste
