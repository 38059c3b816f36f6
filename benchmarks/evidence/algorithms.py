"""Six ways to forget the same instances, against the same retrained models.

Difficulty is the cost to reach the oracle: the first look that shows no difference between the margin of the
instance and the retrained model's, or before which it crossed it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.evidence.cases import Case
from per_instance_accountant.errors import GuaranteeError
from per_instance_accountant.evaluation.measures import StepsToOracle, steps_to_oracle
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
LOOKS = tuple(np.unique(np.geomspace(1, 321, 34).astype(int) - 1).tolist())
NAMES = ("fine_tune", "gradient_ascent", "neg_grad_plus", "random_relabel", "salun", "scrub")
RATES = (2.0, 1.0, 0.3, 0.1, 0.03, 0.01)
DAMAGE = 0.01


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

    def reached(self, tolerance: float, seeds: slice | NDArray[np.int64] = slice(None)) -> StepsToOracle:
        """Steps to the oracle, from some of the seeds."""
        return steps_to_oracle(self.unlearned[:, seeds], self.oracle[:, seeds], LOOKS, tolerance)


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


def outcome(
    case: Case, course: Course, method: Method, seeds: range, references: dict[Schedule, Reals]
) -> Outcome:
    """One algorithm beside its reference: the retrained models, fine-tuned at the same rate on the
    same draws, so that what the batches do cancels. Gradient ascent sees no other instance: its reference
    stays where it is. The ascents of SCRUB draw nothing, so its batches are shifted against those of
    its reference. references: what is known of this course already, added to."""
    models, forget, retain = members(case, course, seeds)
    draws = [1_000 + seed for seed in seeds] * len(course.requests)
    unlearned, done = followed(method, models, forget, retain, draws)
    retrained = course.kept[1][0]
    if isinstance(method, GradientAscent):
        oracle = np.repeat(margins(retrained, forget)[:, :1], len(LOOKS), axis=1)
    else:
        if method.schedule not in references:
            tuning = FineTune(schedule=method.schedule)
            references[method.schedule] = followed(tuning, retrained, forget, retain, draws)[0]
        oracle = references[method.schedule]
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
    references: dict[Schedule, Reals] = {}
    for rate in grid:
        for name, method in methods(case, dict.fromkeys(NAMES, rate)).items():
            try:
                found = outcome(case, course, method, seeds, references)
            except GuaranteeError:
                continue
            apart = float(np.abs((found.unlearned - found.oracle).mean(1)).mean())
            if found.damage.mean() <= DAMAGE and apart < best[name][0]:
                best[name] = (apart, rate)
    return {name: rate for name, (_, rate) in best.items()}
