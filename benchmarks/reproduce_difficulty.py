"""Is an instance hard to forget by itself, or for an algorithm? Six algorithms on three data sets.

Difficulty is the number of steps to the retrained model, two-sided. Which pairs of algorithms agree on
the order of the instances, where there is a floor, and which factors predict it; 95 % bootstrap
intervals over instances. ``--quick`` takes wine alone; ``--data`` and ``--model`` take the user's own.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from benchmarks import Figure, report
from benchmarks.evidence.algorithms import RATES, compared, tuned
from benchmarks.evidence.cases import BUNDLED, own
from benchmarks.evidence.losses import ledger_losses
from benchmarks.evidence.writing import Plot, keep, options, write


def main() -> None:
    torch.set_num_threads(1)
    chosen = options(__doc__)
    start = time.perf_counter()
    if chosen.data:
        cases = [own(chosen.data, chosen.model, chosen.count, chosen.count, chosen.noise_std, chosen.steps)]
    else:
        cases = [BUNDLED[name]() for name in (("wine",) if chosen.quick else BUNDLED)]
    figures: dict[str, Figure] = {}
    tables: dict[str, Any] = {}
    plots: list[Plot] = []
    for case in cases:
        losses = ledger_losses(case, case.noisy, range(1 if chosen.quick else 4))[0].mean(0)
        fourth = np.argsort(losses, kind="stable")[-2 * len(losses) // 5 : -len(losses) // 5]
        some = fourth[:: max(1, len(fourth) // (4 if chosen.quick else 8))]
        rates = tuned(case, some, range(100, 103), (1.0, 0.1) if chosen.quick else RATES)
        tables[f"{case.name}_rates"] = rates
        for hardest in (False, True):
            probes, seeds = (36, range(10)) if hardest else (24, range(6))
            probes, seeds = (12, range(3)) if chosen.quick else (probes, seeds)
            found, table = compared(case, losses, rates, probes, seeds, hardest)
            name = f"{case.name}_{'hardest' if hardest else 'all'}"
            figures, tables[name] = figures | found, table
            series = {
                method: (list(range(len(row))), [value[0] for value in row.values()])
                for method, row in table["factors"].items()
            }
            keep(chosen.output, case.name, figures, tables)
            plots.append((f"{name}: factors against steps", "line", series, "factor", "rank correlation"))
    figures["wall_s"] = Figure(value=time.perf_counter() - start, target=60.0 if chosen.quick else None)
    figures["cpu_s"] = Figure(value=time.process_time(), target=900.0)
    if chosen.output:
        write(chosen.output, "reproduce_difficulty", figures, tables, plots)
    report("reproduce_difficulty", figures, chosen.format)


if __name__ == "__main__":
    main()
