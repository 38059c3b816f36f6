"""Runs whose losses are parted by size: a line of the complex plane for each part.

With b the transform of the rest of a step, its small losses, and u that of its jumps,

    prod (b_j + u_j)^n_j = prod b_j^n_j + prod b_j^n_j (prod (1 + u_j / b_j)^n_j - 1);

both terms belong to positive measures. Each is integrated on a line that suits it, or shown negligible by
Chernoff's inequality; losses beyond the top are a mass that is added. Derivation: docs/math/tight_epsilon.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.divergence.contour import UNIT
from per_instance_accountant.divergence.dots import representable
from per_instance_accountant.divergence.jump_tables import (
    RUNG_COSTS,
    RUNGS,
    Part,
    beyond,
    log_moments,
    tabulate_parts,
)
from per_instance_accountant.divergence.tails import Levels, Tail, node_weights, product

Floats = NDArray[np.float64]
Places = NDArray[np.int64]
Amplitudes = NDArray[np.complex128]

SMALL: Final = math.log(1e-6)
"""What may be left to Chernoff's inequality, to an alias or to what lies beyond the nodes, beside delta."""
_NODES: Final = np.array([64, 144, 256, 576, 1024, 2304, 4096, 9216, 16384, 36864])
"""Nodes by effort; squares."""
_ENOUGH: Final = 3e-5
_BEYOND_SADDLE: Final = 8.0
_STEEP: Final = 5.0
"""About how often delta halves, and more, while a small epsilon doubles."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Total:
    """Upper bound of delta: tails, Chernoff bounds ``exp(height - rung epsilon)``, and a mass; n runs.

    blur: the largest squared mean of the Gaussian steps that were composed.
    """

    tails: list[Tail]
    chernoffs: list[tuple[Floats, Floats]]
    mass: Floats
    blur: float
    moments: list[Floats]
    """(n, rungs) log moments of the measure of each tail."""

    def shift(self, slope: Floats) -> Floats:
        """By how much the Gaussian steps raise epsilon where log delta falls with ``slope`` < 0, (n,)."""
        return np.asarray(self.blur * np.maximum(1 - slope, 0.0) / 2)

    def log_alias(self, epsilon: Floats) -> Floats:
        """Upper bound of the logarithm of what the trapezoidal rule counts a period farther right, (n,)."""
        each = [np.full_like(epsilon, -np.inf)]
        for tail, logs in zip(self.tails, self.moments, strict=True):
            far = logs - (epsilon + tail.period)[:, None] * RUNGS + RUNG_COSTS
            each.append(_least(far) + tail.abscissa * tail.period)
        return np.asarray(np.max(each, axis=0))

    def at(self, epsilon: Floats) -> tuple[Floats, Floats, Floats]:
        """As a :class:`Tail`: log delta, its slope in epsilon, and the share of delta that was added."""
        found = [tail.at(epsilon) for tail in self.tails]
        found += [(height - rung * epsilon, -rung, np.ones_like(epsilon)) for height, rung in self.chernoffs]
        found.append((np.log(self.mass), np.zeros_like(epsilon), np.ones_like(epsilon)))
        logs, slopes, shares = (np.stack(column) for column in zip(*found, strict=True))
        peak = logs.max(axis=0)
        weight = np.exp(logs - peak)
        total = weight.sum(axis=0)
        weight = np.where(weight > 0, weight / total, 0.0)
        value = peak + np.log(total) + 1e-14 * (1 + np.abs(peak))
        return value, (weight * slopes).sum(axis=0), (weight * shares).sum(axis=0)


class Runs:
    """Runs with the same cuts: up to a loss of ``low`` the rest, beyond ``top`` an infinite loss."""

    def __init__(self, counts: Floats, levels: Levels, low: float, top: float, *, add: bool) -> None:
        pairs = [(float(q), float(a)) for q, a in zip(*levels, strict=True)]
        known = np.array([add or representable(q, a, top) for q, a in pairs])
        self.lost = np.asarray((counts[:, ~known] > 0).any(axis=1))
        """(n,) runs with a level that has no dots."""
        used = np.flatnonzero((counts > 0).any(axis=0) & known)
        self.counts, pairs = counts[:, used], [pairs[j] for j in used]
        self.parts = [
            [Part(rate=q, ratio=a, low=low, top=top, add=add, jumps=jumps) for q, a in pairs]
            for jumps in (False, True)
        ]
        self.logs = [np.full((len(counts), RUNGS.size), np.inf)] * 2
        if pairs:
            rest, jump = (np.stack([log_moments(part) for part in parts]) for parts in self.parts)
            moments = self.counts @ rest
            once = np.log(np.expm1(self.counts @ np.logaddexp(0.0, jump - rest)))
            self.logs = [moments, moments + once]

    def chernoff_epsilon(self, goal: Floats) -> Floats:
        """An upper bound of epsilon, (n,): each part has half of delta."""
        each = [_least((logs + RUNG_COSTS - goal[:, None] + math.log(2)) / RUNGS) for logs in self.logs]
        return np.maximum(*each)

    def chernoff_delta(self, at: Floats) -> Floats:
        """An upper bound of log delta, (n,)."""
        return np.logaddexp(*(_least(logs - at[:, None] * RUNGS + RUNG_COSTS) for logs in self.logs))

    def lines(self, at: Floats, goal: Floats, finer: Places) -> Floats:
        """(n, 6): rung, nodes and period times abscissa, for the rest and for the jumps; 0 nodes stand for
        Chernoff's inequality at that rung. at, goal: epsilon and log delta, about; finer: added effort."""
        return np.stack([column for logs in self.logs for column in _line(logs, at, goal, finer)], axis=1)

    def total(self, rows: NDArray[np.intp], lines: Floats, at: Floats, goal: Floats) -> Total:
        """The bound for some of the runs, on lines that are the same for all."""
        counts, tails, chernoffs, largest = self.counts[rows], [], [], 0.0
        moments: list[Floats] = []
        if not self.parts[0]:
            return Total(tails=[], chernoffs=[], mass=np.full(rows.size, np.inf), blur=0.0, moments=[])
        for jumps, (rung, nodes, turns) in enumerate(lines.reshape(2, 3)):
            logs, c = self.logs[jumps][rows, int(rung)], float(RUNGS[int(rung)])
            if nodes == 0:
                height = logs + RUNG_COSTS[int(rung)]
                # Height and slope may cancel to far less than either.
                room = 32 * UNIT * np.where(np.isfinite(height), 1 + np.abs(height), 0.0)
                chernoffs.append((height + room, np.full(rows.size, c)))
                continue
            spacing = 2 * math.pi * c / float(turns)
            excess = float((logs - c * at - math.log(c) - goal).max())
            blur = float(_blur(spacing, float(nodes), excess))
            largest = max(largest, blur)
            moments.append(self.logs[jumps][rows])
            tails.append(self._tail(counts, bool(jumps), (c, spacing, int(nodes), blur), float(at.max())))
        mass = counts @ np.array([beyond(part) for part in self.parts[0]]) * (1 + 1e-12)
        mass = np.where(self.lost[rows], np.inf, mass)
        return Total(tails=tails, chernoffs=chernoffs, mass=mass, blur=largest, moments=moments)

    def _tail(
        self, counts: Floats, jumps: bool, line: tuple[float, float, int, float], largest: float
    ) -> Tail:
        c, spacing, count, blur = line
        lines = [tabulate_parts(part, c, spacing, count) for part in self.parts[jumps]]
        rest = np.stack([one.rest for one in lines])
        error = np.array([one.error_rest for one in lines])
        log_scale = counts @ np.array([one.base for one in lines])
        size, inexact = counts @ (np.abs(rest).max(axis=1) + 1), counts @ error
        amplitude = np.exp(product(counts, rest))
        if jumps:
            steps = np.stack([one.jumps for one in lines if one.jumps is not None])
            log_jumps = product(counts, steps)
            expected = log_jumps[:, 0].real
            whole = np.expm1(expected)
            size += counts @ np.abs(steps).max(axis=1)
            inexact += (1 + expected) * (error.max() + max(one.error_jumps for one in lines)) * 1.01
            amplitude, log_scale = amplitude * _expm1(log_jumps) / whole[:, None], log_scale + np.log(whole)
        size += 2 * largest * spacing * count + 64
        inexact += 16 * UNIT * (counts.shape[1] + 2 * math.isqrt(count) + 16 + size)
        nodes = np.asarray(c + 1j * spacing * np.arange(count), np.complex128)
        weight = node_weights(nodes, spacing)
        return Tail(
            abscissa=c,
            period=2 * math.pi / spacing,
            frequencies=np.asarray(nodes.imag, np.float64),
            amplitude=amplitude * (np.exp(0.5 * blur * (nodes * nodes + nodes - c * c - c)) * weight),
            log_scale=log_scale + 0.5 * blur * (c * c + c),
            added=(_truncated(blur, spacing, count) + np.expm1(inexact) * np.abs(weight).sum()) * (1 + 1e-9),
        )


