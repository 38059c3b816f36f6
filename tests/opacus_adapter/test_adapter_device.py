"""Accelerators: how often a step waits for the device, and the same numbers on CUDA as by hand."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from per_instance_accountant import FixedThresholds, Sweep
from per_instance_accountant.errors import AlignmentError
from per_instance_accountant.ledger import Step, Thresholds
from per_instance_accountant.opacus_adapter import PrivacyEngine

CUDA = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is present"),
]
WAITING = ("cpu", "item", "tolist", "__bool__", "__float__", "__int__")
"""What makes Python wait for a device."""


class Waits:
    """Counts calls of methods of tensors that wait, made while a step is taken."""

    def __init__(self, monkeypatch):
        self.counts = dict.fromkeys(WAITING, 0)
        for name in WAITING:
            monkeypatch.setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))

    def _counted(self, name, method):
        def call(tensor, *arguments, **named):
            self.counts[name] += 1
            return method(tensor, *arguments, **named)

        return call


def waits_of_a_step(start, stock, monkeypatch, engine, mode):
    """Waits of one step: (ours, stock Opacus')."""
    found = []
    for made in (engine, stock()):
        training = start(made, mode=mode)
        batches = iter(training.loader)
        training.step(next(batches))
        x, y = next(batches)
        training.optimizer.zero_grad()
        with monkeypatch.context() as patched:
            waits = Waits(patched)
            training.criterion(training.model(x), y).backward()
            training.optimizer.step()
        found.append(waits.counts)
    return found


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew", "ghost"])
def test_a_step_copies_its_norms_once_and_waits_for_nothing_else(start, stock, monkeypatch, mode):
    ours, theirs = waits_of_a_step(start, stock, monkeypatch, None, mode)
    added = {name: ours[name] - theirs[name] for name in WAITING}
    # The state of the random generator lives on the host; its copy is none.
    assert added.pop("cpu") <= 2
    assert set(added.values()) == {0}, added


def test_seeded_bug_a_wait_for_every_instance_is_caught(start, stock, monkeypatch):
    engine = PrivacyEngine(accountant="rdp")
    training_clip = torch.Tensor.norm

    def chatty(self, *arguments, **named):
        found = training_clip(self, *arguments, **named)
        found.sum().item()
        return found

    from per_instance_accountant.opacus_adapter import clipping

    norms = clipping.row_norms

    def slow(gradients):
        for gradient in gradients:
            chatty(gradient)
        return norms(gradients)

    monkeypatch.setattr(clipping, "row_norms", slow)
    ours, theirs = waits_of_a_step(start, stock, monkeypatch, engine, "hooks")
    assert ours["item"] > theirs["item"]


def synchronisations(training, steps):
    """What PyTorch reports as waiting for the device in so many steps."""
    training.module.to("cuda")
    found = 0
    for number, batch in enumerate(training.loader):
        there = tuple(part.pin_memory().to("cuda", non_blocking=True) for part in batch)
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn" if number else "default")
            try:
                training.step(there)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found += sum("synchroniz" in str(warning.message) for warning in caught)
        if number == steps:
            return found
    raise AssertionError("the loader is too short")


@pytest.mark.parametrize("options", [{"mode": "hooks"}, {"mode": "functorch"}, {"mode": "ghost"}])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
def test_no_step_synchronises_with_the_device(start, stock, device, options, own):
    rule = FixedThresholds(thresholds=np.linspace(0.01, 1.5, 97)) if own else None
    ours = synchronisations(start(PrivacyEngine(accountant="rdp", charging=rule), **options), 5)
    assert ours <= synchronisations(start(stock(), **options), 5)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_gradient_that_is_not_finite_is_void_on_the_device(start, device, mode):
    training = start(mode=mode)
    training.module.to(device)
    batches = iter(training.loader)
    x, y = (part.to(device) for part in next(batches))
    before = training.weights.clone()
    training.step((x * torch.nan, y))
    assert torch.equal(training.weights, before)
    with pytest.raises(AlignmentError, match="PIA006"):
        training.engine.close()


@pytest.mark.parametrize(
    ("device", "verify"),
    [
        ("cpu", "every_step"),
        pytest.param("cuda", "every_step", marks=CUDA),
        pytest.param("cuda", "off", marks=CUDA),
    ],
)
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew", "ghost"])
@pytest.mark.parametrize("rule", [None, Sweep(every=3)])
def test_contributions_on_a_device(start, models, by_hand, device, mode, rule, verify):
    training = start(PrivacyEngine(accountant="rdp", charging=rule, verify=verify), mode=mode)
    twin, _ = models["perceptron"]()
    training.module.to(device)
    x, y = training.dataset.tensors
    taken = []
    for inputs, target in training.loader:
        taken.append({name: p.detach().cpu() for name, p in training.module.named_parameters()})
        training.step((inputs.to(device), target.to(device)))
    limits = np.full(len(x), 0.8)
    count = 0
    for event in training.engine.ledger.events():
        if isinstance(event, Thresholds):
            limits = event.values.astype(np.float64)
        if isinstance(event, Step):
            rows = event.positions.tolist()
            if rows:
                norms = np.minimum(by_hand(twin, taken[count], x[rows], y[rows]), limits[rows])
                np.testing.assert_allclose(event.contributions, norms, rtol=2e-5)
            count += 1
    assert count == len(training.loader)
    assert all(p.device.type == device for p in training.module.parameters())
