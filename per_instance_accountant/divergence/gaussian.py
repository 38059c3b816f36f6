"""Gaussian DP: exact (epsilon, delta) of ``N(0, 1)`` against ``N(mu, 1)``, rounded to the safe side."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import erfcx, ndtr

from per_instance_accountant.divergence.orders import ROUNDING, as_nonnegative, as_probability

Floats = NDArray[np.float64]

_SLACK: Final = 1e-12
"""Slack on log delta, above the error of its evaluation (docs/math/conversions.md)."""
_GAUSS_X, _GAUSS_W = np.polynomial.legendre.leggauss(6)
_TAIL: Final = [float((-1) ** k * math.prod(range(2 * k + 1, 0, -2))) for k in range(16, -1, -1)]


def _mills(x: Floats) -> Floats:
    """``P[Z > x] / phi(x)``."""
    return np.asarray(math.sqrt(math.pi / 2) * erfcx(x / math.sqrt(2)))


def _mills_slope(x: Floats) -> Floats:
    """Minus the derivative of the Mills ratio, ``1 - x mills(x)``, without cancellation for x >= -1."""
    far = np.maximum(x, 12.0)
    inverse = 1 / (far * far)
    series = np.full_like(far, _TAIL[0])
    for coefficient in _TAIL[1:]:
        series = series * inverse + coefficient
    near = np.minimum(x, 12.0)
    return np.where(x > 12, series * inverse, 1 - near * _mills(near))


def _log_delta(mu: Floats, x: Floats) -> Floats:
    """Upper bound of log delta at ``epsilon = mu (x + mu / 2) >= 0``, mu (n,) in (0, inf), x (n,) finite.

    delta = phi(x) (mills(x) - mills(x + mu)) because ``e^epsilon phi(x + mu) = phi(x)``.
    """
    right = np.maximum(x, -1.0)
    difference = _mills(right) - _mills(right + mu)
    thin = mu <= 0.1 * np.maximum(right, 1.0)
    half = mu[thin] / 2
    difference[thin] = half * (_mills_slope(right[thin][:, None] + half[:, None] * (1 + _GAUSS_X)) @ _GAUSS_W)
    tail = (
        -0.5 * right * right
        - 0.5 * math.log(2 * math.pi)
        + np.log(np.maximum(difference, np.nextafter(0.0, 1.0)))
    )
    left = np.minimum(x, -1.0)
    density = np.exp(-0.5 * np.minimum(left * left, 2000.0)) / math.sqrt(2 * math.pi)
    bulk = np.log(np.maximum(ndtr(-left) - density * _mills(np.maximum(left + mu, 0.0)), 1e-300))
    value = np.where(x < -1, bulk, tail)
    return np.asarray(np.minimum(value + _SLACK + ROUNDING * np.abs(value), 0.0))


def _log_delta_at(mu: Floats, epsilon: Floats) -> Floats:
    """Upper bound of log delta at mu (n,) in (0, inf) and epsilon in [0, inf)."""
    quotient = epsilon / mu
    x = np.where(np.isfinite(quotient), quotient - mu / 2 - ROUNDING * (quotient + mu / 2), 1e300)
    return np.where(x > 1e150, -np.inf, _log_delta(mu, np.minimum(x, 1e150)))


def _positive_delta(log_delta: Floats) -> Floats:
    """exp that raises an underflow to the smallest float."""
    return np.maximum(np.exp(log_delta), np.nextafter(0.0, 1.0))


def _scalar_or_array(value: Floats, shape: tuple[int, ...]) -> float | Floats:
    return float(value.reshape(())) if shape == () else value.reshape(shape)


@np.errstate(all="ignore")
def gaussian_delta(mu: ArrayLike, epsilon: ArrayLike) -> float | Floats:
    """Smallest delta at which mu-GDP implies (epsilon, delta)-DP, rounded up, in [0, 1].

    mu, epsilon: scalars or arrays in [0, inf] that broadcast. Returns the broadcast shape, float for scalars.
    ``Phi(mu / 2 - epsilon / mu) - e^epsilon Phi(-mu / 2 - epsilon / mu)`` (Balle and Wang 2018, Theorem 8),
    evaluated as a difference of Mills ratios, docs/math/conversions.md.
    Raises UsageError PIA070 or PIA071.

    >>> round(gaussian_delta(1.0, 1.0), 10)
    0.1269367375
    """
    m, e = np.broadcast_arrays(as_nonnegative("mu", mu, 2), as_nonnegative("epsilon", epsilon, 2))
    ordinary = (m > 0) & np.isfinite(m) & np.isfinite(e)
    delta = np.where(np.isinf(m), 1.0, 0.0)
    if ordinary.any():
        delta[ordinary] = _positive_delta(_log_delta_at(m[ordinary], e[ordinary]))
    return _scalar_or_array(delta, m.shape)


@np.errstate(all="ignore")
def gaussian_epsilon(mu: ArrayLike, delta: float) -> float | Floats:
    """Smallest epsilon at which mu-GDP implies (epsilon, delta)-DP, rounded up.

    mu: scalar or (n,) in [0, inf]. delta in [0, 1]; 0 gives inf unless mu is 0. Returns float or (n,).
    Inverts :func:`gaussian_delta` by bisection and returns the end at which its delta is not exceeded.
    Raises UsageError PIA070 or PIA071.

    >>> round(gaussian_epsilon(1.0, 1e-5), 8)
    4.3771781
    """
    m, probability = as_nonnegative("mu", mu, 2), as_probability(delta)
    epsilon = np.where(m > 0, np.inf if probability < 1 else 0.0, 0.0)
    ordinary = (m > 0) & np.isfinite(m)
    if not ordinary.any() or probability in (0.0, 1.0):
        return _scalar_or_array(epsilon, m.shape)
    kept, log_target = m[ordinary], math.log(probability)
    # x = epsilon / mu - mu / 2; delta < exp(-x^2 / 2) for x >= 0 bounds it from above.
    low, high = -kept / 2, np.full(kept.shape, math.sqrt(-2 * log_target) + 1e-6)
    free = _log_delta(kept, low) <= log_target
    for _ in range(64):
        middle = (low + high) / 2
        enough = _log_delta(kept, middle) <= log_target
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    bound = kept * (high + kept / 2) + ROUNDING * kept * (np.abs(high) + kept / 2)
    epsilon[ordinary] = np.where(free, 0.0, bound)
    return _scalar_or_array(epsilon, m.shape)


@np.errstate(all="ignore")
def gaussian_mu(epsilon: float, delta: float) -> float:
    """Largest mu for which mu-GDP implies (epsilon, delta)-DP, rounded DOWN (a target to stay below).

    epsilon in [0, inf], delta in [0, 1]. delta = 0 gives 0 and delta = 1 or epsilon = inf gives inf.
    Raises UsageError PIA070 or PIA071.

    >>> round(gaussian_mu(1.0, 1e-5), 9)
    0.268051123
    """
    target, probability = as_nonnegative("epsilon", epsilon, 0), as_probability(delta)
    if probability == 1 or np.isinf(target):
        return math.inf
    if probability == 0:
        return 0.0
    log_target = math.log(probability)
    low, high = -700.0, 1.0
    while _log_delta_at(np.exp([high]), target) <= log_target and high < 300:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        if _log_delta_at(np.exp([middle]), target) <= log_target:
            low = middle
        else:
            high = middle
    return math.exp(low) * (1 - ROUNDING)
