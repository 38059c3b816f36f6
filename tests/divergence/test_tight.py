"""Tight epsilon and delta: never below the truth, close to it, and certified by what is added."""

from __future__ import annotations

import math

import mpmath as mp
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant

from per_instance_accountant.divergence import (
    DEFAULT_ORDERS,
    contour,
    gaussian_delta,
    gaussian_epsilon,
    rdp_to_delta,
    rdp_to_epsilon,
    sampled_gaussian_delta,
    sampled_gaussian_epsilon,
    sampled_gaussian_rdp,
    tails,
    tight,
)
from per_instance_accountant.errors import UsageError

CASES = [
    (0.02, [1.0], [1000], 1e-5),
    (0.02, [0.2, 0.5, 1.0], [500, 300, 200], 1e-5),
    (0.3, [0.1, 0.3], [50, 100], 1e-5),
    (0.01, [0.3, 2.0], [300, 3], 1e-7),
]
RARE = [(1e-3, [1.0], [500], 1e-5), (1e-3, [0.5, 2.0], [100, 100], 1e-6)]
"""sample_rate * steps below 1."""


def by_pld(rate: float, ratios: list[float], counts: list[int], delta: float, *, above: bool) -> float:
    """dp_accounting's certified value, pessimistic or optimistic, both directions."""
    parts = [
        pld.from_gaussian_mechanism(
            1 / ratio,
            sampling_prob=rate,
            value_discretization_interval=1e-4,
            use_connect_dots=above,
            pessimistic_estimate=above,
        ).self_compose(count)
        for ratio, count in zip(ratios, counts, strict=True)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total.compose(part)
    return float(total.get_epsilon_for_delta(delta))


def one_step_delta(rate: float, ratio: float, epsilon: float) -> float:
    """Exact, the larger direction, at 40 digits: both hockey sticks cut at one point of the line."""
    with mp.workdps(40):
        q, a, e = mp.mpf(rate), mp.mpf(ratio), mp.exp(mp.mpf(epsilon))

        def cut(level: mp.mpf) -> mp.mpf:
            return mp.log(mp.expm1(mp.log(level)) / q + 1) / a + a / 2

        def above(z: mp.mpf) -> mp.mpf:
            return mp.erfc(z / mp.sqrt(2)) / 2

        z = cut(e)
        remove = (1 - q) * above(z) + q * above(z - a) - e * above(z)
        add = mp.mpf(0)
        if 1 / e > 1 - q:
            z = cut(1 / e)
            add = above(-z) - e * ((1 - q) * above(-z) + q * above(a - z))
        return float(max(remove, add))


def by_rdp(rate: float, ratios: np.ndarray, counts: np.ndarray, delta: float) -> np.ndarray:
    curve = counts @ sampled_gaussian_rdp(rate, ratios, DEFAULT_ORDERS)
    return np.asarray(rdp_to_epsilon(DEFAULT_ORDERS, curve, delta))


@pytest.mark.parametrize("case", CASES + RARE)
def test_lies_inside_the_error_bars_of_dp_accounting(
    case: tuple[float, list[float], list[int], float],
) -> None:
    rate, ratios, counts, delta = case
    ours = sampled_gaussian_epsilon(rate, ratios, counts, delta)
    assert by_pld(*case, above=False) * (1 - 1e-9) <= ours <= by_pld(*case, above=True) + 1e-4


@pytest.mark.parametrize("case", [CASES[2]])
def test_lies_inside_the_error_bars_of_prv_accountant(
    case: tuple[float, list[float], list[int], float],
) -> None:
    rate, ratios, counts, delta = case
    steps = [
        PoissonSubsampledGaussianMechanism(noise_multiplier=1 / r, sampling_probability=rate) for r in ratios
    ]
    accountant = PRVAccountant(
        prvs=steps, max_self_compositions=counts, eps_error=0.02, delta_error=delta / 1000
    )
    low, _, high = accountant.compute_epsilon(delta=delta, num_self_compositions=counts)
    assert low <= sampled_gaussian_epsilon(rate, ratios, counts, delta) <= high


@settings(max_examples=6, phases=[Phase.generate], deadline=None, derandomize=True)
@given(
    rate=st.floats(1e-4, 0.95),
    ratio=st.floats(0.05, 4.0),
    epsilon=st.floats(1e-3, 3.0),
)
def test_one_step_is_never_below_the_exact_delta_and_close(rate: float, ratio: float, epsilon: float) -> None:
    exact = one_step_delta(rate, ratio, epsilon)
    ours = sampled_gaussian_delta(rate, [ratio], [1], epsilon)
    assert ours >= exact * (1 - 1e-12)
    rdp = sampled_gaussian_rdp(rate, ratio, DEFAULT_ORDERS)[0]
    assert ours <= rdp_to_delta(DEFAULT_ORDERS, rdp, epsilon) * (1 + 1e-9)
    if exact > 1e-6 and rate > 0.01 and ratio > 0.3:
        assert ours <= exact * 1.02


@settings(max_examples=10, phases=[Phase.generate], deadline=None, derandomize=True)
@given(
    ratios=st.lists(st.floats(0.01, 2.0), min_size=1, max_size=3),
    steps=st.integers(1, 50),
    delta=st.sampled_from([1e-9, 1e-5, 1e-2]),
)
def test_without_sampling_both_methods_give_the_exact_gaussian(
    ratios: list[float], steps: int, delta: float
) -> None:
    counts = [steps] * len(ratios)
    mu = math.sqrt(steps * sum(r * r for r in ratios))
    exact = gaussian_epsilon(mu, delta)
    assert exact <= sampled_gaussian_epsilon(1.0, ratios, counts, delta) <= exact * (1 + 1e-12) + 1e-12
    contours = tails.line_epsilons(
        np.array([counts], dtype=float),
        (np.ones(len(ratios)), np.array(ratios)),
        np.array([exact + 1.0]),
        math.log(delta),
        np.zeros(1),
        add=False,
    )[0][0]
    assert exact * (1 - 1e-9) - 1e-12 <= contours <= exact * (1 + 1e-4) + 1e-6
    assert sampled_gaussian_delta(1.0, ratios, counts, exact) <= gaussian_delta(mu, exact) * (1 + 1e-9)


RUNS = st.builds(
    lambda seed, scale: np.random.default_rng(seed).integers(0, scale, (6, 4)).astype(float),
    st.integers(0, 2**31),
    st.sampled_from([40, 300, 3000]),
)
RATIOS = np.array([0.05, 0.2, 0.6, 1.1])


@settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate])
@given(counts=RUNS, rate=st.sampled_from([0.01, 0.2]), delta=st.sampled_from([1e-7, 1e-5, 1e-3]))
def test_laws_of_many_runs(counts: np.ndarray, rate: float, delta: float) -> None:
    epsilon = sampled_gaussian_epsilon(rate, RATIOS, counts, delta)
    assert (epsilon >= 0).all() and (epsilon <= by_rdp(rate, RATIOS, counts, delta) * (1 + 1e-9)).all()
    # Monotone, up to the tightness of the bound.
    slack = 2e-4 + 2e-4 * epsilon
    assert (sampled_gaussian_epsilon(rate, RATIOS, counts + np.eye(4)[2], delta) >= epsilon - slack).all()
    assert (sampled_gaussian_epsilon(rate, RATIOS * 1.05, counts, delta) >= epsilon - slack).all()
    assert (sampled_gaussian_epsilon(rate, RATIOS, counts, delta * 2) <= epsilon + slack).all()
    # An instance alone, and in another order of the levels, has the same epsilon.
    alone = [sampled_gaussian_epsilon(rate, RATIOS[::-1], row[::-1], delta) for row in counts]
    np.testing.assert_allclose(alone, epsilon, rtol=2e-4)


