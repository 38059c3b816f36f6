"""Sweeps measure every instance at public steps, set the thresholds that clip, and leave no trace."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from per_instance_accountant import Sweep
from per_instance_accountant.errors import AlignmentError
from per_instance_accountant.ledger import Step, Thresholds
from per_instance_accountant.opacus_adapter import PrivacyEngine, sweep_norms

MODES = pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(10, 16), nn.Dropout(0.5), nn.Linear(16, 3)

    def forward(self, x):
        return self.last(self.drop(torch.relu(self.first(x))))


def sweep(training, **options):
    return sweep_norms(training.model, training.optimizer, training.loader, training.criterion, **options)


@MODES
@pytest.mark.parametrize("model", ["perceptron", "convolutional", "tokens"])
def test_norms_of_all_instances_equal_brute_force(start, models, by_hand, mode, model):
    module, dataset = models[model]()
    twin = copy.deepcopy(module)
    training = start(mode=mode, module=module, dataset=dataset)
    exact = by_hand(twin, training.parameters(), *dataset.tensors)
    for batch_size in (7, 256):
        norms = sweep(training, batch_size=batch_size)
        assert norms.dtype == np.float32
        assert (norms >= exact * (1 - 2e-6)).all() and (norms <= exact * (1 + 2e-5)).all()


def traces(training):
    """Everything that a sweep could disturb."""
    modules, parameters = list(training.module.modules()), list(training.module.parameters())
    state = [copy.deepcopy(p.__dict__) for p in parameters]
    flags = [(m.training, {k for k in m.__dict__ if not k.startswith("_")}) for m in modules]
    grads = [None if p.grad is None else p.grad.clone() for p in parameters]
    return state, flags, grads, training.weights, training.model.__dict__.get("grad_accumulation_allowed")


def same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@MODES
def test_a_sweep_leaves_no_trace(start, mode):
    training = start(mode=mode, module=Dropping(), batch_size=97)
    training.module.drop.eval()
    with training.physical(40) as loader:
        batches = iter(loader)
        training.step(next(batches))
        before, states = (
            traces(training),
            (torch.get_rng_state(), random.getstate(), np.random.get_state()[1]),
        )
        first = sweep(training)
        assert same(traces(training), before)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1] and (np.random.get_state()[1] == states[2]).all()
        training.module.drop.train()
        assert np.array_equal(sweep(training), first)
        training.module.drop.eval()
        for batch in batches:
            training.step(batch)
    assert len(training.steps) == 1


@MODES
@pytest.mark.parametrize("limit", [None, 5])
def test_training_with_sweeps(start, models, by_hand, mode, limit):
    rule = Sweep(every=4, slack=1.2)
    module, dataset = models["perceptron"]()
    twin, x, y = copy.deepcopy(module), *dataset.tensors
    training = start(
        PrivacyEngine(accountant="rdp", charging=rule), mode=mode, module=module, dataset=dataset
    )
    at_step = {0: training.parameters()}
    for _ in range(2):
        with training.physical(limit) as loader:
            for batch in loader:
                training.step(batch)
                at_step.setdefault(training.engine.ledger.num_steps, training.parameters())
    steps, thresholds, stated = 0, None, []
    for event in training.engine.ledger.events():
        if isinstance(event, Thresholds):
            stated.append(steps)
            thresholds = event.values
            exact = by_hand(twin, at_step[steps], x, y)
            expected = np.minimum(1.2 * exact, 0.8)
            assert event.source == "sweep"
            assert (thresholds >= expected * (1 - 3e-6)).all() and (thresholds <= expected * (1 + 2e-5)).all()
        if isinstance(event, Step):
            assert (event.contributions <= thresholds[event.positions]).all()
            steps += 1
    assert stated == list(range(0, steps, 4))


def test_with_room_to_spare_sweeps_do_not_change_training(start):
    """Same random draws, same weights: the sweeps consume nothing of the run's randomness."""
    loose = PrivacyEngine(accountant="rdp", charging=Sweep(every=2, slack=1e6))
    module = Dropping()
    twin = copy.deepcopy(module)
    swept, plain = start(loose, module=module).train(2), start(module=twin).train(2)
    assert torch.equal(swept.weights, plain.weights)


def test_a_norm_that_is_not_finite_stops_the_sweep(start):
    training = start(PrivacyEngine(accountant="rdp", charging=Sweep(every=2)))
    training.dataset.tensors[0][5] = float("nan")
    with pytest.raises(AlignmentError, match="PIA006"):
        next(iter(training.loader))
    assert training.engine.ledger.num_steps == 0
    assert training.module.training
