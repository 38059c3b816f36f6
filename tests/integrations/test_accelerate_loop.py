"""Loops that an Accelerator prepared take private steps, and the ledger says exactly who was in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import DataLoader

from per_instance_accountant import PrivacyEngine, PrivacyFilter, Sweep
from per_instance_accountant.errors import PiaError
from per_instance_accountant.integrations.accelerate import AcceleratedLoader, prepare
from per_instance_accountant.ledger import Step
from tests.integrations.conftest import CLIP, check_steps, examples, parameters
from tests.integrations.test_lightning_trainer import network, own_loss


@pytest.fixture(autouse=True)
def fresh_state() -> None:
    """Accelerate keeps its settings in the process; other tests of this process set others."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def made(
    engine: Any = None, *, batch_size: int = 9, **options: Any
) -> tuple[Any, nn.Module, tuple[Any, ...]]:
    engine, module = engine or PrivacyEngine(accountant="rdp"), network()
    loader = {name: options.pop(name) for name in ("num_workers",) if name in options}
    private = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.05),
        data_loader=DataLoader(examples(), batch_size=batch_size, **loader),
        noise_multiplier=1.0,
        max_grad_norm=CLIP,
        **options,
    )
    return engine, module, private


def loop(accelerator: Accelerator, module: nn.Module, prepared: Any, skip: Any = ()) -> list[Any]:
    model, optimizer, loader = prepared
    snapshots = []
    parts = accelerator.gradient_accumulation_steps
    for _ in range(2):
        for number, (x, y) in enumerate(loader):
            if number in skip:
                continue
            if number % parts == 0:
                snapshots.append(parameters(module))
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
    return snapshots


@pytest.mark.parametrize(("parts", "workers"), [(1, 0), (3, 0), (2, 2)])
def test_recorded_contributions_are_those_of_the_drawn_instances(parts, workers, torch_seed):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
    engine, module, private = made(num_workers=workers)
    snapshots = loop(accelerator, module, prepare(accelerator, engine, *private))
    assert check_steps(engine, snapshots, own_loss) > 80
    assert engine.accountant.history[0][2] == engine.ledger.num_steps == 14


def test_skipped_draws_do_not_shift_the_attribution(torch_seed):
    accelerator = Accelerator(cpu=True)
    engine, module, private = made(engine=PrivacyEngine(accountant="rdp", charging=Sweep(every=3)))
    snapshots = loop(accelerator, module, prepare(accelerator, engine, *private), skip=(1, 4))
    assert len(snapshots) == 10
    check_steps(engine, snapshots, own_loss)


def test_attribution_of_what_the_loader_read_last_would_be_wrong(monkeypatch, torch_seed):
    """Seeded bug: batches are announced when Accelerate fetches them, one ahead of the loop."""

    def ahead(self: Any) -> Any:
        from per_instance_accountant.opacus_adapter.loader import relay

        waiting: list[Any] = []
        for batch in relay(iter(self._shard), self._loader):
            waiting.append(batch)
            if len(waiting) > 1:
                yield waiting.pop(0)
        yield from waiting

    monkeypatch.setattr(AcceleratedLoader, "__iter__", ahead)
    accelerator = Accelerator(cpu=True)
    engine, module, private = made()
    with pytest.raises((PiaError, AssertionError)):
        check_steps(engine, loop(accelerator, module, prepare(accelerator, engine, *private)), own_loss)


def test_empty_draws_charge_nobody(torch_seed):
    accelerator = Accelerator(cpu=True)
    engine, module, private = made(batch_size=1)
    snapshots = loop(accelerator, module, prepare(accelerator, engine, *private))
    steps = [event for event in engine.ledger.events() if isinstance(event, Step)]
    assert sum(len(step.positions) == 0 for step in steps) > 20
    check_steps(engine, snapshots, own_loss)


@pytest.mark.parametrize("skip", [(0,), (1,), (2,)])
def test_a_draw_that_is_left_in_part_is_noticed(skip, torch_seed):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    engine, module, private = made()
    with pytest.raises(PiaError, match="PIA002"):
        loop(accelerator, module, prepare(accelerator, engine, *private), skip=skip)
    assert engine.ledger.num_steps == 0


def test_accelerate_may_not_prepare_the_tracked_loader_alone(torch_seed):
    accelerator = Accelerator(cpu=True)
    engine, module, (model, optimizer, loader) = made()
    prepared = accelerator.prepare(model, optimizer, loader)
    with pytest.raises(PiaError, match="PIA007"):
        loop(accelerator, module, prepared)
    assert engine.ledger.num_steps == 0


