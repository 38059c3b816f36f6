"""A checkpoint and its ledger belong together: no step is lost, none is charged twice, no code is run."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
import torch

from per_instance_accountant import FixedThresholds
from per_instance_accountant.errors import LedgerError, UnsupportedError
from per_instance_accountant.ledger import Ledger, Resume, Step, Thresholds
from per_instance_accountant.opacus_adapter import PrivacyEngine


def steps_of(path):
    return [event for event in Ledger.open(path).events() if isinstance(event, Step)]


def save(training, path):
    training.engine.save_checkpoint(path=path, module=training.model, optimizer=training.optimizer)


def load(training, path, **options):
    return training.engine.load_checkpoint(
        path=path, module=training.model, optimizer=training.optimizer, **options
    )


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_kill_and_resume_loses_and_doubles_nothing(start, tmp_path, mode):
    ledger, checkpoint = tmp_path / "run", tmp_path / "model.pt"
    first = start(PrivacyEngine(accountant="rdp", ledger=ledger), mode=mode).train()
    save(first, checkpoint)
    recorded, weights = first.steps, first.weights.clone()
    second = first.train()
    lost = len(first.steps) - len(recorded)
    second.engine.tracker.recorder._writer._end()  # as a killed process: nothing is flushed

    again = start(PrivacyEngine(accountant="rdp", ledger=ledger), mode=mode)
    load(again, checkpoint)
    assert torch.equal(again.weights, weights)
    assert sum(n for _, _, n in again.engine.accountant.history) == len(recorded)
    again.train()
    again.engine.close()
    steps = steps_of(ledger)
    assert len(steps) == len(recorded) + lost + len(again.loader)
    assert Ledger.open(ledger).num_abandoned_steps == lost
    for old, new in zip(recorded, steps, strict=False):
        assert np.array_equal(old.positions, new.positions)
    resumes = [event for event in Ledger.open(ledger).events() if isinstance(event, Resume)]
    assert [event.at_step for event in resumes] == [len(recorded)]


def test_resume_at_the_last_step_abandons_nothing(start, tmp_path):
    ledger, checkpoint = tmp_path / "run", tmp_path / "model.pt"
    first = start(PrivacyEngine(accountant="rdp", ledger=ledger)).train()
    save(first, checkpoint)
    first.engine.close()
    again = start(PrivacyEngine(accountant="rdp", ledger=ledger))
    load(again, checkpoint)
    again.train()
    assert again.engine.ledger.num_abandoned_steps == 0
    assert again.engine.ledger.num_steps == 2 * len(first.loader)


def test_going_back_within_one_process(start, tmp_path):
    training = start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "run")).train()
    save(training, tmp_path / "model.pt")
    training.train()
    load(training, tmp_path / "model.pt")
    training.train()
    count = len(training.loader)
    assert (training.engine.ledger.num_steps, training.engine.ledger.num_abandoned_steps) == (
        3 * count,
        count,
    )


def test_fixed_thresholds_are_stated_again_after_going_back(start, tmp_path):
    rule = FixedThresholds(thresholds=np.linspace(0.1, 1, 97))
    training = start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "run", charging=rule))
    save(training, tmp_path / "model.pt")
    training.train().engine.close()
    again = start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "run", charging=rule))
    load(again, tmp_path / "model.pt")
    again.train()
    stated = [event for event in again.engine.ledger.events() if isinstance(event, Thresholds)]
    assert len(stated) == 2 and np.array_equal(stated[0].values, stated[1].values)
    again.engine.close()

    other = FixedThresholds(thresholds=np.linspace(0.2, 1, 97))
    third = start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "run", charging=other))
    with pytest.raises(LedgerError, match="PIA045"):
        load(third, tmp_path / "model.pt")


def test_a_checkpoint_ahead_of_its_ledger(start, tmp_path):
    ledger = tmp_path / "run"
    first = start(PrivacyEngine(accountant="rdp", ledger=ledger)).train()
    first.engine.tracker.recorder.writer.flush()
    shutil.copytree(ledger, tmp_path / "old")
    save(first.train(), tmp_path / "model.pt")
    again = start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "old"))
    weights = again.weights.clone()
    with pytest.raises(LedgerError, match="PIA040"):
        load(again, tmp_path / "model.pt")
    assert torch.equal(again.weights, weights)
    assert again.engine.accountant.history == []


@pytest.mark.parametrize("other", ["run", "memory", "data set", "stock"])
def test_a_checkpoint_of_something_else(start, stock, tmp_path, other):
    first = start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "run")).train()
    save(first, tmp_path / "model.pt")
    first.engine.close()
    ledger = tmp_path / "other" if other == "run" else None if other == "memory" else tmp_path / "run"
    if other == "run":
        start(PrivacyEngine(accountant="rdp", ledger=ledger)).train().engine.close()
    if other == "stock":
        theirs = start(stock()).train()
        theirs.engine.save_checkpoint(path=tmp_path / "model.pt", module=theirs.model)
    dataset = torch.utils.data.TensorDataset(torch.ones(50, 10), torch.zeros(50, dtype=torch.int64))
    engine = PrivacyEngine(accountant="rdp", ledger=ledger)
    again = start(engine, dataset=dataset if other == "data set" else None)
    with pytest.raises(LedgerError, match="PIA040"):
        load(again, tmp_path / "model.pt")


def test_foreign_entries_travel_and_the_file_is_plain(start, tmp_path):
    training = start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "run")).train()
    mine = {"epoch": 3}
    training.engine.save_checkpoint(
        path=tmp_path / "model.pt", module=training.model, optimizer=training.optimizer, checkpoint_dict=mine
    )
    assert mine == {"epoch": 3}
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert content["epoch"] == 3
    assert content["per_instance_accountant"]["anchor"]["steps"] == len(training.steps)
    assert load(training, tmp_path / "model.pt")["epoch"] == 3


class Trap:
    def __reduce__(self):
        return (exec, ("import builtins; builtins.trapped = True",))


def test_a_checkpoint_cannot_run_code(start, tmp_path):
    training = start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "run")).train()
    training.engine.save_checkpoint(
        path=tmp_path / "model.pt", module=training.model, checkpoint_dict={"trap": Trap()}
    )
    for options in ({}, {"torch_load_kwargs": {"weights_only": False}}):
        with pytest.raises(UnsupportedError, match="PIA060"):
            load(training, tmp_path / "model.pt", **options)
    import builtins

    assert not hasattr(builtins, "trapped")
    pickle.loads(pickle.dumps(Trap()))
    assert builtins.__dict__.pop("trapped") is True
