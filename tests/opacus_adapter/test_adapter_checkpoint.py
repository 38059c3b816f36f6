"""A checkpoint and its ledger belong together: no step is lost, none is charged twice, no code is run."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from per_instance_accountant import FixedThresholds
from per_instance_accountant.errors import GuaranteeError, LedgerError, UnsupportedError
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

    again = start(PrivacyEngine(accountant="rdp", ledger=ledger), mode=mode, seed=2)
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
    again = start(PrivacyEngine(accountant="rdp", ledger=ledger), seed=2)
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
    again = start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "run", charging=rule), seed=2)
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


SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from torch.utils.data import DataLoader, TensorDataset
from per_instance_accountant import PrivacyEngine

torch.set_num_threads(1)
folder, seed, resume = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "resume"
kill_after = int(sys.argv[4])
torch.manual_seed(seed)
data = TensorDataset(torch.randn(60, 4), torch.randint(0, 2, (60,)))
model = torch.nn.Linear(4, 2)
engine = PrivacyEngine(accountant="rdp", ledger=folder / "run")
model, optimizer, loader = engine.make_private(
    module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    data_loader=DataLoader(data, batch_size=6), noise_multiplier=1.0, max_grad_norm=1.0)
if resume:
    engine.load_checkpoint(path=folder / "model.pt", module=model, optimizer=optimizer)
taken = 0
while True:
    for x, y in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        taken += 1
        print(taken, flush=True)
        if taken == 7 and not resume:
            engine.save_checkpoint(path=folder / "model.pt", module=model, optimizer=optimizer)
        if taken == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def run_until_killed(folder, seed, action, steps):
    """Steps that the process had released when it was killed; its error output otherwise."""
    arguments = [sys.executable, "-c", SCRIPT, str(folder), str(seed), action, str(steps)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    return (len(done.stdout.split()), done.returncode, done.stderr)


def test_killed_processes_resume_twice_from_one_checkpoint(tmp_path):
    """No released step is missing, none before the checkpoint is charged twice. With the seed of the first
    process the second would draw its noise again: it releases nothing."""
    assert run_until_killed(tmp_path, 1, "begin", 11)[:2] == (11, -9)
    first = steps_of(tmp_path / "run")
    assert len(first) == 11
    released, code, errors = run_until_killed(tmp_path, 1, "resume", 5)
    assert (released, code) == (0, 1) and "PIA091" in errors
    assert len(steps_of(tmp_path / "run")) == 11
    assert run_until_killed(tmp_path, 2, "resume", 5)[:2] == (5, -9)
    assert run_until_killed(tmp_path, 3, "resume", 3)[:2] == (3, -9)
    steps = steps_of(tmp_path / "run")
    assert len(steps) == 11 + 5 + 3
    for old, new in zip(first, steps, strict=False):
        assert np.array_equal(old.positions, new.positions)
    resumes = [e.at_step for e in Ledger.open(tmp_path / "run").events() if isinstance(e, Resume)]
    assert resumes == [7, 7, 7]
    assert Ledger.open(tmp_path / "run").num_abandoned_steps == 4 + 5


def noise_of(training):
    """What a step adds to the clipped sum."""
    drawn, add_noise = [], type(training.optimizer).add_noise

    def spying(self):
        summed = torch.cat([p.summed_grad.flatten() for p in self.params])
        add_noise(self)
        drawn.append(torch.cat([p.grad.flatten() for p in self.params]) - summed)

    return drawn, spying


def test_stock_opacus_repeats_its_noise_and_this_engine_refuses_to(start, stock, tmp_path, monkeypatch):
    noises = []
    for resume in (False, True):
        theirs = start(stock())
        drawn, spying = noise_of(theirs)
        if resume:
            load(theirs, tmp_path / "stock.pt")
        monkeypatch.setattr(type(theirs.optimizer), "add_noise", spying)
        theirs.train()
        monkeypatch.undo()
        save(theirs, tmp_path / "stock.pt")
        noises.append(drawn[0])
    assert torch.allclose(*noises, atol=1e-6)

    ours = start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "run")).train()
    save(ours, tmp_path / "model.pt")
    ours.engine.close()
    again = start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "run"))
    load(again, tmp_path / "model.pt")
    weights = again.weights.clone()
    with pytest.raises(GuaranteeError, match="PIA091"):
        again.train()
    assert torch.equal(again.weights, weights)
    assert len(again.steps) == len(again.loader)
    again.engine.abandon()
    torch.manual_seed(7)
    assert len(again.train().steps) == 2 * len(again.loader)


def test_a_seed_set_again_in_one_process_is_noticed(start, tmp_path):
    training = start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "run"))
    save(training, tmp_path / "model.pt")
    torch.manual_seed(11)
    training.train()
    load(training, tmp_path / "model.pt")
    torch.manual_seed(11)
    with pytest.raises(GuaranteeError, match="PIA091"):
        training.train()


def test_other_noise_clip_norm_and_rate_are_a_phase_of_their_own(start, tmp_path):
    first = start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "run")).train()
    save(first, tmp_path / "model.pt")
    first.engine.close()
    changed = {"noise_multiplier": 1.3, "max_grad_norm": 0.5, "batch_size": 20}
    again = start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "run"), seed=2, **changed)
    load(again, tmp_path / "model.pt")
    again.train()
    old, new = again.engine.ledger.phases
    assert (old.noise_std, old.max_grad_norm) == (pytest.approx(0.56), 0.8)
    assert (new.noise_std, new.max_grad_norm) == (pytest.approx(0.65), 0.5)
    assert old.sample_rate == 1 / 9 and new.sample_rate == 1 / 5
    # Opacus' own accountant goes on with its history of the file, too.
    assert [entry[0] for entry in again.engine.accountant.history] == [0.7, 1.3]


def test_an_error_names_the_steps_that_the_ledger_lacks(start, tmp_path):
    first = start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "run")).train()
    first.engine.tracker.recorder.writer.flush()
    shutil.copytree(tmp_path / "run", tmp_path / "old")
    save(first.train(), tmp_path / "model.pt")
    again = start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "old"), seed=2)
    count = len(first.loader)
    with pytest.raises(LedgerError, match=rf"after {2 * count} steps and the ledger holds {count}"):
        load(again, tmp_path / "model.pt")


def test_the_moving_clip_norm_continues(start, tmp_path):
    adaptive = {
        "clipping": "adaptive",
        "target_unclipped_quantile": 0.9,
        "clipbound_learning_rate": 0.5,
        "max_clipbound": 5.0,
        "min_clipbound": 0.05,
        "unclipped_num_std": 2.0,
    }
    first = start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "run"), **adaptive).train()
    save(first, tmp_path / "model.pt")
    first.engine.close()
    reached = first.optimizer.max_grad_norm
    again = start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "run"), seed=2, **adaptive)
    assert again.optimizer.max_grad_norm == 0.8 != reached
    load(again, tmp_path / "model.pt")
    assert again.optimizer.max_grad_norm == reached
    flat = start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "flat")).train()
    save(flat, tmp_path / "flat.pt")
    flat.optimizer.max_grad_norm = 0.3
    load(flat, tmp_path / "flat.pt")
    assert flat.optimizer.max_grad_norm == 0.3
