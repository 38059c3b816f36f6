"""Losses of groups: the exact law of a group's sum, never a sum of the members' losses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from per_instance_accountant import account
from per_instance_accountant.accounting import account_groups
from per_instance_accountant.divergence import group_gaussian_rdp, group_gaussian_rdp_removal
from per_instance_accountant.errors import GuaranteeError, PiaError, UnsupportedError
from per_instance_accountant.ledger import Drop, Filter, LedgerWriter, Phase, Run, Step, Thresholds

ORDERS = [2.0, 3.5, 8.0]


def phase(charging, rate=0.1, noise=1.5):
    return Phase(
        kind="train",
        sampling="poisson",
        sample_rate=rate,
        noise_std=noise,
        max_grad_norm=1.0,
        charging=charging,
        denominator=1.0,
        learning_rate=0.1,
    )


def recorded(events, labels, ids=None):
    writer = LedgerWriter.create(None, Run(num_instances=len(labels), groups={"person": labels}, ids=ids))
    for event in events:
        writer.append(event)
    return writer.ledger()


def step(positions, contributions):
    return Step(positions=np.array(positions, np.int64), contributions=np.array(contributions, np.float32))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    rate=st.sampled_from([0.02, 0.3, 1.0]),
    direction=st.sampled_from(["both", "removal"]),
)
def test_the_fold_against_one_formula_per_step_and_group(seed, rate, direction):
    """Never below, at most 5 % above (rounded ratios), with sweeps, two mechanisms and a drop."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 4, 11)
    exact = dict.fromkeys(np.unique(labels).tolist(), 0.0)
    formula = {"both": group_gaussian_rdp, "removal": group_gaussian_rdp_removal}[direction]
    events = [Filter(family="renyi", orders=np.full(11, 2.0), budgets=np.full(11, 1e9))]
    gone = np.zeros(11, dtype=bool)
    for number in range(6):
        if number % 3 == 0:
            noise = 2.0 + number
            events.append(phase("sweep", rate, noise))
        if number % 2 == 0:
            limits = draw.uniform(0.0, 1.2, 11).astype(np.float32)
            events.append(Thresholds(values=limits, source="sweep"))
        if number == 3:
            events.append(Drop(positions=np.array([5])))
            gone[5] = True
        events.append(step([], []))
        bounds = np.where(gone, 0.0, np.minimum(limits.astype(np.float64), 1.0))
        for label in exact:
            exact[label] = exact[label] + formula(rate, bounds[labels == label] / noise, ORDERS)
    loss = account_groups(recorded(events, labels), "person", ORDERS, direction=direction)
    assert loss.ids.tolist() == sorted(exact) and str(loss.basis) == "OUTPUT_SPECIFIC"
    for row, label in zip(loss.rdp, sorted(exact), strict=True):
        assert (row >= exact[label] * (1 - 1e-12)).all() and (row <= exact[label] * 1.05).all()


def test_groups_of_one_equal_their_member_and_sums_are_too_small():
    """Full batch: a group of k at the clip norm has k^2 times the loss, a sum of losses only k times it."""
    labels = np.array([0, 1, 1, 1, 2, 2])
    ledger = recorded([phase("worst_case", 1.0), step(range(6), np.ones(6))], labels)
    single, groups = account(ledger, orders=ORDERS), account_groups(ledger, "person", ORDERS)
    factors = groups.rdp / single.rdp[0]
    assert np.allclose(factors, np.array([[1.0], [9.0], [4.0]]), rtol=1e-6, atol=0)
    summed = 3 * single.rdp[0]
    assert not (summed >= groups.rdp[1]).any()
    assert np.allclose(groups.mu, np.array([1.0, 3.0, 2.0]) / 1.5, rtol=1e-6, atol=0)
    assert str(groups.basis) == "CERTIFIED" and groups.epsilon(1e-5)[1] > 3 * groups.epsilon(1e-5)[0] / 1.01


def test_unamplified_members_that_are_drawn_together():
    labels = np.array(["a", "a", "b"])
    events = [phase("unamplified"), step([0, 1], [0.5, 1.0]), step([1, 2], [0.25, 1.0])]
    loss = account_groups(recorded(events, labels), "person", [4.0])
    expected = np.array([1.5**2 + 0.25**2, 1.0]) / 1.5**2
    assert np.allclose(loss.mu**2, expected, rtol=1e-6, atol=0)
    assert (loss.rdp[:, 0] <= 2 * expected * (1 + 1e-6)).all()


def test_groups_by_business_id():
    ids = np.array(["w", "x", "y", "z"])
    ledger = recorded([phase("worst_case"), step([], [])], np.zeros(4, np.int64), ids)
    some = account_groups(ledger, {"p": ["z", "w"], "q": ["x"]}, ORDERS)
    assert some.ids.tolist() == ["p", "q"] and (some.rdp[0] > some.rdp[1]).all()
    for groups in ({"p": ["z"], "q": ["z", "x"]}, {"p": ["nobody"]}, {"p": []}, {}, "unknown"):
        with pytest.raises(PiaError, match=r"PIA07[01]|PIA032"):
            account_groups(ledger, groups)
    with pytest.raises(PiaError, match="PIA070"):
        account_groups(ledger, {"p": ["z"]}, direction="addition")


def test_runs_that_say_nothing_about_groups():
    labels = np.zeros(2, np.int64)
    with pytest.raises(UnsupportedError, match="PIA060"):
        account_groups(recorded([phase("last_seen"), step([], [])], labels), "person")
    with pytest.raises(GuaranteeError, match="PIA011"):
        account_groups(recorded([phase("worst_case"), step([0], [2.0])], labels), "person")
