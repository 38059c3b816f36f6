"""Gradients that leave a batch unclipped or without noise, and draws that are not fresh: stock and here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import TensorDataset

from per_instance_accountant import Sweep
from per_instance_accountant.errors import (
    AlignmentError,
    GuaranteeError,
    UnsupportedError,
)
from per_instance_accountant.opacus_adapter import PrivacyEngine

CLIP = 0.8
ROWS, ONE = 9, 4


def table(rows, target=None):
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(ROWS, 10, generator=generator)
    x[ONE] *= 3
    y = torch.arange(ROWS) % 3 if target is None else torch.randn(ROWS, target, generator=generator) * 3
    return TensorDataset(x[rows], y[rows])


def everybody(start, engine=None, *, without=None, target=None, module=None, **arguments):
    """A training whose every batch is the whole data set, without noise."""
    rows = [row for row in range(ROWS) if row != without]
    module = module or nn.Linear(10, target or 3)
    arguments = {"noise_multiplier": 0.0, "max_grad_norm": CLIP, "batch_size": len(rows), **arguments}
    return start(engine, module=module, dataset=table(rows, target), **arguments)


def one_step(training, loss, between=lambda training: None):
    x, y = next(iter(training.loader))
    training.optimizer.zero_grad()
    loss(training, x, y).backward()
    between(training)
    training.optimizer.step()
    return torch.cat([p.grad.flatten() for p in training.optimizer.params]) * len(x)


def ordinary(training, x, y):
    return training.criterion(training.model(x), y)


def seed_module(width=3):
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, width))


def influence(start, engines, loss=ordinary, **arguments):
    """By how much one instance moves the clipped sum, and what it was charged."""
    make = arguments.pop("module", seed_module)
    here = everybody(start, engines(), module=make(), **arguments)
    moved = one_step(here, loss)
    moved = moved - one_step(everybody(start, engines(), without=ONE, module=make(), **arguments), loss)
    if not isinstance(here.engine, PrivacyEngine):
        return float(moved.norm()), None
    step = here.steps[-1]
    return float(moved.norm()), float(step.contributions[list(step.positions).index(ONE)])


def ours():
    return PrivacyEngine(accountant="rdp")


def test_losses_of_one_column_with_ghost_clipping(start, stock):
    """(B,) factors times (B, 1) losses are a (B, B) product."""
    settings = {"mode": "ghost", "target": 1, "module": lambda: seed_module(1), "criterion": nn.MSELoss()}
    assert influence(start, stock, **settings)[0] > 5 * CLIP
    moved, charged = influence(start, ours, **settings)
    assert 0.5 * CLIP < moved <= charged * (1 + 1e-5) <= CLIP * (1 + 2e-5)
    hooks, _ = influence(start, ours, **{**settings, "mode": "hooks"})
    assert moved == pytest.approx(hooks, rel=1e-4)


class Positions(nn.Module):
    """Five predictions for each instance, with the batch flattened into them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layer = nn.Linear(2, 3)

    def forward(self, x):
        return self.layer(x.unflatten(1, (5, 2))).flatten(0, 1)


def of_the_whole_batch(out, y):
    return nn.functional.cross_entropy(out, y)


def test_a_criterion_without_one_loss_for_each_instance(start, stock):
    settings = {"mode": "ghost", "criterion": of_the_whole_batch}
    assert influence(start, stock, **settings)[0] > 1.05 * CLIP
    with pytest.raises(AlignmentError, match="PIA003"):
        influence(start, ours, **settings)

    def alone(engine):
        training = start(
            engine, module=Positions(), dataset=table([ONE]), mode="ghost", batch_size=1, noise_multiplier=0.0
        )
        return one_step(training, lambda t, x, y: t.criterion(t.model(x), y.repeat(5)))

    assert float(alone(stock()).norm()) > 4 * CLIP
    with pytest.raises(AlignmentError, match="PIA003"):
        alone(ours())


def freeze(training):
    training.module[0].requires_grad_(False)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_layer_frozen_between_backward_and_step(start, stock, mode):
    for engine, moves in ((stock(), True), (ours(), False)):
        training = everybody(start, engine, module=seed_module(), mode=mode)
        before = [p.detach().clone() for p in training.module.parameters()]
        one_step(training, ordinary, freeze)
        moved = [not torch.equal(*pair) for pair in zip(before, training.module.parameters(), strict=True)]
        assert moved == [moves, moves, True, True]


def penalise(training):
    penalty = sum(p.square().sum() for p in training.module.parameters()) * training.expected
    penalty.backward()


def shrink(training):
    nn.utils.clip_grad_norm_(training.module.parameters(), 0.1)


