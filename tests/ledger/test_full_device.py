"""A device that is full at any one write, or whose fsync fails: whole frames, typed errors, nothing half."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from per_instance_accountant.errors import LedgerError
from per_instance_accountant.ledger import (
    Ledger,
    LedgerWriter,
    Phase,
    Run,
    Step,
    merge_parts,
    new_run_id,
    storage,
)

PHASE = Phase(
    kind="train",
    sampling="poisson",
    sample_rate=0.25,
    noise_std=1.5,
    max_grad_norm=1.0,
    charging="worst_case",
    denominator=2.0,
    learning_rate=0.1,
)


def step_of(position: int) -> Step:
    return Step(positions=np.array([position]), contributions=np.ones(1, np.float32))


class Failing:
    """One call of the system, by number, fails; ``calls`` counts all of them."""

    def __init__(self, original: Callable[..., Any], number: int) -> None:
        self.original, self.number, self.calls = original, number, 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls == self.number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.original(*arguments)


def course(path: Path, taken: list[int]) -> None:
    """Six steps, each offered again once when it is refused; ``taken`` are those acknowledged."""
    with LedgerWriter.create(path, Run(num_instances=8)) as writer:
        writer.append(PHASE)
        for number in range(6):
            try:
                writer.append(step_of(number))
            except LedgerError:
                writer.append(step_of(number))
            taken.append(number)


@pytest.mark.parametrize("name", ["write", "fsync"])
def test_every_single_failure_leaves_a_ledger_that_tells_the_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    original, number, reached = getattr(os, name), 0, True
    while reached:
        number += 1
        path, taken = tmp_path / str(number), []
        failing = Failing(original, number)
        with monkeypatch.context() as patch:
            patch.setattr(storage.os, name, failing)
            with suppress(LedgerError):
                course(path, taken)
        reached = failing.calls >= number
        if not taken:
            try:
                assert Ledger.open(path).num_steps <= 1
            except LedgerError:
                LedgerWriter.create(path, Run(num_instances=8)).close()
            continue
        steps = [event for event in Ledger.open(path).events() if isinstance(event, Step)]
        recorded = [step.positions.tolist() for step in steps]
        assert recorded[: len(taken)] == [[number] for number in taken]
        assert len(recorded) <= len(taken) + 1
        with LedgerWriter.resume(path) as writer:
            writer.append(PHASE)
            writer.append(step_of(7))
        assert Ledger.open(path).num_steps == len(recorded) + 1
    assert number > (5 if name == "write" else 2)


def test_a_merge_that_fails_at_any_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity, parts = new_run_id(), []
    for rank in range(2):
        run = Run(num_instances=8, run_id=identity, rank=rank, world_size=2)
        with LedgerWriter.create(None, run) as part:
            part.append(PHASE)
            part.append(step_of(rank))
        parts.append(part.ledger())
    for number in range(1, 100):
        failing = Failing(os.write, number)
        with monkeypatch.context() as patch:
            patch.setattr(storage.os, "write", failing)
            try:
                merged = merge_parts(parts, tmp_path / "whole")
            except LedgerError:
                assert list(tmp_path.iterdir()) == []
                continue
        break
    assert failing.number > 6 and failing.calls < failing.number
    assert merged.digest == Ledger.open(tmp_path / "whole").digest


def test_an_export_is_on_the_device_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / "run", []
    course(path, [])
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, o=original: (calls.append(n), o(*a))[1])
    Ledger.open(path).export(tmp_path / "tables")
    assert calls == ["fsync", "replace", "fsync"] * 4
    failing = Failing(os.fsync, 3)
    monkeypatch.setattr(os, "fsync", failing)
    before = {file.name: file.read_bytes() for file in (tmp_path / "tables").iterdir()}
    with pytest.raises(LedgerError, match="PIA041"):
        Ledger.open(path).export(tmp_path / "tables", overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "tables").iterdir()} == before
