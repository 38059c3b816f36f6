"""CPU time and size of the page for 60,000 instances, after the fold."""

from __future__ import annotations

import time

import numpy as np

from benchmarks import Figure, arguments, report
from per_instance_accountant import audit
from per_instance_accountant.ledger import Ledger, LedgerWriter, Phase, Run, Step, Thresholds
from per_instance_accountant.report import report_html

INSTANCES = 60_000


def ledger(steps: int) -> Ledger:
    """A run with thresholds, batches of 600 and ten classes."""
    generator = np.random.default_rng(0)
    thresholds = generator.uniform(0.05, 1.0, INSTANCES).astype(np.float32)
    groups = {"label": generator.integers(0, 10, INSTANCES)}
    writer = LedgerWriter.create(None, Run(num_instances=INSTANCES, groups=groups))
    writer.append(
        Phase(
            kind="train",
            sampling="poisson",
            sample_rate=0.01,
            noise_std=1.1,
            max_grad_norm=1.0,
            charging="fixed_thresholds",
            denominator=600.0,
            learning_rate=0.1,
        )
    )
    writer.append(Thresholds(values=thresholds, source="fixed"))
    for _ in range(steps):
        drawn = np.sort(generator.choice(INSTANCES, 600, replace=False))
        writer.append(Step(positions=drawn, contributions=thresholds[drawn]))
    return writer.ledger()


def main() -> None:
    """Print the figures."""
    options = arguments(__doc__)
    result = audit(ledger(300 if options.quick else 3000), tight=False)
    before = time.process_time()
    page = report_html(result, budget=4.0)
    seconds = time.process_time() - before
    figures = {
        "instances_60000_cpu_s": Figure(value=seconds, target=5.0),
        "instances_60000_kB": Figure(value=len(page.encode()) / 1000, target=400.0),
    }
    report("page", figures, options.format)


if __name__ == "__main__":
    main()