def _least(bounds: Floats) -> Floats:
    return np.asarray(np.where(np.isnan(bounds), np.inf, bounds).min(axis=1))


def _blur(spacing: float | Floats, nodes: float | Floats, excess: float | Floats) -> Floats:
    """Squared mean of a Gaussian step that makes what lies beyond the nodes negligible; excess: the logarithm
    of the moment beside delta."""
    return np.asarray(2 * np.maximum(excess - SMALL, 1.0) / (spacing * nodes) ** 2)


def _truncated(blur: float, spacing: float, count: int) -> float:
    """What lies beyond the nodes, relative to the moment: the Gaussian step bounds every term, and the sum of
    spacing / w^2 over them is at most ``1 / (width - spacing)``."""
    width = spacing * count
    return math.exp(-0.5 * blur * width**2) / (math.pi * (width - spacing))


def enough(epsilon: Floats) -> Floats:
    """By how much an epsilon may be raised and still be called tight."""
    return np.asarray(np.minimum(_ENOUGH * (1 + epsilon / 50), np.maximum(0.002 * epsilon, 1e-7)))


def _line(logs: Floats, at: Floats, goal: Floats, finer: Places) -> list[Floats]:
    """Rung, nodes, and period times abscissa, (n,) each."""
    bound = logs - at[:, None] * RUNGS + RUNG_COSTS
    bound = np.where(np.isnan(bound), np.inf, bound)
    cheap = bound.min(axis=1) < goal + SMALL
    exponent = logs - at[:, None] * RUNGS - np.log(RUNGS * (RUNGS + 1))
    exponent = np.where(np.isfinite(exponent), exponent, np.inf)
    # Beyond the saddle the Gaussian step may be smaller, and little is lost to rounding.
    fit = exponent <= goal[:, None] + _BEYOND_SADDLE
    last = RUNGS.size - 1 - fit[:, ::-1].argmax(axis=1)
    rung = np.where(fit.any(axis=1), last, exponent.argmin(axis=1))
    # An alias on the left is at most the whole measure, itself at most its moment at the first rung.
    turns = np.maximum(np.minimum(logs[:, 0], 0.0) - goal, 0.0) - SMALL
    turns = 2.0 ** (np.ceil(4 * np.log2(turns)) / 4)
    # A period much shorter than epsilon invites aliases as soon as epsilon is a little smaller.
    rung = np.minimum(rung, np.maximum(np.searchsorted(RUNGS, 3 * turns / at) - 1, 0))
    for _ in range(8):
        period = turns / RUNGS[rung]
        far = _least(logs - (at + period)[:, None] * RUNGS + RUNG_COSTS) + turns
        rung = np.maximum(rung - ~(far <= goal + SMALL), 0)
    # Octaves only, so that few tables are made, but where every bit of the abscissa counts.
    rung -= (rung % 2) * (RUNGS[rung] > 1)
    c, spacing = RUNGS[rung], 2 * math.pi * RUNGS[rung] / turns
    excess = logs[np.arange(at.size), rung] - c * at - np.log(c) - goal
    # Where jumps decide, log delta falls faster than at the rate of the abscissa.
    slope = np.maximum(c, _STEEP / at)
    shift = _blur(spacing[:, None], _NODES, excess[:, None]) * (slope + 1)[:, None] / 2
    effort = (shift > 0.9 * enough(at)[:, None]).sum(axis=1) + finer
    nodes = _NODES[np.minimum(effort, _NODES.size - 1)]
    columns = (
        np.where(cheap, bound.argmin(axis=1), rung),
        np.where(cheap, 0, nodes),
        np.where(cheap, 0, turns),
    )
    return [column.astype(np.float64) for column in columns]


def _expm1(x: Amplitudes) -> Amplitudes:
    half = np.sin(x.imag / 2)
    real = np.expm1(x.real) * np.cos(x.imag) - 2 * half * half
    return np.asarray(real + 1j * np.exp(x.real) * np.sin(x.imag))
