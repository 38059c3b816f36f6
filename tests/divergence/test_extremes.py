"""The whole range that the kernel is meant for: rate 1e-8 to 1, ratio 1e-8 to 30, orders 1.01 to 10,000,
1e9 steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import mpmath as mp
import numpy as np

from per_instance_accountant.divergence import rdp_to_delta, rdp_to_epsilon, sampled_gaussian_rdp

RATES = np.array([1e-8, 1e-5, 1e-3, 0.1, 0.5, 0.999, 1.0])
RATIOS = np.array([1e-8, 1e-4, 1e-2, 0.3, 1.0, 5.0, 30.0])
ORDERS = np.array([1.01, 1.5, 2.0, 2.5, 7.75, 32.0, 512.0, 10_000.0])
STEPS = 1e9


def truth(exact: Callable[..., mp.mpf], q: float, r: float, a: float) -> mp.mpf:
    return mp.mpf(a) * mp.mpf(r) ** 2 / 2 if q == 1 else exact(q, r, a)


def worst(table: np.ndarray, exact: Callable[..., mp.mpf]) -> tuple[float, float]:
    """Smallest and largest relative error of (rates, ratios, orders) against 40 digits; a third of the
    grid at the orders whose sums are long."""
    errors = []
    for (i, q), (j, r), (k, a) in itertools.product(enumerate(RATES), enumerate(RATIOS), enumerate(ORDERS)):
        if a >= 512 and (i + j) % 3:
            continue
        value = truth(exact, float(q), float(r), float(a))
        errors.append(float(mp.mpf(float(table[i, j, k])) / value - 1))
    return min(errors), max(errors)


def kernel() -> np.ndarray:
    return np.stack([sampled_gaussian_rdp(float(q), RATIOS, ORDERS) for q in RATES])


def test_never_below_the_truth_at_the_ends_of_the_range(exact_rdp: Callable[..., mp.mpf]) -> None:
    low, high = worst(kernel(), exact_rdp)
    assert low >= 0 and high <= 1e-9
    assert worst(kernel() * (1 - 1e-8), exact_rdp)[0] < 0, "the law sees an error of 1e-8"


def test_a_billion_steps_are_numbers_or_infinite() -> None:
    curves = STEPS * kernel().reshape(-1, ORDERS.size)
    for delta in (1e-15, 1e-5, 0.5):
        epsilon = rdp_to_epsilon(ORDERS, curves, delta)
        assert not np.isnan(epsilon).any() and (epsilon >= 0).all() and np.isfinite(epsilon).all()
    for target in (0.0, 1e-6, 1.0, 1e12):
        probability = rdp_to_delta(ORDERS, curves, target)
        assert ((probability >= 0) & (probability <= 1)).all()
    assert (np.diff(curves.reshape(len(RATES), len(RATIOS), -1), axis=0) >= 0).all()
    assert (np.diff(curves.reshape(len(RATES), len(RATIOS), -1), axis=1) >= 0).all()


def test_overflow_is_infinite_and_never_a_number_that_is_too_small() -> None:
    huge = sampled_gaussian_rdp(0.01, [1e150, 1e160, np.inf], [2.0, 16384.0])
    assert np.isinf(huge[1:]).all() and not np.isnan(huge).any() and (huge[0] > 1e299).all()
    with np.errstate(over="ignore"):
        assert np.isinf(rdp_to_epsilon([2.0, 16384.0], huge * STEPS, 1e-5)).all()