@pytest.mark.parametrize("case", CASES + RARE)
def test_delta_inverts_epsilon(case: tuple[float, list[float], list[int], float]) -> None:
    rate, ratios, counts, delta = case
    epsilon = sampled_gaussian_epsilon(rate, ratios, counts, delta)
    assert sampled_gaussian_delta(rate, ratios, counts, epsilon) <= delta * 1.02
    assert sampled_gaussian_delta(rate, ratios, counts, epsilon * 0.99) > delta


def test_a_large_epsilon_is_as_tight() -> None:
    case = 0.01, [3.0], [2000], 1e-5
    ours = sampled_gaussian_epsilon(*case)
    assert ours > 70
    assert by_pld(*case, above=False) <= ours <= by_pld(*case, above=True) + 1e-4
    delta = sampled_gaussian_delta(case[0], case[1], case[2], ours)
    assert delta == pytest.approx(case[3], rel=1e-4)


def test_rare_sampling_does_without_the_fallback() -> None:
    """An expected 0.4 draws, many levels."""
    ratios = np.geomspace(0.1, 1.5, 30)
    counts = np.eye(30)[::3] * 200
    tight = sampled_gaussian_epsilon(0.002, ratios, counts, 1e-5)
    assert (tight < 0.9 * by_rdp(0.002, ratios, counts, 1e-5)).all()
    for i in (4, 9):
        case = 0.002, [float(ratios[3 * i])], [200], 1e-5
        assert by_pld(*case, above=False) <= tight[i] <= by_pld(*case, above=True) + 5e-5