@pytest.mark.parametrize("change", [penalise, shrink])
def test_gradients_changed_after_the_backward_pass(start, stock, change):
    theirs = everybody(start, stock(), module=seed_module(), mode="ghost")
    theirs.expected = 100
    unchanged = one_step(everybody(start, stock(), module=seed_module(), mode="ghost"), ordinary)
    assert not torch.allclose(one_step(theirs, ordinary, change), unchanged, rtol=1e-2)
    training = everybody(start, module=seed_module(), mode="ghost")
    training.expected = 100
    weights = training.weights.clone()
    with pytest.raises(AlignmentError, match="PIA005"):
        one_step(training, ordinary, change)
    assert torch.equal(training.weights, weights) and not training.steps
    training.engine.abandon()
    one_step(training, ordinary)
    assert len(training.steps) == 1


def test_a_parameter_that_the_model_does_not_have(start, stock):
    def train(engine):
        training = everybody(start, engine, module=seed_module(), mode="ghost", max_grad_norm=0.01)
        extra = nn.Parameter(torch.zeros(3))
        training.optimizer.add_param_group({"params": [extra]})
        one_step(training, lambda t, x, y: t.criterion(t.model(x) + extra, y))
        return extra

    train(stock())
    with pytest.raises(AlignmentError, match="PIA003"):
        train(ours())
    training = everybody(start, module=seed_module(), mode="hooks")
    training.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(AlignmentError, match="PIA003"):
        one_step(training, ordinary)


def test_a_parameter_of_the_model_may_join_the_optimizer(start):
    module = seed_module()
    optimizer = torch.optim.SGD(module[2].parameters(), lr=0.05)
    training = everybody(start, module=module, mode="ghost", optimizer=optimizer)
    one_step(training, ordinary)
    training.optimizer.add_param_group({"params": list(module[0].parameters())})
    one_step(training, ordinary)
    assert len(training.steps) == 2


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_after_wrapping(start, stock, mode, dtype):
    def train(engine):
        training = everybody(start, engine, module=seed_module(), mode=mode)
        training.module.to(dtype)
        return one_step(training, lambda t, x, y: t.criterion(t.model(x.to(dtype)), y))

    train(stock())
    with pytest.raises(UnsupportedError, match="PIA060"):
        train(ours())


def drawn(training, generator):
    found = []
    for _ in range(2):
        generator.manual_seed(3)
        for x, y in training.loader:
            found.append(training.rows_of(x))
            training.step((x, y))
    return found


def test_a_loader_that_is_seeded_in_every_epoch(start, stock, tmp_path):
    """Noise is fresh, draws are not: an instance of the first batch is in it every time."""
    generator = torch.Generator()
    theirs = drawn(start(stock(), loader={"generator": generator}), generator)
    half = len(theirs) // 2
    assert theirs[:half] == theirs[half:]
    training = start(loader={"generator": generator})
    with pytest.raises(GuaranteeError, match="PIA091"):
        drawn(training, generator)
    assert len(training.steps) == half
    generator.manual_seed(4)
    assert len(training.train().steps) == 2 * half

    engine = PrivacyEngine(accountant="rdp", ledger=tmp_path / "run")
    first = start(engine, loader={"generator": generator.manual_seed(3)}).train()
    engine.save_checkpoint(path=tmp_path / "a.pt", module=first.model, optimizer=first.optimizer)
    engine.close()
    engine = PrivacyEngine(accountant="rdp", ledger=tmp_path / "run")
    again = start(engine, loader={"generator": generator.manual_seed(3)}, seed=8)
    engine.load_checkpoint(path=tmp_path / "a.pt", module=again.model, optimizer=again.optimizer)
    with pytest.raises(GuaranteeError, match="PIA091"):
        again.train()
    generator.manual_seed(5)
    assert len(again.train().steps) == 2 * half


def test_whole_batches_need_no_fresh_draws(start):
    generator = torch.Generator()
    training = everybody(start, loader={"generator": generator}, noise_multiplier=1.0)
    assert len(drawn(training, generator)) == len(training.steps) == 2


