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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import Figure
from benchmarks.evidence.cases import Case
from benchmarks.evidence.prediction import resolved_tolerance, spread_over
from per_instance_accountant.errors import GuaranteeError
from per_instance_accountant.evaluation import difficulty
from per_instance_accountant.evaluation.measures import StepsToOracle, rank_correlation, steps_to_oracle
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
LOOKS = (0, 1, 2, 3, 5, 7, 10, 14, 20, 28, 40, 56, 80, 112, 160)
NAMES = ("fine_tune", "gradient_ascent", "neg_grad_plus", "random_relabel", "salun", "scrub")
RATES = (2.0, 1.0, 0.3, 0.1, 0.03)
DAMAGE = 0.01
FLOOR = 0.5
"""An algorithm has a floor where more than this share of the instances reaches the oracle within two
steps."""


def methods(case: Case, rates: Mapping[str, float]) -> dict[str, Method]:
    """Learning rates in units of the training's; nothing else is tuned."""
    usual = Schedule(
        steps=LOOKS[-1],
        learning_rate=case.noisy.learning_rate,
        momentum=0.0,
        weight_decay=case.noisy.weight_decay,
        batch_size=max(1, round(case.noisy.denominator)),
    )
    at = {name: replace(usual, learning_rate=usual.learning_rate * rates[name]) for name in NAMES}
    return {
        "fine_tune": FineTune(schedule=at["fine_tune"]),
        "gradient_ascent": GradientAscent(schedule=replace(at["gradient_ascent"], weight_decay=0.0)),
        "neg_grad_plus": NegGradPlus(schedule=at["neg_grad_plus"], retain_weight=0.95),
        "random_relabel": RandomRelabel(schedule=at["random_relabel"]),
        "salun": SalUn(schedule=at["salun"], keep=0.5),
        "scrub": Scrub(schedule=at["scrub"], rounds=LOOKS[-1] // 10, retain_steps=9),
    }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """unlearned, oracle: (R, S, t) margins; shift, damage: (R,)."""

    unlearned: Reals
    oracle: Reals
    shift: Reals
    damage: Reals

    def reached(self, tolerance: float) -> StepsToOracle:
        return steps_to_oracle(self.unlearned, self.oracle, LOOKS, tolerance)

    def redrawn(self, generator: np.random.Generator, tolerance: float) -> Reals:
        """First steps again, from seeds drawn with replacement."""
        rows = generator.integers(0, self.oracle.shape[1], self.oracle.shape[1])
        again = steps_to_oracle(self.unlearned[:, rows], self.oracle[:, rows], LOOKS, tolerance)
        return again.first.astype(np.float64)


def members(case: Case, course: Course, seeds: range) -> tuple[Ensemble, Instances, Instances]:
    """R * S base models with what each forgets (with the same wrong label for every algorithm) and retains:
    all instances in their order, the last in the place of the forgotten one, so that one draw of positions
    gives the same batch for every request."""
    count, chosen = len(case.train), course.requests[:, 0]
    kept = np.tile(np.arange(count - 1), (len(chosen), 1))
    inner = np.flatnonzero(chosen < count - 1)
    kept[inner, chosen[inner]] = count - 1

    def at(positions: NDArray[np.int64]) -> Instances:
        index = torch.from_numpy(np.repeat(positions, len(seeds), axis=0))
        return Instances(inputs=case.train.inputs[index], labels=case.train.labels[index])

    forget = at(course.requests)
    classes = int(case.train.labels.max()) + 1
    turns = np.random.default_rng(7).integers(1, classes, forget.labels.shape)
    targets = (forget.labels + torch.from_numpy(turns)) % classes
    parameters = {
        name: value.repeat((len(chosen),) + (1,) * (value.ndim - 1))
        for name, value in course.base.parameters.items()
    }
    return course.base.with_parameters(parameters), replace(forget, targets=targets), at(kept)


def followed(
    method: Method, models: Ensemble, forget: Instances, retain: Instances, seeds: list[int]
) -> tuple[Reals, Ensemble]:
    """(members, t) margins at the looks, and the models at the end."""
    seen: dict[int, Reals] = {0: margins(models, forget)[:, 0]}

    def watch(step: int, now: Ensemble) -> None:
        if step in LOOKS:
            seen[step] = margins(now, forget)[:, 0]

    done = unlearn_ensemble(method, models, forget, retain, seeds=seeds, watch=watch).models
    final = margins(done, forget)[:, 0]
    return np.stack([seen.get(step, final) for step in LOOKS], 1), done


def outcome(case: Case, course: Course, method: Method, seeds: range) -> Outcome:
    """One algorithm beside its reference: the retrained models, fine-tuned at the same rate on the
    same draws, so that what the batches do cancels. Gradient ascent sees no other instance: its reference
    stays where it is. The ascents of SCRUB draw nothing, so its batches are shifted against those of
    its reference."""
    models, forget, retain = members(case, course, seeds)
    draws = [1_000 + seed for seed in seeds] * len(course.requests)
    unlearned, done = followed(method, models, forget, retain, draws)
    retrained = course.kept[1][0]
    if isinstance(method, GradientAscent):
        oracle = np.repeat(margins(retrained, forget)[:, :1], len(LOOKS), axis=1)
    else:
        oracle, _ = followed(FineTune(schedule=method.schedule), retrained, forget, retain, draws)
    shape = (len(course.requests), len(seeds))
    moved = [
        (done.parameters[name] - value).flatten(1).square().sum(1)
        for name, value in models.parameters.items()
    ]
    before = accuracies(models, spread(case.test, models.size))
    after = accuracies(done, spread(case.test, models.size))
    return Outcome(
        unlearned=unlearned.reshape(*shape, -1),
        oracle=oracle.reshape(*shape, -1),
        shift=torch.stack(moved).sum(0).sqrt().double().numpy().reshape(shape).mean(1),
        damage=(before - after).reshape(shape).mean(1),
    )


def started(case: Case, chosen: NDArray[np.int64], seeds: range) -> Course:
    requests = chosen[:, None].tolist()
    return unlearning_course(case.start(seeds), case.train, requests, case.silent, seeds=seeds, at=[0])


def tuned(
    case: Case, chosen: NDArray[np.int64], seeds: range, grid: Sequence[float] = RATES
) -> dict[str, float]:
    """The same rule for every algorithm: of the ``grid`` the rate with the smallest mean distance of margins
    from the reference, over all looks, among those that cost at most ``DAMAGE`` of test accuracy and do not
    diverge; the smallest rate if there is none. On instances and seeds that are not compared."""
    course = started(case, chosen, seeds)
    best = dict.fromkeys(NAMES, (np.inf, min(grid)))
    for rate in grid:
        for name, method in methods(case, dict.fromkeys(NAMES, rate)).items():
            try:
                found = outcome(case, course, method, seeds)
            except GuaranteeError:
                continue
            apart = float(np.abs((found.unlearned - found.oracle).mean(1)).mean())
            if found.damage.mean() <= DAMAGE and apart < best[name][0]:
                best[name] = (apart, rate)
    return {name: rate for name, (_, rate) in best.items()}


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
    case: Case, losses: Reals, rates: Mapping[str, float], probes: int, seeds: range, hardest: bool
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """All algorithms on one data set: cross-algorithm agreement, factors, floors. hardest: probes from
    the hardest fifth of the loss only, since most others start within the tolerance and agree by
    ties."""
    order = np.argsort(losses, kind="stable")
    eligible = order[-len(order) // 5 :] if hardest else order
    prefix = f"{case.name}_{'hardest' if hardest else 'all'}"
    course = started(case, eligible[spread_over(losses[eligible], probes)], seeds)
    found = {name: outcome(case, course, method, seeds) for name, method in methods(case, rates).items()}
    tolerance = resolved_tolerance(found["fine_tune"].unlearned, found["fine_tune"].oracle)
    reached = {name: one.reached(tolerance) for name, one in found.items()}
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
            rho = rank_correlation(
                steps[name],
                steps[other],
                redraw=lambda generator, one=found[other]: one.redrawn(generator, tolerance),
                redraw_first=lambda generator, one=found[name]: one.redrawn(generator, tolerance),
                draws=300,
            )
            free = max(floors[name], floors[other]) <= FLOOR
            key = f"{prefix}_agreement_{name}_{other}"
            figures[key] = Figure(value=rho.value, target=0.7 if free else None, at_least=True)
            figures[f"{key}_low"] = Figure(value=rho.low)
            figures[f"{key}_high"] = Figure(value=rho.high)
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
