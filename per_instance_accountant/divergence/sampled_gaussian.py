"""Renyi divergence of one Poisson-subsampled Gaussian step, rounded up."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln

from per_instance_accountant.divergence import quadrature
from per_instance_accountant.divergence.orders import (
    MAX_ORDER,
    ROUNDING,
    as_float_array,
    as_nonnegative,
    as_orders,
    bad_argument,
)

Floats = NDArray[np.float64]

INFLATION: Final = 2e-10
"""Relative amount by which computed values are raised; above their error (docs/math/sampled_gaussian.md)."""
_SMALLEST_RATE: Final = 1e-15
_SMALLEST_RATIO: Final = 1e-40
_LARGEST_RATIO: Final = 1e6
_SAFE_EXPONENT: Final = 300.0
_LONGEST_SUM: Final = 1024
"""Most terms that are summed in logarithms; beyond it quadrature is cheaper and as exact."""


@np.errstate(all="ignore")
def gaussian_rdp(ratios: ArrayLike, orders: ArrayLike) -> Floats:
    """RDP ``order ratio^2 / 2`` of one Gaussian step, in nats, both directions (Mironov 2017, Proposition 7).

    ratios: scalar or (n,), sensitivity / noise std in [0, inf]. orders: scalar or (m,). Returns (n, m).
    Raises UsageError PIA070 or PIA071.

    >>> gaussian_rdp(0.5, [2.0, 8.0]).tolist()
    [[0.25, 1.0]]
    """
    r = np.atleast_1d(as_nonnegative("ratios", ratios, 1))
    return _positive(r, (r * r / 2)[:, None] * as_orders(orders))


@np.errstate(all="ignore")
def sampled_gaussian_rdp(sample_rate: float, ratios: ArrayLike, orders: ArrayLike) -> Floats:
    """Upper bound, in nats, of the RDP of one Poisson-subsampled Gaussian step, in both directions.

    sample_rate in [0, 1]. ratios: scalar or (n,), sensitivity / noise std in [0, inf]. orders: scalar or (m,)
    in (1, 16384] or inf. Returns (n, m): ``D_order((1 - q) N(0, 1) + q N(ratio, 1) || N(0, 1))``, the larger
    direction (Mironov, Talwar and Zhang 2019), never below the exact value and at most 1e-9 of it above.
    ratio 0 or sample_rate 0 gives exactly 0, ratio inf gives inf, sample_rate 1 gives ``order ratio^2 / 2``,
    rounded up.
    For sample_rate below 1e-15 and ratio above 1e6 the upper bound is looser.
    Integer orders: the finite sum of the same paper without its cancellation; others: quadrature (our
    derivation). Both, with their errors, in docs/math/sampled_gaussian.md.
    Raises UsageError PIA070 or PIA071.

    >>> sampled_gaussian_rdp(0.01, 1.0, [1.5, 2.0, 8.0]).round(12).tolist()
    [[0.000127253743, 0.000171813422, 0.000893643908]]
    """
    rate = as_float_array("sample_rate", sample_rate, 0).item()
    if not 0 <= rate <= 1:
        raise bad_argument("sample_rate", f"is {rate}", "[0, 1]")
    wanted = np.atleast_1d(as_float_array("orders", orders, 1))
    if np.isposinf(wanted).any():
        return _at_infinity(rate, ratios, wanted)
    grid = as_orders(wanted)
    if grid.max() > MAX_ORDER:
        raise bad_argument("orders", f"reach {grid.max()}", f"(1, {MAX_ORDER:.0f}]")
    unsampled = gaussian_rdp(ratios, grid)
    r = np.atleast_1d(np.asarray(ratios, dtype=np.float64))
    if rate == 0:
        return np.zeros_like(unsampled)
    result = unsampled * (1 + ROUNDING)
    inner = (r > 0) & (r <= _LARGEST_RATIO) & (rate < 1)
    if inner.any():
        value = _two_kernels(max(rate, _SMALLEST_RATE), r[inner], grid) * (1 + INFLATION)
        # fmin: the bound without sampling stands in for a value that could not be represented.
        result[inner] = np.fmin(result[inner], value)
    return _positive(r, result)


def _at_infinity(rate: float, ratios: ArrayLike, orders: Floats) -> Floats:
    """Values with order inf among the orders: the likelihood ratio of a Gaussian shift is unbounded."""
    finite = ~np.isposinf(orders)
    r = np.atleast_1d(as_nonnegative("ratios", ratios, 1))
    result = np.repeat(np.where((r > 0) & (rate > 0), np.inf, 0.0)[:, None], orders.size, axis=1)
    if finite.any():
        result[:, finite] = sampled_gaussian_rdp(rate, r, orders[finite])
    return result


def _positive(ratios: Floats, rdp: Floats) -> Floats:
    """Raise an underflow to the smallest normal float: only ratio 0 costs nothing."""
    return np.where((ratios > 0)[:, None], np.maximum(rdp, np.finfo(np.float64).tiny), 0.0)


def _two_kernels(q: float, ratios: Floats, orders: Floats) -> Floats:
    """RDP before inflation, for 0 < q < 1 and ratios in (0, largest]."""
    kept = np.maximum(ratios, _SMALLEST_RATIO)
    whole = orders == np.floor(orders)
    log_moment = np.empty((ratios.size, orders.size))
    if whole.any():
        log_moment[:, whole] = _integer_log_moments(q, kept, orders[whole])
    if not whole.all():
        log_moment[:, ~whole] = quadrature.log_moments(q, kept, orders[~whole])
    # log A is convex in ratio^2 and 0 at 0, so below the smallest ratio it lies under the chord.
    return log_moment * ((ratios / kept) ** 2)[:, None] / (orders - 1)


def _integer_log_moments(q: float, ratios: Floats, orders: Floats) -> Floats:
    """``log A`` with ``A - 1 = sum_{k=2}^{a} P[Bin(a, q) = k] (exp(k (k - 1) ratio^2 / 2) - 1)``, (n, m)."""
    result = np.empty((ratios.size, orders.size))
    log_pmfs = [_log_binomial(int(order), q) for order in orders]
    for rows in np.array_split(np.arange(ratios.size), math.ceil(ratios.size / 128)):
        square = ratios[rows] ** 2
        k = np.arange(2, int(orders.max()) + 1, dtype=np.float64)
        growth = np.expm1(np.minimum(np.outer(square, k * (k - 1) / 2), _SAFE_EXPONENT))
        for column, (order, log_pmf) in enumerate(zip(orders, log_pmfs, strict=True)):
            total = np.einsum("nk,k->n", growth[:, : log_pmf.size], np.exp(log_pmf))
            result[rows, column] = np.log1p(total)
            large = rows[order * (order - 1) / 2 * square > _SAFE_EXPONENT]
            if large.size:
                result[large, column] = _large_log_moments(q, ratios[large], float(order), log_pmf)
    return result


def _large_log_moments(q: float, ratios: Floats, order: float, log_pmf: Floats) -> Floats:
    """``log A``, (n,), where the terms of the sum overflow."""
    result = np.empty(ratios.size)
    # Where order ratio^2 / 2 >= log(order / q) + 5 term k is at most e^(-5 (order - k)) times the last one.
    steep = order * ratios**2 / 2 >= math.log(order / q) + 5
    flat = ~steep
    result[steep] = _sum_in_logs(order, ratios[steep] ** 2, log_pmf[-64:])
    if order <= _LONGEST_SUM:
        result[flat] = _sum_in_logs(order, ratios[flat] ** 2, log_pmf)
    elif flat.any():
        result[flat] = quadrature.log_moments(q, ratios[flat], np.array([order]))[:, 0]
    return result


def _sum_in_logs(order: float, square: Floats, log_pmf: Floats) -> Floats:
    """``log A``, (n,), by the sum over the last terms, whose log binomial weights are given."""
    k = order - np.arange(log_pmf.size - 1, -1, -1)
    exponent = np.outer(square, k * (k - 1) / 2)
    terms = log_pmf + np.where(exponent > 40, exponent, np.log(np.expm1(np.minimum(exponent, 40.0))))
    peak = terms.max(axis=1)
    return np.asarray(np.logaddexp(0.0, peak + np.log(np.exp(terms - peak[:, None]).sum(axis=1))))


def _log_binomial(n: int, q: float) -> Floats:
    """Log probabilities of k = 2 .. n under Binomial(n, q), absolute error of a few ulp of the largest term.

    Stirling's formula with its remainder, so that no difference of large log-gammas is taken.
    """
    k = np.arange(2, n, dtype=np.float64)
    rest = n - k
    entropy = -k * np.log(k / n) - rest * np.log1p(-k / n)
    shape = (
        0.5 * np.log(n / (2 * math.pi * k * rest)) + _stirling(np.float64(n)) - _stirling(k) - _stirling(rest)
    )
    return np.append(entropy + shape + k * math.log(q) + rest * math.log1p(-q), n * math.log(q))


def _stirling(n: Floats | np.float64) -> Floats:
    """``log n! - (n + 1/2) log n + n - log(2 pi) / 2`` for n >= 1."""
    inverse = 1 / (n * n)
    series = (1 / 12 - inverse * (1 / 360 - inverse * (1 / 1260 - inverse / 1680))) / n
    small = np.minimum(n, 20.0)
    direct = gammaln(small + 1) - (small + 0.5) * np.log(small) + small - 0.5 * math.log(2 * math.pi)
    return np.asarray(np.where(n >= 20, series, direct))
