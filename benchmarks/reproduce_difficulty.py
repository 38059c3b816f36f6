"""Is an instance hard to forget by itself, or for an algorithm? Six algorithms on four data sets.

Difficulty is the number of steps to the retrained model, two-sided. Which pairs of algorithms agree on
the order of the instances, where there is a floor, how far the measurement agrees with itself, and which
factors predict the order; 95 % bootstrap intervals over instances and seeds. ``--quick`` takes wine
alone; ``--data`` and ``--model`` take the user's own.
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from benchmarks import Figure, report
from benchmarks.evidence.agreement import FACTORS, compared
from benchmarks.evidence.algorithms import NAMES, RATES, tuned
from benchmarks.evidence.cases import BUNDLED, own
from benchmarks.evidence.losses import ledger_losses
from benchmarks.evidence.writing import Plot, keep, options, write

ABOUT = (
    "Steps until the margin of an instance shows no difference from models that were trained without it, or "
    "crosses theirs. On the floor: instances of which no difference is seen before any step; every algorithm "
    "agrees about them. The diagonal is one algorithm on two halves of the seeds: no agreement can be more."
)


def pictures(name: str, table: dict[str, Any]) -> list[Plot]:
    """Agreement of every pair (on the diagonal: of an algorithm with itself, on other seeds), and factors."""
    pairs = {pair: row and row[0] for pair, row in table["agreement"].items()}
    pairs |= {pair: value for pair, value in table["halves"].items() if pair not in pairs}

    def at(first: str, second: str) -> float | None:
        return pairs.get(f"{first} {second}", pairs.get(f"{second} {first}"))

    agreed = {one: (NAMES, [at(one, other) for other in NAMES]) for one in NAMES}
    ranked = {
        method: (list(FACTORS), [row.get(factor) and row[factor][0] for factor in FACTORS])
        for method, row in table["factors"]["traced"].items()
    }
    return [
        (f"{name}: rank correlation of steps, instances off the floor", "matrix", agreed, "", ""),
        (f"{name}: factors against steps, instances off the floor", "matrix", ranked, "", ""),
    ]


def run_case(name: str, chosen: Any) -> tuple[dict[str, Figure], dict[str, Any], float]:
    """One data set in a process of its own, on one thread, with the CPU seconds it took."""
    torch.set_num_threads(1)
    begun = time.process_time()
    if name == "own":
        case = own(chosen.data, chosen.model, chosen.count, chosen.count, chosen.noise_std, chosen.steps)
    else:
        case = BUNDLED[name]()
    losses = ledger_losses(case, case.noisy, range(1 if chosen.quick else 10))[0].mean(0)
    fourth = np.argsort(losses, kind="stable")[-2 * len(losses) // 5 : -len(losses) // 5]
    some = fourth[:: max(1, len(fourth) // (4 if chosen.quick else 8))]
    rates = tuned(case, some, range(100, 103), (1.0, 0.1) if chosen.quick else RATES)
    probes, seeds, draws = (24, range(8), 100) if chosen.quick else (60, range(24), 300)
    figures, table = compared(case, losses, rates, probes, seeds, draws)
    table["rates"] = rates
    keep(chosen.output, name, figures, table)
    return figures, table, time.process_time() - begun


def main() -> None:
    chosen = options(__doc__)
    start = time.perf_counter()
    names = ["own"] if chosen.data else ["wine"] if chosen.quick else list(BUNDLED)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        done = [job.result() for job in [pool.submit(run_case, name, chosen) for name in names]]
    figures: dict[str, Figure] = {}
    tables = {name: table for name, (_, table, _) in zip(names, done, strict=True)}
    for found, _, _ in done:
        figures |= found
    plots = [plot for name in names for plot in pictures(name, tables[name])]
    figures |= {f"{name}_cpu_s": Figure(value=cpu) for name, (*_, cpu) in zip(names, done, strict=True)}
    figures["cpu_s"] = Figure(value=sum(cpu for *_, cpu in done), target=None if chosen.quick else 1500.0)
    figures["wall_s"] = Figure(value=time.perf_counter() - start, target=60.0 if chosen.quick else None)
    if chosen.output:
        write(chosen.output, "reproduce_difficulty", ABOUT, figures, tables, plots)
    report("reproduce_difficulty", figures, chosen.format)


if __name__ == "__main__":
    main()
