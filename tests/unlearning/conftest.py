"""Ledgers written by hand, so that every fact in them is known."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from per_instance_accountant.ledger import Ledger, LedgerWriter
from per_instance_accountant.ledger.records import Phase, Run, Step, Thresholds
from per_instance_accountant.unlearning import UnlearningPlan, issue, plan, softmax_regression

NOBODY = Step(positions=np.empty(0, np.int64), contributions=np.empty(0, np.float32))
PHASE = Phase(
    kind="train",
    sampling="poisson",
    sample_rate=0.1,
    noise_std=4.0,
    max_grad_norm=1.5,
    charging="worst_case",
    denominator=10.0,
    learning_rate=0.2,
    weight_decay=0.2,
)


class Course:
    """A run under construction. ``known``: assumptions under which all bounds apply to the default phase."""

    num_instances = 40
    nobody, phase = NOBODY, PHASE

    def __init__(self, path: Path | None = None, *, ids=None, assumptions=None) -> None:
        run = Run(num_instances=self.num_instances, ids=ids, assumptions=assumptions)
        self.writer = LedgerWriter.create(path, run)

    @property
    def known(self):
        return softmax_regression(feature_norm=1.0, num_instances=self.num_instances, denominator=10.0)

    def train(self, steps: int, **changes) -> Course:
        self.writer.append(dataclasses.replace(PHASE, **changes))
        return self.step(steps)

    def step(self, steps: int, step: Step = NOBODY) -> Course:
        for _ in range(steps):
            self.writer.append(step)
        return self

    def thresholds(self, values, source: str = "fixed") -> Course:
        self.writer.append(Thresholds(values=np.asarray(values, np.float32), source=source))
        return self

    def forget(self, positions, base=1.5) -> Course:
        values = np.broadcast_to(np.asarray(base, np.float32), self.num_instances).copy()
        values[positions] = 0
        return self.thresholds(values, "forget")

    def unlearn(self, made: UnlearningPlan, steps: int | None = None, **changes) -> Course:
        self.forget(self.ledger.positions_of(list(made.ids)))
        phase = dataclasses.asdict(made.mechanism) | {"kind": "unlearn", "plan_digest": made.digest} | changes
        return self.train(made.steps if steps is None else steps, **phase)

    @property
    def ledger(self) -> Ledger:
        return self.writer.ledger()


@pytest.fixture(scope="session")
def course():
    return Course


@pytest.fixture
def certified(tmp_path):
    """A finished unlearning on disk: (course, plan, certificate, ledger path, model file before, after)."""
    known = softmax_regression(feature_norm=1.0, num_instances=Course.num_instances, denominator=10.0)
    started = Course(tmp_path / "run", assumptions=known.to_dict()).train(120)
    made = plan(started.ledger, ids=[3, 17], target_epsilon=0.1, order=8)
    before, after = tmp_path / "before.pt", tmp_path / "after.pt"
    before.write_bytes(b"weights before")
    after.write_bytes(b"weights after")
    started.unlearn(made)
    certificate = issue(made, started.ledger, before, after)
    return started, made, certificate, tmp_path / "run", before, after
