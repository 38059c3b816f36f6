"""Exponential moments of a sum of independent inclusions, as rigorous upper bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_STEP: Final = 0.5
_REACH: Final = 9.0
"""Trapezoid with spacing 1/2 on [-9, b sum(w) + 9]: aliasing below 1e-33, truncation below 1e-16."""
_WIDEST: Final = 400.0
_BLOCK: Final = 1 << 20
_ROUNDING: Final = 1e-13
_FEW: Final = 500
_BINS: Final = 20_000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inclusions:
    """Independent coins: ``counts[j]`` of them have probability ``rates[j]``, weight ``weights[j]``; (n,)."""

    weights: Array
    rates: Array
    counts: Array

    @classmethod
    def of(cls, weights: Array, rates: Array) -> Inclusions:
        """Equal coins are counted. Of more than 500, weights below 1e-12 of the largest are raised to that;
        more than 20,000 are all rounded up, by at most 2^-10 relative.

        >>> Inclusions.of(np.array([1.0, 2.0, 1.0]), np.array([0.1, 0.1, 0.1])).counts.tolist()
        [2.0, 1.0]
        """
        used = (weights > 0) & (rates > 0)
        weights, rates = weights[used], rates[used]
        if len(weights) > _FEW:
            weights = np.maximum(weights, weights.max() * 1e-12)
        if len(weights) > _BINS:
            mantissa, exponent = np.frexp(weights)
            weights = np.ldexp(np.ceil(mantissa * 1024) / 1024, exponent)
        pairs, counts = np.unique(np.column_stack([weights, rates]), axis=0, return_counts=True)
        return cls(weights=pairs[:, 0], rates=pairs[:, 1], counts=counts.astype(np.float64))

    def log_square_moment(self, factor: float) -> float:
        """Upper bound of ``log E exp(factor * S^2)``, S the sum of the weights of the coins that fall.

        Hubbard-Stratonovich: it equals ``E_z prod_j (1 - q_j + q_j exp(sqrt(2 factor) z w_j))`` for
        standard normal z, a trapezoid sum whose error is bounded in docs/math/unlearning_bounds.md.
        Rounded up by 1e-13 absolute and 1e-12 relative.

        >>> round(Inclusions.of(np.array([1.0]), np.array([1.0])).log_square_moment(0.5), 9)
        0.5
        """
        scaled = math.sqrt(2 * factor) * self.weights
        top = float(self.counts @ scaled)
        always = top * top / 2 * (1 + 1e-12)
        if not 0 < top < _WIDEST:
            return always
        z = _STEP * np.arange(-math.ceil(_REACH / _STEP), math.ceil((top + _REACH) / _STEP) + 1)
        exponent = -z * z / 2
        for start in range(0, len(scaled), max(1, _BLOCK // len(z))):
            part = slice(start, start + max(1, _BLOCK // len(z)))
            exponent += _log_mixture(np.outer(z, scaled[part]), self.rates[part]) @ self.counts[part]
        peak = float(exponent.max())
        total = peak + math.log(float(np.exp(exponent - peak).sum()) * _STEP / math.sqrt(2 * math.pi))
        return min(max(total, 0.0) * (1 + 1e-12) + _ROUNDING, always)


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
