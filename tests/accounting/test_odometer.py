"""Odometer, partitions, schedules and levels: every shortcut against the long way, and never below it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import Phase as Stage
from hypothesis import given, settings
from hypothesis import strategies as st

from per_instance_accountant import audit
from per_instance_accountant.accounting import Odometer, Sweep, WorstCase, account, levels
from per_instance_accountant.accounting.levels import Span, tight_epsilon
from per_instance_accountant.divergence import rdp_to_epsilon, sampled_gaussian_epsilon, sampled_gaussian_rdp
from per_instance_accountant.errors import UsageError
from per_instance_accountant.ledger import Ledger, LedgerWriter
from per_instance_accountant.ledger.records import Phase, Run, Step, Thresholds

ORDERS = np.array([2.0, 8.0, 32.0])
RATE, N = 0.05, 30
VALUES = np.geomspace(0.01, 1, N).astype(np.float32)


def ledger(charging: str = "fixed_thresholds", noises: tuple[float, ...] = (1.0,), steps: int = 50) -> Ledger:
    writer = LedgerWriter.create(None, Run(num_instances=N))
    for noise in noises:
        writer.append(
            Phase(
                kind="train",
                sampling="poisson",
                sample_rate=RATE,
                noise_std=noise,
                max_grad_norm=1.0,
                charging=charging,
                denominator=1.0,
                learning_rate=0.1,
            )
        )
        writer.append(Thresholds(values=VALUES, source="fixed"))
        for t in range(steps):
            drawn = np.array([t % N, (t + 7) % N])
            writer.append(Step(positions=drawn, contributions=VALUES[drawn]))
    return writer.ledger()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31))
def test_odometer_is_never_below_the_exact_sum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    odometer, exact = Odometer(5, RATE, 1.3), np.zeros((5, 3))
    squared = np.ones(5)
    for _ in range(12):
        chosen = np.flatnonzero(rng.random(5) < 0.5)
        values = np.exp(rng.uniform(-16, 0, chosen.size)) * (rng.random(chosen.size) > 0.1)
        odometer.set_bounds(chosen, values)
        squared[chosen] = values
        steps = int(rng.integers(0, 40))
        odometer.advance(steps)
        exact += steps * sampled_gaussian_rdp(RATE, 1.3 * np.sqrt(squared), ORDERS)
    for order, column in zip(ORDERS, exact.T, strict=True):
        truth = rdp_to_epsilon([order], column[:, None], 1e-5)
        got = odometer.epsilons([order], 1e-5)
        assert (got >= truth * (1 - 1e-9)).all()
        np.testing.assert_array_equal(got, odometer.epsilons([order], 1e-5))
    assert odometer.bytes_per_instance <= 700


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), steps=st.integers(0, 700), size=st.sampled_from([1, 3, 600]))
def test_charging_steps_at_once_gives_the_counts_of_one_after_another(
    seed: int, steps: int, size: int
) -> None:
    rng = np.random.default_rng(seed)
    squared = np.exp(rng.uniform(-16, 0, (steps, size))) * (rng.random((steps, size)) > 0.1)
    squared[rng.random((steps, size)) < 0.05] = 1.0
    at_once, singly = Odometer(size, RATE, 1.3), Odometer(size, RATE, 1.3)
    for odometer in (at_once, singly):
        odometer.advance(3)
        odometer.set_bounds(slice(None), np.full(size, 0.3))
        odometer.advance(2)
    at_once.charge(squared)
    for row in squared:
        singly.set_bounds(slice(None), row)
        singly.advance()
    singly.set_bounds(slice(None), np.full(size, 0.3))
    for odometer in (at_once, singly):
        odometer.advance(7)
    np.testing.assert_array_equal(at_once.rdp(ORDERS), singly.rdp(ORDERS))
    np.testing.assert_array_equal(at_once._counts, singly._counts)
    assert (at_once._counts.sum(axis=1) == (12 + steps) * 256).all(), "a step was charged in part"


def test_charging_steps_refuses_bad_bounds_and_stays_as_it_was() -> None:
    odometer = Odometer(2, RATE, 1.0)
    odometer.charge([[0.1, 0.2]])
    before = odometer.epsilons(ORDERS, 1e-5)
    for bad in ([[0.1, 1.1]], [[0.1, -0.1]], [[0.1, np.nan]], [[0.1]], [0.1, 0.2], [[0.1, 0.2, 0.3]]):
        with pytest.raises(UsageError, match="PIA07"):
            odometer.charge(bad)
    odometer.advance(2**24 - 3)
    with pytest.raises(UsageError, match="PIA070"):
        odometer.charge([[0.1, 0.2]] * 2)
    full = odometer.epsilons(ORDERS, 1e-5)
    assert (full > before).all() and np.isfinite(full).all()


def test_odometer_refuses_bounds_outside_and_stays_as_it_was() -> None:
    odometer = Odometer(2, RATE, 1.0)
    odometer.advance(10)
    before = odometer.epsilons(ORDERS, 1e-5)
    for bad in ([1.1], [-0.1], [np.nan]):
        with pytest.raises(UsageError, match="PIA070"):
            odometer.set_bounds(np.array([0]), bad)
    with pytest.raises(UsageError, match="PIA070"):
        odometer.advance(-1)
    np.testing.assert_array_equal(odometer.epsilons(ORDERS, 1e-5), before)
    worst = 10 * sampled_gaussian_rdp(RATE, [1.0], ORDERS)[0]
    np.testing.assert_allclose(before, rdp_to_epsilon(ORDERS, worst, 1e-5), rtol=1e-9)


@pytest.mark.parametrize("charging", ["fixed_thresholds", "sweep", "last_seen", "unamplified", "worst_case"])
def test_partitions_give_the_numbers_of_the_whole(charging: str) -> None:
    run = ledger(charging)
    whole = account(run, orders=ORDERS)
    parts = [account(run, orders=ORDERS, partition=cut) for cut in ((0, 1), (1, 17), (17, N))]
    np.testing.assert_allclose(np.concatenate([part.rdp for part in parts]), whole.rdp, rtol=1e-14)
    np.testing.assert_array_equal(np.concatenate([part.ids for part in parts]), whole.ids)
    np.testing.assert_array_equal(parts[0].worst_case_rdp, whole.worst_case_rdp)
    for bad in ((0, N + 1), (3, 3), (-1, 2)):
        with pytest.raises(UsageError, match="PIA070"):
            account(run, partition=bad)


def test_an_audit_in_parts_is_the_audit_of_the_whole() -> None:
    run = ledger(steps=10)
    small = audit(run, tight=False, memory=3 * 3424)
    np.testing.assert_allclose(small.epsilon, audit(run, tight=False).epsilon, rtol=1e-13)
    with pytest.raises(UsageError, match="PIA070"):
        audit(run, memory=0)


def test_a_schedule_of_noises_is_never_below_the_exact_sum() -> None:
    noises = tuple(np.linspace(0.8, 3, 40))
    loss = account(ledger(noises=noises, steps=3), orders=ORDERS)
    exact = sum(3 * sampled_gaussian_rdp(RATE, VALUES / noise, ORDERS) for noise in noises)
    assert (loss.rdp >= exact * (1 - 1e-9)).all() and (loss.rdp <= exact * 1.03).all()
    tight = loss.tight_epsilon(1e-5)
    counts = np.full((1, len(noises)), 3)
    for i in (5, 20, N - 1):
        truth = sampled_gaussian_epsilon(RATE, VALUES[i] / np.array(noises), counts, 1e-5)[0]
        assert truth * (1 - 1e-5) <= tight[i] <= truth * 1.1


def test_only_bounds_fixed_before_the_run_are_tight() -> None:
    swept = account(ledger("sweep"))
    assert swept.spans is None
    np.testing.assert_array_equal(swept.tight_epsilon(1e-5), swept.epsilon(1e-5))
    fixed = account(ledger())
    assert (fixed.tight_epsilon(1e-5) < 0.97 * fixed.epsilon(1e-5)).all()
    worst = account(ledger("sweep"), charging=WorstCase())
    assert worst.tight_epsilon(1e-5)[0] < worst.epsilon(1e-5)[0]
    assert fixed.tight_worst_case_epsilon(1e-5) < fixed.worst_case_epsilon(1e-5)
    assert fixed.tight_worst_case_epsilon(1e-5) == pytest.approx(
        sampled_gaussian_epsilon(RATE, [1.0], [50], 1e-5), rel=1e-6
    )
    assert Sweep(every=5).basis != fixed.basis


RATIOS = np.random.default_rng(4).lognormal(-1.2, 0.7, 300).astype(np.float32)


def assert_levels_are_above() -> None:
    span = Span(steps=200, sample_rate=RATE, ratios=RATIOS)
    some = np.arange(0, 300, 12)
    truth = sampled_gaussian_epsilon(RATE, RATIOS[some], np.eye(some.size) * 200, 1e-5)
    tight = tight_epsilon((span,), 1e-5)[some]
    assert (tight >= truth * (1 - 2e-5)).all(), "a ratio was rounded down"
    assert (tight / truth - 1).mean() < 0.01


def test_levels_round_up_and_cost_less_than_one_percent() -> None:
    assert_levels_are_above()


def test_law_catches_rounding_to_the_nearest_level(monkeypatch: pytest.MonkeyPatch) -> None:
    def nearest(grid: np.ndarray, ratios: np.ndarray) -> np.ndarray:
        return np.asarray(np.abs(grid[None, :] - ratios[:, None]).argmin(axis=1))

    monkeypatch.setattr(levels, "_rounded_up", nearest)
    with pytest.raises(AssertionError, match="rounded down"):
        assert_levels_are_above()


@settings(max_examples=5, deadline=None, derandomize=True, phases=[Stage.generate])
@given(seed=st.integers(0, 2**31))
def test_levels_reach_every_ratio(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ratios = np.exp(rng.uniform(-14, 3, 5000)).astype(np.float32)
    ratios[:5] = [0, np.inf, 1, 1, 1e-30]
    grid = levels._levels([Span(steps=3, sample_rate=0.1, ratios=ratios)])
    assert (np.diff(grid) > 0).all() and grid.size <= 264
    assert (grid[levels._rounded_up(grid, ratios)] >= ratios).all()
