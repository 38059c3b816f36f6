"""The laws hold for this package's accountants, and each notices its seeded mistake."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings

from per_instance_accountant import account
from per_instance_accountant.divergence import sampled_gaussian_rdp
from per_instance_accountant.errors import UsageError
from per_instance_accountant.ledger import Phase, Step
from per_instance_accountant.testing import (
    CHECKS,
    LawBroken,
    law,
    oracles,
    parametrize_with_checks,
    strategies,
)
from per_instance_accountant.testing.accountants import (
    OPTIONAL,
    LedgerAccountant,
    RenyiAccountant,
    TightAccountant,
    fresh,
)
from per_instance_accountant.testing.laws import require


@parametrize_with_checks([RenyiAccountant(), TightAccountant, LedgerAccountant()], examples=4)
def test_the_laws_hold_for_our_accountants(accountant, check):
    verdict = check(accountant)
    assert verdict.status == "held" and verdict.examples >= 1


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.law.name)
def test_every_law_notices_its_seeded_mistake(check, seeded):
    with pytest.raises(LawBroken) as caught:
        check(seeded.SEEDED[check.law.name])
    assert caught.value.law == check.law.name and caught.value.what
    assert "smallest input: " in str(caught.value)


def test_every_law_says_what_failing_means():
    assert len(CHECKS) == len({check.law.name for check in CHECKS}) >= 30
    assert [check.law.name for check in CHECKS if "Failing:" not in (check.__doc__ or "")] == []


def test_every_optional_method_has_laws():
    assert {need for check in CHECKS for need in check.law.needs} == set(OPTIONAL)


def test_the_smallest_input_is_small(seeded):
    (check,) = [c for c in CHECKS if c.law.name == "rdp_is_a_number"]
    smallest = check.law.judge(seeded.OverflowsAtLargeOrders).smallest
    order = float(smallest.partition("order=")[2].partition(",")[0])
    assert 1000 < order <= 1100


def test_a_law_of_ones_own_joins_in():
    before = len(CHECKS)

    @law(delta=strategies.deltas(), examples=5)
    def check_epsilon_is_even(new, delta):
        """Not a law at all. Failing: nothing."""
        require(new().epsilon(delta) == 1, "not one")

    with pytest.raises(LawBroken, match="not one"):
        check_epsilon_is_even(RenyiAccountant)
    assert len(CHECKS) == before
    with pytest.raises(ValueError, match="no optional methods"):
        law(needs=("no_such_method",))


def test_what_is_no_accountant_is_refused():
    for thing in (object(), 3.0, dict, lambda: None):
        with pytest.raises(UsageError, match="nothing was checked"):
            fresh(thing)


def test_an_instance_is_copied():
    accountant = RenyiAccountant()
    fresh(accountant).step(noise_multiplier=1.0, sample_rate=0.1)
    assert accountant.num_steps() == 0


# ------------------------------------------------------------------------------------ oracles and strategies


@pytest.mark.parametrize(("rate", "ratio"), [(0.01, 1.0), (0.3, 0.05), (1e-6, 3.0), (0.9, 20.0)])
@pytest.mark.parametrize("order", [1.001, 2.0, 2.5, 31.0, 300.5])
def test_both_ways_to_the_exact_divergence_agree(rate, ratio, order):
    """Neighbouring integer orders by the sum, the order itself by quadrature, the package by its own."""
    value = oracles.sampled_gaussian_rdp(rate, ratio, order)
    package = sampled_gaussian_rdp(rate, ratio, order)[0, 0]
    assert value <= package <= value * (1 + 1e-9)
    if order == int(order) and rate < 0.9:
        near = oracles.sampled_gaussian_rdp(rate, ratio, order + 1e-9)
        assert near == pytest.approx(value, rel=1e-6)


def test_the_lower_bound_of_a_run_is_close_where_the_truth_is_known():
    for steps, ratio, delta in [(100, 0.1, 1e-5), (9, 0.5, 1e-8), (1, 0.8, 1e-3)]:
        exact = oracles.gaussian_epsilon(math.sqrt(steps) * ratio, delta)
        assert 0.99 * exact <= oracles.run_epsilon_below(1.0, ratio, steps, delta) <= exact
    step = oracles.step_epsilon(0.05, 1.3, 1e-6)
    assert 0.99 * step <= oracles.run_epsilon_below(0.05, 1.3, 1, 1e-6) <= step


def test_both_directions_of_a_step_count():
    """Adding is worse than removing nowhere in epsilon, but at delta near the rate both are seen."""
    assert oracles.step_delta(0.9, 3.0, 0.5) > oracles.step_delta(0.9, 3.0, 1.0) > 0
    with pytest.raises(ZeroDivisionError):
        oracles.step_delta(0.5, 0.0, 1.0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(strategies.ledgers())
def test_any_ledger_of_the_strategy_can_be_folded(ledger):
    loss = account(ledger, orders=[2.0, 8.0])
    assert loss.rdp.shape == (ledger.num_instances, 2)
    assert bool((loss.rdp >= 0).all()) and bool((loss.rdp <= loss.worst_case_rdp * (1 + 1e-12)).all())


def test_the_strategies_reach_what_they_name():
    rules, abandoned, families = set(), 0, set()

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(strategies.ledgers(), strategies.filters(), strategies.norm_histories())
    def collect(ledger, budget, history):
        nonlocal abandoned
        rules.update(phase.charging for phase in ledger.phases)
        abandoned += ledger.num_abandoned_steps
        families.add((budget.family, budget.delta is None))
        assert history.shape[0] <= 6 and history.shape[1] <= 5 and history.max() <= 2
        assert all(isinstance(event, (Phase, Step)) or event for event in ledger.events())

    collect()
    assert rules == {"worst_case", "sweep", "unamplified", "last_seen"} and abandoned
    assert families == {("renyi", False), ("renyi", True), ("gaussian", True)}


def test_the_ridge_oracle_is_the_divergence_of_a_simulation():
    """The Renyi divergence of Gaussians of one covariance, from simulated means and variances."""
    problem = {
        "instances": 5, "dimension": 1, "regularisation": 0.5, "noise_std": 0.3, "learning_rate": 0.6,
        "training_steps": 6, "unlearning_steps": 3, "order": 2.0, "seed": 3,
    }  # fmt: skip
    random = np.random.default_rng(3)
    x, y = random.normal(size=(5, 1)), random.normal(size=5)
    hessian = float(x[:, 0] @ x[:, 0]) / 5 + 0.5
    rate = 0.6 / hessian
    ends = []
    for target in (y[0], 0.0):
        theta = np.zeros(200_000)
        noise = np.random.default_rng(7)
        for step in range(9):
            pull = (float(x[1:, 0] @ y[1:]) + float(x[0, 0]) * (target if step < 6 else 0.0)) / 5
            theta = theta - rate * (hessian * theta - pull) + noise.normal(0, 0.3, theta.size)
        ends.append(theta)
    simulated = (ends[0].mean() - ends[1].mean()) ** 2 / ends[0].var()
    assert oracles.ridge_divergence(**problem)["divergence"] == pytest.approx(simulated, rel=0.02)
