"""Promises that the test suite holds to, counted, and individual sums against exact ones.

``python -m benchmarks.promises`` runs the tests of each promise by themselves; ``--quick`` a part of them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import mpmath as mp
import numpy as np

from benchmarks import Figure, arguments, report
from benchmarks.exact import rdp_of_step
from per_instance_accountant import account
from per_instance_accountant.ledger import LedgerWriter, Phase, Run, Step, Thresholds

ROOT: Final = Path(__file__).resolve().parents[1]
SUITES: Final = {
    "filters that stop too late": ["accounting/test_filter_law.py"],
    "noise, clipping, ghost norms and ranks, measured": [
        "testing/test_testing_components.py",
        "testing/test_testing_releases.py",
        "opacus_adapter/test_adapter_clipping.py",
    ],
    "200 of 200 audits of whole runs below the claim, and the auditor": ["testing/test_testing_audits.py"],
    "edited certificates": ["unlearning/test_certificate.py", "unlearning/test_certificate_format.py"],
    "ranks killed at any moment, merged": ["ledger/test_merge_law.py"],
    "seals of large ledgers and kept audits": ["ledger/test_ledger_sealing.py", "audit/test_kept_audit.py"],
}
"""What is promised -> its tests, below ``tests``."""
QUICK: Final = ("edited certificates", "seals of large ledgers and kept audits")
BAD_INPUTS: Final = ["bad_inputs/test_number_cases.py", "bad_inputs/test_stored_cases.py"]


def bad_inputs(quick: bool) -> dict[str, Figure]:
    """The table of bad inputs, one test for each row."""
    failed, passed = outcomes(BAD_INPUTS if quick else ["bad_inputs"])
    return {
        "bad inputs with another behaviour than promised": Figure(value=failed, target=0),
        "bad inputs with the promised behaviour": Figure(
            value=passed, target=50 if quick else 106, at_least=True
        ),
    }


def suites(quick: bool) -> dict[str, Figure]:
    """Tests of each promise that fail; a promise without a test that passed counts as one that fails."""
    figures = {}
    for name, files in SUITES.items():
        if not quick or name in QUICK:
            failed, passed = outcomes(files)
            figures[f"{name}: tests that fail, of {failed + passed}"] = Figure(
                value=max(failed, passed == 0), target=0
            )
    return figures


def outcomes(files: list[str]) -> tuple[int, int]:
    """Tests that failed and that passed."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:xdist"]
    command += [str(ROOT / "tests" / name) for name in files]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    counted = {name: int(n) for n, name in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    return counted.get("failed", 0) + counted.get("error", 0) + (done.returncode > 1), counted.get(
        "passed", 0
    )


def compositions(quick: bool) -> dict[str, Figure]:
    """Random histories of thresholds and noise, folded, against sums in 60 digits."""
    chance, below, excess, orders = np.random.default_rng(0), 0, 0.0, (2.0, 5.0, 32.0)
    count = 6 if quick else 60
    for _ in range(count):
        events, spans = history(chance)
        with LedgerWriter.create(None, Run(num_instances=3)) as writer:
            for event in events:
                writer.append(event)
        charged = account(writer.ledger(), orders=orders).rdp
        for place, order in np.ndindex(charged.shape):
            ratios = ((q, mp.mpf(float(c[place])) / mp.mpf(std), steps) for q, std, c, steps in spans)
            exact = mp.fsum(n * rdp_of_step(q, r, orders[order]) for q, r, n in ratios if r > 0)
            below += bool(charged[place, order] < exact)
            excess = max(excess, float(charged[place, order] / exact - 1))
    return {
        f"individual sums below the exact ones, of {9 * count}": Figure(value=below, target=0),
        "largest relative excess of them": Figure(value=excess),
    }


def history(chance: np.random.Generator) -> tuple[list[Any], list[tuple[float, float, Any, int]]]:
    """Facts of a run with a sweep now and then, and (rate, noise, thresholds, steps) of its spans."""
    nobody = Step(positions=np.empty(0, np.int64), contributions=np.empty(0, np.float32))
    rate, events, spans = float(chance.choice([0.01, 0.1, 0.5])), [], []
    edges = [0, *sorted(chance.integers(1, 40, size=3).tolist()), 40]
    for start, end in pairwise(edges):
        std, thresholds = float(chance.uniform(0.6, 4)), chance.uniform(0.01, 1, 3).astype(np.float32)
        events += [
            Phase(
                kind="train",
                sampling="poisson",
                sample_rate=rate,
                noise_std=std,
                max_grad_norm=1.0,
                charging="sweep",
                denominator=1.0,
                learning_rate=0.1,
            ),
            Thresholds(values=thresholds, source="sweep"),
            *[nobody] * (end - start),
        ]
        spans.append((rate, std, thresholds, end - start))
    return events, spans


def promises(quick: bool) -> dict[str, Figure]:
    """All of them."""
    return compositions(quick) | bad_inputs(quick) | suites(quick)


if __name__ == "__main__":
    options = arguments(__doc__)
    report("promises", promises(options.quick), options.format)
