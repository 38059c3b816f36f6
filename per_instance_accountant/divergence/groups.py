"""Renyi divergence of one Poisson-subsampled Gaussian step for a forget set: never a sum of single values."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln

from per_instance_accountant.divergence.orders import (
    ROUNDING,
    as_float_array,
    as_nonnegative,
    as_orders,
    bad_argument,
)
from per_instance_accountant.divergence.sampled_gaussian import gaussian_rdp, sampled_gaussian_rdp

Floats = NDArray[np.float64]

_STEP: Final = 0.5
_REACH: Final = 9.0
_LONGEST: Final = 512.0
"""Largest sqrt(order (order - 1)) sum(ratios) that is integrated; beyond it all-or-none is the bound."""
_LEVELS: Final = 256
_MOST_SUMS: Final = 512
_MOST_PRODUCTS: Final = 2_000_000
_UNIT: Final = float(np.finfo(np.float64).eps)
_SLACK: Final = 2e-10
"""Relative slack: exponents up to _LONGEST^2 / 2 carry a few ulp and may cancel to a value of order 1."""


@np.errstate(all="ignore")
def group_gaussian_rdp(sample_rate: float, ratios: ArrayLike, orders: ArrayLike) -> Floats:
    """Upper bound, in nats, of the RDP of one step for a forget set, in BOTH directions, (m,).

    sample_rate q in [0, 1]: every member is drawn independently with it. ratios: (f,) sensitivity / noise std
    of the members. orders: (m,), each above 1. The larger of :func:`group_gaussian_rdp_removal` and a bound
    of the other direction, the smaller of ``log(E exp(a (a - 1) S^2 / 2)) / (a - 1)`` with ``S = sum_i I_i
    ratio_i``, I_i independent Bernoulli(q), and ``-f log(1 - q)`` (our derivation,
    docs/math/sampled_gaussian.md). Raises UsageError PIA070 or PIA071.

    >>> group_gaussian_rdp(0.01, [0.5, 0.5], [4.0, 8.0]).round(7).tolist()
    [0.0201007, 0.0201007]
    """
    rate, members, grid = _arguments(sample_rate, ratios, orders)
    joint = _joint_convexity(rate, members, grid)
    # All members are left out with probability (1 - q)^f, so the density with the set is at least that share.
    left_out = members.size * -math.log1p(-rate) * (1 + ROUNDING) if rate < 1 else math.inf
    return np.maximum(_removal(rate, members, grid, joint), np.minimum(joint, left_out))


@np.errstate(all="ignore")
def group_gaussian_rdp_removal(sample_rate: float, ratios: ArrayLike, orders: ArrayLike) -> Floats:
    """Upper bound, in nats, of the RDP of one step in the REMOVAL direction (with || without the set), (m,).

    Arguments as :func:`group_gaussian_rdp`, orders up to 16384. At an integer order it is the divergence of
    members whose vectors are parallel, and where their sums take too many values that of one instance with
    the summed ratio (our derivation, docs/math/sampled_gaussian.md); at another order the chord between the
    neighbouring integers is used. Says nothing about the direction without || with.
    Raises UsageError PIA070 or PIA071.

    >>> group_gaussian_rdp_removal(0.01, [0.5, 0.5], [4.0, 8.0]).round(9).tolist()
    [0.000230718, 0.000473529]
    """
    rate, members, grid = _arguments(sample_rate, ratios, orders)
    return _removal(rate, members, grid, _joint_convexity(rate, members, grid))


def _removal(rate: float, members: Floats, grid: Floats, joint: Floats) -> Floats:
    total = members.sum() * (1 + ROUNDING * max(members.size - 1, 0))
    low, high = np.floor(grid), np.ceil(grid)
    whole = np.concatenate([np.maximum(low, 2.0), high])
    values = np.fmin(sampled_gaussian_rdp(rate, total, whole)[0], _aligned(rate, members, whole))
    left, right = (low - 1) * values[: grid.size], (high - 1) * values[grid.size :]
    chord = (left + (grid - low) * (right - left)) / (grid - 1) * (1 + ROUNDING)
    chord = np.where(low == grid, values[: grid.size], np.where(np.isnan(chord), np.inf, chord))
    return np.asarray(np.minimum(joint, chord))


def _aligned(rate: float, members: Floats, whole: Floats) -> Floats:
    """Upper bound of the removal direction at whole orders, (m,): members whose vectors are parallel.

    ``E g(z)^a``, ``g(z) = sum_S p_S exp(S z - S^2 / 2)``, z ~ N(0, 1): a mixture of unit Gaussians, so
    the trapezoidal rule is exact to 1e-33; inf where that would be long.
    """
    result = np.full(whole.size, np.inf)
    if rate in (0.0, 1.0) or not members.size or not np.isfinite(members.sum()):
        return result
    atoms = _sums_of_draws(rate, members)
    if atoms is None:
        return result
    sums, log_share = atoms
    for order in np.unique(whole):
        points = math.ceil((order * float(sums[-1]) + 2 * _REACH) / _STEP) + 2
        if points * sums.size > _MOST_PRODUCTS:
            continue
        z = (np.arange(points) - math.ceil(_REACH / _STEP)) * _STEP
        log_g = np.logaddexp.reduce(np.outer(sums, z) + (log_share - sums * sums / 2)[:, None], axis=0)
        terms = order * log_g - z * z / 2
        value = float(np.logaddexp.reduce(terms)) + math.log(_STEP) - 0.5 * math.log(2 * math.pi)
        # Every exponent is wrong by a few units in the last place of its largest part.
        largest = order * (float(sums[-1]) * float(z[-1]) + float(np.abs(log_share).max()))
        slack = 8 * _UNIT * (largest + float(z[-1]) ** 2 + points + order * sums.size)
        result[whole == order] = (value + slack) / (order - 1)
    return result


def _sums_of_draws(rate: float, members: Floats) -> tuple[Floats, Floats] | None:
    """Values of ``sum_i I_i ratio_i``, rising, and log probabilities; None if they are too many."""
    sizes, counts = np.unique(members, return_counts=True)
    if float(np.prod(counts + 1.0)) > _MOST_SUMS:
        return None
    sums, log_share = np.zeros(1), np.zeros(1)
    for size, count in zip(sizes, counts, strict=True):
        drawn = np.arange(count + 1.0)
        log_binomial = gammaln(count + 1) - gammaln(drawn + 1) - gammaln(count - drawn + 1)
        log_binomial += drawn * math.log(rate) + (count - drawn) * math.log1p(-rate)
        sums = np.add.outer(sums, drawn * size * (1 + ROUNDING)).ravel()
        log_share = np.add.outer(
            log_share, log_binomial + ROUNDING * (1 + gammaln(count + 1) - log_binomial)
        ).ravel()
    order = np.argsort(sums, kind="stable")
    return sums[order], log_share[order]


def _joint_convexity(rate: float, members: Floats, grid: Floats) -> Floats:
    """Upper bound of both directions by joint convexity of ``exp((a - 1) D_a)`` given who was drawn."""
    total = members.sum() * (1 + ROUNDING * max(members.size - 1, 0))
    everybody = gaussian_rdp(total, grid)[0]
    if rate in (0.0, 1.0) or total == 0 or np.isinf(total):
        return everybody if rate == 1 or np.isinf(total) else np.zeros(grid.size)
    sizes, counts = _merged(members)
    scales = np.sqrt(grid * (grid - 1))
    # E exp(c S^2 / 2) is convex in S, so drawing all or none with probability q bounds it.
    exponent = (grid - 1) * everybody
    result = np.logaddexp(math.log1p(-rate), math.log(rate) + exponent)
    result = np.where(exponent < 1, np.log1p(rate * np.expm1(np.minimum(exponent, 1.0))), result) / (grid - 1)
    for j in np.flatnonzero(scales * total <= _LONGEST):
        result[j] = min(result[j], _log_mean_exp_square(rate, scales[j] * sizes, counts) / (grid[j] - 1))
    # Where squares would underflow nothing is gained from sampling.
    result = np.where(scales * total < 1e-100, np.inf, result * (1 + _SLACK))
    return np.asarray(np.fmin(result, everybody * (1 + ROUNDING)))


def _arguments(sample_rate: float, ratios: ArrayLike, orders: ArrayLike) -> tuple[float, Floats, Floats]:
    rate = as_float_array("sample_rate", sample_rate, 0).item()
    if not 0 <= rate <= 1:
        raise bad_argument("sample_rate", f"is {rate}", "[0, 1]")
    members = np.atleast_1d(as_nonnegative("ratios", ratios, 1))
    return float(rate), members[members > 0], as_orders(orders)


def _merged(members: Floats) -> tuple[Floats, Floats]:
    """Distinct ratios and how often each occurs; many distinct ones are first rounded up to a few levels."""
    sizes, counts = np.unique(members, return_counts=True)
    if sizes.size > _LEVELS:
        octaves = np.maximum(np.ceil(np.log2(members / sizes[-1]) * 16) / 16, -16.0)
        rounded = np.maximum(members, sizes[-1] * np.exp2(octaves) * (1 + ROUNDING))
        sizes, counts = np.unique(rounded, return_counts=True)
    return sizes, counts.astype(np.float64)


def _log_mean_exp_square(q: float, sizes: Floats, counts: Floats) -> float:
    """``log E exp((sum_i I_i sizes_i)^2 / 2) = log E_z prod_i (1 - q + q e^{sizes_i z})``, z ~ N(0, 1).

    With the even part s and the odd part d of the log product,
    ``E_z e^{s + d} - 1 = E_z [(e^s - 1) + 2 e^s sinh(d / 2)^2]``: non-negative terms, no cancellation.
    Trapezoidal rule: the integrand is a mixture of unit Gaussians centred at sums of sizes.
    """
    z = np.arange(1, math.ceil((float(counts @ sizes) + _REACH) / _STEP) + 1) * _STEP
    x = np.outer(z, sizes)
    shrink, small = np.exp(-x), np.minimum(x, 600.0)
    # 1 + 4 q (1 - q) sinh(x / 2)^2 is the product of the two factors at x and -x; where it would overflow its
    # logarithm is x plus a constant, and so is that of their quotient.
    even = np.log1p(4 * q * (1 - q) * np.sinh(small / 2) ** 2) + (x - small)
    odd = np.log1p(2 * q * np.sinh(small) / (1 - q + q * shrink)) + (x - small)
    s, d = even @ counts / 2, odd @ counts / 2
    base = -z * z / 2 + math.log(2 * _STEP) - 0.5 * math.log(2 * math.pi)
    # log(2 sinh(d / 2)^2) = d - log 2 + 2 log(1 - e^-d)
    odd_terms = base + s + d - math.log(2) + 2 * np.log(-np.expm1(-d))
    even_terms = base + s + np.log(-np.expm1(-s))
    return float(np.logaddexp(0.0, np.logaddexp.reduce(np.concatenate([odd_terms, even_terms]))))
