"""Does an instance's privacy loss predict how many steps forgetting it takes?

The losses are those of ledgers that PrivacyEngine recorded; the steps are counted against retrained
models, paired by start, batches and noise. Training and fine-tuning are Langevin dynamics (``sgld``) or
plain SGD (``sgd``); groups are trained by the first and fine-tuned by the second. Intervals are 95 %, over
instances, seeds and recorded runs. ``--quick`` takes wine alone, in small sizes; ``--data`` and ``--model``
take the user's own.
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from benchmarks import Figure, report
from benchmarks.evidence import groups, theory
from benchmarks.evidence.cases import BUNDLED, Case, images, own, with_noise
from benchmarks.evidence.losses import COARSE, ledger_losses
from benchmarks.evidence.prediction import (
    Probed,
    against_scores,
    figures_of,
    probe,
    scored,
    spread_over,
)
from benchmarks.evidence.writing import Plot, keep, options, write
from per_instance_accountant import Unamplified

ABOUT = (
    "Privacy loss: order 2, mean over recorded Langevin runs. Steps: until no difference is seen from models "
    "that were trained without the instance, and fine-tuned as long, beyond a tenth of their standard "
    "deviation; 0: none was seen before any step, twice the last look: it never vanished. Margins in nats."
)
Part = tuple[dict[str, Figure], dict[str, Any], list[Plot]]


def sizes(quick: bool) -> dict[str, int]:
    if quick:
        return {"probes": 12, "seeds": 8, "scored": 4, "ledgers": 2, "subsets": 0, "groups": 16, "draws": 50}
    return {
        "probes": 60,
        "seeds": 24,
        "scored": 10,
        "ledgers": 10,
        "subsets": 120,
        "groups": 32,
        "draws": 200,
    }


def per_instance(case: Case, chosen: Any) -> Part:
    """Everything about single instances of one data set, and its groups."""
    quick, size = chosen.quick, sizes(chosen.quick)
    seeds, scored_seeds = range(size["seeds"]), range(size["scored"])
    recorded, basis = ledger_losses(case, case.noisy, range(size["ledgers"]))
    losses = recorded.mean(0)
    probes = spread_over(losses, size["probes"])
    scores, _ = scored(case, case.noisy, scored_seeds, size["subsets"])
    figures: dict[str, Figure] = {}
    tables: dict[str, Any] = {
        "basis": basis,
        "loss_quantiles": np.quantile(losses, [0, 0.2, 0.5, 0.8, 1]).tolist(),
    }
    points: dict[str, Any] = {}
    for name, training in (("sgld", case.noisy), ("sgd", case.silent)):
        key = f"{case.name}_{name}"
        found = probe(case, key, recorded, training, None, probes=probes, seeds=seeds, device=chosen.device)
        figures |= figures_of(found, target=not quick)
        compared, tables[f"{name}_scores"] = against_scores(found, losses, scores, size["draws"])
        figures |= compared
        points[name] = (found.losses.tolist(), found.steps.settled.tolist())
        tables[name] = {
            "instances": probes.tolist(),
            "losses": found.losses.tolist(),
            "steps": found.steps.settled.tolist(),
            "gap_before": found.steps.gap[:, 0].tolist(),
            "doubt_before": found.steps.doubt[:, 0].tolist(),
        }
        if name == "sgd":
            figures |= from_silent_run(case, found, scored_seeds)
        elif not quick:
            figures |= by_other_rules(case, found)
        keep(chosen.output, case.name, figures, tables)
    plots: list[Plot] = [
        (f"{case.name}: steps to the oracle by privacy loss", "points", points, "nats, order 2", "steps")
    ]
    grouped, tables["groups"], more = by_group(case, losses, size, quick)
    return figures | grouped, tables, plots + more


def from_silent_run(case: Case, found: Probed, seeds: range) -> dict[str, Figure]:
    """The loss that the noise-free run would have had, as its own predictor."""
    if np.unique(found.steps.settled).size < 3:
        return {}
    _, hypothetical = scored(case, case.silent, seeds, 0)
    rho = found.correlation(hypothetical.mean(0)[found.probes])
    key = f"{found.name}_rho_hypothetical_loss_steps"
    return {key: Figure(value=rho.value), f"{key}_low": Figure(value=rho.low)}


def by_other_rules(case: Case, found: Probed) -> dict[str, Figure]:
    """Sensitivity to the charging rule: two runs each with a coarse sweep and without amplification."""
    figures: dict[str, Figure] = {}
    for name, rule in (("coarse", COARSE), ("unamplified", Unamplified())):
        recorded = ledger_losses(case, case.noisy, range(2), rule)[0][:, found.probes]
        rho = replace(found, recorded=recorded).predicted(draws=200)
        key = f"{found.name}_rho_{name}_loss_steps"
        figures |= {key: Figure(value=rho.value), f"{key}_low": Figure(value=rho.low)}
    return figures


def by_group(case: Case, losses: Any, size: dict[str, int], quick: bool) -> Part:
    found = groups.group_course(
        case, f"{case.name}_group", losses, case.noisy, case.silent, range(size["groups"])
    )
    figures, steps = groups.steps_figures(found, size["draws"])
    barriers, paths = groups.barrier_figures(found)
    figures |= groups.accuracy_figures(found) | barriers | groups.distance_figures(found)
    if not quick:
        figures |= groups.attack_figures(found) | groups.relearn_figures(found)
        figures |= groups.size_figures(case, f"{case.name}_group", losses, range(16), (1, 5, 25, 50))
    course = found.course
    gaps = (course.unlearned - course.oracle).mean((1, 3))
    lines = {name: (course.at.tolist(), gaps[row].tolist()) for row, name in enumerate(groups.NAMES)}
    shares = np.linspace(0, 1, 11).tolist()
    tags = ("before", "during", "after")
    key = f"{found.key}_{{}}_barrier_{{}}_above_mean"
    heights = {
        tag: (groups.NAMES, [barriers[key.format(name, tag)].value for name in groups.NAMES]) for tag in tags
    }
    along = {tag: (shares, path) for tag, path in zip(tags, paths["fifth_5"], strict=True)}
    plots: list[Plot] = [
        (f"{case.name}: margin gap to the oracle, fifths of the loss", "line", lines, "steps", "nats"),
        (f"{case.name}: loss from unlearned to oracle, hardest fifth", "line", along, "share", "nats"),
        (f"{case.name}: barrier above the mean of the ends, by group", "line", heights, "group", "nats"),
    ]
    return figures, {"steps": steps, "paths": paths}, plots


def noise_levels(case: Case, seeds: range) -> Part:
    """The same prediction at other noise levels: ledger, training and unlearning alike."""
    figures: dict[str, Figure] = {}
    for factor in (0.5, 2.0):
        setting = with_noise(case.noisy, factor * case.noisy.noise_std)
        recorded = ledger_losses(case, setting, range(4))[0]
        key = f"{case.name}_noise_{setting.noise_std:g}"
        probes = spread_over(recorded.mean(0), 30)
        found = probe(case, key, recorded, setting, None, probes=probes, seeds=seeds)
        figures |= figures_of(found, target=False)
    return figures, {}, []


def theory_part(quick: bool) -> Part:
    """Certified over measured steps, claims over lower bounds."""
    runs, noises = (100, (2.0, 8.0)) if quick else (600, (2.0, 4.0, 8.0, 16.0))
    figures, claims = theory.canary_curve(runs, noises)
    plots: list[Plot] = [
        (
            "epsilon of a canary: claim and lower bound",
            "line",
            {name: (claims["noise"], claims[name]) for name in ("claim", "bound", "null")},
            "noise std",
            "epsilon",
        )
    ]
    if quick:
        return figures, {"claims": claims}, plots
    more, curve = theory.theory_curve(8, range(10))
    pairs = {name: (curve["loss"], curve[name]) for name in ("certified", "measured")}
    plots.append(("steps to (0.5, 1e-5)-indistinguishability", "points", pairs, "nats", "steps"))
    return figures | more, {"claims": claims, "theory": curve}, plots


def run_part(name: str, chosen: Any) -> tuple[Part, float]:
    """One part in a process of its own, on one thread, with the CPU seconds it took."""
    torch.set_num_threads(1)
    begun = time.process_time()
    if name == "theory":
        part = theory_part(chosen.quick)
    elif name == "noise":
        parts = [noise_levels(BUNDLED[case](), range(12)) for case in ("wine", "digits")]
        part = (parts[0][0] | parts[1][0], {}, [])
    elif name == "images":
        part = single(images(), range(3), chosen.device)
    elif name == "own":
        case = own(chosen.data, chosen.model, chosen.count, chosen.count, chosen.noise_std, chosen.steps)
        part = per_instance(case, chosen)
    else:
        part = per_instance(BUNDLED[name](), chosen)
    keep(chosen.output, name, part[0], part[1])
    return part, time.process_time() - begun


def single(case: Case, seeds: range, device: str) -> Part:
    """Loss and steps of a few instances only: that the path runs."""
    recorded = ledger_losses(case, case.noisy, range(1))[0]
    probes = spread_over(recorded[0], 5)
    found = probe(case, case.name, recorded, case.noisy, None, probes=probes, seeds=seeds, device=device)
    gap = float(np.abs(found.steps.gap[:, 0]).max())
    return {f"{case.name}_largest_gap_before": Figure(value=gap)}, {}, []


def main() -> None:
    chosen = options(__doc__)
    start = time.perf_counter()
    names = ["own"] if chosen.data else ["wine", "theory"]
    if not chosen.quick and not chosen.data:
        names = ["digits", "diabetes", "breast_cancer", "wine", "noise", "theory", "images"]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        done = [job.result() for job in [pool.submit(run_part, name, chosen) for name in names]]
    figures: dict[str, Figure] = {}
    tables: dict[str, Any] = {}
    plots: list[Plot] = []
    for name, ((part, table, drawn), _) in zip(names, done, strict=True):
        figures, plots = figures | part, plots + drawn
        tables[name] = table
    figures |= {f"{name}_cpu_s": Figure(value=cpu) for name, (_, cpu) in zip(names, done, strict=True)}
    figures["cpu_s"] = Figure(value=sum(cpu for _, cpu in done), target=None if chosen.quick else 1500.0)
    figures["wall_s"] = Figure(value=time.perf_counter() - start, target=60.0 if chosen.quick else None)
    if chosen.output:
        write(chosen.output, "reproduce_per_instance", ABOUT, figures, tables, plots)
    report("reproduce_per_instance", figures, chosen.format)


if __name__ == "__main__":
    main()
