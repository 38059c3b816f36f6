"""The model of a ledger holds for this package's, and notices stores with one mistake each."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from per_instance_accountant.errors import LedgerError
from per_instance_accountant.ledger import LedgerWriter, Resume, merge_parts, new_run_id
from per_instance_accountant.testing.ledger_model import PackageStore, ledger_machine
from per_instance_accountant.testing.search import Broken

FEW = settings(
    max_examples=25,
    stateful_step_count=10,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=False,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


class Counting(PackageStore):
    """Counts what the model did."""

    def __init__(self):
        self.calls = Counter()

    def resume(self, path, checkpoint, session):
        writer = super().resume(path, checkpoint, session)
        self.calls["resumed behind" if writer.ledger().num_abandoned_steps else "resumed"] += 1
        return writer

    def spent(self, paths):
        found = super().spent(paths)
        self.calls["merged" if len(paths) > 1 else "single"] += 1
        self.calls["steps"] = max(self.calls["steps"], found[0])
        return found


class KeepsStepsInMemory(PackageStore):
    """A step reaches the file with the next one only."""

    def __init__(self):
        self.waiting = {}

    def step(self, writer, positions, contributions):
        if id(writer) in self.waiting:
            super().step(writer, *self.waiting[id(writer)])
        self.waiting[id(writer)] = positions, contributions


class ForgetsBranches(PackageStore):
    """A resume cuts off the steps that the checkpoint does not know."""

    def __init__(self):
        self.ends = {}

    def checkpoint(self, writer):
        anchor = writer.anchor
        self.ends[anchor.digest] = (writer.ledger().path / "events.log").stat().st_size
        return anchor

    def resume(self, path, checkpoint, session):
        with (path / "events.log").open("r+b") as log:
            log.seek(0, 2)
            if log.tell() > self.ends[checkpoint.digest]:
                log.truncate(self.ends[checkpoint.digest])
        return super().resume(path, checkpoint, session)


class TrustsOldLedgers(PackageStore):
    def resume(self, path, checkpoint, session):
        writer = LedgerWriter.resume(path, session=session)
        writer.append(self._phase())
        return writer


class ReadsTheFirstRankOnly(PackageStore):
    def spent(self, paths):
        return super().spent(paths[:1]) if len(paths) == 1 else self._first(paths)

    def _first(self, paths):
        steps, spent = super().spent(paths)
        return steps, np.where(np.arange(len(spent)) % len(paths) == 0, spent, 0.0)


class CountsBranchesTwice(PackageStore):
    def spent(self, paths):
        steps, spent = super().spent(paths)
        return steps, spent * (2 if steps > 3 else 1)


class TakesEveryStartForOne(PackageStore):
    def resume(self, path, checkpoint, session):
        return super().resume(path, checkpoint, "0" * 32)


class RoundsDown(PackageStore):
    def step(self, writer, positions, contributions):
        super().step(writer, positions, np.floor(contributions * 4) / 4)


def run(store):
    run_state_machine_as_test(ledger_machine(store), settings=FEW)


def test_the_model_holds_for_the_ledger_of_this_package():
    store = Counting()
    run(store)
    assert min(store.calls[name] for name in ("resumed", "resumed behind", "merged", "single")) > 5
    assert store.calls["steps"] >= 4


@pytest.mark.parametrize(
    ("store", "what"),
    [
        (KeepsStepsInMemory, "steps are known of"),
        (ForgetsBranches, "steps are known of|less is charged"),
        (TrustsOldLedgers, "rolled back behind the checkpoint"),
        (ReadsTheFirstRankOnly, "less is charged"),
        (CountsBranchesTwice, "more is charged"),
        (RoundsDown, "less is charged"),
        (TakesEveryStartForOne, "steps are known of"),
    ],
)
def test_a_store_with_a_mistake_is_noticed(store, what):
    # A merge may notice first that the ranks contradict each other.
    with pytest.raises((Broken, LedgerError), match=rf"{what}|ranks|frame"):
        run(store())


def crashed_apart(folder):
    """Three ranks; each crash comes when other ranks have recorded a step. Returns their ledgers."""
    store = PackageStore()
    paths = [folder / f"rank{rank}" for rank in range(3)]

    def record(writers):
        for rank, writer in enumerate(writers):
            store.step(writer, np.array([rank]), np.array([1.0]))

    def resume(writers, anchors):
        for writer in writers:
            store.crash(writer)
        session = new_run_id()
        return [store.resume(path, anchor, session) for path, anchor in zip(paths, anchors, strict=True)]

    writers = store.create(paths, 6)
    begin = [writer.anchor for writer in writers]
    record(writers)
    record(writers[:1])
    writers = resume(writers, begin)
    record(writers[:2])
    writers = resume(writers, begin)
    later = [writer.anchor for writer in writers]
    record(writers[:2])
    writers = resume(writers, later)
    record(writers)
    for writer in writers:
        store.crash(writer)
    return paths


def test_sessions_in_which_some_ranks_did_no_step_are_told_apart(tmp_path):
    paths = crashed_apart(tmp_path)
    steps, spent = PackageStore().spent(paths)
    assert steps == 5
    # Whom a rank drew that did not record the step is unknown, so everybody's charge has it once more.
    recorded = np.array([5.0, 4.0, 2.0, 0.0, 0.0, 0.0])
    assert (spent >= recorded).all() and spent[0] >= 5
    ledger = merge_parts(paths, None)
    assert [event.at_step for event in ledger.events() if isinstance(event, Resume)] == [0, 0, 3]
    assert ledger.merge.incomplete == ((1, 4),)