def test_rates_may_differ_by_level() -> None:
    mixed = sampled_gaussian_epsilon([0.01, 0.05, 1.0], [1.0, 0.8, 0.1], [300, 100, 5], 1e-5)
    low = sampled_gaussian_epsilon(0.01, [1.0, 0.8, 0.1], [300, 100, 5], 1e-5)
    assert (
        low
        < mixed
        < sampled_gaussian_epsilon(0.06, [1.0, 0.8], [300, 100], 1e-5) + gaussian_epsilon(0.3, 1e-5)
    )
    same = sampled_gaussian_epsilon([0.02, 0.02], [1.0, 1.0], [400, 600], 1e-5)
    assert same == pytest.approx(sampled_gaussian_epsilon(0.02, [1.0], [1000], 1e-5), rel=1e-6)


def test_extremes_are_numbers_or_infinite() -> None:
    values = sampled_gaussian_epsilon(0.01, [0.0, 1e-8, 30.0, 100.0, np.inf], np.eye(5), 1e-5)
    assert values[0] == 0 and np.isinf(values[4]) and np.isfinite(values[:4]).all()
    assert (np.diff(values) >= 0).all()
    assert sampled_gaussian_epsilon(0.01, [1.0], [0], 1e-5) == 0
    assert sampled_gaussian_epsilon(0.0, [1.0], [10], 1e-5) == 0
    assert sampled_gaussian_epsilon(0.01, [1.0], [10], 0.0) == np.inf
    assert sampled_gaussian_epsilon(0.01, [1.0], [10], 1.0) == 0
    assert sampled_gaussian_delta(0.01, [np.inf, 1.0], [1, 1], 1.0) == 1
    assert sampled_gaussian_delta(0.01, [1.0], [10], np.inf) == 0
    many = sampled_gaussian_epsilon(1e-8, [1e-3], [1e9], 1e-5)
    assert 0 <= many <= by_rdp(1e-8, np.array([1e-3]), np.array([[1e9]]), 1e-5)[0]


@pytest.mark.parametrize(
    "arguments",
    [
        (1.5, [1.0], [1], 1e-5),
        (math.nan, [1.0], [1], 1e-5),
        (0.1, [-1.0], [1], 1e-5),
        (0.1, [1.0], [0.5], 1e-5),
        (0.1, [1.0], [-1], 1e-5),
        (0.1, [1.0], [math.nan], 1e-5),
        (0.1, [1.0, 2.0], [1], 1e-5),
        ([0.1, 0.2], [1.0], [1], 1e-5),
        (0.1, [1.0], [1], 2.0),
        (0.1, [1.0], [1], math.nan),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[object, ...]) -> None:
    with pytest.raises(UsageError, match="PIA07"):
        sampled_gaussian_epsilon(*arguments)  # type: ignore[arg-type]


def assert_never_below_gaussian() -> None:
    """The bound of every effort against the exact value where it is known, at epsilons around the
    root."""
    counts, levels = np.array([[30.0]]), (np.ones(1), np.array([0.2]))
    for epsilon in (0.5, 2.0, 4.0):
        truth = math.log(gaussian_delta(0.2 * math.sqrt(30), epsilon))
        for effort in range(len(tails._NODES)):
            for abscissa in (1.0, 4.0, 12.0):
                tail = tails.make_tail(counts, levels, abscissa, 12.0, effort, add=False)
                assert tail.at(np.array([epsilon]))[0][0] >= truth - 1e-9, "below the truth"


def test_every_line_and_effort_is_an_upper_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_never_below_gaussian()
    monkeypatch.setattr(tails, "_NODES", (4, 9, 16))
    assert_never_below_gaussian()


def test_law_catches_a_truncation_that_is_not_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tails, "_NODES", (4, 9, 16))
    monkeypatch.setattr(contour.Line, "log_decay", lambda self, edges: np.full((1, edges.size - 1), -np.inf))
    with pytest.raises(AssertionError, match="below the truth"):
        assert_never_below_gaussian()