def test_the_noise_of_the_count_inside_a_logical_batch(start):
    options = {"target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.2, "unclipped_num_std": 4.0}
    options |= {"max_clipbound": 10.0, "min_clipbound": 0.01, "clipping": "adaptive"}
    training = everybody(start, noise_multiplier=1.0, **options)
    manager = BatchMemoryManager(
        data_loader=training.loader, max_physical_batch_size=5, optimizer=training.optimizer
    )
    with manager as loader:
        batches = iter(loader)
        training.step(next(batches))
        training.optimizer.unclipped_num_std = 0.6
        with pytest.raises(AlignmentError, match="PIA009"):
            training.step(next(batches))
    assert not training.steps


WEIGHTS = torch.tensor([1.0, 5.0, 0.2])
COUPLED = {
    "class weights": lambda out, y: nn.functional.cross_entropy(out, y, weight=WEIGHTS),
    "ignored labels": lambda out, y: nn.functional.cross_entropy(out, y, ignore_index=1),
    "divided twice": lambda out, y: nn.functional.cross_entropy(out, y) / len(y),
}


@pytest.mark.parametrize("name", sorted(COUPLED))
def test_losses_that_are_divided_by_something_of_the_batch(start, name):
    """An instance whose own gradient vanishes moves those of the others; only ``verify=`` can see it."""

    def coupled(training, x, y):
        if len(x) == ROWS:
            x = x.clone()
            x[ONE] = 0
            x[ONE, 1] = 1e4
        return COUPLED[name](training.model(x), y)

    def module():
        made = nn.Linear(10, 3)
        with torch.no_grad():
            made.weight.copy_(torch.eye(3, 10))
        return made

    moved, charged = influence(start, ours, coupled, module=module, max_grad_norm=50.0)
    assert moved > 0.1 > 1000 * charged
    engine = PrivacyEngine(accountant="rdp", verify="first_step")
    checked = everybody(start, engine, module=module(), max_grad_norm=50.0)
    with pytest.raises(AlignmentError, match="PIA090"):
        one_step(checked, coupled)


def test_a_criterion_with_class_weights(start):
    criterion = nn.CrossEntropyLoss(weight=WEIGHTS)
    with pytest.raises(UnsupportedError, match="PIA101"):
        start(criterion=criterion)
    assert start(mode="ghost", criterion=criterion).train().steps
    assert (
        start(criterion=nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum"), reduction="sum").train().steps
    )


@pytest.mark.parametrize("scale", [1e36, 1e25, 1e-40])
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_gradients_of_any_size_move_the_sum_by_what_is_charged(start, mode, scale):
    def scaled(training, x, y):
        x = x.clone()
        if len(x) == ROWS:
            x[ONE] *= scale
            with torch.no_grad():
                y[ONE] = training.module(x[ONE]).argmin()
        return training.criterion(training.model(x), y)

    def module():
        torch.manual_seed(5)
        return nn.Linear(10, 3)

    moved, charged = influence(start, ours, scaled, mode=mode, module=module)
    assert np.isfinite(moved) and moved <= charged * (1 + 1e-5) <= CLIP * (1 + 2e-5)


@pytest.mark.compat
@pytest.mark.parametrize("careless", [False, True])
@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_rows_of_a_batch_that_was_given_up_are_not_in_the_next_one(start, models, by_hand, mode, careless):
    """Opacus adds the rows of a backward pass to those of an unfinished one. Careless: only its counters are
    set back, as they must be to go on at all."""
    training = start(mode=mode, poisson_sampling=False)
    batches = iter(training.loader)
    x, y = next(batches)
    training.optimizer.zero_grad()
    training.model(x)
    training.criterion(training.model(x), y).backward()  # of two forward passes
    with pytest.raises(AlignmentError, match="PIA005"):
        training.optimizer.step()
    left = [p.__dict__.get("_current_grad_sample") for p in training.module.parameters()]
    training.engine.abandon()
    if careless:
        for p, rows in zip(training.module.parameters(), left, strict=True):
            p._current_grad_sample = rows
    x, y = next(batches)
    training.optimizer.zero_grad()
    training.criterion(training.model(x), y).backward()
    found = torch.cat([p.grad_sample.flatten(1) for p in training.module.parameters()], dim=1).norm(dim=1)
    expected = by_hand(models["perceptron"]()[0], training.parameters(), x, y)
    assert np.allclose(found, expected, rtol=1e-4) != careless


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("rule", [None, Sweep(every=1)])
def test_an_error_in_a_backward_pass_leaves_nothing_behind(start, models, by_hand, mode, rule):
    """Ghost clipping switches its hooks off between its two passes."""
    training = start(PrivacyEngine(accountant="rdp", charging=rule), mode=mode)
    twin, failing = models["perceptron"]()[0], True

    class Failing(torch.autograd.Function):
        count = 0

        @staticmethod
        def forward(context, values):
            return values.clone()

        @staticmethod
        def backward(context, gradient):
            Failing.count += 1
            if failing and Failing.count == (2 if mode == "ghost" else 1):
                raise RuntimeError("out of memory")
            return gradient

    for number, (x, y) in enumerate(training.loader):
        before = training.parameters()
        training.optimizer.zero_grad()
        loss = training.criterion(Failing.apply(training.model(x)), y)
        if number == 0:
            with pytest.raises(RuntimeError, match="out of memory"):
                loss.backward()
            training.engine.abandon()
            failing = False
            continue
        loss.backward()
        training.optimizer.step()
        step = training.steps[-1]
        rows = step.positions.copy()
        inputs, targets = (part[rows] for part in training.dataset.tensors)
        norms = np.minimum(by_hand(twin, before, inputs, targets), CLIP)
        assert len(rows) == len(x)
        np.testing.assert_allclose(step.contributions, norms, rtol=2e-5)
