"""Log-moment of the sampled Gaussian mechanism at any real order, by quadrature without cancellation.

With z ~ N(0, 1), y = ratio z - ratio^2 / 2, u = q (e^y - 1), l = log(1 + u), h = order - 1 and
E2(x) = e^x - 1 - x:

    A - 1 = E[(1 + u)^order - 1 - order u] = E[(1 + u) (E2(h l) + h E2(-l))],

a sum of non-negative terms. docs/math/sampled_gaussian.md derives it and the errors of both rules below.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_REACH: Final = 8.6
"""Half-width, in standard deviations, of the window kept around each bump: the tail beyond is below 2e-17."""
_STEP: Final = 0.4
_PANEL: Final = 3.0
_SERIES: Final = [1 / math.factorial(k) for k in range(10, 1, -1)]
_GAUSS_X, _GAUSS_W = np.polynomial.legendre.leggauss(12)
_LOG_SQRT_2PI: Final = 0.5 * math.log(2 * math.pi)


def log_moments(sample_rate: float, ratios: Floats, orders: Floats) -> Floats:
    """``log A`` for every pair, (n, m); sample_rate in (0, 1), ratios (n,) above 0, orders (m,) above 1.

    The nodes of a ratio depend on its octave, not on the other ratios: equal ratios have bit-equal values in
    every call with the same orders.
    """
    result = np.empty((ratios.size, orders.size))
    octave = np.frexp(ratios)[1]
    for columns in _order_groups(orders):
        excess = orders[columns] - 1
        reach = orders[columns[-1]] * ratios
        shared = (octave <= 1) & ((reach <= 24) | (reach * ratios <= 8))
        # Ratios far below 1 / order need no octave of their own.
        key = np.where(shared, np.maximum(octave, -2 - np.frexp(orders[columns[-1]])[1]), octave)
        for chosen, kernel in ((shared, _on_lattice), (~shared, _on_panels)):
            for exponent in np.unique(key[chosen]):
                rows = np.flatnonzero(chosen & (key == exponent))
                for block in np.array_split(rows, math.ceil(rows.size / 128)):
                    result[np.ix_(block, columns)] = kernel(sample_rate, ratios[block], excess, 2.0**exponent)
    return result


def _order_groups(orders: Floats) -> list[NDArray[np.intp]]:
    """Indices of the orders, ascending, in groups whose orders minus 1 differ by a factor of at most 8."""
    ranks = np.argsort(orders, kind="stable")
    excess = orders[ranks] - 1
    starts = [0]
    while (stop := int(np.searchsorted(excess, 8 * excess[starts[-1]], side="right"))) < orders.size:
        starts.append(stop)
    return np.split(ranks, starts[1:])


def _exp_excess(x: Floats) -> Floats:
    """``e^x - 1 - x``, relative error below 1e-14."""
    small = np.abs(x) < 0.05
    t = np.where(small, x, 0.0)
    series = np.full_like(t, _SERIES[0])
    for coefficient in _SERIES[1:]:
        series *= t
        series += coefficient
    return np.asarray(np.where(small, t * t * series, np.expm1(x) - x))


def _on_lattice(q: float, ratios: Floats, excess: Floats, largest: float) -> Floats:
    """Trapezoidal rule on one lattice for ratios below ``largest <= 2`` and a group of orders, (n, m)."""
    step = _STEP / max(1.0, largest)
    z = np.arange(-_REACH, _REACH + max(2.0, 1 + excess[-1]) * largest + step, step)
    log_ratio = np.log1p(q * np.expm1(ratios[:, None] * z - (ratios * ratios / 2)[:, None]))
    base = log_ratio + (math.log(step) - _LOG_SQRT_2PI - z * z / 2)
    mass = np.exp(base)
    near = np.abs(log_ratio) * excess[-1] <= 0.5
    rest = (mass * _exp_excess(-log_ratio)).sum(axis=1)[:, None] * excess
    rest += _by_moments(np.where(near, mass, 0.0), log_ratio, excess)
    up, down = (q * np.expm1(sign * largest * (np.abs(z) + largest / 2)) for sign in (1, -1))
    far = np.maximum(np.log1p(up), -np.log1p(down)) * excess[-1] > 0.5
    if not far.any():
        return np.asarray(np.log1p(rest))
    log_ratio, base = np.compress(far, log_ratio, axis=1), np.compress(far, base, axis=1)
    base[np.compress(far, near, axis=1)] = -np.inf
    mass = np.exp(base)
    rest -= mass.sum(axis=1)[:, None] + (mass * log_ratio).sum(axis=1)[:, None] * excess
    result, work = np.empty_like(rest), np.empty_like(base)
    for column, h in enumerate(excess):
        np.multiply(log_ratio, h, out=work)
        work += base
        peak = np.maximum(work.max(axis=1), 0.0)
        work -= peak[:, None]
        total = np.exp(work, out=work).sum(axis=1)
        # Above e^300 what is left out is below the last bit; below it nothing overflows.
        small = np.log1p(np.exp(np.minimum(peak, 300.0)) * total + rest[:, column])
        result[:, column] = np.where(peak < 300, small, peak + np.log(total))
    return np.asarray(result)


def _by_moments(mass: Floats, log_ratio: Floats, excess: Floats) -> Floats:
    """``sum mass E2(h l)`` where ``|h l| <= 1/2``, as a power series in h whose moments serve every order."""
    power = mass * log_ratio
    total = np.zeros((mass.shape[0], excess.size))
    for k in range(2, 16):
        power *= log_ratio
        total += (power.sum(axis=1) / math.factorial(k))[:, None] * excess**k
    return np.asarray(total)


def _on_panels(q: float, ratios: Floats, excess: Floats, largest: float) -> Floats:
    """Gauss-Legendre panels laid out for each pair, ratios in [largest / 2, largest), (n, m)."""
    r, h = (pair.ravel() for pair in np.broadcast_arrays(ratios[:, None], excess))
    blocks = np.array_split(np.arange(r.size), math.ceil(r.size / 32))
    return np.concatenate([_panel_block(q, r[block], h[block], largest) for block in blocks]).reshape(
        -1, excess.size
    )


def _panel_block(q: float, ratios: Floats, excess: Floats, largest: float) -> Floats:
    log_q, log_odds = math.log(q), math.log1p(-q) - math.log(q)
    r, h = ratios[:, None], excess[:, None]
    switch = log_odds / r + r / 2
    edges = _panel_edges(r, 1 + h, switch, largest)
    half = np.diff(edges, axis=1) / 2
    t = ((edges[:, :-1] + half)[:, :, None] + half[:, :, None] * _GAUSS_X).reshape(ratios.size, -1)
    weight = (half[:, :, None] * _GAUSS_W).reshape(ratios.size, -1)
    # w: log odds of having been sampled given the output; above 0, squares are completed around z = ratio.
    w, z = r * t, t + switch
    y, soft = w + log_odds, np.log1p(np.exp(-np.abs(w)))
    u = q * np.expm1(np.minimum(y, 600.0))
    # Where 1 + u cancels, or would overflow, its logarithm is the log-sum of its two parts.
    parts = soft + np.where(w > 0, log_q + y, math.log1p(-q))
    log_ratio = np.where((u < -0.5) | (y > 600), parts, np.log1p(np.maximum(u, -0.5)))
    base = np.where(w > 0, log_q + soft - 0.5 * (z - r) ** 2, log_ratio - 0.5 * z * z)
    v = h * log_ratio
    peak = (base + np.maximum(v, 0.0)).max(axis=1)
    base -= peak[:, None]
    large = v > 40
    bracket = np.where(large, 0.0, _exp_excess(np.minimum(v, 40.0))) + h * _exp_excess(-log_ratio)
    total = (weight * (np.exp(base) * bracket + np.where(large, np.exp(base + v), 0.0))).sum(axis=1)
    return np.asarray(np.logaddexp(0.0, peak + np.log(total) - _LOG_SQRT_2PI))


def _panel_edges(r: Floats, order: Floats, switch: Floats, largest: float) -> Floats:
    """Sorted panel edges (p, e) relative to the switch: fine around 0, r, 2r, order r, graded there."""
    zero, spread = np.zeros_like(r), np.minimum(1.5 / r, order * r)
    if largest <= 2:
        bumps = [(zero, zero, np.maximum(spread, 2 * r)), (order * r, spread, zero)]
    else:
        bumps = [(zero, zero, spread), (r, zero, zero), (2 * r, zero, zero), (order * r, spread, zero)]
    widest = 2 * _REACH + (max(3 / largest, 2 * largest) if largest <= 2 else 3 / largest)
    fractions = np.linspace(0, 1, math.ceil(widest / _PANEL) + 1)
    windows = []
    for centre, left, right in bumps:
        low, high = centre - _REACH - left, centre + _REACH + right
        windows.append(low + (high - low) * fractions)
    # Away from the switch by 2^7 / r the integrand has no bump that a window above would miss.
    scales = 2.0 ** np.arange(1, min(7, math.ceil(math.log2(max(8 * largest, 4)))) + 1)
    graded = np.concatenate([-scales[::-1], [0.0], scales]) / r
    edges = np.concatenate([np.concatenate(windows, axis=1) - switch, graded], axis=1)
    low, high = -_REACH - switch, np.maximum(order, 2) * r + _REACH - switch
    return np.asarray(np.sort(np.clip(edges, low, high), axis=1))