def test_wrong_orders_are_refused():
    accelerator = Accelerator(cpu=True)
    engine, _, private = made()
    other, _, _ = made()
    with pytest.raises(PiaError, match="PIA071"):
        prepare(accelerator, other, *private)
    prepared = accelerator.prepare(*private[:2])
    with pytest.raises(PiaError, match="PIA071"):
        prepare(accelerator, engine, *prepared, private[2])
    with pytest.raises(PiaError, match="PIA070"):
        prepare(accelerator, PrivacyEngine(), *private)
    module = network()
    optimizer, loader = accelerator.prepare(
        torch.optim.SGD(module.parameters(), lr=0.1), DataLoader(examples(), batch_size=9)
    )
    with pytest.raises(PiaError, match="PIA060"):
        PrivacyEngine().make_private(
            module=module, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
        )


def ghost_loop(accelerator: Accelerator, module: nn.Module, prepared: Any, factor: float = 1.0) -> list[Any]:
    model, optimizer, criterion, loader = prepared
    snapshots = []
    for _ in range(2):
        for number, (x, y) in enumerate(loader):
            if number % accelerator.gradient_accumulation_steps == 0:
                snapshots.append(parameters(module))
            with accelerator.accumulate(model):
                loss = criterion(model(x), y)
                assert type(loss) is torch.Tensor and loss.requires_grad
                accelerator.backward(loss * factor)
                optimizer.step()
                optimizer.zero_grad()
    return snapshots


@pytest.mark.parametrize(("parts", "batch_size"), [(1, 9), (3, 9), (2, 1)])
def test_ghost_clipping(parts, batch_size, torch_seed):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
    engine, module, private = made(
        grad_sample_mode="ghost", criterion=nn.CrossEntropyLoss(), batch_size=batch_size
    )
    snapshots = ghost_loop(accelerator, module, prepare(accelerator, engine, *private))
    assert check_steps(engine, snapshots, own_loss) > 80
    assert engine.accountant.history[0][2] == engine.ledger.num_steps


def test_a_factor_of_the_loop_is_kept_under_ghost_clipping(torch_seed):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    engine, module, private = made(grad_sample_mode="ghost", criterion=nn.CrossEntropyLoss())
    snapshots = ghost_loop(accelerator, module, prepare(accelerator, engine, *private), factor=0.25)
    assert check_steps(engine, snapshots, lambda weights, row: own_loss(weights, row) / 4) > 80


def test_an_ordinary_loss_under_ghost_clipping_releases_nothing(torch_seed):
    accelerator = Accelerator(cpu=True)
    engine, module, private = made(grad_sample_mode="ghost", criterion=nn.CrossEntropyLoss())
    model, optimizer, _, loader = prepare(accelerator, engine, *private)
    with pytest.raises(PiaError, match="PIA005"):
        loop(accelerator, module, (model, optimizer, loader))
    assert engine.ledger.num_steps == 0


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("how", ["twice", "penalty after", "sum of two", "penalty"])
def test_gradients_beside_the_two_passes_are_noticed(how, hidden, torch_seed):
    accelerator = Accelerator(cpu=True)
    engine, module, private = made(grad_sample_mode="ghost", criterion=nn.CrossEntropyLoss())
    model, optimizer, criterion, loader = prepare(accelerator, engine, *private)
    before, engine.tracker.optimizer.hides_sum = parameters(module), hidden

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        if how == "sum of two":
            loss = loss + criterion(model(x), y)
        if how == "penalty":
            loss = loss + sum(p.square().sum() for p in module.parameters())
        accelerator.backward(loss, retain_graph=True)
        if how == "twice":
            accelerator.backward(loss)
        if how == "penalty after":
            accelerator.backward(sum(p.square().sum() for p in module.parameters()))
        optimizer.step()

    with pytest.raises((PiaError, NotImplementedError)):
        step(*next(iter(loader)))
    assert engine.ledger.num_steps == 0
    assert all(torch.equal(before[name], p) for name, p in module.named_parameters())


def test_a_budget_can_end_the_epochs_quietly(torch_seed):
    budget = PrivacyFilter(budget=1.6, delta=1e-2, on_spent="stop")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    engine, module, private = made(engine=PrivacyEngine(accountant="rdp", filter=budget))
    snapshots = loop(accelerator, module, prepare(accelerator, engine, *private))
    assert 0 < engine.ledger.num_steps == len(snapshots) < 14
