"""Exponential moments of a sum of independent inclusions, as rigorous upper bounds."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_STEP: Final = 0.25
_REACH: Final = 12.0
"""Trapezoid with spacing 1/4 on [-12, b sum(w) + 12]: aliasing below 1e-130, truncation below 1e-31
(docs/math)."""
_WIDEST: Final = 400.0
_BLOCK: Final = 1 << 21
_ROUNDING: Final = 1e-13
_BINS: Final = 20_000


def log_square_moment(weights: Array, rates: Array, factor: float) -> float:
    """Upper bound of ``log E exp(factor * S^2)``, ``S = sum_j I_j weights_j``, ``I_j`` independent with
    rates_j.

    weights, rates: (n,), weights >= 0; factor > 0. Hubbard-Stratonovich: the expectation equals
    ``E_z prod_j (1 - q_j + q_j exp(sqrt(2 factor) z w_j))`` for a standard normal z; the integral is a
    trapezoid sum whose error is bounded in docs/math/unlearning_bounds.md. Rounded up by 1e-13 absolute and
    1e-12 relative.

    >>> round(log_square_moment(np.array([1.0]), np.array([1.0]), 0.5), 9)
    0.5
    """
    used = (weights > 0) & (rates > 0)
    b = math.sqrt(2 * factor)
    scaled, rates = b * weights[used], rates[used]
    top = float(scaled.sum())
    if not top < _WIDEST:
        return top * top / 2 * (1 + 1e-12)
    if top == 0:
        return 0.0
    scaled, rates, counts = _merged(scaled, rates)
    z = _STEP * np.arange(-math.ceil(_REACH / _STEP), math.ceil((top + _REACH) / _STEP) + 1)
    exponent = -z * z / 2
    for start in range(0, len(scaled), max(1, _BLOCK // len(z))):
        part = slice(start, start + max(1, _BLOCK // len(z)))
        exponent += _log_mixture(np.outer(z, scaled[part]), rates[part]) @ counts[part]
    peak = float(exponent.max())
    total = peak + math.log(float(np.exp(exponent - peak).sum()) * _STEP / math.sqrt(2 * math.pi))
    return min(max(total, 0.0) * (1 + 1e-12) + _ROUNDING, top * top / 2 * (1 + 1e-12))


def _log_mixture(x: Array, rates: Array) -> Array:
    """``log(1 - q + q e^x)`` without overflow, and without cancellation where it is near zero."""
    result = np.log1p(rates * np.expm1(np.clip(x, -0.5, 30.0)))
    far = np.abs(x - 14.75) > 15.25
    if far.any():
        log_rates = np.broadcast_to(np.log(rates), x.shape)[far]
        with np.errstate(divide="ignore"):
            log_rest = np.broadcast_to(np.log1p(-rates), x.shape)[far]
        result[far] = np.logaddexp(log_rest, x[far] + log_rates)
    return result


def _merged(weights: Array, rates: Array) -> tuple[Array, Array, Array]:
    """Equal (weight, rate) pairs once, with counts. Very long lists are first rounded up to 1 + 2^-10
    relative."""
    if len(weights) > _BINS:
        weights = np.maximum(weights, weights.max() * 1e-12)
        mantissa, exponent = np.frexp(weights)
        weights = np.ldexp(np.ceil(mantissa * 1024) / 1024, exponent)
    pairs, counts = np.unique(np.column_stack([weights, rates]), axis=0, return_counts=True)
    return pairs[:, 0], pairs[:, 1], counts.astype(np.float64)
