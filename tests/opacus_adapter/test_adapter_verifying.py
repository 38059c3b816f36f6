"""``verify=`` sees what counts cannot: rows that the loop permuted or mixed, parameters used outside of their
layer. Each test shows first that the loop passes every count."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from per_instance_accountant.errors import AlignmentError, UnsupportedError, UsageError
from per_instance_accountant.ledger import Step
from per_instance_accountant.opacus_adapter import PrivacyEngine

MODES = pytest.mark.parametrize("mode", ["hooks", "functorch", "ew", "ghost"])


def engine(verify):
    return PrivacyEngine(accountant="rdp", verify=verify)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(10, 16), nn.Dropout(0.5), nn.Linear(16, 3)

    def forward(self, x):
        return self.last(self.drop(torch.relu(self.first(x))))


class Reusing(nn.Module):
    """Uses a weight outside of its layer, which per-sample hooks do not see."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(10, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.last(nn.functional.linear(torch.tanh(self.inner(x)), self.inner.weight))


def permuted(x, y):
    order = torch.arange(len(x)).roll(1)
    return x[order], y[order]


def permuted_in_place(x, y):
    x[:] = x.roll(1, dims=0)
    return x, y


def mixed(x, y):
    return 0.5 * x + 0.5 * x.roll(1, dims=0), y


def train(training, change):
    for x, y in training.loader:
        training.step(change(x, y))


@MODES
@pytest.mark.parametrize("module", [None, Dropping])
def test_an_honest_loop_passes_and_is_not_changed(start, mode, module):
    torch.manual_seed(3)
    own = module() if module else None
    torch.manual_seed(3)
    twin = module() if module else None
    checked = start(engine("every_step"), mode=mode, module=own).train(2, 5)
    plain = start(engine("off"), mode=mode, module=twin).train(2, 5)
    assert len(checked.steps) == len(plain.steps) > 0
    assert torch.equal(checked.weights, plain.weights)


@pytest.mark.parametrize("clipping", ["per_layer", "adaptive"])
def test_an_honest_loop_with_other_clipping_passes(start, clipping):
    extra = {"max_grad_norm": [0.5] * 4}
    if clipping == "adaptive":
        extra = {
            "target_unclipped_quantile": 0.5,
            "clipbound_learning_rate": 0.2,
            "max_clipbound": 3.0,
            "min_clipbound": 0.05,
            "unclipped_num_std": 2.0,
        }
    assert start(engine("every_step"), clipping=clipping, **extra).train().steps


@MODES
@pytest.mark.parametrize("change", [permuted, permuted_in_place, mixed])
@pytest.mark.parametrize("verify", ["first_step", "every_step"])
def test_rows_that_are_not_the_loaders_are_found(start, mode, change, verify):
    train(start(engine("off"), mode=mode), change)
    training = start(engine(verify), mode=mode)
    weights = training.weights.clone()
    with pytest.raises(AlignmentError, match="PIA090"):
        train(training, change)
    assert torch.equal(training.weights, weights)
    assert training.steps == []


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_parameter_used_outside_of_its_layer_is_found(start, mode):
    train(start(engine("off"), mode=mode, module=Reusing()), lambda x, y: (x, y))
    with pytest.raises(AlignmentError, match="PIA090"):
        train(start(engine("first_step"), mode=mode, module=Reusing()), lambda x, y: (x, y))


def test_first_step_looks_once_and_every_step_always(start):
    calls = {"first_step": 0, "every_step": 0}
    for how in calls:
        training = start(engine(how))
        verifier = training.engine.tracker.verifier
        compute = verifier._norms

        def counted(content, rows, how=how, compute=compute):
            calls[how] += 1
            return compute(content, rows)

        verifier._norms = counted
        training.train()
        nonempty = sum(len(step.positions) > 0 for step in training.steps)
    assert calls == {"first_step": 1, "every_step": nonempty}


def test_gradients_that_the_loop_writes_are_checked(start):
    """Mode no_op: gradients of the rows in another order."""

    def write(training, x, y):
        loss = nn.functional.cross_entropy
        parameters = dict(training.module.named_parameters())
        gradients = torch.func.vmap(
            torch.func.grad(
                lambda p, a, b: loss(torch.func.functional_call(training.module, p, (a[None],)), b[None])
            ),
            in_dims=(None, 0, 0),
        )({name: p.detach() for name, p in parameters.items()}, x, y)
        for name, p in parameters.items():
            p.grad_sample = gradients[name]
        training.optimizer.step()
        training.optimizer.zero_grad()

    training = start(engine("every_step"), mode="no_op")
    for x, y in training.loader:
        write(training, x, y)
    assert len(training.steps) == len(training.loader)
    training = start(engine("every_step"), mode="no_op")
    x, y = next(iter(training.loader))
    with pytest.raises(AlignmentError, match="PIA090"):
        write(training, *permuted(x, y))


def test_an_unknown_word(start):
    with pytest.raises(UsageError, match="PIA070"):
        engine("always")


def test_batches_whose_loss_is_unknown(start):
    training = start(engine("first_step"), dataset=torch.utils.data.TensorDataset(torch.randn(40, 10)))
    (x,) = next(iter(training.loader))
    with pytest.raises(UnsupportedError, match="PIA060"):
        training.step((x, torch.zeros(len(x), dtype=torch.int64)))
    assert [event for event in training.engine.ledger.events() if isinstance(event, Step)] == []
