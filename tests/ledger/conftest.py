"""Small ledgers whose bytes the tests may change."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from per_instance_accountant.ledger import Ledger, LedgerWriter, Phase, Run, Step, Thresholds
from per_instance_accountant.ledger.progress import Progress
from per_instance_accountant.ledger.storage import Memory
from per_instance_accountant.ledger.walk import walk_to_end


def phase(**changes: Any) -> Phase:
    settings = {
        "kind": "train",
        "sampling": "poisson",
        "sample_rate": 0.25,
        "noise_std": 1.5,
        "max_grad_norm": 1.0,
        "charging": "worst_case",
        "denominator": 4.0,
        "learning_rate": 0.1,
    }
    return Phase(**(settings | changes))


def step(*positions: int, contribution: float = 0.5) -> Step:
    return Step(
        positions=np.array(positions, np.int64),
        contributions=np.full(len(positions), contribution, np.float32),
    )


def thresholds(values: Any, source: str = "sweep") -> Thresholds:
    return Thresholds(values=np.asarray(values, np.float32), source=source)


def source(key: bytes, log: bytes) -> Memory:
    """A ledger with exactly these bytes."""
    memory = Memory()
    memory.key = key
    memory.append(log)
    return memory


def opened(key: bytes, log: bytes) -> Ledger:
    memory = source(key, log)
    return Ledger(memory, walk_to_end(memory))


def small(num_instances: int = 40) -> SimpleNamespace:
    """Run, phase, thresholds, three steps and a mark; with the offset at which every frame ends."""
    run = Run(num_instances=num_instances, groups={"class": np.arange(num_instances) % 2})
    writer, ends = LedgerWriter.create(None, run), []
    ends.append(writer._walk.end)
    for event in (phase(), thresholds(np.ones(num_instances)), step(0, 3), step(), step(7, 2)):
        writer.append(event)
        ends.append(writer._walk.end)
    writer.close()
    ends.append(writer._walk.end)
    with writer.source.reading() as (read_at, size):
        log = read_at(size, 0)
    return SimpleNamespace(key=writer.source.key, log=log, ends=ends, ledger=writer.ledger())


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    return SimpleNamespace(
        phase=phase,
        step=step,
        thresholds=thresholds,
        source=source,
        opened=opened,
        small=small,
        progress=Progress,
    )
