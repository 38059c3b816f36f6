"""Loops that do wrong things at random: every update of the parameters is a step of the ledger, and the sum
of exactly the gradients, clipped to exactly the contributions, that the step names.

PIA_LOOPS sets the number of trainings.
"""

from __future__ import annotations

import contextlib
import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from per_instance_accountant import FixedThresholds, PrivacyEngine, Sweep
from per_instance_accountant.errors import PiaError
from per_instance_accountant.ledger import Step
from per_instance_accountant.opacus_adapter import capture, deferring

LOOPS = int(os.environ.get("PIA_LOOPS", "32"))
COUNT, CLIP, DRAWN = 60, 0.8, 10
WRONG = (
    *("rows missing", "rows twice", "two forwards", "two backwards", "two steps", "no zero_grad"),
    *("skip", "break", "other clip norm", "error before backward", "error before step", "evaluation mode"),
    *("closure", "p.grad edited", "zero_grad late", "forward without gradient", "p.grad removed"),
)
USERS = (RuntimeError, ValueError, NotImplementedError, IndexError, AttributeError)
"""What a script or Opacus raises; loops go on after abandon()."""


class Network(nn.Module):
    """Two hidden layers. tied: of one weight. frozen: the first weight does not learn."""

    def __init__(self, *, tied: bool = False, frozen: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 3)
        if tied:
            self.second.weight = self.first.weight
        self.first.weight.requires_grad_(not frozen)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Wild:
    """One training whose loop chooses what to do; ``updates`` holds parameters before and after each."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        torch.manual_seed(seed)
        mode = self.chance.choice(["hooks", "functorch", "ew", "ghost"])
        frozen, tied = self.chance.choice([(False, False), (True, False), (False, mode != "ghost")])
        self.module = Network(tied=tied, frozen=frozen)
        x = torch.randn(COUNT, 10) * torch.exp(torch.randn(COUNT, 1))
        self.dataset = TensorDataset(x, torch.randint(0, 3, (COUNT,)))
        rule = self.chance.choice(
            [None, Sweep(every=3), FixedThresholds(thresholds=np.linspace(0.01, 1, COUNT))]
        )
        self.engine = PrivacyEngine(accountant="rdp", charging=rule)
        self.limit = self.chance.choice([None, 4])
        learning = [p for p in self.module.parameters() if p.requires_grad]
        made = self.engine.make_private(
            module=self.module,
            optimizer=torch.optim.SGD(learning, lr=1.0),
            data_loader=DataLoader(self.dataset, batch_size=DRAWN),
            criterion=nn.CrossEntropyLoss(),
            noise_multiplier=0.0,
            max_grad_norm=CLIP,
            grad_sample_mode=mode,
        )
        self.model, self.optimizer, self.loader = made[0], made[1], made[-1]
        self.criterion = made[2] if len(made) == 4 else nn.CrossEntropyLoss()
        if self.chance.random() < 0.5:
            self.engine.tracker.recorder.deferral.devices = frozenset({"cpu"})
        self.updates: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
        wrapped = self.optimizer.original_optimizer
        wrapped.register_step_pre_hook(lambda *_: self.updates.append((self.parameters(), {})))
        wrapped.register_step_post_hook(lambda *_: self.updates[-1][1].update(self.parameters()))

    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.module.named_parameters()}

    def train(self, epochs: int = 4) -> None:
        for _ in range(epochs):
            try:
                with self._batches() as batches:
                    for x, y in batches:
                        action = self.chance.choices(["ordinary", *WRONG], [12, *[1] * len(WRONG)])[0]
                        if action == "break":
                            break
                        if action != "skip":
                            self._step(x, y, action)
            except (PiaError, *USERS):
                self.engine.abandon()
            finally:
                self.model.train()

    def _batches(self) -> Any:
        if self.limit is None:
            return contextlib.nullcontext(self.loader)
        return BatchMemoryManager(
            data_loader=self.loader, max_physical_batch_size=self.limit, optimizer=self.optimizer
        )

    def _backward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = self.criterion(self.model(x), y)
        loss.backward()
        return loss

    def _step(self, x: torch.Tensor, y: torch.Tensor, action: str) -> None:
        if action == "closure":
            self.optimizer.step(lambda: (self.optimizer.zero_grad(), self._backward(x, y))[1])
            return
        if action != "no zero_grad":
            self.optimizer.zero_grad()
        self._before(x, action)
        if action == "rows missing":
            x, y = x[1:], y[1:]
        if action == "rows twice":
            x, y = torch.cat([x, x[:1]]), torch.cat([y, y[:1]])
        self._backward(x, y)
        if action == "two backwards":
            self._backward(x, y)
        self._after(action)
        self.optimizer.step()
        if action == "two steps":
            self.optimizer.step()
        self.model.train()

    def _before(self, x: torch.Tensor, action: str) -> None:
        if action == "two forwards":
            self.model(x)
        if action == "forward without gradient":
            with torch.no_grad():
                self.model(x)
        if action == "evaluation mode":
            self.model.eval()
        if action == "error before backward":
            self.model(x)
            raise RuntimeError("a script fails")

    def _after(self, action: str) -> None:
        for p in self.module.parameters():
            if action == "p.grad edited" and p.grad is not None:
                p.grad.mul_(2)
            if action == "p.grad removed":
                p.grad = None
        if action == "other clip norm":
            self.optimizer.max_grad_norm = self.chance.choice([CLIP / 2, CLIP])
        if action == "zero_grad late":
            self.optimizer.zero_grad()
        if action == "error before step":
            raise RuntimeError("a script fails")


def clipped_sum(wild: Wild, before: dict[str, torch.Tensor], step: Step) -> torch.Tensor:
    """The sum of the gradients of these instances, each cut to its recorded contribution, without Opacus."""
    learning = {n: before[n].requires_grad_() for n, p in wild.module.named_parameters() if p.requires_grad}
    total = torch.zeros(sum(p.numel() for p in learning.values()))
    for row, contribution in zip(step.positions.tolist(), step.contributions.tolist(), strict=True):
        x, y = wild.dataset[row]
        # A tied weight has one name here and serves in both places.
        output = torch.func.functional_call(wild.twin, before, (x[None],), tie_weights=True)
        loss = nn.functional.cross_entropy(output, y[None])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(learning.values()))])
        total += gradient * min(1.0, contribution / max(float(gradient.norm()), 1e-30))
    return total


def check(seed: int) -> int:
    """Number of updates of one training, each of which is found among the recorded steps, in order."""
    wild = Wild(seed)
    wild.twin = Network(tied=wild.module.second.weight is wild.module.first.weight)
    wild.train()
    steps = iter([event for event in wild.engine.ledger.events() if isinstance(event, Step)])
    for before, after in wild.updates:
        names = [name for name, p in wild.module.named_parameters() if p.requires_grad]
        moved = DRAWN * torch.cat([(before[name] - after[name]).flatten() for name in names])
        found = (clipped_sum(wild, dict(before), step) for step in steps)
        assert any(torch.allclose(moved, total, rtol=1e-3, atol=1e-4) for total in found), seed
    return len(wild.updates)


@pytest.mark.compat
def test_every_update_is_the_clipped_sum_that_the_ledger_names(monkeypatch):
    monkeypatch.setattr(deferring, "FLUSH_STEPS", 3)
    assert sum(check(seed) for seed in range(LOOPS)) > 3 * LOOPS


def careless(self: Any) -> None:
    """Gives a batch up as a script would that only sets Opacus' counters back."""
    kept = [(p, p.__dict__.get("_current_grad_sample")) for p in self.module.parameters()]
    abandon(self)
    for p, rows in kept:
        if rows is not None:
            p._current_grad_sample = rows


abandon = capture.Tracker.abandon
BUGS = {"_check_rows": lambda self, count: None, "abandon": careless}


@pytest.mark.parametrize("name", BUGS)
def test_seeded_bugs_are_found(monkeypatch, name):
    monkeypatch.setattr(capture.Tracker, name, BUGS[name])

    def survives(seed: int) -> bool:
        try:
            return check(seed) >= 0
        except AssertionError:
            return False

    assert not all(survives(seed) for seed in range(60))
