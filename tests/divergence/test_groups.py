"""Forget sets: bounds against enumeration of who was drawn, and against the divergences themselves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import mpmath as mp
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import logsumexp

from per_instance_accountant.divergence import (
    gaussian_rdp,
    group_gaussian_rdp,
    group_gaussian_rdp_removal,
    groups,
    sampled_gaussian_rdp,
)
from per_instance_accountant.errors import UsageError

Bound = Callable[[float, Any, Any], NDArray[np.float64]]


def _sum_of_singles(q: float, ratios: Any, orders: Any) -> NDArray[np.float64]:
    """Seeded bug: the individual values added up."""
    return np.asarray(sampled_gaussian_rdp(q, ratios, orders).sum(axis=0))


def _enumerated(q: float, ratios: NDArray[np.float64], a: float) -> mp.mpf:
    with mp.workdps(60):
        total = mp.mpf(0)
        for drawn in itertools.product([0, 1], repeat=ratios.size):
            size = sum((mp.mpf(r) for r, one in zip(ratios.tolist(), drawn, strict=True) if one), mp.mpf(0))
            chance = mp.mpf(q) ** sum(drawn) * (1 - mp.mpf(q)) ** (ratios.size - sum(drawn))
            total += chance * mp.exp(mp.mpf(a) * (mp.mpf(a) - 1) * size * size / 2)
        return mp.log(total) / (mp.mpf(a) - 1)


def test_joint_convexity_against_enumeration() -> None:
    rng = np.random.default_rng(5)
    integrated = 0
    for _ in range(120):
        ratios = 10 ** rng.uniform(-8, 1.2, int(rng.integers(1, 5)))
        q = float(10 ** rng.uniform(-9, 0)) if rng.random() < 0.6 else float(1 - 10 ** rng.uniform(-9, -0.1))
        a = float(1 + 10 ** rng.uniform(-6, 3))
        error = float(
            mp.mpf(float(groups._joint_convexity(q, ratios, np.array([a]))[0])) / _enumerated(q, ratios, a)
            - 1
        )
        assert error >= 0
        if math.sqrt(a * (a - 1)) * ratios.sum() <= 512:
            integrated += 1
            assert error <= 1e-9
        else:
            assert error <= 1e-4
    assert integrated > 80


def _directions(q: float, vectors: NDArray[np.float64], a: float) -> tuple[float, float]:
    """Both Renyi divergences of the group step in the plane, by summation on a fine lattice."""
    z = np.arange(-16, 22, 0.2)
    x, y = np.meshgrid(z, z)
    log_with = []
    for drawn in itertools.product([0, 1], repeat=len(vectors)):
        shift = np.array(drawn) @ vectors
        chance = sum(drawn) * math.log(q) + (len(vectors) - sum(drawn)) * math.log1p(-q)
        log_with.append(chance - ((x - shift[0]) ** 2 + (y - shift[1]) ** 2) / 2)
    p, base = logsumexp(np.array(log_with), axis=0), -(x * x + y * y) / 2
    constant = math.log(0.04 / (2 * math.pi))

    def renyi(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
        return float((logsumexp(a * left + (1 - a) * right) + constant) / (a - 1))

    return renyi(p, base), renyi(base, p)


def _covers(bound: Bound, reverse: bool, seed: int) -> bool:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(int(rng.integers(2, 4)), 2)) * rng.uniform(0.2, 0.9)
    q, a = float(rng.uniform(0.02, 0.6)), float(rng.choice([1.3, 2.0, 2.6, 3.0]))
    forward, backward = _directions(q, vectors, a)
    value = bound(q, np.linalg.norm(vectors, axis=1), a)[0]
    return bool(value >= forward * (1 - 1e-9) and (not reverse or value >= backward * (1 - 1e-9)))


@pytest.mark.parametrize("seed", range(12))
def test_covers_the_divergences_of_vectors(seed: int) -> None:
    assert _covers(group_gaussian_rdp, True, seed)
    assert _covers(group_gaussian_rdp_removal, False, seed)


def _aligned(q: float, sizes: list[float], a: float) -> tuple[float, float]:
    """Exact divergences of members whose vectors are parallel, with || without and without || with."""
    z = np.arange(-40.0, 40.0 + a * sum(sizes), 0.02)
    mixture = np.full_like(z, -np.inf)
    for drawn in itertools.product([0, 1], repeat=len(sizes)):
        shift = float(np.dot(drawn, sizes))
        chance = sum(drawn) * math.log(q) + (len(sizes) - sum(drawn)) * math.log1p(-q)
        mixture = np.logaddexp(mixture, chance - (z - shift) ** 2 / 2)
    constant, base = math.log(0.02 / math.sqrt(2 * math.pi)), -z * z / 2
    forward = logsumexp(a * mixture + (1 - a) * base) + constant
    backward = logsumexp(a * base + (1 - a) * mixture) + constant
    return float(forward / (a - 1)), float(backward / (a - 1))


def test_high_orders_of_both_directions_cost_no_more_than_one_instance_of_all() -> None:
    for q, sizes in ((0.01, [0.5, 0.5]), (0.1, [0.3, 0.2, 0.9]), (0.4, [1.0, 2.0])):
        for a in (2.0, 8.0, 32.0, 64.0):
            truth = max(_aligned(q, sizes, a))
            left_out = -len(sizes) * math.log1p(-q)
            bound = group_gaussian_rdp(q, sizes, a)[0]
            together = sampled_gaussian_rdp(q, sum(sizes), a)[0, 0]
            assert truth * (1 - 1e-9) <= bound <= max(together, left_out) * (1 + 1e-6)
            assert a < 32 or bound < groups._joint_convexity(q, np.array(sizes), np.array([a]))[0]


def test_parallel_members_are_exact_at_whole_orders() -> None:
    cases = [(0.01, [0.5, 0.5]), (0.1, [0.3, 0.2, 0.9]), (0.4, [1.0, 2.0]), (0.02, [0.25] * 8)]
    for q, sizes in cases:
        for a in (2.0, 8.0, 32.0, 64.0):
            truth = _aligned(q, sizes, a)
            removal = group_gaussian_rdp_removal(q, sizes, a)[0]
            assert truth[0] * (1 - 1e-9) <= removal <= truth[0] * (1 + 1e-9) + 1e-11
            if a >= 32:
                assert group_gaussian_rdp(q, sizes, a)[0] <= max(
                    truth[0] * (1 + 1e-8), -len(sizes) * math.log1p(-q)
                ) * (1 + 1e-9)
    assert group_gaussian_rdp(0.01, [0.5, 0.5], 32.0)[0] == pytest.approx(6.49, abs=0.05)


def test_law_catches_a_bound_that_leaves_a_member_out() -> None:
    """Without || with approaches -f log(1 - q) at high orders; one member fewer lies below it."""
    backward = _aligned(0.2, [1.0, 1.0, 1.0], 64.0)[1]
    assert -2 * math.log1p(-0.2) < backward <= -3 * math.log1p(-0.2)
    assert group_gaussian_rdp(0.2, [1.0, 1.0, 1.0], 64.0)[0] >= backward


def test_the_removal_law_catches_the_sum_of_single_values() -> None:
    """Ten aligned members at rate 0.01, order 4: 138.6 in truth, 0.0036 as the sum of single values."""
    n = np.arange(11)
    z = np.linspace(-12, 60, 200001)
    log_binomial = [math.log(math.comb(10, k)) + k * math.log(0.01) + (10 - k) * math.log(0.99) for k in n]
    p = logsumexp(np.array(log_binomial)[:, None] - (z - n[:, None]) ** 2 / 2, axis=0)
    moment = logsumexp(4 * p + 3 * z * z / 2) + math.log((z[1] - z[0]) / math.sqrt(2 * math.pi))
    truth = moment / 3
    assert truth == pytest.approx(138.6, rel=1e-3)
    assert _sum_of_singles(0.01, np.ones(10), 4.0)[0] < 0.004
    assert group_gaussian_rdp_removal(0.01, np.ones(10), 4.0)[0] >= truth
    assert group_gaussian_rdp(0.01, np.ones(10), 4.0)[0] >= truth
    assert not all(_covers(_sum_of_singles, False, seed) for seed in range(12))


def test_laws() -> None:
    orders = np.array([1.2, 2.0, 3.5, 8.0, 64.0, 1000.0])
    for bound in (group_gaussian_rdp, group_gaussian_rdp_removal):
        one, two = bound(0.05, [0.3], orders), bound(0.05, [0.3, 0.2], orders)
        assert bound(0.05, [0.3, 0.0], orders).tolist() == one.tolist()
        assert (two >= one).all() and (bound(0.06, [0.3, 0.2], orders) >= two).all()
        np.testing.assert_allclose(bound(0.05, [0.2, 0.3], orders), two, rtol=1e-12, atol=0)
        assert (two <= gaussian_rdp(0.5, orders)[0] * (1 + 1e-9)).all()
        assert not bound(0.05, [0.0, 0.0], orders).any() and not bound(0.05, [], orders).any()
        assert not bound(0.0, [1.0], orders).any()
        np.testing.assert_allclose(
            bound(1.0, [0.3, 0.2], orders), gaussian_rdp(0.5, orders)[0], rtol=1e-12, atol=0
        )
        assert np.isinf(bound(0.1, [np.inf, 1.0], orders)).all()
    # One member: removal is the single-instance value itself at integer orders.
    single = sampled_gaussian_rdp(0.05, 0.3, [2.0, 8.0, 64.0])[0]
    assert (group_gaussian_rdp_removal(0.05, [0.3], [2.0, 8.0, 64.0]) <= single).all()
    np.testing.assert_allclose(group_gaussian_rdp_removal(0.05, [0.3], [2.0]), single[:1], rtol=1e-9, atol=0)


def test_the_ends_of_the_float_range_stay_sound() -> None:
    orders = np.array([np.nextafter(1, 2), 1.5, 64.0, 16384.0])
    for size in (5e-324, 1e-160, 1e-100, 1e-20, 1e5, 1e160):
        for bound in (group_gaussian_rdp, group_gaussian_rdp_removal):
            with np.errstate(all="raise"):
                value = bound(0.3, [size, size], orders)
            assert (value > 0).all()
            assert (value <= gaussian_rdp(2 * size, orders)[0] * (1 + 1e-13)).all()
            assert (value >= 0.05 * gaussian_rdp(size, orders)[0]).all()


def test_many_distinct_members_are_rounded_up_only() -> None:
    rng = np.random.default_rng(8)
    ratios = rng.uniform(1e-4, 0.02, 700)
    z = np.arange(-400, 401) * 0.1
    a = 4.0
    logs = np.log1p(0.01 * np.expm1(math.sqrt(a * (a - 1)) * np.outer(z, ratios))).sum(axis=1)
    truth = (logsumexp(logs - z * z / 2) + math.log(0.1 / math.sqrt(2 * math.pi))) / (a - 1)
    assert truth <= group_gaussian_rdp(0.01, ratios, a)[0] <= truth * 1.15


@pytest.mark.parametrize(
    "arguments",
    [
        (math.nan, [1.0], [2.0]),
        (1.5, [1.0], [2.0]),
        (0.1, [math.nan], [2.0]),
        (0.1, [-1.0], [2.0]),
        (0.1, [1.0], [1.0]),
    ],
)
def test_bad_arguments(arguments: tuple[Any, Any, Any]) -> None:
    for bound in (group_gaussian_rdp, group_gaussian_rdp_removal):
        with pytest.raises(UsageError):
            bound(*arguments)
