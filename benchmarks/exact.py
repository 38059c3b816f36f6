"""Exact values of the sampled Gaussian in 60 digits, slow, written from the definitions only."""

from __future__ import annotations

import mpmath as mp

DIGITS = 60


def rdp_of_step(rate: float, ratio: float, order: float) -> mp.mpf:
    """``log E_{x ~ N(0, 1)}[(1 - q + q exp(r x - r^2 / 2))^a] / (a - 1)``: the sum for whole orders, else the
    trapezoidal rule, whose error falls exponentially in the inverse of its step for analytic integrands."""
    with mp.workdps(DIGITS + 60):
        q, r, a = mp.mpf(rate), mp.mpf(ratio), mp.mpf(order)
        moment = _whole(q, r, int(order)) if order == int(order) else _broken(q, r, a)
        return mp.log(moment) / (a - 1)


def _whole(q: mp.mpf, r: mp.mpf, order: int) -> mp.mpf:
    total, weight = mp.mpf(0), (1 - q) ** order
    for k in range(order + 1):
        total += weight * mp.exp(mp.mpf(k * (k - 1)) / 2 * r**2)
        weight *= mp.mpf(order - k) / (k + 1) * q / (1 - q)
    return total


def _broken(q: mp.mpf, r: mp.mpf, a: mp.mpf) -> mp.mpf:
    # Zeros of the base lie pi / r off the real line; 90 digits need a step of 2 pi times that over 207.
    step = min(mp.mpf("0.25"), 2 * mp.pi * (mp.pi / r) / 207)
    low, high = mp.mpf(-20), a * r + 20
    total, x = mp.mpf(0), low
    while x <= high:
        total += mp.exp(-x * x / 2) * (1 - q + q * mp.exp(r * x - r * r / 2)) ** a
        x += step
    return total * step / mp.sqrt(2 * mp.pi)


def one_step_delta(rate: float, ratio: float, epsilon: float) -> mp.mpf:
    """The larger of both hockey-stick divergences between ``(1 - q) N(0, 1) + q N(r, 1)`` and ``N(0, 1)``."""
    with mp.workdps(DIGITS):
        q, r, e = mp.mpf(rate), mp.mpf(ratio), mp.exp(mp.mpf(epsilon))
        remove = mp.mpf(0)
        if (e - 1 + q) > 0:
            x = (mp.log((e - 1 + q) / q) + r * r / 2) / r
            remove = (1 - q - e) * mp.ncdf(-x) + q * mp.ncdf(r - x)
        add = mp.mpf(0)
        if 1 / e > 1 - q:
            x = (mp.log((1 / e - 1 + q) / q) + r * r / 2) / r
            add = (1 - e * (1 - q)) * mp.ncdf(x) - e * q * mp.ncdf(x - r)
        return max(remove, add)