@pytest.mark.parametrize("only", [False, True])
def test_law_catches_one_direction_only(monkeypatch: pytest.MonkeyPatch, only: bool) -> None:
    """Each direction alone misses the exact one-step delta somewhere, or is the larger one
    everywhere."""
    original = tails.make_tail
    larger = 0.5, 1.0, 0.3

    def one(*arguments: object, add: bool) -> tails.Tail:
        return original(*arguments, add=only)  # type: ignore[arg-type]

    monkeypatch.setattr(tails, "make_tail", one)
    nothing = np.array([np.inf]), np.array([False])
    monkeypatch.setattr(tight, "parted_deltas", lambda *given, **named: nothing)
    monkeypatch.setattr(tails, "_ladder", lambda r, a, add, ladder=tails._ladder: ladder(r, a, only))
    exact = one_step_delta(*larger)
    ours = sampled_gaussian_delta(larger[0], [larger[1]], [1], larger[2])
    assert (ours < exact * (1 - 1e-6)) is only


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("ratio", [0.01, 0.5, 1.0, 3.0])
def test_decay_bounds_hold_at_every_frequency(ratio: float, add: bool) -> None:
    rate = 0.05
    line = contour.tabulate(np.array([rate]), np.array([ratio]), 3.0, 0.4, 2000, add=add)
    frequency = 0.4 * np.arange(2000)
    modulus = np.exp((line.log_moment[0] - line.log_moment[0, 0]).real)
    edges = 0.3 * 1.3 ** np.arange(35)
    bounds = np.exp(line.log_decay(edges)[0])
    for j, bound in enumerate(bounds):
        inside = (frequency >= edges[j]) & (frequency <= edges[j + 1])
        assert (modulus[inside] <= bound * (1 + 1e-9) + line.error[0]).all()
    assert line.error[0] < 1e-9


@pytest.mark.parametrize("add", [False, True])
def test_tabulated_moments_equal_mpmath(add: bool) -> None:
    rate, ratio, c, spacing = 0.1, 1.3, 2.5, 0.9
    line = contour.tabulate(np.array([rate]), np.array([ratio]), c, spacing, 12, add=add)
    with mp.workdps(30):
        q, a = mp.mpf(rate), mp.mpf(ratio)
        for m in (0, 1, 5, 11):
            s = mp.mpc(c, spacing * m)
            power = -s if add else 1 + s
            value = mp.quad(
                lambda z, p=power: mp.npdf(z) * mp.exp(p * mp.log(1 - q + q * mp.exp(a * z - a * a / 2))),
                mp.linspace(-14, 18, 33),
            )
            ours = np.exp(line.log_moment[0, m] - line.log_moment[0, 0].real)
            exact = complex(value / mp.exp(mp.mpf(float(line.log_moment[0, 0].real))))
            assert abs(ours - exact) <= line.error[0] + 1e-15


def test_squares_of_tiny_ratios_do_not_vanish() -> None:
    """delta at 0 is at least the total variation of one unsampled step times the rate."""
    for ratio in (1e-170, 2.6e-162, 1e-150):
        assert sampled_gaussian_delta(0.999, [ratio], [1], 0.0) >= 0.999 * ratio / math.sqrt(2 * math.pi)


def test_rates_whose_inverse_overflows_are_raised() -> None:
    for rate in (5e-324, 1e-300, 1e-200):
        tiny = sampled_gaussian_epsilon(rate, [0.5], [[1000]], 5e-324)
        assert 0 <= tiny[0] <= sampled_gaussian_epsilon(1e-20, [0.5], [[1000]], 5e-324)[0]
