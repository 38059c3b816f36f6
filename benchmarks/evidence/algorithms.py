"""Six ways to forget the same instances, against the same retrained models: is difficulty the
instance's own?

Difficulty is the cost to reach the oracle: the first look at which the margin of the instance is within
the tolerance of the retrained model's, or has crossed it. Candidate factors, our definitions: expansion
(of ``scores.expansion``), membership (margin before minus the oracle's, in oracle standard deviations:
what an attacker with shadow models sees), confidence and boundary distance (signs turned), privacy loss
(ledger); and after unlearning, per algorithm, parameter shift, loss of test accuracy, and the steps of
fine-tuning.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import Figure
from benchmarks.evidence.cases import Case
from benchmarks.evidence.losses import ledger_losses
from benchmarks.evidence.prediction import resolved_tolerance, spread_over
from per_instance_accountant.evaluation import difficulty
from per_instance_accountant.evaluation.measures import rank_correlation, steps_to_oracle
from per_instance_accountant.evaluation.oracle import Course, unlearning_course
from per_instance_accountant.evaluation.oracle.course import spread
from per_instance_accountant.evaluation.outcomes import accuracies, margins
from per_instance_accountant.finetuning.methods import (
    Ensemble,
    FineTune,
    GradientAscent,
    Instances,
    Method,
    NegGradPlus,
    RandomRelabel,
    SalUn,
    Schedule,
    Scrub,
    unlearn_ensemble,
)

Reals = NDArray[np.float64]
LOOKS = (0, 1, 2, 3, 5, 7, 10, 14, 20, 28, 40, 56, 80)
FLOOR = 0.5
"""An algorithm has a floor where more than this share of the instances reaches the oracle within two
steps."""


def methods(case: Case) -> dict[str, Method]:
    """One setting each, not tuned per data set."""
    usual = Schedule(
        steps=LOOKS[-1],
        learning_rate=case.noisy.learning_rate,
        momentum=0.0,
        weight_decay=case.noisy.weight_decay,
        batch_size=max(1, round(case.noisy.denominator)),
    )
    gentle = replace(usual, learning_rate=usual.learning_rate / 10)
    return {
        "fine_tune": FineTune(schedule=usual),
        "gradient_ascent": GradientAscent(schedule=replace(gentle, weight_decay=0.0)),
        "neg_grad_plus": NegGradPlus(schedule=usual, retain_weight=0.95),
        "random_relabel": RandomRelabel(schedule=gentle),
        "salun": SalUn(schedule=gentle, keep=0.5),
        "scrub": Scrub(schedule=gentle, rounds=8, retain_steps=9),
    }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """unlearned: (R, S, t) margins; shift, damage: (R,)."""

    unlearned: Reals
    shift: Reals
    damage: Reals


def members(case: Case, course: Course, seeds: int) -> tuple[Ensemble, Instances, Instances]:
    """R * S base models with what each forgets and retains."""
    count = len(case.train)
    rows = np.repeat(course.requests, seeds, axis=0)
    kept = np.stack([np.setdiff1d(np.arange(count), row) for row in rows])

    def at(positions: NDArray[np.int64]) -> Instances:
        index = torch.from_numpy(positions)
        return Instances(inputs=case.train.inputs[index], labels=case.train.labels[index])

    repeats = len(course.requests)
    parameters = {
        name: value.repeat((repeats,) + (1,) * (value.ndim - 1))
        for name, value in course.base.parameters.items()
    }
    return course.base.with_parameters(parameters), at(rows), at(kept)


def outcome(case: Case, course: Course, method: Method, seeds: int) -> Outcome:
    models, forget, retain = members(case, course, seeds)
    seen: dict[int, Reals] = {}

    def watch(step: int, now: Ensemble) -> None:
        if step in LOOKS:
            seen[step] = margins(now, forget)[:, 0]

    done = unlearn_ensemble(
        method, models, forget, retain, seeds=list(range(models.size)), watch=watch
    ).models
    final = margins(done, forget)[:, 0]
    shape = (len(course.requests), seeds)
    unlearned = np.stack([seen.get(step, final).reshape(shape) for step in LOOKS], 2)
    moved = [
        (done.parameters[name] - value).flatten(1).square().sum(1)
        for name, value in models.parameters.items()
    ]
    before = accuracies(models, spread(case.test, models.size))
    after = accuracies(done, spread(case.test, models.size))
    return Outcome(
        unlearned=unlearned,
        shift=torch.stack(moved).sum(0).sqrt().double().numpy().reshape(shape).mean(1),
        damage=(before - after).reshape(shape).mean(1),
    )


def factors(case: Case, course: Course, seeds: range, losses: Reals) -> dict[str, Reals]:
    """(R,) values from the original model, larger said to be harder."""
    rows = course.requests[:, 0]
    scores = difficulty(case.trained(case.silent, seeds, 9), case.train).scores
    oracle = course.oracle[:, :, 0, 0]
    apart = course.unlearned[:, :, 0, 0].mean(1) - oracle.mean(1)
    return {
        "privacy_loss": losses[rows],
        "expansion": scores["expansion"][rows],
        "membership": apart / np.maximum(oracle.std(1, ddof=1), 1e-6),
        "confidence": scores["mean_confidence"][rows],
        "boundary": scores["boundary"][rows],
    }


def compared(
    case: Case, probes: int, seeds: range, hardest: bool
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """All algorithms on one data set: cross-algorithm agreement, factors, floors. hardest: probes from
    the hardest fifth of the loss only, since most others start within the tolerance and agree by
    ties."""
    losses = ledger_losses(case, case.noisy, range(1))[0][0]
    eligible = np.argsort(losses, kind="stable")[-len(losses) // 5 :] if hardest else np.arange(len(losses))
    chosen = eligible[spread_over(losses[eligible], probes)]
    prefix = f"{case.name}_{'hardest' if hardest else 'all'}"
    course = unlearning_course(
        case.start(seeds),
        case.train,
        chosen[:, None].tolist(),
        case.silent,
        seeds=seeds,
        at=LOOKS,
    )
    found = {name: outcome(case, course, method, len(seeds)) for name, method in methods(case).items()}
    oracle = course.oracle[..., 0]
    tolerance = resolved_tolerance(found["fine_tune"].unlearned, oracle)
    reached = {
        name: steps_to_oracle(one.unlearned, oracle, course.at, tolerance) for name, one in found.items()
    }
    steps = {name: one.first.astype(np.float64) for name, one in reached.items()}
    gaps = {name: np.abs(one.gap[:, -1]) for name, one in reached.items()}
    figures = {f"{prefix}_tolerance": Figure(value=tolerance)}
    tables: dict[str, Any] = {"factors": {}, "agreement": {}, "final_gap_agreement": {}}
    floors = {name: float((one <= 2).mean()) for name, one in steps.items()}
    for name, one in steps.items():
        key = f"{prefix}_{name}"
        figures[f"{key}_within_two_steps"] = Figure(value=floors[name])
        figures[f"{key}_never"] = Figure(value=float((one > LOOKS[-1]).mean()))
        figures[f"{key}_steps_mean"] = Figure(value=float(one.mean()))
    ranked = [name for name, one in steps.items() if np.unique(one).size > 2]
    for place, name in enumerate(ranked):
        for other in ranked[place + 1 :]:
            rho = rank_correlation(steps[name], steps[other], draws=300)
            free = max(floors[name], floors[other]) <= FLOOR
            key = f"{prefix}_agreement_{name}_{other}"
            figures[key] = Figure(value=rho.value, target=0.7 if free else None, at_least=True)
            tables["agreement"][f"{name} {other}"] = [rho.value, rho.low, rho.high]
            final = rank_correlation(gaps[name], gaps[other], draws=300)
            tables["final_gap_agreement"][f"{name} {other}"] = [final.value, final.low, final.high]
    given = factors(case, course, seeds, losses)
    for name in ranked:
        after = {
            "parameter_shift": found[name].shift,
            "performance_shift": found[name].damage,
            "fine_tune_steps": steps["fine_tune"],
        }
        row: dict[str, list[float]] = {}
        for factor, values in (given | after).items():
            if np.unique(values).size > 2 and not (factor == "fine_tune_steps" and name == "fine_tune"):
                rho = rank_correlation(values, steps[name], draws=300)
                row[factor] = [rho.value, rho.low, rho.high]
        tables["factors"][name] = row
    negative = [row for row in tables["final_gap_agreement"].values() if row[2] < 0]
    figures[f"{prefix}_final_gap_pairs_that_disagree_in_sign"] = Figure(value=float(len(negative)))
    return figures, tables
