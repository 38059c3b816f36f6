"""Training loops that do not do what the accounting assumes: refused before anything is released."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import opacus
import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from per_instance_accountant import PrivacyEngine, Unamplified, account
from per_instance_accountant.errors import PiaError
from per_instance_accountant.ledger import Ledger, Step
from tests.bad_inputs.cases import refused

torch.set_num_threads(1)
ROWS = 24


class Loop:
    """A private training of a small model."""

    def __init__(
        self, module: nn.Module | None = None, x: torch.Tensor | None = None, **changes: Any
    ) -> None:
        torch.manual_seed(0)
        engine = changes.pop("engine", None) or PrivacyEngine(accountant="rdp", **changes.pop("tracking", {}))
        self.module = module or nn.Sequential(nn.Linear(4, 3))
        self.x = torch.randn(ROWS, 4) if x is None else x
        self.data = TensorDataset(self.x, torch.arange(len(self.x)) % 3)
        options = {
            "module": self.module,
            "optimizer": torch.optim.SGD(self.module.parameters(), lr=0.1),
            "data_loader": DataLoader(self.data, batch_size=6, **changes.pop("loader", {})),
            "noise_multiplier": 1.0,
            "max_grad_norm": 1.0,
        }
        self.engine = engine
        self.model, self.optimizer, self.loader = engine.make_private(**(options | changes))

    def backward(self, batch: Any) -> None:
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(batch[0]), batch[1]).backward()

    def step(self, batch: Any) -> None:
        self.backward(batch)
        self.optimizer.step()

    def run(self, epochs: int = 1) -> Loop:
        for _ in range(epochs):
            for batch in self.loader:
                self.step(batch)
        return self

    @property
    def ledger(self) -> Ledger:
        return self.engine.ledger

    def refuses(self, call: Callable[[], Any], code: str) -> None:
        """The call is refused; weights and facts are as they were."""
        steps = self.ledger.num_steps
        weights = copy.deepcopy(self.module.state_dict())
        refused(call, code)
        assert self.ledger.num_steps == steps
        assert all(torch.equal(weights[name], value) for name, value in self.module.state_dict().items())

    def first(self) -> Any:
        return next(batch for batch in self.loader if len(batch[0]))


def a_poisoned_row(value: float) -> None:
    x = torch.ones(ROWS, 4)
    x[:, 0] = value
    loop = Loop(x=x)
    batch = loop.first()
    loop.refuses(lambda: loop.step(batch), "PIA006")


def a_changed_clip_norm() -> None:
    loop = Loop()
    for number, batch in enumerate(loop.loader):
        loop.optimizer.max_grad_norm = 1.0 if number < 2 else 0.5
        loop.step(batch)
    norms = [phase.max_grad_norm for phase in loop.ledger.phases]
    assert norms == [1.0, 0.5] and [phase.noise_std for phase in loop.ledger.phases] == [1.0, 0.5]


def a_private_batch_size_is_stated() -> None:
    for rows in (ROWS, ROWS - 1):
        loop = Loop(x=torch.randn(rows, 4)).run()
        phase = loop.ledger.phases[0]
        assert phase.denominator == loop.optimizer.expected_batch_size
        assert phase.sample_rate == loop.loader.batch_sampler.sample_rate
    assert "normalisers and sampling rates stay" in account_statement(loop)


def account_statement(loop: Loop) -> str:
    from per_instance_accountant import audit

    return audit(loop.ledger).statement()


def steps_are_counted_not_computed() -> None:
    """93 rows in batches of 1: planned from floats one step is lost, recorded are those that were taken."""
    loop = Loop(x=torch.randn(93, 4), data_loader=DataLoader(dataset_of(93), batch_size=1))
    taken = 0
    for batch in loop.loader:
        loop.step(batch)
        taken += 1
    assert loop.ledger.num_steps == taken == len(loop.loader)


def dataset_of(rows: int) -> TensorDataset:
    torch.manual_seed(0)
    return TensorDataset(torch.randn(rows, 4), torch.arange(rows) % 3)


def an_instance_twice_in_one_step() -> None:
    loop = Loop()
    batch = loop.first()

    def twice() -> None:
        loop.backward(batch)
        nn.functional.cross_entropy(loop.model(batch[0]), batch[1]).backward()
        loop.optimizer.step()

    with pytest.raises((PiaError, ValueError)):
        twice()
    assert loop.ledger.num_steps == 0


def a_step_around_the_noise() -> None:
    loop = Loop()
    loop.backward(loop.first())
    loop.refuses(loop.optimizer.original_optimizer.step, "PIA008")


def a_closure() -> None:
    loop = Loop()
    batch, calls = loop.first(), []

    def closure() -> Any:
        calls.append(1)
        loop.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(loop.model(batch[0]), batch[1])
        loss.backward()
        return loss

    before = loop.module[0].weight.detach().clone()
    try:
        loop.optimizer.step(closure)
    except PiaError:
        assert torch.equal(before, loop.module[0].weight) and loop.ledger.num_steps == 0
        return
    assert len(calls) == 1 and loop.ledger.num_steps == 1


def zero_grad_forgotten() -> None:
    loop = Loop()
    batches = iter(loop.loader)
    loop.step(next(batches))
    batch = next(batches)

    def again() -> None:
        nn.functional.cross_entropy(loop.model(batch[0]), batch[1]).backward()
        loop.optimizer.step()

    with pytest.raises((PiaError, ValueError)):
        again()
    assert loop.ledger.num_steps == 1


def a_batch_of_another_loader() -> None:
    loop = Loop()
    loop.refuses(lambda: loop.step((loop.x[:3], torch.zeros(3, dtype=torch.long))), "PIA007")


def a_batch_cut_by_hand() -> None:
    loop = Loop()
    x, y = loop.first()
    loop.refuses(lambda: loop.step((x[:-1], y[:-1])), "PIA003")


def a_loop_that_stops_inside_a_logical_batch() -> None:
    loop = Loop()
    with BatchMemoryManager(
        data_loader=loop.loader, max_physical_batch_size=2, optimizer=loop.optimizer
    ) as parts:
        for batch in parts:
            loop.step(batch)
            break
    refused(lambda: loop.run(), "PIA002")


def layers_that_mix_instances() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.raises(Exception, match="BatchNorm"):
        Loop(module)


def frozen_layers_stay_and_others_are_charged() -> None:
    module = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    module[0].requires_grad_(False)
    before = module[0].weight.clone()
    loop = Loop(module).run()
    assert torch.equal(before, module[0].weight) and loop.ledger.num_steps == len(loop.loader)


def a_noise_multiplier(value: float) -> None:
    with pytest.raises((PiaError, ValueError)):
        Loop(noise_multiplier=value)


def no_noise_is_no_privacy() -> None:
    loop = Loop(noise_multiplier=0.0).run()
    assert np.isinf(account(loop.ledger).rdp).all()
    assert loop.engine.get_epsilon(1e-5) == math.inf


def targets_without_noise() -> None:
    for changes in (
        {"target_epsilon": math.nan},
        {"target_epsilon": math.inf},
        {"target_epsilon": 0.0},
        {"target_epsilon": -1.0},
        {"target_delta": 1.0},
        {"target_delta": math.nan},
        {"epochs": 0},
        {"epochs": math.nan},
    ):
        refused(lambda changes=changes: calibrated(**changes), "PIA070")
    error = refused(lambda: calibrated(target_epsilon=1e-7), "PIA011")
    assert "reaches epsilon 1e-07" in str(error)


def calibrated(**changes: Any) -> Any:
    module = nn.Linear(4, 3)
    options = {"target_epsilon": 8.0, "target_delta": 1e-5, "epochs": 1, "max_grad_norm": 1.0}
    return PrivacyEngine(accountant="per_instance").make_private_with_epsilon(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(dataset_of(ROWS), batch_size=6),
        **(options | changes),
    )


def loaders_without_poisson_sampling() -> None:
    loop = Loop(poisson_sampling=False).run()
    assert loop.ledger.phases[0].sampling == "shuffled"
    assert loop.ledger.phases[0].amplification_rate == 1.0
    assert account(loop.ledger, orders=[2.0]).worst_case_rdp[0] >= len(loop.loader) * 1.0


def a_weighted_sampler() -> None:
    """Opacus puts a Poisson sampler in its place; the rate on record is the one that is drawn with."""
    sampler = torch.utils.data.WeightedRandomSampler([1.0] * 3 + [0.0] * (ROWS - 3), ROWS)
    loop = Loop(loader={"sampler": sampler}).run(5)
    steps = [event for event in loop.ledger.events() if isinstance(event, Step)]
    assert np.unique(np.concatenate([step.positions for step in steps])).size > 3
    assert loop.ledger.phases[0].sample_rate == loop.loader.batch_sampler.sample_rate


def empty_draws_are_steps() -> None:
    loop = Loop(x=torch.randn(4, 4), data_loader=DataLoader(dataset_of(40), batch_size=1)).run()
    sizes = [event.positions.size for event in loop.ledger.events() if isinstance(event, Step)]
    assert 0 in sizes and len(sizes) == len(loop.loader)


def two_owners_of_one_instance() -> None:
    people = np.repeat(np.arange(ROWS // 2), 2)
    loop = Loop(tracking={"groups": {"person": people}}).run()
    from per_instance_accountant.accounting import account_groups

    alone = account(loop.ledger, orders=[2.0]).rdp[:, 0].max()
    together = account_groups(loop.ledger, "person", orders=[2.0]).rdp[:, 0].max()
    assert together > alone


def observed_norms_do_not_amplify() -> None:
    loop = Loop().run()
    amplified, alone = account(loop.ledger, orders=[2.0]), account(loop.ledger, Unamplified(), orders=[2.0])
    assert amplified.basis == "CERTIFIED" and alone.basis == "OUTPUT_SPECIFIC"
    assert alone.rdp.max() > amplified.rdp.max() / len(loop.loader)


def an_engine_used_twice() -> None:
    engine = PrivacyEngine(accountant="rdp")
    Loop(engine=engine)
    with pytest.raises(PiaError) as caught:
        Loop(engine=engine)
    assert caught.value.code == "PIA060"


def a_checkpoint_that_is_a_pickle() -> None:
    import os
    import tempfile

    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (target,)

    with tempfile.TemporaryDirectory() as folder:
        target = os.path.join(folder, "executed")
        torch.save({"module_state_dict": Payload()}, os.path.join(folder, "checkpoint.pt"))
        loop = Loop()
        with pytest.raises(PiaError):
            loop.engine.load_checkpoint(path=os.path.join(folder, "checkpoint.pt"), module=loop.model)
        assert not os.path.exists(target)


def history_that_no_run_has() -> None:
    accountant = opacus.accountants.create_accountant("per_instance")
    for history in ([(1.0, 0.1, -5)], [(math.nan, 0.1, 1)], [(1.0, 2.0, 1)], None):
        with pytest.raises((PiaError, ValueError, TypeError)):
            accountant.load_state_dict({"history": history, "mechanism": "per_instance"})
        assert accountant.history == []
    accountant.load_state_dict({"history": [(0.0, 0.1, 0)], "mechanism": "per_instance"})
    assert accountant.get_epsilon(1e-5) == 0.0


CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "a row that is NaN": ("refused before release", lambda: a_poisoned_row(math.nan)),
    "a row that is infinite": ("refused before release", lambda: a_poisoned_row(math.inf)),
    "another clip norm in the middle": ("a new mechanism on record", a_changed_clip_norm),
    "one row less": ("its own rate and normaliser on record", a_private_batch_size_is_stated),
    "a number of steps that floats get wrong": ("counted as taken", steps_are_counted_not_computed),
    "two backward passes in one step": ("refused before release", an_instance_twice_in_one_step),
    "a step of the inner optimizer": ("noticed at the next step", a_step_around_the_noise),
    "a closure": ("one pass, or refused", a_closure),
    "zero_grad forgotten": ("refused, nothing recorded", zero_grad_forgotten),
    "a batch from elsewhere": ("refused before release", a_batch_of_another_loader),
    "a batch cut by hand": ("refused before release", a_batch_cut_by_hand),
    "a loop left inside a logical batch": (
        "refused before the next one",
        a_loop_that_stops_inside_a_logical_batch,
    ),
    "batch normalisation": ("refused", layers_that_mix_instances),
    "frozen layers": ("stay as they are", frozen_layers_stay_and_others_are_charged),
    "noise that is NaN": ("refused", lambda: a_noise_multiplier(math.nan)),
    "noise that is negative": ("refused", lambda: a_noise_multiplier(-1.0)),
    "no noise": ("an infinite loss", no_noise_is_no_privacy),
    "targets that no noise reaches": ("refused, without a search that does not end", targets_without_noise),
    "a shuffled loader": ("no amplification", loaders_without_poisson_sampling),
    "a weighted sampler": ("replaced by one with an equal rate", a_weighted_sampler),
    "draws of nobody": ("steps like any other", empty_draws_are_steps),
    "a person with two instances": ("more than the larger of the two", two_owners_of_one_instance),
    "norms of the drawn only": ("no amplification claimed for them", observed_norms_do_not_amplify),
    "one engine for two runs": ("refused", an_engine_used_twice),
    "a checkpoint that runs code": ("never executed", a_checkpoint_that_is_a_pickle),
    "a history that no run has": ("refused, unchanged", history_that_no_run_has),
}


@pytest.mark.parametrize("name", CASES)
def test_training(name: str) -> None:
    CASES[name][1]()
