"""Renyi divergence to (epsilon, delta) and back; every result is an upper bound."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from per_instance_accountant.divergence.orders import (
    ROUNDING,
    as_curve,
    as_float_array,
    as_probability,
    bad_argument,
)


@np.errstate(all="ignore")
def rdp_to_epsilon(orders: ArrayLike, rdp: ArrayLike, delta: float) -> float | NDArray[np.float64]:
    """Smallest epsilon over the given orders at which an RDP curve implies (epsilon, delta)-DP, rounded up.

    orders: (m,), each above 1. rdp: (m,) -> float, or (n, m) -> (n,), in nats. delta in [0, 1].
    Orders whose rdp is inf are skipped; if all are, the result is inf. delta = 1 gives 0; delta = 0 gives inf
    unless the whole curve is 0.
    Source: Canonne, Kamath and Steinke 2020, Proposition 12, minimised over the orders, not below 0.
    Raises UsageError PIA070 (NaN or negative rdp, delta outside [0, 1]) or PIA071 (shapes).

    >>> round(rdp_to_epsilon([2.0, 5.5, 8.0], [1.0, 2.75, 4.0], 1e-5), 6)
    4.728924
    """
    grid, curve = as_curve(orders, rdp)
    probability = as_probability(delta)
    if probability == 1:
        best = np.zeros(curve.shape[:-1])
    elif probability == 0:
        best = np.where((curve == 0).all(axis=-1), 0.0, np.inf)
    else:
        down, up = np.log1p(-1 / grid), -(np.log(probability) + np.log(grid)) / (grid - 1)
        slack = ROUNDING * (-down + (np.log(grid) - np.log(probability)) / (grid - 1))
        best = np.min(curve * (1 + ROUNDING) + (down + up + slack), axis=-1)
        best = np.where((curve == 0).all(axis=-1), 0.0, np.maximum(best, 0.0))
    return float(best) if curve.ndim == 1 else np.asarray(best)


@np.errstate(all="ignore")
def rdp_to_delta(orders: ArrayLike, rdp: ArrayLike, epsilon: float) -> float | NDArray[np.float64]:
    """Smallest delta over the given orders at which an RDP curve implies (epsilon, delta)-DP, rounded up.

    orders: (m,), each above 1. rdp: (m,) -> float, or (n, m) -> (n,), in nats. epsilon in [0, inf].
    The result is in [0, 1]. Source: Canonne, Kamath and Steinke 2020, Proposition 12, solved for delta.
    Raises UsageError PIA070 (NaN or negative rdp or epsilon) or PIA071 (shapes).

    >>> round(rdp_to_delta([2.0, 5.5, 8.0], [1.0, 2.75, 4.0], 4.728924276), 9)
    1e-05
    """
    grid, curve = as_curve(orders, rdp)
    target = as_float_array("epsilon", epsilon, 0).item()
    if not target >= 0:
        raise bad_argument("epsilon", f"is {target}", "[0, inf]")
    if target == np.inf:
        delta = np.where(np.isfinite(curve).any(axis=-1), 0.0, 1.0)
    else:
        offset = np.log1p(-1 / grid) - target
        slack = ROUNDING * ((grid - 1) * (curve + np.abs(offset)) + np.log(grid) + 1)
        exponent = (grid - 1) * (curve + offset) - np.log(grid) + slack
        exponent = np.where(np.isfinite(curve), exponent, np.inf)
        # The smallest positive float keeps an underflow on the safe side.
        delta = np.minimum(
            np.maximum(np.exp(np.minimum(exponent.min(axis=-1), 0.0)), np.nextafter(0.0, 1.0)), 1.0
        )
        delta = np.where((curve == 0).all(axis=-1), 0.0, delta)
    return float(delta) if curve.ndim == 1 else np.asarray(delta)
