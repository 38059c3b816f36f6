"""Tables of the two parts of sampled Gaussian steps, with and without a jump, on a line of the complex
plane.

The window ``Phi((z - middle) / width)`` parts the law of one step, ``z ~ N(0, 1)`` weighted by r(z)
to the power 1 + s, into jumps and the rest; Phi is analytic and ``|Phi(x + i y)| <= exp(y^2 / 2)
Phi(x)``. Derivation: docs/math/tight_epsilon.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

from per_instance_accountant.divergence.contour import UNIT

Floats = NDArray[np.float64]
Amplitudes = NDArray[np.complex128]

RUNGS: Final = 2.0 ** (np.arange(-6, 25) / 2)
"""Abscissas at which the rest is bounded."""
EDGES: Final = np.append(1.5 ** np.arange(12), np.inf)
"""Blocks of frequencies beyond the nodes, relative to the first one left out."""
_HEIGHTS: Final = np.array([0.03, 0.1, 0.25, 0.5, 0.7, 0.9])
"""Shifts of the line of integration in z that bound the jumps, relative to pi / a."""
_REACH: Final = 9.5
_CUT: Final = 45.0
_ACCURACY: Final = 40.0
_MOST_POINTS: Final = 100_000
_LOG_SQRT_2PI: Final = 0.5 * math.log(2 * math.pi)
_AT_ONCE: Final = 1 << 20
"""Products held at once."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parts:
    """k levels on one line of n nodes.

    rest: (k, n) complex, log of b relative to b(c). quotient: (k, n) complex, ``u / b``. beyond:
    (k, g) upper bounds of ``|u| / b(c)`` at and above each of g frequencies. error: (k,) of b and u,
    relative to b(c) and u(c). base: (k,) ``log b(c)``. rungs: (k, r) upper bounds of log b at the
    rungs; whole: the same of ``log (b + u)``.
    """

    rest: Amplitudes
    quotient: Amplitudes
    beyond: Floats
    error: Floats
    base: Floats
    rungs: Floats
    whole: Floats


def jump_place(loss: Floats | float, q: Floats, a: Floats) -> Floats:
    """The z at which a step loses ``loss`` > 0."""
    return np.asarray((loss + np.log(-np.expm1(-loss) + q * np.exp(-loss)) - np.log(q)) / a + a / 2)


