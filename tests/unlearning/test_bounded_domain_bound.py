"""R5 and R6: exactly computable chains on a line, the fixtures, and mistakes that the laws must catch."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm

from per_instance_accountant.errors import UsageError
from per_instance_accountant.unlearning import bounds
from per_instance_accountant.unlearning.bounds.bounded_domain import batch_sizes

LAW = settings(max_examples=40, deadline=None, derandomize=True)
GRID = np.linspace(-8, 8, 1201)
WIDTH = GRID[1] - GRID[0]


def kernel(image, s):
    """Row-stochastic matrix of ``x -> N(image(x), s^2)`` on the grid, up to its tails."""
    density = norm.pdf(GRID[None, :], image[:, None], s)
    return density / density.sum(axis=1, keepdims=True)


def renyi(p, q, order):
    used = (p > 1e-280) & (q > 1e-280)
    exponents = order * np.log(p[used]) + (1 - order) * np.log(q[used])
    return float(np.logaddexp.reduce(exponents)) / (order - 1)


def hockey(p, q, epsilon):
    return float(np.maximum(p - math.exp(epsilon) * q, 0).sum())


def chains(rng):
    """Two laws, and a rough non-contractive map into [-1, 1] followed by noise: (p, q, matrix, s)."""
    s = float(rng.uniform(0.4, 1.2))
    image = np.clip(rng.choice([-1.0, 1.0], len(GRID)) * rng.uniform(0.5, 1.0, len(GRID)), -1, 1)
    a, b = rng.uniform(-1, 1, 2)
    weight = rng.uniform(0.2, 0.8)
    p = weight * norm.pdf(GRID, a, 0.7) + (1 - weight) * norm.pdf(GRID, b, 0.6)
    q = norm.pdf(GRID, (a + b) / 2, 1.2)
    return p / p.sum(), q / q.sum(), kernel(image, s), s


def far_apart(s):
    p, q = (np.isclose(GRID, end, atol=WIDTH / 2).astype(float) for end in (1.0, -1.0))
    return p / p.sum(), q / q.sum(), kernel(np.sign(GRID - 1e-9), s)


def test_fixtures():
    bound = bounds.bounded_domain(curve=lambda orders: 0.5 * orders, diameter=2.0, noise_std=0.5, order=2)
    assert math.exp(bound.log_contraction) == pytest.approx(0.9544997361, rel=1e-9)
    assert bound.steps(0.1) == 60 and bound.value(60) == pytest.approx(0.0999447, rel=1e-5)
    hockey_stick = bounds.bounded_domain(diameter=2.0, noise_std=1.0, delta=1e-5)
    expected = [0.5098617, 0.2160309, 0.0648574, 0.0095478, 2.48303e-4, 2.65341e-8]
    found = [float(hockey_stick.delta_at(1.0, k)[0]) for k in range(1, 7)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert hockey_stick.steps(1.0) == 6 and hockey_stick.value(6) <= 1.0 < hockey_stick.value(5)


def test_never_below_exact_rough_chains_in_both_directions():
    rng = np.random.default_rng(5)
    checked = 0
    for _ in range(12):
        p, q, matrix, s = chains(rng)
        for first, second in ((p, q), (q, p)):
            laws = first, second
            start = {a: renyi(first, second, a) for a in (1.5, 2.0, 4.0, 8.0)}
            for steps in range(1, 5):
                laws = laws[0] @ matrix, laws[1] @ matrix
                for order, loss in start.items():
                    bound = bounds.bounded_domain(
                        curve=lambda orders, loss=loss: np.full(len(orders), loss),
                        diameter=2.0,
                        noise_std=s,
                        order=order,
                    )
                    exact = renyi(*laws, order)
                    if exact > 1e-9:
                        checked += 1
                        assert bound.value(steps) >= exact * (1 - 1e-6)
    assert checked >= 180


def test_the_hockey_stick_recursion_is_never_below_exact_and_a_radius_for_the_diameter_is_caught():
    rng = np.random.default_rng(6)
    violations = checked = 0
    for trial in range(12):
        p, q, matrix, s = chains(rng)
        if trial % 2:
            # As far apart as the domain allows, and a map that keeps it so.
            p, q, matrix = far_apart(s)
        right, wrong = (
            bounds.bounded_domain(diameter=width, noise_std=s, delta=1e-5) for width in (2.0, 1.0)
        )
        for epsilon in (0.1, 0.5, 1.0):
            laws, delta = (p, q), hockey(p, q, epsilon)
            mistaken = delta
            for _ in range(3):
                level = np.array([epsilon])
                delta *= float(right._coefficient(level, np.array([delta]))[0])
                mistaken *= float(wrong._coefficient(level, np.array([mistaken]))[0])
                laws = laws[0] @ matrix, laws[1] @ matrix
                exact = hockey(*laws, epsilon)
                checked += 1
                # The grid of the oracle blurs theta by about its width squared.
                assert delta >= exact * (1 - 1e-4)
                violations += mistaken < exact * (1 - 1e-3)
    assert checked == 108 and violations > 20


def test_hidden_batches_are_averaged_on_the_safe_side():
    for n, q in ((3, 0.5), (60, 0.25), (5000, 0.01), (1_000_000, 0.001)):
        sizes, chances = batch_sizes(n, q)
        assert len(sizes) <= 62 and sizes[-1] == n and 1 <= chances.sum() < 1 + 1e-9
        for k in (0, int(n * q), int(n * q + 3 * math.sqrt(n * q)), n):
            # Stochastically larger: at least as much mass above any k.
            assert chances[sizes > k].sum() >= binom.sf(k, n, q) * (1 - 1e-9)


@LAW
@given(
    diameter=st.floats(0.1, 6),
    rho=st.floats(1e-4, 3),
    order=st.floats(1.2, 20),
    steps=st.integers(0, 40),
    scale=st.floats(0.01, 100),
)
def test_laws_of_the_bounded_domain(diameter, rho, order, steps, scale):
    def made(width=diameter, noise=1.0, loss=rho):
        return bounds.bounded_domain(
            curve=lambda orders: loss * orders, diameter=width, noise_std=noise, order=order
        )

    value = made().value(steps)
    assert 0 <= value <= rho * order * (1 + 1e-12)
    assert made().value(steps + 1) <= value * (1 + 1e-9)
    assert made(width=1.1 * diameter).value(steps) >= value * (1 - 1e-9)
    assert made(loss=1.1 * rho).value(steps) >= value * (1 - 1e-9)
    assert made(width=diameter * scale, noise=scale).value(steps) == pytest.approx(value, rel=1e-7)
    again = bounds.bounded_domain(
        curve=lambda orders: np.full(len(orders), value), diameter=diameter, noise_std=1.0, order=order
    )
    assert again.value(3) == pytest.approx(made().value(steps + 3), rel=1e-6)
    target = 0.3 * rho * order
    needed = made().steps(target, 10**7)
    if 0 < needed < math.inf:
        assert made().value(int(needed)) <= target < made().value(int(needed) - 1)


@LAW
@given(diameter=st.floats(0.5, 5), rho=st.floats(0.01, 2), target=st.floats(0.05, 2))
def test_least_steps_at_a_delta(diameter, rho, target):
    bound = bounds.bounded_domain(
        curve=lambda orders: rho * orders, diameter=diameter, noise_std=1.0, delta=1e-5
    )
    needed = bound.steps(target, 3000)
    if math.isinf(needed):
        return
    assert bound.value(int(needed)) <= target
    assert needed == 0 or bound.value(int(needed) - 1) > target * (1 - 2e-5)


def outward(z, d, r, s, steps):
    """Exact mu of two chains that drift apart as far as they may: Gaussians of equal variance."""
    distance, variance = z, 0.0
    for _ in range(steps):
        distance, variance = r * distance + d, r * r * variance + s * s
    return distance / math.sqrt(variance)


@LAW
@given(
    z=st.floats(0.01, 10),
    d=st.floats(0, 2),
    r=st.floats(0.5, 1.2),
    s=st.floats(0.1, 3),
    steps=st.integers(1, 60),
)
def test_clipped_gradients_are_exact_for_outward_drift_and_monotone(z, d, r, s, steps):
    bound = bounds.clipped_gradients(start_distance=z, drift=d, decay=r, noise_std=s, order=2)
    exact = [outward(z, d, r, s, k) for k in range(1, steps + 1)]
    assert bound.mu(steps) == pytest.approx(min(exact), rel=1e-9)
    assert bound.mu(steps) >= min(exact) * (1 - 1e-12)
    assert bound.mu(steps + 1) <= bound.mu(steps) <= bound.mu(0) == math.inf
    assert bound.floor <= bound.mu(steps) * (1 + 1e-9)
    scaled = bounds.clipped_gradients(start_distance=7 * z, drift=7 * d, decay=r, noise_std=7 * s, order=2)
    assert scaled.mu(steps) == pytest.approx(bound.mu(steps), rel=1e-9)


@pytest.mark.parametrize(
    ("r", "steps", "mu"), [(1.0, 10, 0.31622777), (0.9, 10, 0.16216232), (1.05, 10, 0.40558267)]
)
def test_distance_fixtures(r, steps, mu):
    bound = bounds.clipped_gradients(start_distance=1.0, drift=0.0, decay=r, noise_std=1.0, order=2)
    assert bound.mu(steps) == pytest.approx(mu, rel=1e-7)
    expected = math.sqrt(1.05**2 - 1) if r > 1 else 0
    assert bound.floor == pytest.approx(expected, rel=1e-9)


def test_below_the_floor_is_unreachable_and_the_raw_formula_would_rise():
    bound = bounds.clipped_gradients(start_distance=1.0, drift=0.01, decay=1.0, noise_std=1.0, order=2)
    assert bound.steps(bound.floor**2 * 1.0001) < math.inf == bound.steps(bound.floor**2 * 0.999)
    # Extrapolating a formula that is not monotone (the seeded mistake) reports more than the minimum.
    assert outward(1.0, 0.01, 1.0, 1.0, 1000) > bound.mu(1000)
    assert bound.floor == pytest.approx(2 * math.sqrt(0.01), rel=1e-9)


@pytest.mark.parametrize("wrong", [{"diameter": -1.0}, {"noise_std": math.nan}, {"diameter": math.inf}])
def test_bad_domains_are_refused(wrong):
    arguments = {"diameter": 1.0, "noise_std": 1.0, "order": 2} | wrong
    with pytest.raises(UsageError, match="PIA070"):
        bounds.bounded_domain(**arguments)
    with pytest.raises(UsageError, match="PIA071"):
        bounds.bounded_domain(diameter=[1.0, 2.0], noise_std=1.0, order=2)
    with pytest.raises(UsageError, match="PIA070"):
        bounds.bounded_domain(diameter=[1.0, 2.0], chances=[0.5, 0.1], noise_std=1.0, order=2)
    with pytest.raises(UsageError, match="PIA070"):
        bounds.clipped_gradients(start_distance=math.nan, drift=0.0, decay=1.0, noise_std=1.0, order=2)
