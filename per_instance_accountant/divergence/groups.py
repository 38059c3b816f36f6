"""Renyi divergence of one Poisson-subsampled Gaussian step for a forget set: never a sum of single values."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

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

    Arguments as :func:`group_gaussian_rdp`, orders up to 16384. One instance with the summed ratio dominates
    the group at every integer order (our derivation, docs/math/sampled_gaussian.md); at another order the
    chord between the neighbouring integers is used. Says nothing about the direction without || with.
    Raises UsageError PIA070 or PIA071.

    >>> group_gaussian_rdp_removal(0.01, [0.5, 0.5], [4.0, 8.0]).round(9).tolist()
    [0.000363154, 0.000893644]
    """
    rate, members, grid = _arguments(sample_rate, ratios, orders)
    return _removal(rate, members, grid, _joint_convexity(rate, members, grid))


def _removal(rate: float, members: Floats, grid: Floats, joint: Floats) -> Floats:
    total = members.sum() * (1 + ROUNDING * max(members.size - 1, 0))
    low, high = np.floor(grid), np.ceil(grid)
    values = sampled_gaussian_rdp(rate, total, np.concatenate([np.maximum(low, 2.0), high]))[0]
    left, right = (low - 1) * values[: grid.size], (high - 1) * values[grid.size :]
    chord = (left + (grid - low) * (right - left)) / (grid - 1) * (1 + ROUNDING)
    chord = np.where(low == grid, values[: grid.size], np.where(np.isnan(chord), np.inf, chord))
    return np.asarray(np.minimum(joint, chord))


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