@lru_cache(maxsize=24)
def tabulate_parts(
    rates: bytes, ratios: bytes, top: float, abscissa: float, spacing: float, count: int
) -> Parts:
    """Tables of the levels, in blocks of about equal lattices."""
    q, a = np.frombuffer(rates), np.frombuffer(ratios)
    start, width = _windows(q, a, top, abscissa)
    high = 2 * _REACH + (1 + abscissa) * a
    steps = np.stack([_step(a, width, spacing * count), _step(a, width, 0.0)])
    points = np.ceil((high + _REACH) / steps[0]).astype(np.int64) + 1
    made: list[tuple[NDArray[Any], ...]] = []
    order = np.argsort(points, kind="stable")
    cost = np.cumsum(points[order] * math.isqrt(count))
    for block in np.split(order, np.flatnonzero(np.diff(cost // _AT_ONCE)) + 1):
        lattice = (-_REACH, high[block], int(points[block].max()), steps[1][block])
        window = (start[block], width[block])
        made.append(_block(q[block], a[block], window, lattice, (abscissa, spacing, count)))
    columns = [np.concatenate(column)[np.argsort(order)] for column in zip(*made, strict=True)]
    names = ("rest", "quotient", "beyond", "error", "base", "rungs", "whole")
    return Parts(**dict(zip(names, columns, strict=True)))


def _windows(q: Floats, a: Floats, top: float, abscissa: float) -> tuple[Floats, Floats]:
    """Middle and width of ``Phi((z - middle) / width)``, the share of the jumps; infinite middle:
    no jumps."""
    start, end = jump_place(top / 4, q, a), jump_place(top, q, a)
    never = start >= (1 + abscissa) * a + 8
    return np.where(never, np.inf, start), np.where(never, 1.0, (end - start) / 6)


def _step(a: Floats, width: Floats, top: float) -> Floats:
    """(k,) lattice steps with which the strips ``|Im z| < y < pi / a`` bound the error below
    ``exp(-_ACCURACY)``."""
    y = np.minimum(0.95 * math.pi / a, 8.0)[:, None] * np.linspace(0.01, 1, 100)
    growth = math.log(2.01) + y * y / 2 * (1 + 1 / width[:, None] ** 2) + top * a[:, None] * y
    return np.asarray(np.minimum((2 * math.pi * y / (_ACCURACY + growth)).max(axis=1), 0.2))


@np.errstate(all="ignore")
def _block(
    q: Floats,
    a: Floats,
    window: tuple[Floats, Floats],
    lattice: tuple[float, Floats, int, Floats],
    line: tuple[float, float, int],
) -> tuple[NDArray[Any], ...]:
    """rest, quotient, beyond, error, base, rungs, whole of b levels."""
    low, high, points, coarse = lattice
    abscissa, _, count = line
    if points > _MOST_POINTS:
        unknown = np.full((a.size, RUNGS.size), np.inf)
        rest = np.zeros((a.size, count), complex)
        return rest, rest + 1, unknown[:, : EDGES.size - 1], unknown[:, 0], unknown[:, 0], unknown, unknown
    step = (high - low) / (points - 1)
    z = low + step[:, None] * np.arange(points)
    loss, place = _loss(q, a, z), (z - window[0][:, None]) / window[1][:, None]
    outside, inside = log_ndtr(-place), log_ndtr(place)
    pure = -z * z / 2 + np.log(step)[:, None] - _LOG_SQRT_2PI
    tilted = (1 + abscissa) * loss + pure
    b, log_b, wrong_b = _sums(tilted + outside, (q, a, z, loss, outside), line)
    u, log_u, wrong_u = _sums(tilted + inside, (q, a, z, loss, inside), line)
    b = np.where(np.abs(b) < 1e-18, 1e-18, b)
    ratio = np.where(np.isfinite(log_u), np.exp(log_u - log_b), 0.0)
    u = np.where(ratio[:, None] > 0, u, 0.0)
    stride = max(1, int((0.05 / step).min()))
    beyond = _beyond(q, a, z[:, ::stride], (tilted + inside)[:, ::stride] + math.log(stride), window[1], line)
    beyond = np.exp(np.minimum(beyond - log_b[:, None], 700.0)) + ratio[:, None] * math.exp(-_ACCURACY)
    beyond = np.where(ratio[:, None] > 0, np.minimum(beyond, ratio[:, None] * 1.001), 0.0)
    stride = max(1, int((coarse / step).min()))
    rungs = _moments(loss[:, ::stride], (pure + outside)[:, ::stride] + math.log(stride))
    wrong = np.maximum(wrong_b, np.where(ratio > 0, wrong_u, 0.0))
    whole = _moments(loss[:, ::stride], pure[:, ::stride] + math.log(stride))
    return np.log(b), u / b * ratio[:, None], beyond, wrong, log_b, rungs, whole


def _loss(q: Floats, a: Floats, z: Floats) -> Floats:
    """``log(1 - q + q exp(a z - a^2 / 2))``, (b, p), q at most 1 / 2."""
    y = a[:, None] * z - (a * a / 2)[:, None]
    rate = q[:, None]
    low = np.log1p(rate * np.expm1(np.minimum(y, 30.0)))
    high = y + np.log(rate) + np.log1p((1 - rate) / rate * np.exp(-np.maximum(y, 30.0)))
    return np.asarray(np.where(y > 30, high, low))


def _sums(
    log_weight: Floats, terms: tuple[Floats, ...], line: tuple[float, float, int]
) -> tuple[Amplitudes, Floats, Floats]:
    """``sum exp(log_weight + i w loss)`` at the nodes relative to w = 0; its logarithm there; errors
    relative to it."""
    q, a, z, loss, window = terms
    abscissa, spacing, count = line
    peak = log_weight.max(axis=1)
    kept = np.flatnonzero((log_weight > peak[:, None] - _CUT).any(axis=0))
    if not kept.size:
        dead = np.full(len(z), -np.inf)
        return np.zeros((len(z), count), complex), dead, np.zeros(len(z))
    part = slice(int(kept[0]), int(kept[-1]) + 1)
    weight = np.exp(log_weight[:, part] - peak[:, None])
    total = weight.sum(axis=1)
    weight /= total[:, None]
    sums = _turned(weight, loss[:, part], spacing, count)
    sums[:, 0] = 1.0
    y = np.abs(a[:, None] * z[:, part]) + (a * a)[:, None]
    power = 1 + abscissa + spacing * count
    each = 16 + z[:, part] ** 2 + np.abs(window[:, part]) * 16
    each += power * (2 * np.abs(loss[:, part]) + np.minimum(y, 2.0 + y * -np.expm1(-np.abs(loss[:, part]))))
    each += np.where(y > 30, power * (1 - np.log(q))[:, None], 0.0)
    error = 4 * UNIT * ((weight * each).sum(axis=1) + z.shape[1]) + z.shape[1] * math.exp(-_CUT)
    error += 4 * math.exp(-_ACCURACY)
    return sums, peak + np.log(total), error


def _turned(weight: Floats, loss: Floats, spacing: float, count: int) -> Amplitudes:
    """``sum weight exp(i spacing m loss)``, m = 0 .. count - 1: m in two digits, one matrix product."""
    fine = np.arange(math.isqrt(count))
    sums = np.zeros((len(weight), fine.size, fine.size), dtype=np.complex128)
    for place in np.array_split(np.arange(weight.shape[1]), math.ceil(weight.size * fine.size / _AT_ONCE)):
        turn = 1j * spacing * loss[:, None, place]
        within = np.exp(fine[:, None] * turn)
        across = np.exp((fine.size * fine)[:, None] * turn) * weight[:, None, place]
        sums += np.matmul(across, within.transpose(0, 2, 1))
    return sums.reshape(len(weight), count)


def _beyond(
    q: Floats, a: Floats, z: Floats, log_weight: Floats, width: Floats, line: tuple[float, float, int]
) -> Floats:
    """(b, g) upper bounds of ``log |u|`` at and above the edges: on the line ``Im z = y`` the
    modulus falls like ``exp(-w arg r)``, and ``arg r`` rises with Re z."""
    edges = line[1] * line[2] * EDGES[:-1]
    step = z[:, 1] - z[:, 0]
    curvature = 1 + 1 / width**2
    cell = np.maximum(log_weight[:, :-1], log_weight[:, 1:]) + (curvature * step**2 / 8)[:, None]
    odds = (1 - q[:, None]) / q[:, None] * np.exp(-np.clip(a[:, None] * z - (a * a / 2)[:, None], -700, 700))
    peak = cell.max(axis=1)
    mass = np.exp(cell - peak[:, None])
    best = np.full((a.size, edges.size), np.inf)
    for height in _HEIGHTS:
        y = np.minimum(height * math.pi / a, 6.0)
        angle = np.arctan2(np.sin(a * y)[:, None], odds + np.cos(a * y)[:, None])[:, :-1]
        growth = y * y / 2 * curvature
        for j, edge in enumerate(edges):
            value = np.log((mass * np.exp(-edge * angle)).sum(axis=1)) + growth
            best[:, j] = np.minimum(best[:, j], value)
    return np.asarray(best + peak[:, None] + 1e-9)


def _moments(loss: Floats, log_weight: Floats) -> Floats:
    """(b, r) upper bounds of the log moments of the rest at the rungs, inf where the lattice ends
    too soon."""
    result = np.empty((len(loss), RUNGS.size))
    for j, rung in enumerate(RUNGS):
        value = (1 + rung) * loss + log_weight
        peak = value.max(axis=1)
        result[:, j] = peak + np.log(np.exp(value - peak[:, None]).sum(axis=1))
        result[value[:, -1] > peak - _CUT, j] = np.inf
    return result + 1e-12 + np.abs(result) * 1e-14
