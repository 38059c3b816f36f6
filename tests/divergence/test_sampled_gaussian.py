"""The kernel of every number: never below the truth, at most 1e-9 above it, and lawful."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import gammaln

from per_instance_accountant.divergence import (
    DEFAULT_ORDERS,
    gaussian_rdp,
    quadrature,
    sampled_gaussian,
    sampled_gaussian_rdp,
)
from per_instance_accountant.errors import UsageError

Kernel = Callable[[float, Any, Any], NDArray[np.float64]]
CHECKED = settings(max_examples=60, deadline=None, derandomize=True)

rates = st.floats(-12, 0).map(lambda x: 10.0**x)
ratios = st.floats(-8, 3).map(lambda x: 10.0**x)
orders = st.one_of(st.floats(-7.8, 4).map(lambda x: 1 + 10.0**x), st.integers(2, 10000).map(float)).filter(
    lambda a: a <= 10000
)


def _cancelling(sample_rate: float, ratios: Any, orders: Any) -> NDArray[np.float64]:
    """Seeded bug: the textbook log-sum, whose k = 0 and k = 1 terms cancel against 1."""
    r = np.atleast_1d(np.asarray(ratios, dtype=float))
    columns = []
    for a in np.atleast_1d(orders):
        k = np.arange(int(a) + 1)
        log_terms = gammaln(a + 1) - gammaln(k + 1) - gammaln(a - k + 1) + k * math.log(sample_rate)
        log_terms = log_terms + (a - k) * math.log1p(-sample_rate) + np.outer(r * r / 2, k * (k - 1))
        columns.append(np.logaddexp.reduce(log_terms, axis=1) / (a - 1))
    return np.array(columns).T


def _relative_error(kernel: Kernel, exact: mp.mpf, q: float, r: float, a: float) -> float:
    return float(mp.mpf(float(kernel(q, r, a)[0, 0])) / exact - 1)


def test_integer_orders_against_the_finite_sum(exact_rdp: Callable[..., mp.mpf]) -> None:
    grid = itertools.product(
        [1e-6, 1e-3, 0.02, 0.5, 0.97], [0.3, 1.0, 4.0, 1e2, 1e5, 1e8], [2, 3, 8, 64, 200, 512]
    )
    errors = []
    for q, noise, a in grid:
        r = 1 / noise
        errors.append(_relative_error(sampled_gaussian_rdp, exact_rdp(q, r, a), q, r, a))
    assert min(errors) >= 0
    assert max(errors) <= 1e-9


def _fractional_points() -> list[tuple[float, float, float]]:
    rng = np.random.default_rng(20240229)
    points = [
        (1e-12, 1e-8, 1 + 2**-26),
        (1e-12, 1e3, 1 + 2**-26),
        (1 - 1e-12, 10.0, 1.000001),
        (1 - 1e-12, 1e3, 1.1),
        (1e-12, 5.0, 1.3),
        (0.5, 1e-8, 999.5),
        (0.01, 1.0, 600.5),
        (1e-9, 0.25, 700.25),
        (0.3, 0.01, 1234.5),
    ]
    for _ in range(130):
        excess = 10 ** rng.uniform(-7.8, 2.3)
        q = rng.choice([10 ** rng.uniform(-12, 0), 1 - 10 ** rng.uniform(-12, -0.1)])
        # Half of the points sit where log A is of order 1: the order at which sampling stops helping.
        crossing = math.sqrt(2 * abs(math.log(q)) / excess * rng.uniform(0.3, 3))
        r = 10 ** rng.uniform(-8, 3) if rng.random() < 0.5 else min(max(crossing, 1e-8), 1e3)
        points.append((float(q), float(r), float(1 + excess)))
    return points


def test_real_orders_are_never_below_the_truth(exact_rdp: Callable[..., mp.mpf]) -> None:
    errors = [
        _relative_error(sampled_gaussian_rdp, exact_rdp(q, r, a), q, r, a) for q, r, a in _fractional_points()
    ]
    assert min(errors) >= 0
    assert max(errors) <= 1e-9


def test_the_oracle_catches_the_cancelling_sum(exact_rdp: Callable[..., mp.mpf]) -> None:
    truth = exact_rdp(0.01, 1e-8, 8)
    assert abs(_relative_error(_cancelling, truth, 0.01, 1e-8, 8.0)) > 1
    assert _relative_error(sampled_gaussian_rdp, truth, 0.01, 1e-8, 8.0) <= 1e-9


def test_quadrature_and_sum_agree_at_integer_orders() -> None:
    """Two kernels that share no formula, over the lattice, the panels and the seam between them."""
    r = np.concatenate([np.geomspace(1e-8, 1e3, 45), np.linspace(1.9, 2.1, 5)])
    a = np.array([2.0, 3, 7, 24, 63, 200, 511, 1024])
    for q in (1e-12, 1e-6, 0.02, 0.5, 1 - 1e-9):
        with np.errstate(all="ignore"):
            by_quadrature = quadrature.log_moments(q, r, a)
            by_sum = sampled_gaussian._integer_log_moments(q, r, a)
        np.testing.assert_allclose(by_quadrature, by_sum, rtol=2e-12, atol=0)


def test_two_oracles_agree(exact_rdp: Callable[..., mp.mpf]) -> None:
    """The series of the oracle against direct integration, so that a shared mistake is impossible."""
    for q, r, a in ((0.01, 1.0, 1.5), (0.3, 2.5, 3.7), (0.9, 0.4, 7.25)):
        switch = math.log((1 - q) / q) / r + r / 2

        def integrand(z: mp.mpf, q: float = q, r: float = r, a: float = a) -> mp.mpf:
            mixture = 1 - mp.mpf(q) + mp.mpf(q) * mp.exp(mp.mpf(r) * z - mp.mpf(r) ** 2 / 2)
            return mixture ** mp.mpf(a) * mp.exp(-z * z / 2) / mp.sqrt(2 * mp.pi)

        with mp.workdps(25):
            moment = mp.quad(integrand, sorted([-12, 0, switch, r, a * r, a * r + 6, a * r + 14]))
            direct = mp.log(moment) / (mp.mpf(a) - 1)
        assert abs(direct / exact_rdp(q, r, a) - 1) < 1e-15


@pytest.mark.parametrize(
    ("ratio", "order", "value"),
    [
        (1.0, 2.0, 1.7181342207e-4),
        (1.0, 8.0, 8.9364390761e-4),
        (1.0, 32.0, 11.246275937),
        (0.25, 8.0, 2.5899123e-5),
        (1.0, 1.5, 1.2725374333e-4),
    ],
)
def test_known_values(ratio: float, order: float, value: float) -> None:
    assert sampled_gaussian_rdp(0.01, ratio, order)[0, 0] == pytest.approx(value, rel=1e-8)


def test_equals_opacus_at_its_default_orders() -> None:
    compute_rdp = pytest.importorskip("opacus.accountants.analysis.rdp").compute_rdp
    alphas = np.array(pytest.importorskip("opacus.accountants").RDPAccountant.DEFAULT_ALPHAS)
    assert set(alphas) <= set(DEFAULT_ORDERS)
    assert max(DEFAULT_ORDERS) >= 9000
    for q, noise in ((0.001, 0.6), (0.01, 1.0), (0.02, 2.0), (0.2, 1.1), (0.5, 4.0)):
        theirs = compute_rdp(q=q, noise_multiplier=noise, steps=1, orders=alphas)
        np.testing.assert_allclose(sampled_gaussian_rdp(q, 1 / noise, alphas)[0], theirs, rtol=1e-6, atol=0)


def test_limits_are_exact() -> None:
    r, a = np.array([0.0, 1e-8, 0.3, 1e3, np.inf]), np.array([1.5, 2.0, 9999.5])
    whole = sampled_gaussian_rdp(1.0, r, a)
    np.testing.assert_allclose(whole, (r * r / 2)[:, None] * a, rtol=2e-15, atol=0)
    for i, j in np.ndindex(4, 3):
        assert Fraction(whole[i, j]) >= Fraction(r[i]) ** 2 / 2 * Fraction(a[j])
    np.testing.assert_array_equal(gaussian_rdp(r, a), (r * r / 2)[:, None] * a)
    assert not sampled_gaussian_rdp(0.0, r, a).any()
    inner = sampled_gaussian_rdp(0.3, r, a)
    assert (inner[0] == 0).all() and np.isinf(inner[-1]).all() and np.isfinite(inner[1:-1]).all()


@pytest.mark.parametrize("q", [5e-324, 1e-200, 1e-12, 0.5, 1 - 2**-53])
def test_the_ends_of_the_float_range_stay_sound(q: float) -> None:
    r = np.array([5e-324, 1e-300, 1e-160, 1e-41, 1e-8, 1e3, 1e7, 1e160, 1e300])
    a = np.array([np.nextafter(1, 2), 1 + 2**-26, 1.5, 2.0, 63.0, 1024.0, 9999.5, 10000.0, 16384.0])
    with np.errstate(all="raise"):
        value = sampled_gaussian_rdp(q, r, a)
    assert (value > 0).all()
    assert (value[1:] >= value[:-1]).all()
    assert (value <= np.maximum(gaussian_rdp(r, a) * (1 + 1e-14), 1e-307)).all()


@CHECKED
@given(q=rates, r=ratios, a=orders)
def test_bounded_by_the_step_without_sampling(q: float, r: float, a: float) -> None:
    value = sampled_gaussian_rdp(q, r, a)[0, 0]
    assert 0 < value <= gaussian_rdp(r, a)[0, 0] * (1 + 1e-14)


def _grows(kernel: Kernel, q: float, r: float, a: float, factor: float) -> bool:
    """Nondecreasing in the rate, the ratio and the order, up to the spread that the rounding allows."""
    slack = 1 - 4e-10
    values = kernel(q, [r, r * factor], [a, min(a * factor, 10000.0)])
    more_often = kernel(min(q * factor, 1.0), r, a)[0, 0]
    return bool(
        values[0, 0] > 0
        and values[1, 0] >= values[0, 0] * slack
        and values[0, 1] >= values[0, 0] * slack
        and more_often >= values[0, 0] * slack
    )


@CHECKED
@given(q=rates, r=ratios, a=orders, factor=st.floats(1, 3))
def test_grows_with_rate_ratio_and_order(q: float, r: float, a: float, factor: float) -> None:
    assert _grows(sampled_gaussian_rdp, q, r, a, factor)


def test_growth_catches_the_cancelling_sum() -> None:
    points = [(0.01, 10.0**-e, float(a), 2.0) for e in (5, 6, 7, 8) for a in (4, 8, 16, 64)]
    assert all(_grows(sampled_gaussian_rdp, *point) for point in points)
    assert not all(_grows(_cancelling, *point) for point in points)


def _convex_in_order(kernel: Kernel, q: float, r: float, a: float, gap: float) -> bool:
    """(a - 1) D_a is convex in a and 0 at a = 1."""
    near, mid, far = a, a + gap * (a - 1), a + 2 * gap * (a - 1)
    g = kernel(q, r, [near, mid, far])[0] * (np.array([near, mid, far]) - 1)
    weight = (mid - near) / (far - near)
    return bool(
        g[1] <= (weight * g[2] + (1 - weight) * g[0]) * (1 + 4e-10)
        and g[0] <= g[1] * (near - 1) / (mid - 1) * (1 + 4e-10)
    )


@CHECKED
@given(q=rates, r=ratios, a=orders.filter(lambda a: a < 3000), gap=st.floats(0.01, 1))
def test_convex_in_the_order(q: float, r: float, a: float, gap: float) -> None:
    assert _convex_in_order(sampled_gaussian_rdp, q, r, a, gap)


def test_convexity_catches_an_order_read_below() -> None:
    def read_below(q: float, r: Any, orders: Any) -> NDArray[np.float64]:
        return sampled_gaussian_rdp(q, r, np.maximum(np.floor(orders), 2.0))

    assert not all(_convex_in_order(read_below, 0.02, 1.0, a, 0.1) for a in np.linspace(2, 4, 21))


def _convex_in_square(kernel: Kernel, q: float, r: float, a: float, factor: float) -> bool:
    """log A is convex in ratio^2 and 0 at 0: the mean of two squares costs at most the mean of the costs."""
    high = r * factor
    mean = math.sqrt((r * r + high * high) / 2)
    low, mid, top = kernel(q, [r, mean, high], a)[:, 0]
    return bool(mid <= (low + top) / 2 * (1 + 1e-9) and low <= top / factor**2 * (1 + 1e-9))


@CHECKED
@given(q=rates, r=st.floats(-8, 1.5).map(lambda x: 10.0**x), a=orders, factor=st.floats(1.01, 10))
def test_convex_in_the_squared_ratio(q: float, r: float, a: float, factor: float) -> None:
    assert _convex_in_square(sampled_gaussian_rdp, q, r, a, factor)


def test_convexity_in_the_square_catches_rounding_to_the_nearest_level() -> None:
    def nearest(q: float, r: Any, orders: Any) -> NDArray[np.float64]:
        return sampled_gaussian_rdp(q, np.round(np.asarray(r) / 0.1) * 0.1, orders)

    assert not all(_convex_in_square(nearest, 0.02, r, 8.0, 1.3) for r in np.linspace(0.11, 0.97, 12))


@pytest.mark.parametrize("a", [1.0001, 1.1, 1.5, 2.0, 2.5, 3.0, 7.3, 64.0])
def test_the_algebra_of_the_convexity_proof(a: float) -> None:
    """L = x^2/2 d^2/dx^2 on f = (1 - q + q x)^a: the closed forms, and f L^2 f >= (L f)^2."""
    with mp.workdps(40):
        order = mp.mpf(a)
        for q, x in itertools.product((0.001, 0.3, 0.9), (1e-3, 0.5, 1.0, 3.0, 1e3)):
            rate, point = mp.mpf(q), mp.mpf(x)

            def f(t: mp.mpf, rate: mp.mpf = rate) -> mp.mpf:
                return (1 - rate + rate * t) ** order

            def generator(g: Callable[[mp.mpf], mp.mpf]) -> Callable[[mp.mpf], mp.mpf]:
                return lambda t: t * t / 2 * mp.diff(g, t, 2, h=mp.mpf(10) ** -8 * t)

            y = rate * point / (1 - rate + rate * point)
            c = order * (order - 1)
            once = c / 2 * y**2 * f(point)
            twice = c / 4 * y**2 * (2 + 4 * (order - 2) * y + (order - 2) * (order - 3) * y**2) * f(point)
            assert abs(generator(f)(point) / once - 1) < 1e-9
            assert abs(generator(generator(f))(point) - twice) < 1e-9 * abs(c) * y**2 * f(point)
            gap = c / 4 * y**2 * f(point) ** 2 * (1 - y) * (2 + (4 * order - 6) * y)
            assert abs(f(point) * twice - once**2 - gap) <= mp.mpf(10) ** -30 * f(point) ** 2
            assert gap >= 0


@pytest.mark.parametrize(
    ("q", "noise", "a"), [(0.01, 1.0, 1.5), (0.3, 0.7, 4.0), (0.5, 2.0, 2.5), (0.9, 1.0, 8.0)]
)
def test_covers_the_other_direction(q: float, noise: float, a: float) -> None:
    z = np.linspace(-14 * a, 14 * a, 400001)
    log_ratio = np.logaddexp(math.log1p(-q), math.log(q) + z / noise - 0.5 / noise**2)
    moment = np.trapezoid(np.exp((1 - a) * log_ratio - z * z / 2), z) / math.sqrt(2 * math.pi)
    assert math.log(moment) / (a - 1) <= sampled_gaussian_rdp(q, 1 / noise, a)[0, 0]


def test_equal_ratios_have_equal_bits_whatever_stands_beside_them() -> None:
    r = np.concatenate([np.geomspace(1e-6, 40, 150), [1.0]])
    orders = [1.1, 2.5, 10.9, 12.0, 63.0, 700.5, 3000.0]
    block = sampled_gaussian_rdp(0.02, r, orders)
    for i in range(0, r.size, 6):
        assert sampled_gaussian_rdp(0.02, r[i], orders)[0].tolist() == block[i].tolist()


def test_shapes_scalars_and_order_of_arguments() -> None:
    block = sampled_gaussian_rdp(sample_rate=0.1, ratios=[0.9, 0.1, 0.5], orders=[8, 1.5, 64, 3.25])
    assert block.shape == (3, 4)
    for i, r in enumerate((0.9, 0.1, 0.5)):
        for j, a in enumerate((8, 1.5, 64, 3.25)):
            single = sampled_gaussian_rdp(0.1, r, a)
            assert single.shape == (1, 1)
            assert single[0, 0] == pytest.approx(block[i, j], rel=1e-12)
    assert sampled_gaussian_rdp(0.1, [], [2.0]).shape == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((math.nan, 1.0, 2.0), "PIA070"),
        ((-0.1, 1.0, 2.0), "PIA070"),
        ((1.1, 1.0, 2.0), "PIA070"),
        ((0.1, [1.0, math.nan], 2.0), "PIA070"),
        ((0.1, -1e-300, 2.0), "PIA070"),
        ((0.1, 1.0, [2.0, math.nan]), "PIA070"),
        ((0.1, 1.0, 1.0), "PIA070"),
        ((0.1, 1.0, -math.inf), "PIA070"),
        ((0.1, 1.0, [math.inf, 0.5]), "PIA070"),
        ((0.1, 1.0, 1e6), "PIA070"),
        ((0.1, 1.0, []), "PIA071"),
        ((0.1, [[1.0]], 2.0), "PIA071"),
        ((0.1, "1", 2.0), "PIA071"),
        ((0.1, None, 2.0), "PIA071"),
        ((True, 1.0, 2.0), "PIA071"),
        (([0.1, 0.2], 1.0, 2.0), "PIA071"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, Any, Any], code: str) -> None:
    with pytest.raises(UsageError) as caught:
        sampled_gaussian_rdp(*arguments)
    assert caught.value.code == code


def test_the_limit_of_the_orders_is_infinite_for_whoever_takes_part() -> None:
    values = sampled_gaussian_rdp(0.1, [0.0, 0.5], [2.0, math.inf])
    assert values[:, 0].tolist() == sampled_gaussian_rdp(0.1, [0.0, 0.5], 2.0)[:, 0].tolist()
    assert values[:, 1].tolist() == [0.0, math.inf]
    assert sampled_gaussian_rdp(0.0, [0.5], math.inf).tolist() == [[0.0]]
