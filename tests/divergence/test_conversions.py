"""Renyi to (epsilon, delta) and orders between the orders: never below the truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from per_instance_accountant.divergence import (
    DEFAULT_ORDERS,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_rdp,
    interpolate_rdp,
    rdp_to_delta,
    rdp_to_epsilon,
    sampled_gaussian_rdp,
)
from per_instance_accountant.errors import UsageError

CHECKED = settings(max_examples=80, deadline=None, derandomize=True)
ORDERS = np.array(DEFAULT_ORDERS)
Convert = Callable[[Any, Any, float], Any]

mus = st.floats(-3, 1).map(lambda x: 10.0**x)
deltas = st.floats(-12, -0.01).map(lambda x: 10.0**x)


def _without_order(orders: Any, rdp: Any, delta: float) -> float:
    """Seeded bug: reads the RDP slope as if it were the RDP at every order."""
    a = np.asarray(orders)
    return float(np.min(np.asarray(rdp) / a + np.log1p(-1 / a) - (np.log(delta) + np.log(a)) / (a - 1)))


def _above_exact(convert: Convert, mu: float, delta: float) -> bool:
    """Soundness: the epsilon of the Gaussian's Renyi curve is at least its exact epsilon."""
    return bool(
        convert(ORDERS, gaussian_rdp(mu, ORDERS)[0], delta) >= gaussian_epsilon(mu, delta) * (1 - 1e-9)
    )


@CHECKED
@given(mu=mus, delta=deltas)
def test_epsilon_is_at_least_the_exact_gaussian_one(mu: float, delta: float) -> None:
    assert _above_exact(rdp_to_epsilon, mu, delta)


def test_soundness_catches_a_dropped_order() -> None:
    assert not all(_above_exact(_without_order, mu, 1e-5) for mu in (0.5, 1.0, 1.4142135623730951, 3.0))


@CHECKED
@given(mu=mus, epsilon=st.floats(0, 30))
def test_delta_is_at_least_the_exact_gaussian_one(mu: float, epsilon: float) -> None:
    delta = rdp_to_delta(ORDERS, gaussian_rdp(mu, ORDERS)[0], epsilon)
    assert gaussian_delta(mu, epsilon) * (1 - 1e-9) <= delta <= 1


def test_known_values() -> None:
    assert rdp_to_epsilon([2.0, 5.5, 64.0], [1.0, 2.75, 32.0], 1e-5) == pytest.approx(4.7289242763, rel=1e-10)
    curve = gaussian_rdp(1.0, ORDERS)[0]
    assert rdp_to_delta(ORDERS, curve, rdp_to_epsilon(ORDERS, curve, 1e-5)) == pytest.approx(1e-5, rel=1e-9)


def test_a_long_grid_serves_small_losses() -> None:
    """mu = 0.05 at delta 1e-5: 0.160 exact; orders up to 32 alone would say 0.268."""
    curve = gaussian_rdp(0.05, ORDERS)[0]
    short = ORDERS <= 32
    assert rdp_to_epsilon(ORDERS[short], curve[short], 1e-5) == pytest.approx(0.268, abs=2e-3)
    assert rdp_to_epsilon(ORDERS, curve, 1e-5) < 0.18
    assert gaussian_epsilon(0.05, 1e-5) == pytest.approx(0.160, abs=1e-3)


@pytest.mark.parametrize("delta", [1e-5, 1e-9])
@pytest.mark.parametrize("loss", [1e-6, 1e-3, 0.1, 1.0, 10.0, 100.0])
def test_the_default_orders_waste_little(loss: float, delta: float) -> None:
    """Within 1 % of a grid of 40,000 orders for curves a * loss, or below 0.01 where neither matters."""
    fine = 1 + np.geomspace(1e-3, 1e4, 40000)
    best = rdp_to_epsilon(fine, fine * loss, delta)
    assert rdp_to_epsilon(ORDERS, ORDERS * loss, delta) <= max(best * 1.01, 0.01)


def test_equals_dp_accounting_and_opacus() -> None:
    compute = pytest.importorskip("dp_accounting.rdp.rdp_privacy_accountant").compute_epsilon
    spent = pytest.importorskip("opacus.accountants.analysis.rdp").get_privacy_spent
    for mu in (0.3, 1.0, 4.0):
        curve = gaussian_rdp(mu, ORDERS[:150])[0]
        ours = rdp_to_epsilon(ORDERS[:150], curve, 1e-6)
        assert ours == pytest.approx(compute(ORDERS[:150], curve, 1e-6)[0], rel=1e-12)
        theirs = spent(orders=ORDERS[:150], rdp=curve, delta=1e-6)[0]
        assert ours == pytest.approx(theirs, rel=1e-12)
        assert ours >= theirs


@CHECKED
@given(
    q=st.floats(1e-4, 1),
    r=st.floats(1e-3, 3),
    delta=deltas,
    factor=st.floats(1, 100),
    steps=st.integers(1, 1000),
)
def test_laws_of_the_conversion(q: float, r: float, delta: float, factor: float, steps: int) -> None:
    curve = steps * sampled_gaussian_rdp(q, r, ORDERS)[0]
    epsilon = rdp_to_epsilon(ORDERS, curve, delta)
    assert epsilon >= 0 and math.isfinite(epsilon)
    assert rdp_to_epsilon(ORDERS, curve, min(delta * factor, 1.0)) <= epsilon
    assert rdp_to_epsilon(ORDERS, curve * factor, delta) >= epsilon
    assert rdp_to_epsilon(ORDERS[::7], curve[::7], delta) >= epsilon
    back = rdp_to_delta(ORDERS, curve, epsilon)
    assert back <= delta * (1 + 1e-9) * (1 + 1e-9 * epsilon)
    assert rdp_to_delta(ORDERS, curve, epsilon * factor) <= back
    if epsilon > 0:
        # The slack of both roundings is a few ulp of the exponent.
        assert back == pytest.approx(delta, rel=1e-6)


