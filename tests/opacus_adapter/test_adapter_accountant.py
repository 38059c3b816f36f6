"""The registered accountant: Opacus' worst case from our kernel, without side effects."""

from __future__ import annotations

import copy

import numpy as np
import opacus
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant, create_accountant
from opacus.accountants.utils import get_noise_multiplier
from torch import nn
from torch.utils.data import DataLoader

from per_instance_accountant.errors import UsageError
from per_instance_accountant.opacus_adapter import PerInstanceAccountant

HISTORIES = st.lists(
    st.tuples(st.floats(0.5, 20), st.sampled_from([0.001, 0.01, 0.1, 1.0]), st.integers(1, 2000)),
    min_size=1,
    max_size=3,
)


def accountant_of(history):
    accountant = create_accountant("per_instance")
    accountant.history = list(history)
    return accountant


@settings(max_examples=40, deadline=None, derandomize=True)
@given(HISTORIES, st.sampled_from([1e-3, 1e-5, 1e-8]))
def test_equals_opacus_rdp_from_above(history, delta):
    theirs = RDPAccountant()
    theirs.history = list(history)
    accountant = accountant_of(history)
    before = copy.deepcopy(accountant.history)
    same_orders = accountant.get_epsilon(delta, alphas=RDPAccountant.DEFAULT_ALPHAS)
    expected = theirs.get_epsilon(delta)
    assert same_orders == pytest.approx(expected, rel=1e-6) and same_orders >= expected * (1 - 1e-9)
    assert accountant.get_epsilon(delta) <= same_orders
    assert accountant.history == before
    assert len(accountant) == sum(steps for _, _, steps in history)


def test_full_batch_is_the_gaussian_closed_form():
    orders, delta = np.array([2.0, 8.0, 32.0]), 1e-5
    rdp = 10 * orders / (2 * 5.0**2)
    expected = np.min(rdp + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1))
    assert accountant_of([(5.0, 1.0, 10)]).get_epsilon(delta, alphas=orders) == pytest.approx(
        expected, rel=1e-9
    )


def test_steps_merge_and_no_noise_means_no_bound():
    accountant = PerInstanceAccountant()
    assert accountant.get_epsilon(1e-5) == 0 and len(accountant) == 0
    for noise in (1.0, 1.0, 2.0, 1.0):
        accountant.step(noise_multiplier=noise, sample_rate=0.1)
    assert accountant.history == [(1.0, 0.1, 2), (2.0, 0.1, 1), (1.0, 0.1, 1)]
    accountant.step(noise_multiplier=0.0, sample_rate=0.1)
    assert accountant.get_epsilon(1e-5) == np.inf


def test_state_is_copied_both_ways():
    accountant = accountant_of([(1.0, 0.1, 5)])
    state = accountant.state_dict()
    other = PerInstanceAccountant()
    other.load_state_dict(state)
    other.step(noise_multiplier=1.0, sample_rate=0.1)
    accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    assert state["history"] == [(1.0, 0.1, 5)]
    assert len(other) == len(accountant) == 6


BAD = [
    [(1.0, 0.1, -5)],
    [(1.0, 0.1, 2.5)],
    [(float("nan"), 0.1, 5)],
    [(-1.0, 0.1, 5)],
    [(1.0, float("nan"), 5)],
    [(1.0, 0.0, 5)],
    [(1.0, 1.5, 5)],
    [(1.0, 0.1)],
    None,
    "history",
]


@pytest.mark.parametrize("history", BAD, ids=str)
def test_impossible_states_are_refused(history):
    accountant = accountant_of([(1.0, 0.1, 5)])
    with pytest.raises(UsageError, match="PIA070"):
        accountant.load_state_dict({"history": history, "mechanism": "per_instance"})
    assert accountant.history == [(1.0, 0.1, 5)]
    if isinstance(history, list):
        with pytest.raises(UsageError, match="PIA070"):
            accountant_of(history).get_epsilon(1e-5)


@pytest.mark.parametrize("state", [{}, {"history": []}, {"history": [], "mechanism": "rdp"}])
def test_states_of_others_are_refused(state):
    with pytest.raises(ValueError, match="state"):
        PerInstanceAccountant().load_state_dict(state)


def test_calibration_meets_the_target_from_below():
    noise = get_noise_multiplier(
        target_epsilon=2.0, target_delta=1e-5, sample_rate=0.02, steps=500, accountant="per_instance"
    )
    assert 1.98 <= accountant_of([(noise, 0.02, 500)]).get_epsilon(1e-5) <= 2.0


def test_with_a_stock_engine():
    examples = torch.utils.data.TensorDataset(torch.randn(50, 4), torch.zeros(50, dtype=torch.int64))
    module = nn.Linear(4, 2)
    engine = opacus.PrivacyEngine(accountant="per_instance")
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(examples, batch_size=10),
        target_epsilon=3.0,
        target_delta=1e-3,
        epochs=2,
        max_grad_norm=1.0,
    )
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert len(engine.accountant) == 10
    assert 2.9 <= engine.get_epsilon(1e-3) <= 3.0
