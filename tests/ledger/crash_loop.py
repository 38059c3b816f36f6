"""Kills writers at random moments and reads what they left; prints one JSON object."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

import numpy as np

from per_instance_accountant.ledger import Ledger, LedgerWriter, Phase, Run, Step

N = 5000
PHASE = Phase(
    kind="train",
    sampling="poisson",
    sample_rate=0.1,
    noise_std=1.0,
    max_grad_norm=1.0,
    charging="worst_case",
    denominator=500.0,
    learning_rate=0.1,
)


def step_number(number: int) -> Step:
    chance = np.random.default_rng(number)
    positions = np.flatnonzero(chance.random(N) < 0.1)
    return Step(positions=positions, contributions=chance.random(positions.size, dtype=np.float32))


def write_for_ever(path: Path, acknowledge: int) -> None:
    if path.exists():
        writer = LedgerWriter.resume(path)
        writer.append(PHASE)
    else:
        writer = LedgerWriter.create(path, Run(num_instances=N), fsync="step")
        writer.append(PHASE)
    for number in count(writer.num_steps):
        writer.append(step_number(number))
        os.write(acknowledge, number.to_bytes(8, "little"))
        if number % 7 == 0:
            writer.flush()


def one_round(path: Path, delay: float) -> int:
    """Number of acknowledged steps of a writer that is killed after ``delay`` seconds."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            write_for_ever(path, write_end)
        finally:
            os._exit(1)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as acknowledged:
        first = acknowledged.read(8)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        numbers = first + acknowledged.read()
    os.waitpid(child, 0)
    return int.from_bytes(numbers[-8:], "little") + 1


def main(rounds: int, seed: int) -> None:
    chance = random.Random(seed)
    result = {"rounds": 0, "steps": 0, "lost": 0, "altered": 0, "surplus": 0}
    for _ in range(rounds // 2):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run"
            for _ in range(2):
                done = one_round(path, chance.uniform(0, 0.05))
                ledger = Ledger.open(path)
                steps = [event for event in ledger.events() if isinstance(event, Step)]
                result["rounds"] += 1
                result["steps"] += done
                result["lost"] += max(0, done - len(steps))
                result["surplus"] += max(0, len(steps) - done - 1)
                result["altered"] += sum(
                    not np.array_equal(step.positions, step_number(number).positions)
                    or not np.array_equal(step.contributions, step_number(number).contributions)
                    for number, step in enumerate(steps)
                )
    print(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
