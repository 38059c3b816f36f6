"""Loops that would make a number wrong: each is refused, and nothing is written, released or changed."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from opacus import GradSampleModule
from opacus.accountants import RDPAccountant
from opacus.data_loader import DPDataLoader
from opacus.layers import DPLSTM
from opacus.optimizers import DPOptimizer
from opacus.schedulers import ExponentialGradClip
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from per_instance_accountant import FixedThresholds, Sweep, WorstCase, account
from per_instance_accountant.errors import (
    AlignmentError,
    GuaranteeError,
    LedgerError,
    PiaError,
    UnsupportedError,
    UsageError,
)
from per_instance_accountant.ledger import LedgerWriter, Run
from per_instance_accountant.opacus_adapter import PrivacyEngine, attach

MODES = pytest.mark.parametrize("mode", ["hooks", "ghost"])


@contextlib.contextmanager
def refused(training, code, kind=AlignmentError):
    """The block raises this error, and parameters and number of recorded steps stay as they were."""
    writer = training.engine.tracker.recorder.writer
    weights, events = training.weights.clone(), writer.anchor.sequence
    with pytest.raises(kind) as caught:
        yield
    assert caught.value.code == code
    assert torch.equal(training.weights, weights)
    assert writer.anchor.sequence == events


def backward(training, batch):
    training.optimizer.zero_grad()
    training.criterion(training.model(batch[0]), batch[1]).backward()


@MODES
def test_a_step_without_a_fresh_batch(start, mode):
    training = start(mode=mode)
    batch = next(iter(training.loader))
    training.step(batch)
    with refused(training, "PIA001"):
        training.step(batch)


@MODES
def test_a_step_on_a_batch_of_another_loader(start, mode):
    training = start(mode=mode)
    with refused(training, "PIA007"):
        training.step(next(iter(DataLoader(training.dataset, batch_size=5))))


def test_a_foreign_loader_around_the_tracked_one(start):
    training = start()
    loader = training.loader
    foreign = DataLoader(loader.dataset, batch_sampler=loader.batch_sampler, collate_fn=loader.collate_fn)
    with pytest.raises(AlignmentError, match="PIA007"):
        for _x, _y in foreign:
            pass


@MODES
@pytest.mark.parametrize("poisson", [True, False])
def test_a_loop_that_reads_one_batch_ahead(start, mode, poisson):
    training = start(mode=mode, poisson_sampling=poisson)
    ahead = iter(training.loader)
    batch, _following = next(ahead), next(ahead)
    with refused(training, "PIA007"):
        training.step(batch)


@MODES
@pytest.mark.parametrize("change", ["half", "twice"])
def test_a_batch_of_another_size(start, mode, change):
    training = start(mode=mode)
    x, y = next(iter(training.loader))
    x, y = (x[::2], y[::2]) if change == "half" else (x.repeat(2, 1), y.repeat(2))
    with refused(training, "PIA003"):
        training.step((x, y))


def test_two_forward_passes_in_one_step(start):
    training = start()
    x, y = next(iter(training.loader))
    training.optimizer.zero_grad()
    (training.criterion(training.model(x), y) + training.criterion(training.model(x * 2), y)).backward()
    with refused(training, "PIA005"):
        training.optimizer.step()


def test_two_backward_passes_without_poisson_sampling(start):
    training = start(poisson_sampling=False)
    loader = iter(training.loader)
    training.optimizer.zero_grad()
    for _ in range(2):
        x, y = next(loader)
        training.criterion(training.model(x), y).backward()
    with refused(training, "PIA003"):
        training.optimizer.step()


def test_two_backward_passes_with_ghost_clipping(start):
    training = start(mode="ghost")
    batch = next(iter(training.loader))
    backward(training, batch)
    with refused(training, "PIA005"):
        backward(training, batch)


def test_ghost_step_after_an_ordinary_loss(start):
    training = start(mode="ghost")
    x, y = next(iter(training.loader))
    training.optimizer.zero_grad()
    nn.functional.cross_entropy(training.model(x), y).backward()
    with refused(training, "PIA005"):
        training.optimizer.step()


@MODES
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite(start, mode, value):
    training = start(mode=mode, batch_size=97)
    training.dataset.tensors[0][5] = value
    with refused(training, "PIA006"):
        training.step(next(iter(training.loader)))
    assert all(p.summed_grad is None for p in training.optimizer.params)


def test_gradients_that_overflow_float32_norms_are_clipped(start):
    training = start(batch_size=97, noise_multiplier=0.0)
    training.dataset.tensors[0][5] = 1e30
    training.train()
    assert torch.isfinite(training.weights).all()
    assert training.steps[0].contributions.max() <= 0.8000001


@MODES
@pytest.mark.parametrize("action", ["break", "skip", "new loop"])
def test_an_unfinished_logical_batch(start, mode, action):
    training = start(mode=mode, batch_size=40)
    with training.physical(4) as loader:
        batches = iter(loader)
        training.step(next(batches))
        with refused(training, "PIA002"):
            if action == "break":
                iter(training.loader)
            elif action == "skip":
                next(batches)
                training.step(next(batches))
            else:
                next(iter(loader))
    with pytest.raises(AlignmentError, match="PIA002"):
        training.engine.save_checkpoint(path="never", module=training.model)
    training.engine.abandon()
    steps = len(training.steps)
    training.train(1, 4)
    assert len(training.steps) == steps + len(training.loader)
    assert all(step.contributions.max(initial=0) <= 0.8 for step in training.steps)


def test_the_last_part_of_the_last_logical_batch_skipped(start):
    training = start(batch_size=97)
    with training.physical(40) as loader, refused(training, "PIA002"):
        for number, batch in enumerate(loader):
            if number < 2:
                training.step(batch)


def test_a_part_stepped_after_another_was_skipped(start):
    training = start(batch_size=97)
    with training.physical(40) as loader:
        batches = iter(loader)
        next(batches)
        with refused(training, "PIA002"):
            training.step(next(batches))


def test_parts_of_two_loops_mixed(start):
    training = start(batch_size=97)
    with training.physical(40) as loader:
        one, other = iter(loader), iter(loader)
        training.step(next(one))
        with refused(training, "PIA002"):
            next(other)


@MODES
def test_whole_batches_may_be_skipped(start, mode):
    training = start(mode=mode)
    for number, batch in enumerate(training.loader):
        if number % 2:
            training.step(batch)
    assert len(training.steps) == len(training.loader) // 2


def test_a_replaced_step_hook(start):
    training = start()
    batch = next(iter(training.loader))
    with pytest.raises(AlignmentError, match="PIA004"):
        training.optimizer.attach_step_hook(lambda _: None)
    training.optimizer.step_hook = lambda _: None
    with refused(training, "PIA004"):
        training.step(batch)


@MODES
def test_a_step_around_the_noise(start, mode):
    training = start(mode=mode)
    backward(training, next(iter(training.loader)))
    with refused(training, "PIA008"):
        training.optimizer.original_optimizer.step()


@MODES
@pytest.mark.parametrize("scheduled", ["max_grad_norm", "noise_multiplier"])
def test_a_schedule_moves_inside_a_logical_batch(start, mode, scheduled):
    training = start(mode=mode, batch_size=97)
    with training.physical(40) as loader:
        batches = iter(loader)
        training.step(next(batches))
        setattr(training.optimizer, scheduled, 0.1)
        with refused(training, "PIA009"):
            training.step(next(batches))


def test_the_clip_norm_changes_between_ghost_backward_and_step(start):
    training = start(mode="ghost")
    backward(training, next(iter(training.loader)))
    training.optimizer.max_grad_norm = 0.1
    with refused(training, "PIA009"):
        training.optimizer.step()


@MODES
def test_a_clip_scheduler_changes_clipping_and_noise_together(start, mode):
    """Stock ghost clipping keeps clipping at the old norm while noise follows the new one."""
    training = start(mode=mode)
    scheduler = ExponentialGradClip(training.optimizer, gamma=0.1)
    batches = iter(training.loader)
    training.step(next(batches))
    scheduler.step()
    training.step(next(batches))
    first, second = training.steps
    assert first.contributions.max() > 0.5
    assert second.contributions.max() <= 0.08 * (1 + 1e-6)
    assert [phase.max_grad_norm for phase in training.engine.ledger.phases] == pytest.approx([0.8, 0.08])


def test_skip_signals_by_hand(start):
    training = start()
    batch = next(iter(training.loader))
    training.optimizer.signal_skip_step(True)
    with refused(training, "PIA002"):
        training.step(batch)


def test_zero_grad_forgotten(start):
    training = start()
    batches = iter(training.loader)
    training.step(next(batches))
    training.model.zero_grad()
    x, y = next(batches)
    training.criterion(training.model(x), y).backward()
    with refused(training, "PIA002"):
        training.optimizer.step()


def test_a_grad_scaler(start):
    training = start()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = next(iter(training.loader))
    training.optimizer.zero_grad()
    scaler.scale(training.criterion(training.model(x), y)).backward()
    with refused(training, "PIA060", UnsupportedError):
        scaler.step(training.optimizer)


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(10, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.short = False

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return self.last(hidden if self.short else torch.relu(self.middle(hidden)))


def test_ghost_norms_of_an_earlier_batch_are_not_used_again(start):
    training = start(mode="ghost", module=Conditional())
    batches = iter(training.loader)
    training.step(next(batches))
    training.module.short = True
    with refused(training, "PIA003"):
        backward(training, next(batches))


def test_batch_memory_manager_with_another_optimizer(start):
    training, other = start(), start()
    training.optimizer = other.optimizer
    with pytest.raises(UnsupportedError, match="PIA060"), training.physical(4):
        pass


def test_an_existing_ledger_is_not_continued_by_accident(start, tmp_path):
    start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "run")).train().engine.close()
    training = start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "run"))
    weights = training.weights.clone()
    with pytest.raises(LedgerError, match="PIA045"):
        training.train()
    assert torch.equal(training.weights, weights)


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(3)


class LowPrecision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(10, 3).to(torch.bfloat16)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory = DPLSTM(10, 3, batch_first=True)


REFUSED = {
    "too many layers": ({"clipping": "per_layer", "max_grad_norm": [0.1] * 4}, UsageError, "PIA071"),
    "a layer without norm": ({"clipping": "per_layer", "max_grad_norm": [0.1, 0.0]}, UsageError, "PIA071"),
    "ghost per layer": (
        {"clipping": "per_layer", "max_grad_norm": [0.1] * 2, "mode": "ghost"},
        UnsupportedError,
        "PIA060",
    ),
    "another clipping": ({"clipping": "normalised"}, UnsupportedError, "PIA060"),
    "another mode": ({"mode": "ghost_fsdp"}, UnsupportedError, "PIA060"),
    "swept adaptively": (
        {"clipping": "adaptive", "charging": Sweep(every=3)},
        UnsupportedError,
        "PIA060",
    ),
    "individually adaptive": (
        {"clipping": "adaptive", "charging": FixedThresholds(thresholds=[1.0] * 97)},
        UnsupportedError,
        "PIA060",
    ),
    "random when empty": ({"rand_on_empty": True}, UnsupportedError, "PIA060"),
    "recurrent": ({"module": Recurrent()}, UnsupportedError, "PIA060"),
    "stream": ({"dataset": Stream()}, UnsupportedError, "PIA060"),
    "few thresholds": ({"charging": FixedThresholds(thresholds=[1.0])}, UsageError, "PIA071"),
    "no thresholds": ({"charging": FixedThresholds()}, UsageError, "PIA071"),
    "few ids": ({"ids": [1, 2]}, UsageError, "PIA071"),
    "few labels": ({"groups": {"label": [1, 2]}}, UsageError, "PIA071"),
    "amplified": ({"charging": WorstCase(), "poisson_sampling": False}, GuaranteeError, "PIA010"),
    "swept": ({"charging": Sweep(every=3), "poisson_sampling": False}, GuaranteeError, "PIA010"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_model_is_touched(start, name):
    arguments, kind, code = REFUSED[name]
    tracking = {key: arguments[key] for key in ("charging", "ids", "groups") if key in arguments}
    rest = {key: value for key, value in arguments.items() if key not in tracking}
    module = rest.pop("module", nn.Linear(10, 3))
    with pytest.raises(kind) as caught:
        start(PrivacyEngine(accountant="rdp", **tracking), module=module, **rest)
    assert isinstance(caught.value, PiaError) and caught.value.code == code
    assert not hasattr(module, "autograd_grad_sample_hooks")


def test_low_precision_parameters(start):
    with pytest.raises(UnsupportedError, match="low precision"):
        start(module=LowPrecision())


def test_second_make_private(start):
    training = start()
    with pytest.raises(UnsupportedError, match="twice"):
        start(training.engine)
    raw = training.optimizer.original_optimizer
    for optimizer in (training.optimizer, raw):
        with pytest.raises(UnsupportedError, match="tracked already"):
            start(module=training.module, optimizer=optimizer)
    with pytest.raises(UnsupportedError, match="tracked already"):
        attach(training.optimizer, training.loader)


def test_a_hook_that_assumes_a_smaller_sample_rate(start):
    module = GradSampleModule(nn.Linear(10, 3))
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer = DPOptimizer(sgd, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4)
    optimizer.attach_step_hook(RDPAccountant().get_optimizer_hook_fn(sample_rate=0.01))
    examples = TensorDataset(torch.ones(8, 10), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(GuaranteeError, match="PIA010"):
        attach(optimizer, DPDataLoader(examples, sample_rate=0.5))


@MODES
def test_copies_of_the_model_leave_the_ledger_alone(start, mode, tmp_path):
    training = start(mode=mode)
    training.train()
    kept = copy.deepcopy(training.model).eval()
    torch.save(training.module, tmp_path / "module.pt")
    x = training.dataset.tensors[0]
    assert torch.equal(kept(x), training.model.eval()(x))
    training.model.train()
    steps = len(training.steps)
    training.train()
    assert len(training.steps) == steps + len(training.loader)
    with pytest.raises(UnsupportedError, match="PIA060"):
        copy.deepcopy(training.optimizer)
    training.train()


def private_optimizer(module):
    sgd = torch.optim.SGD(module.parameters(), lr=0.1)
    return DPOptimizer(sgd, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4)


APPENDED = {
    "rows without positions": ({}, 6, UsageError, "PIA071"),
    "repeated positions": ({"positions": [0, 0, 1, 2, 3, 4]}, 6, UsageError, "PIA071"),
    "positions out of range": ({"positions": [0, 1, 2, 3, 4, 8]}, 6, UsageError, "PIA071"),
    "new ids": ({"ids": range(8)}, 8, UsageError, "PIA071"),
    "thresholds nobody recorded": ({"charging": FixedThresholds()}, 8, GuaranteeError, "PIA013"),
    "a plain module": ({"module": nn.Linear(10, 3)}, 8, UnsupportedError, "PIA060"),
}


@pytest.mark.parametrize("name", APPENDED)
def test_attach_to_an_open_ledger_checks_what_it_is_told(name):
    arguments, rows, kind, code = APPENDED[name]
    module = GradSampleModule(nn.Linear(10, 3))
    optimizer = private_optimizer(module)
    examples = TensorDataset(torch.ones(rows, 10), torch.zeros(rows, dtype=torch.int64))
    with LedgerWriter.create(None, Run(num_instances=8)) as writer:
        with pytest.raises(kind) as caught:
            attach(optimizer, DPDataLoader(examples, sample_rate=0.5), ledger=writer, **arguments)
        assert caught.value.code == code
        assert type(optimizer) is DPOptimizer and writer.num_steps == 0


def test_attach_finds_the_module_and_chains_a_later_hook():
    accountant, examples = (
        RDPAccountant(),
        TensorDataset(torch.ones(8, 10), torch.zeros(8, dtype=torch.int64)),
    )
    module = GradSampleModule(nn.Linear(10, 3))
    optimizer = private_optimizer(module)
    tracker, loader = attach(optimizer, DPDataLoader(examples, sample_rate=0.5))
    assert tracker.module is module._module
    with pytest.raises(GuaranteeError, match="PIA010"):
        optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=0.1))
    optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=0.5))
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    assert tracker.ledger.num_steps == 2 and accountant.history == [(1.0, 0.5, 2)]


def test_attach_without_any_module():
    parameter = nn.Parameter(torch.zeros(3))
    sgd = torch.optim.SGD([parameter], lr=0.1)
    optimizer = DPOptimizer(sgd, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4)
    examples = TensorDataset(torch.ones(8, 10), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(UsageError, match="PIA071"):
        attach(optimizer, DPDataLoader(examples, sample_rate=0.5))


def test_a_failing_ledger_keeps_the_parameters(start, monkeypatch):
    """Write-ahead: when the step cannot be recorded, it is not released."""
    training = start()
    batches = iter(training.loader)
    training.step(next(batches))
    weights = training.weights.clone()

    def full(self, event):
        raise LedgerError("PIA041", "no space", "Nothing was written", "free some space")

    monkeypatch.setattr(LedgerWriter, "append", full)
    with pytest.raises(LedgerError, match="PIA041"):
        training.step(next(batches))
    assert torch.equal(training.weights, weights)


def test_the_step_is_on_record_before_noise_is_drawn(start, monkeypatch):
    training = start()
    recorded = []
    add_noise = type(training.optimizer).add_noise

    def spying(self):
        recorded.append(training.engine.tracker.recorder.writer.num_steps)
        add_noise(self)

    monkeypatch.setattr(type(training.optimizer), "add_noise", spying)
    training.train()
    assert recorded == list(range(1, len(recorded) + 1))


def test_an_unfrozen_layer_is_not_released_unclipped_in_ghost_mode() -> None:
    """Opacus lists trainable parameters once, when it wraps the model."""
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3))
    model[0].requires_grad_(False)
    engine = PrivacyEngine(accountant="rdp")
    data = TensorDataset(torch.randn(40, 10), torch.randint(0, 3, (40,)))
    private, optimizer, criterion, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(data, batch_size=10),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode="ghost",
    )
    batches = iter(loader)
    x, y = next(batches)
    optimizer.zero_grad()
    criterion(private(x), y).backward()
    optimizer.step()
    model[0].requires_grad_(True)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = next(batches)
    optimizer.zero_grad()
    with pytest.raises(AlignmentError, match="PIA003"):
        criterion(private(x), y).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert engine.ledger.num_steps == 1


def test_the_sample_rate_cannot_change_behind_the_ledger() -> None:
    engine = PrivacyEngine(accountant="rdp")
    model = nn.Linear(10, 3)
    data = TensorDataset(torch.randn(100, 10), torch.randint(0, 3, (100,)))
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=10),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    loader.batch_sampler.sample_rate = 0.9
    x, y = next(iter(loader))
    optimizer.zero_grad()
    nn.functional.cross_entropy(private(x), y).backward()
    with pytest.raises(GuaranteeError, match="PIA010"):
        optimizer.step()
    assert engine.ledger.num_steps == 0


@pytest.mark.parametrize(("ahead", "named"), [(2, True), (3, False), (4, False)])
def test_reading_several_batches_ahead_is_noticed(ahead: int, named: bool) -> None:
    engine = PrivacyEngine(accountant="rdp")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(10, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    model = Model()
    data = TensorDataset(torch.randn(100, 10), torch.randint(0, 3, (100,)))
    private, _, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=10),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    batches = iter(loader)
    buffer = [next(batches) for _ in range(ahead)]
    with pytest.raises(AlignmentError, match="PIA007"):
        private(x=buffer[0][0]) if named else private(buffer[0][0])
    assert engine.ledger.num_steps == 0


def test_an_instance_that_is_drawn_three_times_is_charged_three_clip_norms() -> None:
    """However small its gradients are now: clipping would have allowed them."""
    engine = PrivacyEngine(accountant="rdp")
    model = nn.Linear(10, 3)
    data = TensorDataset(1e-3 * torch.randn(20, 10), torch.randint(0, 3, (20,)))
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_sampler=[[0, 0, 0, 1]]),
        noise_multiplier=2.0,
        max_grad_norm=10.0,
        poisson_sampling=False,
    )
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(private(x), y).backward()
        optimizer.step()
    worst = account(engine.ledger, charging=WorstCase(), orders=[2]).rdp
    assert worst[0, 0] == pytest.approx(2 * (3 / 2.0) ** 2 / 2, rel=1e-6)
