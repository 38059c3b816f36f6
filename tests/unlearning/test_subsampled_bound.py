"""R4 and R0: exact enumeration of the hidden inclusions, both directions, forget sets of two, seeded
mistakes."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from per_instance_accountant.divergence import gaussian_delta
from per_instance_accountant.unlearning import bounds
from per_instance_accountant.unlearning.bounds.hidden_sizes import hidden_sizes
from per_instance_accountant.unlearning.bounds.inclusion import Inclusions
from per_instance_accountant.unlearning.bounds.interface import Measure
from per_instance_accountant.unlearning.bounds.subsampled import (
    held_until_the_end,
    spread_evenly,
    subsampled_from,
)

LAW = settings(max_examples=40, deadline=None, derandomize=True)


def patterns(rates):
    """All inclusion patterns (2^n, n) and their probabilities."""
    drawn = np.array(list(itertools.product([0, 1], repeat=len(rates))))
    return drawn, np.prod(np.where(drawn == 1, rates, 1 - np.asarray(rates)), axis=1)


def exact_affine(shifts, rate, s, c, steps, order):
    """Larger direction of D_order between the last iterates when all maps are x -> c x (+ shift when
    drawn)."""
    training, members = shifts.shape
    left = c ** (steps + training - 1 - np.arange(training))
    drawn, chance = patterns(np.full(training * members, rate))
    means = drawn @ (shifts * left[:, None]).ravel()
    std = s * math.sqrt(sum(c ** (2 * j) for j in range(training + steps)))
    x = np.linspace(-14 * std, means.max() + (14 + 3 * order) * std, 8001)
    log_q = -((x / std) ** 2) / 2
    log_p = np.logaddexp.reduce(np.log(chance)[:, None] - ((x - means[:, None]) / std) ** 2 / 2, axis=0)
    norm = math.log(x[1] - x[0]) - math.log(std * math.sqrt(2 * math.pi))

    def divergence(p, q):
        return (np.logaddexp.reduce(order * p + (1 - order) * q) + norm) / (order - 1)

    return divergence(log_p, log_q), divergence(log_q, log_p)


CASES = list(
    itertools.product([(0.3, 1.0), (1.0, 1.0)], [0.05, 0.3], [0.6, 0.9], [1, 4, 7], [0, 1, 8], [1.5, 6])
)


def test_never_below_exact_enumeration_of_affine_chains():
    loose = []
    for (delta, s), rate, c, training, steps, order in CASES:
        exact = max(exact_affine(np.full((training, 1), delta), rate, s, c, steps, order))
        bound = bounds.subsampled(
            sensitivity=delta,
            noise_std=s,
            contraction=c,
            training_steps=training,
            sample_rate=rate,
            order=order,
        )
        assert bound.value(steps) >= exact * (1 - 1e-6)
        loose.append(bound.value(steps) / exact)
    assert np.median(loose) < 6  # joint convexity costs up to 1 / rate


def test_never_below_exact_enumeration_for_two_members():
    for c, rate, steps, order in itertools.product([0.6, 0.9], [0.1, 0.4], [0, 1, 4], [1.5, 4]):
        shifts = np.array([[0.5, 0.2], [0.5, 0.4], [0.1, 0.4]])
        exact = max(exact_affine(shifts, rate, 1.0, c, steps, order))
        rows = np.ones(3)
        bound = bounds.subsampled(
            sensitivity=shifts, noise_std=rows, contraction=c * rows, sample_rate=rate, order=order
        )
        assert bound.value(steps) >= exact * (1 - 1e-6)


def test_a_group_is_never_the_sum_of_its_members():
    """Ten aligned members in one full-batch step: the sum of the single values is ten times too small."""
    shifts = np.full((1, 10), 0.4)
    one = np.ones(1)
    group = bounds.contractive(sensitivity=shifts, noise_std=one, contraction=one, order=4)
    single = bounds.contractive(sensitivity=0.4, noise_std=1.0, contraction=1.0, training_steps=1, order=4)
    exact = 4 * (10 * 0.4) ** 2 / 2
    assert group.value(0) == pytest.approx(exact, rel=1e-9)
    assert 10 * single.value(0) == pytest.approx(exact / 10, rel=1e-9)  # what summing would claim
    sampled = bounds.data_processing(ratio=[1.0] * 10, sample_rate=0.01, training_steps=1, order=4)
    alone = bounds.data_processing(ratio=1.0, sample_rate=0.01, training_steps=1, order=4)
    # F_4 = E exp(sum_{a<b} S_a S_b) has the non-negative term "everybody in all four draws".
    everybody = 4 * 10 * math.log(0.01) + 6 * 10.0**2
    assert sampled.value(0) >= everybody / 3 > 10 * alone.value(0)


def test_training_noise_must_not_be_counted_for_random_inclusion():
    """Constant maps in training, drawn only at the last step: the reference value is exact, the shortcut
    lies below."""
    order, rate, steps, training, c = 3.0, 0.5, 4, 6, 0.8
    shifts = np.zeros(training)
    shifts[-1] = 1.0
    ones = np.ones(training)
    bound = bounds.subsampled(
        sensitivity=shifts, noise_std=ones, contraction=c * ones, sample_rate=rate, order=order
    )
    # Only the noise from the last training step on counts: like a chain of one training step.
    exact = max(exact_affine(np.ones((1, 1)), rate, 1.0, c, steps, order))
    wrong_std = math.sqrt(sum(c ** (2 * j) for j in range(training + steps)))
    mu = c**steps / wrong_std
    shortcut = math.log1p(rate * math.expm1(order * (order - 1) * mu**2 / 2)) / (order - 1)
    honest_square = c ** (2 * steps) / sum(c ** (2 * j) for j in range(steps + 1))
    honest = math.log1p(rate * math.expm1(order * (order - 1) * honest_square / 2)) / (order - 1)
    assert bound.value(steps) >= exact
    assert bound.value(steps) == pytest.approx(honest, rel=1e-4)
    assert shortcut < honest


def test_one_direction_is_not_both():
    """The reverse direction can be the larger one after contraction; both must be covered."""
    forward, reverse = exact_affine(np.full((1, 1), 3.0), 0.9, 1.0, 0.9, 1, 6)
    bound = bounds.subsampled(
        sensitivity=3.0, noise_std=1.0, contraction=0.9, training_steps=1, sample_rate=0.9, order=6
    )
    assert bound.direction == "both" and bound.value(1) >= max(forward, reverse) * (1 - 1e-9)


@LAW
@given(
    weights=st.lists(st.floats(1e-6, 2.0), min_size=1, max_size=9),
    rate=st.floats(1e-4, 1.0),
    factor=st.floats(0.05, 20.0),
)
def test_square_moment_equals_enumeration(weights, rate, factor):
    drawn, chance = patterns(np.full(len(weights), rate))
    positive = chance > 0
    exponents = factor * (drawn @ np.array(weights)) ** 2
    exact = float(np.logaddexp.reduce(np.log(chance[positive]) + exponents[positive]))
    found = Inclusions.of(np.array(weights), np.full(len(weights), rate)).log_square_moment(factor)
    assert found >= exact * (1 - 1e-12)
    assert found <= max(exact, 0.0) * (1 + 1e-9) + 3e-13


@LAW
@given(data=st.data())
def test_spread_recursion_equals_enumeration(data):
    """(b) against the pattern-by-pattern cost sum_jk E_j E_k / (V_N - V_{min(j,k)-1}): above it, and
    hardly."""
    training = data.draw(st.integers(1, 4))
    members = data.draw(st.integers(1, 2))

    def draw(low, high, n):
        return np.array(data.draw(st.lists(st.floats(low, high), min_size=n, max_size=n)))

    shifts = draw(0.05, 1.0, training * members).reshape(training, members)
    noise, factor = draw(0.5, 2, training), draw(0.3, 1.05, training)
    rate, order, tau = (
        data.draw(st.floats(0.01, 1.0)),
        data.draw(st.floats(1.1, 8)),
        data.draw(st.floats(0, 3)),
    )
    plan = bounds.schedule(sensitivity=shifts, noise_std=noise, contraction=factor, sample_rate=rate)
    later = np.cumsum(plan.variances()[::-1])[::-1] + tau
    e = plan.arrivals().ravel()
    first = np.repeat(np.arange(training), members)
    gram = np.outer(e, e) / later[np.minimum.outer(first, first)]
    drawn, chance = patterns(np.full(e.size, rate))
    cost = np.einsum("pi,ij,pj->p", drawn, gram, drawn)
    positive = chance > 0
    exact = float(np.logaddexp.reduce(np.log(chance[positive]) + order * (order - 1) / 2 * cost[positive]))
    found = spread_evenly(plan, tau, order) * (order - 1)
    assert exact * (1 - 1e-9) - 1e-15 <= found <= exact * (1 + 1e-3) + 1e-9


def test_rounding_the_grid_down_would_be_caught(monkeypatch):
    room = importlib.import_module("per_instance_accountant.unlearning.bounds.subsampled")
    plan = bounds.schedule(
        sensitivity=np.full(4, 0.5), noise_std=np.ones(4), contraction=np.full(4, 0.9), sample_rate=0.3
    )
    honest = spread_evenly(plan, 0.5, 4.0)

    def nearest_lower(value, grid, shift, sure, factor):
        cells = int(shift / grid[1])
        return np.concatenate([value[cells:], np.full(cells, value[-1])])

    monkeypatch.setattr(room, "_read_ahead", nearest_lower)
    assert spread_evenly(plan, 0.5, 4.0) < honest * (1 - 1e-6)


def test_long_runs_are_shortened_on_the_safe_side():
    """Steps that have faded are taken as always drawn: never below the full recursion of the same problem."""
    short = bounds.subsampled(
        sensitivity=0.5, noise_std=1.0, contraction=0.9, training_steps=250, sample_rate=0.1, order=4
    )
    long = bounds.subsampled(
        sensitivity=0.5, noise_std=1.0, contraction=0.9, training_steps=1000, sample_rate=0.1, order=4
    )
    assert short.value(5) <= long.value(5) <= short.value(5) * 1.001


@pytest.mark.parametrize(("target", "most"), [(0.1, 18), (0.01, 56), (0.001, 111)])
def test_steps_of_the_reference_example(target, most):
    same = {"sensitivity": 0.5, "noise_std": 1.0, "contraction": 0.98, "training_steps": 1000, "order": 8}
    bound = bounds.subsampled(**same, sample_rate=0.02)
    found = bound.steps(target)
    assert found <= most < bounds.contractive(**same).steps(target)
    assert bound.value(found) <= target < bound.value(found - 1)


def test_all_drawn_is_never_better_than_the_gaussian_bound_allows():
    same = {"sensitivity": 0.2, "noise_std": 1.0, "contraction": 0.9, "training_steps": 30, "order": 3}
    exact = bounds.contractive(**same)
    for steps in (0, 1, 10):
        assert bounds.subsampled(**same, sample_rate=1.0).value(steps) >= exact.value(steps) * (1 - 1e-9)


@LAW
@given(
    rate=st.floats(0.01, 0.9),
    c=st.floats(0.3, 1.0),
    delta=st.floats(0.01, 2.0),
    training=st.integers(1, 20),
    steps=st.integers(0, 20),
    order=st.floats(1.2, 10),
)
def test_laws(rate, c, delta, training, steps, order):
    def value(k, *, rate=rate, delta=delta, s=1.0, c=c, training=training):
        return bounds.subsampled(
            sensitivity=delta,
            noise_std=s,
            contraction=c,
            training_steps=training,
            sample_rate=rate,
            order=order,
        ).value(k)

    here, slack = value(steps), 1 + 1e-4  # the chord's looseness is not exactly monotone
    assert value(steps + 1) <= here * slack and value(steps, s=1.5) <= here * slack
    assert (
        here <= value(steps, delta=1.2 * delta) * slack
        and here <= value(steps, rate=min(1.0, 1.2 * rate)) * slack
    )
    assert here <= value(steps, training=training + 1) * slack
    assert value(steps, delta=4 * delta, s=4.0) == pytest.approx(here, rel=1e-9)
    assert value(steps, delta=0.0) == 0 == value(steps, rate=0.0)


def test_held_is_infinite_without_unlearning_noise():
    plan = bounds.schedule(sensitivity=np.ones(2), noise_std=np.ones(2), contraction=np.ones(2))
    held = subsampled_from(plan, Measure(order=2))
    assert held_until_the_end(held.arrivals, 0.0, np.array([2.0])).tolist() == [math.inf]
    assert math.isfinite(held.value(0))


def test_data_processing_equals_the_sampled_gaussian_and_never_decays():
    bound = bounds.data_processing(ratio=1.0, sample_rate=0.01, training_steps=1000, order=8)
    assert bound.value(0) == bound.value(10**6) == pytest.approx(1000 * 8.9364390761e-4, rel=1e-8)
    assert bound.steps(1.0) == 0 and bound.steps(0.5) == math.inf
    full = bounds.data_processing(ratio=[0.3, 0.4], sample_rate=1.0, training_steps=9, delta=1e-5)
    assert full.mu(0) == pytest.approx(3 * 0.7, rel=1e-10)
    assert (
        bounds.data_processing(ratio=math.inf, sample_rate=0.5, training_steps=1, order=2).value(0)
        == math.inf
    )


def exact_epsilon_delta(shifts, rate, s, c, steps, epsilon):
    """Larger hockey-stick divergence of the two last iterates of an affine chain, by quadrature."""
    training = len(shifts)
    left = c ** (steps + training - 1 - np.arange(training))
    drawn, chance = patterns(np.full(training, rate))
    means = drawn @ (shifts * left)
    std = s * math.sqrt(sum(c ** (2 * j) for j in range(training + steps)))
    x = np.linspace(-12 * std, means.max() + 12 * std, 40001)
    q = np.exp(-((x / std) ** 2) / 2)
    p = sum(w * np.exp(-(((x - m) / std) ** 2) / 2) for m, w in zip(means, chance, strict=True))
    width = (x[1] - x[0]) / (std * math.sqrt(2 * math.pi))
    return max(np.maximum(a - math.exp(epsilon) * b, 0).sum() * width for a, b in ((p, q), (q, p)))


def test_epsilon_at_a_delta_never_below_exact_enumeration():
    for rate, c, steps, delta in itertools.product([0.02, 0.3], [0.7, 0.95], [0, 1, 6, 40], [1e-2, 1e-5]):
        bound = bounds.subsampled(
            sensitivity=0.8, noise_std=1.0, contraction=c, training_steps=6, sample_rate=rate, delta=delta
        )
        epsilon = bound.value(steps)
        assert exact_epsilon_delta(np.full(6, 0.8), rate, 1.0, c, steps, epsilon) <= delta * (1 + 1e-6)
        if epsilon > 1e-9:
            assert bound.within(steps, epsilon * (1 + 1e-8)) and not bound.within(steps, epsilon * (1 - 1e-6))


def test_the_size_distribution_dominates_and_rounding_down_would_be_caught():
    rng = np.random.default_rng(3)
    for _ in range(20):
        weights, rates = rng.uniform(0.01, 1, 10), rng.uniform(0.01, 1, 10)
        sizes = hidden_sizes(Inclusions.of(weights, rates), 1e-5)
        drawn, chance = patterns(rates)
        total = drawn @ weights
        for level in rng.uniform(0, weights.sum(), 20):
            tail = chance[total > level].sum()
            assert sizes.chances[sizes.sizes > level].sum() + sizes.beyond >= tail * (1 - 1e-9)
        assert sizes.chances.sum() + sizes.beyond == pytest.approx(1, rel=1e-9)
        exact = float(chance @ gaussian_delta(total / 2, 0.5))
        assert exact <= sizes.delta_at(0.5, 4.0) <= exact * 1.02
        lower = dataclasses.replace(sizes, sizes=sizes.sizes * (1 - 20 / 8192))
        assert lower.delta_at(0.5, 4.0) < exact  # rounding to lower cells


def test_the_mixture_itself_is_tighter_than_its_moments():
    same = {"sensitivity": 0.001, "noise_std": 0.01, "contraction": 0.999, "training_steps": 100}
    bound = bounds.subsampled(**same, sample_rate=0.05, delta=1e-5)
    moments = dataclasses.replace(bound, sizes=None)
    assert bound.value(300) < 0.95 * moments.value(300)
    assert bound.steps(0.05) < moments.steps(0.05) < bounds.contractive(**same, delta=1e-5).steps(0.05)
