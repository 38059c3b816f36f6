"""A ledger of 1e8 events: opening it, and asking for the largest losses and their quantiles.

``python -m benchmarks.large_ledger`` writes and audits such a ledger, 0.8 GB in a temporary directory, and
then opens it again in a process of its own; ``--quick`` a hundredth of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks import Figure, arguments, report
from per_instance_accountant import audit
from per_instance_accountant.ledger import Ledger, LedgerWriter, Phase, Run, Step

ROOT: Final = Path(__file__).resolve().parents[1]
BATCH: Final = 4096
DRAWS: Final = 64
"""Different batches; making one takes longer than recording it."""

AGAIN: Final = """
import json, os, re, sys, time
from per_instance_accountant.audit.kept import kept_audit
from per_instance_accountant.ledger import Ledger
path, figures = sys.argv[1], {}
def timed(name, call):
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    figures[name] = (time.perf_counter() - wall, time.process_time() - cpu)
    return result
timed("open", lambda: Ledger.open_sealed(path))
audit = timed("audit", lambda: kept_audit(path))
top = timed("top", lambda: audit.top(100))
timed("quantiles", lambda: audit.quantiles())
descriptor = os.open(path + "/events.log", os.O_RDONLY)
os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
timed("from the device", lambda: Ledger.open_sealed(path))
figures["memory"] = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
print(json.dumps([figures, top]))
"""


def write(path: Path, steps: int, instances: int) -> None:
    """A run whose losses depend on every event."""
    chance = np.random.default_rng(0)
    draws = [np.sort(chance.choice(instances, BATCH, replace=False)) for _ in range(DRAWS)]
    norms = [chance.random(BATCH).astype(np.float32) for _ in range(DRAWS)]
    with LedgerWriter.create(path, Run(num_instances=instances)) as writer:
        writer.append(
            Phase(
                kind="train",
                sampling="poisson",
                sample_rate=BATCH / instances,
                noise_std=4.0,
                max_grad_norm=1.0,
                charging="unamplified",
                denominator=float(BATCH),
                learning_rate=0.1,
            )
        )
        for step in range(steps):
            norm = norms[(step + step // DRAWS) % DRAWS]
            writer.append(Step(positions=draws[step % DRAWS], contributions=norm))


def large_ledger(quick: bool) -> dict[str, Figure]:
    """Seconds and memory of a new process that looks at the ledger again."""
    steps, instances = (244, 20_000) if quick else (24_415, 1_000_000)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        write(path, steps, instances)
        size = (path / "events.log").stat().st_size
        began = time.process_time()
        ledger = Ledger.open(path)
        full = time.process_time() - began
        began = time.process_time()
        result = audit(ledger, 1e-5)
        fold = time.process_time() - began
        result.keep()
        done = subprocess.run(
            [sys.executable, "-c", AGAIN, str(path)], capture_output=True, text=True, check=True, cwd=ROOT
        )
    figures, top = json.loads(done.stdout)
    name = f"ledger of {steps * BATCH:.3g} events ({size / 1e6:.0f} MB)"
    return {
        f"{name}: open by its seal, s (CPU)": Figure(value=figures["open"][1], target=1.0),
        "the same, s (wall)": Figure(value=figures["open"][0]),
        "the same from the device, s (wall)": Figure(value=figures["from the device"][0]),
        f"kept audit of {instances} instances, opening included, s (CPU)": Figure(
            value=figures["audit"][1], target=1.0
        ),
        "largest 100 losses, s (CPU)": Figure(value=figures["top"][1], target=1.0),
        "six quantiles, s (CPU)": Figure(value=figures["quantiles"][1], target=1.0),
        "largest 100 losses that differ from those of the full audit": Figure(
            value=sum(a != b for a, b in zip(top, result.top(100), strict=True)), target=0
        ),
        "memory of that process, MB": Figure(value=figures["memory"], target=2000),
        "opening with full verification, s (CPU)": Figure(value=full),
        "audit from the events, s (CPU)": Figure(value=fold),
    }


if __name__ == "__main__":
    options = arguments(__doc__)
    report("large_ledger", large_ledger(options.quick), options.format)
