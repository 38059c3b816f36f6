"""R3: closed forms, the taut string, exact Gaussian chains, and the shortcut that must not be taken."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from per_instance_accountant.errors import UsageError
from per_instance_accountant.unlearning import bounds

LAW = settings(max_examples=60, deadline=None, derandomize=True)


def geom(x, n):
    return sum(x**j for j in range(n))


def textbook_mu(delta, s, c, training, steps):
    return delta * c**steps * geom(c, training) / (s * math.sqrt(geom(c * c, training + steps)))


@pytest.mark.parametrize(
    ("training", "steps", "mu"),
    [
        (1000, 0, 0.87177979),
        (1000, 1, 0.78460181),
        (1000, 10, 0.30397082),
        (10, 0, 0.60582936),
        (10, 10, 0.19946235),
    ],
)
def test_common_hessian_fixture(training, steps, mu):
    bound = bounds.contractive(
        sensitivity=0.01, noise_std=0.05, contraction=0.9, training_steps=training, order=8
    )
    assert bound.mu(steps) == pytest.approx(mu, rel=1e-7)
    assert bound.value(steps) == pytest.approx(8 * mu**2 / 2, rel=1e-6)


def test_steps_of_the_fixture_are_the_logarithm_of_the_ratio():
    bound = bounds.contractive(
        sensitivity=0.01, noise_std=0.05, contraction=0.9, training_steps=1000, delta=1e-5
    )
    assert bound.steps(0.5) == math.ceil(math.log(0.87177979 / 0.14221056) / math.log(1 / 0.9)) == 18


@pytest.mark.parametrize(
    ("c", "steps", "mu"),
    [(1.0, 10, 0.31622777), (0.9, 10, 0.16216232), (1.05, 10, 0.40558267), (1.05, 4000, 0.32015621)],
)
def test_start_at_a_distance_decays_like_the_infinity_wasserstein_bound(c, steps, mu):
    # A noiseless training step that moves by 1 leaves the two runs at distance 1.
    bound = bounds.contractive(
        sensitivity=np.ones(1),
        noise_std=np.zeros(1),
        contraction=np.full(1, c),
        unlearning_noise_std=1.0,
        order=2,
    )
    assert bound.value(0) == math.inf
    assert bound.mu(steps) == pytest.approx(mu, rel=1e-7)


@pytest.mark.parametrize("c", [0.5, 0.8, 0.95, 0.99])
def test_cyclic_batches_agree_with_bok_su_altschuler(c):
    for length in (2, 5, 20):
        for epochs in (1, 2, 10, 40):
            shifts = np.zeros(length * epochs)
            shifts[length - 1 :: length] = 1
            ones = np.ones(length * epochs)
            mu = bounds.contractive(sensitivity=shifts, noise_std=ones, contraction=c * ones, order=2).mu(0)
            decay = c**length
            later = c ** (length * (epochs - 1))
            square = 1 + c ** (2 * length - 2) * (1 - c * c) / (1 - decay) ** 2 * (1 - later) / (1 + later)
            assert mu == pytest.approx(math.sqrt(square), rel=1e-10)
    for steps in (1, 5, 30, 200):
        mu = bounds.contractive(
            sensitivity=1.0, noise_std=1.0, contraction=c, training_steps=steps, order=2
        ).mu(0)
        noisy_gd = (1 - c**steps) / (1 + c**steps) * (1 + c) / (1 - c)
        assert mu == pytest.approx(math.sqrt(noisy_gd), rel=1e-10)


@LAW
@given(
    c=st.floats(0.05, 1.1),
    s=st.floats(1e-3, 10),
    delta=st.floats(1e-3, 10),
    training=st.integers(1, 60),
    steps=st.integers(0, 60),
)
def test_closed_form_equals_taut_string_equals_sums(c, s, delta, training, steps):
    closed = bounds.contractive(
        sensitivity=delta, noise_std=s, contraction=c, training_steps=training, order=3
    )
    shifts = np.full(training, delta)
    string = bounds.contractive(
        sensitivity=np.append(shifts, 0.0),  # no longer constant, and the same as one step of tail
        noise_std=np.full(training + 1, s),
        contraction=np.full(training + 1, c),
        order=3,
    )
    expected = textbook_mu(delta, s, c, training, steps + 1)
    assert string.mu(steps) == pytest.approx(closed.mu(steps + 1), rel=1e-9)
    # Beyond 1 the chord is too small, and the string lies above it.
    assert c > 1 or closed.mu(steps + 1) == pytest.approx(expected, rel=1e-9)
    assert closed.mu(steps + 1) >= expected * (1 - 1e-13)


@LAW
@given(data=st.data())
def test_no_bound_below_exact_affine_chains(data):
    """Affine maps with linear part c_t: the last iterates are Gaussians that differ by the accumulated
    shift."""
    n = data.draw(st.integers(1, 12))

    def draw(low, high, n=n):
        return np.array(data.draw(st.lists(st.floats(low, high), min_size=n, max_size=n)))

    shifts, noise, factor = draw(0, 2), draw(0.1, 2), draw(0.2, 1.1)
    steps = data.draw(st.integers(0, 8))
    gap, variance = 0.0, 0.0
    for t in range(n):
        gap, variance = factor[t] * gap + shifts[t], factor[t] ** 2 * variance + noise[t] ** 2
    for _ in range(steps):
        gap, variance = factor[-1] * gap, factor[-1] ** 2 * variance + noise[-1] ** 2
    bound = bounds.contractive(sensitivity=shifts, noise_std=noise, contraction=factor, order=2)
    assert bound.mu(steps) >= gap / math.sqrt(variance) * (1 - 1e-12)


def test_a_late_shift_cannot_use_earlier_noise():
    """Maps constant before the only drawn step: exact 0.1609; Cauchy-Schwarz over all the noise claims
    0.1577."""
    shifts, ones = np.zeros(6), np.ones(6)
    shifts[5] = 1.0
    bound = bounds.contractive(sensitivity=shifts, noise_std=ones, contraction=0.8 * ones, order=2)
    exact = 0.8**6 / math.sqrt(geom(0.64, 7))
    cauchy_schwarz = 0.8**6 / math.sqrt(geom(0.64, 12))
    assert exact == pytest.approx(0.1609, abs=5e-5) and cauchy_schwarz == pytest.approx(0.1577, abs=5e-5)
    assert bound.mu(6) == pytest.approx(exact, rel=1e-10)
    with pytest.raises(AssertionError):
        assert cauchy_schwarz >= exact


@LAW
@given(
    c=st.floats(0.3, 1.0),
    s=st.floats(0.01, 10),
    delta=st.floats(1e-3, 10),
    training=st.integers(1, 300),
    steps=st.integers(0, 50),
    order=st.floats(1.1, 30),
    factor=st.floats(1.01, 3),
)
def test_laws_of_steps_and_values(c, s, delta, training, steps, order, factor):
    def value(k, *, delta=delta, s=s, c=c, training=training):
        return bounds.contractive(
            sensitivity=delta, noise_std=s, contraction=c, training_steps=training, order=order
        ).value(k)

    here, slack = value(steps), 1 + 1e-9
    assert value(steps + 1) <= here * slack and value(steps, s=s * factor) <= here * slack
    assert (
        here <= value(steps, delta=delta * factor) * slack
        and here <= value(steps, training=training + 1) * slack
    )
    assert here <= value(steps, c=min(1.0, c * 1.01)) * slack
    assert value(0) <= order * training * (delta / s) ** 2 / 2 * slack  # never above composition
    assert value(steps, delta=0.0) == 0
    assert value(steps, delta=delta * factor, s=s * factor) == pytest.approx(here, rel=1e-9)
    bound = bounds.contractive(
        sensitivity=delta, noise_std=s, contraction=c, training_steps=training, order=order
    )
    least = bound.steps(here)
    assert least <= steps and bound.value(least) <= here and (least == 0 or bound.value(least - 1) > here)


def test_expansive_maps_have_a_floor_and_say_unreachable():
    bound = bounds.contractive(sensitivity=1.0, noise_std=1.0, contraction=1.05, training_steps=1, order=2)
    floor = bound.value(bounds.MAX_STEPS)
    assert bound.steps(0.99 * floor) == math.inf and bound.steps(1.01 * floor) < math.inf


def test_no_noise_is_infinite_and_no_shift_is_zero():
    silent = bounds.contractive(sensitivity=1.0, noise_std=0.0, contraction=0.5, training_steps=3, order=2)
    assert silent.value(1000) == math.inf and silent.steps(1.0) == math.inf
    unmoved = bounds.contractive(
        sensitivity=0.0, noise_std=0.0, contraction=0.5, training_steps=3, delta=1e-5
    )
    assert unmoved.value(0) == 0 and unmoved.steps(1e-9) == 0


@pytest.mark.parametrize(
    "changed",
    [
        {"sensitivity": math.nan},
        {"noise_std": -1.0},
        {"contraction": math.inf},
        {"training_steps": 0},
        {"training_steps": None},
        {"order": 1.0},
        {"order": math.nan},
        {"order": None},
        {"delta": 1e-5},
        {"noise_std": [1.0, 2.0]},
    ],
)
def test_bad_arguments_are_refused(changed):
    good = {"sensitivity": 1.0, "noise_std": 1.0, "contraction": 0.9, "training_steps": 5, "order": 2}
    with pytest.raises(UsageError):
        bounds.contractive(**(good | changed))
    bound = bounds.contractive(**good)
    for target in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError):
            bound.steps(target)


@pytest.mark.parametrize("c", [2.5, 3.0, 20.0])
def test_expansive_maps_that_turn_into_fresh_directions(c):
    """Two steps, shift along e1 each time, second map ``c e2 e1^T``: the law is Gaussian, with mu^2 exact.

    Chains with one common Hessian cannot tell: there the chord is exact for every factor.
    """
    exact = 1 + c**2 / (1 + c**2)
    bound = bounds.contractive(sensitivity=1.0, noise_std=1.0, contraction=c, training_steps=2, order=2)
    assert bound.mu(0) ** 2 >= exact
    chord = textbook_mu(1.0, 1.0, c, 2, 0) ** 2
    assert chord < exact, "the seeded bug: the closed form of contractive maps used beyond 1"


@pytest.mark.parametrize("c", [0.5, 0.99, 1.0])
def test_the_closed_form_covers_turning_maps_that_do_not_expand(c):
    bound = bounds.contractive(sensitivity=1.0, noise_std=1.0, contraction=c, training_steps=2, order=2)
    assert bound.mu(0) ** 2 >= 1 + c**2 / (1 + c**2)
    assert bound.mu(0) == pytest.approx(textbook_mu(1.0, 1.0, c, 2, 0), rel=1e-9)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    sensitivity=st.floats(1e-4, 1.0),
    log_delta=st.floats(-40, -0.5),
    log_target=st.floats(-14, 4),
    k=st.integers(0, 60),
)
def test_asking_for_a_target_is_asking_for_the_value(sensitivity, log_delta, log_target, k):
    bound = bounds.contractive(
        sensitivity=sensitivity, noise_std=0.3, contraction=0.95, training_steps=40, delta=math.exp(log_delta)
    )
    value = bound.value(k)
    for target in (math.exp(log_target), value, value * (1 + 1e-8), value * (1 - 1e-8), value * (1 - 1e-10)):
        if target > 0:
            assert bound.within(k, target) == (value <= target)
