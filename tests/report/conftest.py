"""An audit of a run with thresholds, two groupings and hostile names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from per_instance_accountant import audit
from per_instance_accountant.audit.budget import BudgetAudit
from per_instance_accountant.ledger import Ledger, LedgerWriter
from per_instance_accountant.ledger.records import Phase, Run, Step, Thresholds

N, STEPS = 400, 30
ASSUMPTIONS = {"smoothness": 1.0, "clipping_never_binds": True, "individual_thresholds": True}
HOSTILE = ["<script>alert(1)</script>", '"><img src=x>', "=1+1", "\u202eevil", "a" * 60]


def make_ledger(size: int = N, steps: int = STEPS, seed: int = 0, folder: Path | None = None) -> Ledger:
    generator = np.random.default_rng(seed)
    thresholds = np.sort(generator.uniform(0.02, 1.0, size)).astype(np.float32)
    # A few groups, of which the last is too small to be shown to everybody.
    label = np.array(HOSTILE)[np.minimum(np.arange(size) * 4 // size + (np.arange(size) >= size - 9), 4)]
    ids = np.array([f"person-{i:05d}" for i in range(size)])
    run = Run(num_instances=size, ids=ids, groups={"label": label, "person": ids}, assumptions=ASSUMPTIONS)
    writer = LedgerWriter.create(folder, run)
    writer.append(
        Phase(
            kind="train",
            sampling="poisson",
            sample_rate=0.1,
            noise_std=2.0,
            max_grad_norm=1.0,
            charging="fixed_thresholds",
            denominator=size / 10,
            learning_rate=0.1,
            weight_decay=0.5,
        )
    )
    writer.append(Thresholds(values=thresholds, source="fixed"))
    for _ in range(steps):
        drawn = np.flatnonzero(generator.random(size) < 0.1)
        writer.append(Step(positions=drawn, contributions=thresholds[drawn]))
    if folder is None:
        return writer.ledger()
    writer.close()
    return Ledger.open(folder)


@pytest.fixture(scope="session")
def source() -> Ledger:
    return make_ledger()


@pytest.fixture(scope="session")
def audited(source: Ledger) -> BudgetAudit:
    return audit(source, delta=1e-5)
