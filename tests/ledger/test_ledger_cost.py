"""What a step costs in bytes and CPU time. ``pytest -s`` prints the figures."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from per_instance_accountant.ledger import Ledger, LedgerWriter, Run, Step

REPEATS, STEPS = 12, 100
TARGETS = [(64, 40e-6, 40e-6), (4096, 150e-6, 150e-6)]
LOADED = 3
"""Factor for a machine that does other work too; a Python loop over instances would still show."""


@pytest.mark.parametrize("rising", [True, False])
@pytest.mark.parametrize(("drawn", "append_limit", "open_limit"), TARGETS)
def test_cost_of_a_step(
    tmp_path: Path, make: SimpleNamespace, drawn: int, append_limit: float, open_limit: float, rising: bool
) -> None:
    chance = np.random.default_rng(0)
    steps = []
    for _ in range(STEPS):
        positions = chance.choice(60_000, drawn, replace=False)
        contributions = chance.random(drawn, dtype=np.float32)
        steps.append(Step(positions=np.sort(positions) if rising else positions, contributions=contributions))
    writer = LedgerWriter.create(tmp_path / "a", Run(num_instances=60_000))
    writer.append(make.phase())
    before = writer._walk.end
    append = []
    for _ in range(REPEATS):
        start = time.process_time()
        for step in steps:
            writer.append(step)
        append.append((time.process_time() - start) / STEPS)
    size = (writer._walk.end - before) / (REPEATS * STEPS)
    writer.close()
    replay = []
    for _ in range(3):
        start = time.process_time()
        assert Ledger.open(tmp_path / "a").num_steps == REPEATS * STEPS
        replay.append((time.process_time() - start) / (REPEATS * STEPS))
    cost = f"append {min(append):.2e} s, open {min(replay):.2e} s"
    print(f"\nB={drawn} {rising=}: {size:.0f} bytes, {cost} per step")
    assert size == 24 + 8 * drawn + 37
    assert min(append) < LOADED * append_limit
    assert min(replay) < LOADED * open_limit