def test_rows_scalars_and_limits() -> None:
    rows = np.stack([gaussian_rdp(1.0, ORDERS)[0], np.zeros(ORDERS.size), np.full(ORDERS.size, np.inf)])
    rows = np.concatenate([rows, np.where(ORDERS > 8, np.inf, rows[:1])])
    epsilon = rdp_to_epsilon(orders=ORDERS, rdp=rows, delta=1e-5)
    assert isinstance(rdp_to_epsilon(ORDERS, rows[0], 1e-5), float)
    assert epsilon.tolist() == [rdp_to_epsilon(ORDERS, row, 1e-5) for row in rows]
    assert epsilon[1] == 0 and epsilon[2] == np.inf and epsilon[3] == epsilon[0]
    assert rdp_to_epsilon(ORDERS, rows, 0.0).tolist() == [np.inf, 0.0, np.inf, np.inf]
    assert rdp_to_epsilon(ORDERS, rows, 1.0).tolist() == [0.0] * 4
    delta = rdp_to_delta(orders=ORDERS, rdp=rows, epsilon=1.0)
    assert delta.tolist() == [rdp_to_delta(ORDERS, row, 1.0) for row in rows]
    assert delta[1] == 0 and delta[2] == 1 and 0 < delta[0] < 1
    assert rdp_to_delta(ORDERS, rows, np.inf).tolist() == [0.0, 0.0, 1.0, 0.0]
    assert rdp_to_delta(ORDERS, rows[0], 1e300) > 0


@pytest.mark.parametrize(
    "bad",
    [
        lambda: rdp_to_epsilon([2.0], [math.nan], 1e-5),
        lambda: rdp_to_epsilon([2.0], [-1e-9], 1e-5),
        lambda: rdp_to_epsilon([2.0], [1.0], math.nan),
        lambda: rdp_to_epsilon([2.0], [1.0], 1.0000001),
        lambda: rdp_to_epsilon([2.0], [1.0], -1e-300),
        lambda: rdp_to_epsilon([2.0, 1.0], [1.0, 1.0], 1e-5),
        lambda: rdp_to_epsilon([2.0, 3.0], [1.0], 1e-5),
        lambda: rdp_to_epsilon([], [], 1e-5),
        lambda: rdp_to_epsilon([2.0], [[[1.0]]], 1e-5),
        lambda: rdp_to_delta([2.0], [math.nan], 1.0),
        lambda: rdp_to_delta([2.0], [1.0], math.nan),
        lambda: rdp_to_delta([2.0], [1.0], -0.1),
        lambda: interpolate_rdp([2.0], [1.0], 1.0),
        lambda: interpolate_rdp([2.0], [1.0], math.nan),
        lambda: interpolate_rdp([2.0], [-1.0], 1.5),
    ],
)
def test_bad_arguments(bad: Callable[[], object]) -> None:
    with pytest.raises(UsageError):
        bad()


Interpolate = Callable[[Any, Any, Any], NDArray[np.float64]]
GRID = np.array([1.5, 2.0, 3.0, 5.0, 8.0, 16.0, 64.0])


def _nearest_lower(orders: Any, rdp: Any, order: Any) -> NDArray[np.float64]:
    """Seeded bug: the curve read at the next lower order of the grid."""
    index = np.maximum(np.searchsorted(np.asarray(orders), order, side="right") - 1, 0)
    return np.asarray(np.asarray(rdp)[..., index])


def _interpolates_above(interpolate: Interpolate, q: float, r: float, order: float) -> bool:
    bound = float(interpolate(GRID, sampled_gaussian_rdp(q, r, GRID)[0], order))
    return bound >= sampled_gaussian_rdp(q, r, order)[0, 0] * (1 - 3e-10)


@CHECKED
@given(q=st.floats(1e-6, 1), r=st.floats(1e-4, 30), order=st.floats(1.0001, 64))
def test_interpolation_is_an_upper_bound(q: float, r: float, order: float) -> None:
    assert _interpolates_above(interpolate_rdp, q, r, order)


def test_interpolation_catches_an_order_read_below() -> None:
    assert not all(_interpolates_above(_nearest_lower, 0.02, 1.0, order) for order in (1.2, 2.7, 4.0, 30.0))


def test_interpolation_at_the_grid_beyond_it_and_with_inf() -> None:
    curve = sampled_gaussian_rdp(0.02, [1.0, 0.3], GRID)
    assert (interpolate_rdp(GRID, curve, GRID) == curve).all()
    shuffled = np.random.default_rng(0).permutation(GRID.size)
    assert (interpolate_rdp(GRID[shuffled], curve[:, shuffled], GRID) == curve).all()
    assert interpolate_rdp(GRID, curve, 2.5).shape == (2,)
    assert interpolate_rdp(GRID, curve[0], 2.5).shape == ()
    assert np.isinf(interpolate_rdp(GRID, curve, [64.1, 1e9])).all()
    infinite = np.where(GRID > 5, np.inf, curve[0])
    assert np.isfinite(interpolate_rdp(GRID, infinite, [1.2, 4.9, 5.0])).all()
    assert np.isinf(interpolate_rdp(GRID, infinite, [5.0001, 8.0, 64.0])).all()
    assert interpolate_rdp([2.0, 4.0], [np.inf, 1.0], [1.5, 2.0, 3.0]).tolist() == [1.0, 1.0, 1.0]
    assert not interpolate_rdp(GRID, np.zeros(GRID.size), [1.2, 7.0]).any()
