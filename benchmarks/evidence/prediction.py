"""Does the privacy loss predict the steps that forgetting takes? One instance at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from benchmarks import Figure
from benchmarks.evidence.cases import Case
from benchmarks.evidence.losses import hypothetical_losses
from per_instance_accountant.evaluation import Difficulty, Training, difficulty, memorisation
from per_instance_accountant.evaluation.measures import (
    Interval,
    StepsToOracle,
    rank_correlation,
    steps_to_oracle,
)
from per_instance_accountant.evaluation.measures.intervals import FEWEST_SEEDS, spearman
from per_instance_accountant.evaluation.oracle import Course, PairedTraining, unlearning_course
from per_instance_accountant.evaluation.oracle.course import spread
from per_instance_accountant.evaluation.outcomes import margins, outputs
from per_instance_accountant.evaluation.scores import gradient_norms

Reals = NDArray[np.float64]
LOOKS = (0, 1, 2, 3, 5, 7, 10, 14, 20, 28, 40, 56, 80, 112, 160, 224, 320, 450, 600, 850, 1200)
CONTRACTIONS = 3
"""Horizon: weight decay alone divides any difference by exp(3) = 20."""
OF_SCATTER = 0.1
"""Tolerance, in standard deviations of the oracle over seeds: an attacker who knows both distributions has an
AUC of 0.53."""
TOLERANCES = (0.02, 0.05, 0.1, 0.25)
CHECKPOINTS = 21


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probed:
    """Probes of one data set under one setting. recorded: (runs, R) predictors; course: what was measured."""

    name: str
    probes: NDArray[np.int64]
    recorded: Reals
    course: Course
    steps: StepsToOracle

    @property
    def losses(self) -> Reals:
        """(R,) means over the recorded runs."""
        mean: Reals = self.recorded.mean(0)
        return mean

    def redraw_losses(self, generator: np.random.Generator) -> Reals:
        """Mean losses again, from recorded runs drawn with replacement."""
        rows = generator.integers(0, len(self.recorded), len(self.recorded))
        mean: Reals = self.recorded[rows].mean(0)
        return mean

    def predicted(self, chosen: NDArray[np.bool_] | None = None, draws: int = 400) -> Interval:
        """Correlation of loss and steps; the interval covers instances, recorded runs and seeds. chosen: (R,)
        those to look at."""
        rows = np.ones(len(self.probes), dtype=bool) if chosen is None else chosen
        return rank_correlation(
            self.losses[rows],
            self.steps.settled[rows],
            redraw=lambda generator: self.redraw(generator)[rows],
            redraw_first=lambda generator: self.redraw_losses(generator)[rows],
            draws=draws,
        )

    def redraw(self, generator: np.random.Generator) -> Reals:
        """Steps again, from seeds drawn with replacement."""
        count = self.course.unlearned.shape[1]
        rows = generator.integers(0, count, count)
        again = steps_to_oracle(
            self.course.unlearned[:, rows], self.course.oracle[:, rows], self.course.at, self.steps.tolerance
        )
        return again.settled.astype(np.float64)

    def correlation(self, scores: Reals, draws: int = 400) -> Interval:
        return rank_correlation(scores, self.steps.settled, redraw=self.redraw, draws=draws)


def spread_over(losses: Reals, count: int) -> NDArray[np.int64]:
    """Every k-th instance in the order of the loss: a systematic sample of all instances."""
    order = np.argsort(losses, kind="stable")
    picked: NDArray[np.int64] = order[np.unique(np.linspace(0, len(order) - 1, count).astype(int))]
    return picked


def looks_of(training: Training) -> tuple[int, ...]:
    """Looks up to ``CONTRACTIONS`` times the steps in which weight decay contracts by e; all without it."""
    rate = training.learning_rate * training.weight_decay
    return tuple(look for look in LOOKS if look * rate <= CONTRACTIONS * (1 + 1e-9))


def probe(
    case: Case,
    name: str,
    recorded: Reals,
    training: Training,
    fine_tuning: Training | None,
    *,
    probes: NDArray[np.int64],
    seeds: range,
    device: str = "cpu",
) -> Probed:
    """Forget every probe alone and count the steps until it looks as if it had never been there."""
    course = unlearning_course(
        case.start(seeds),
        case.train,
        probes[:, None].tolist(),
        training,
        seeds=seeds,
        at=looks_of(training),
        fine_tuning=fine_tuning,
        test=case.test,
        device=device,
    )
    steps = steps_to_oracle(course.unlearned, course.oracle, course.at, tolerance_of(course.oracle))
    return Probed(name=name, probes=probes, recorded=recorded[:, probes], course=course, steps=steps)


def tolerance_of(oracle: Reals) -> float:
    """``OF_SCATTER`` times the standard deviation of an instance's margin over the retrained models of other
    seeds, at the last look: median over instances. Margins (R, S, t, ...). It looks at the reference
    alone, and is the same for an instance and for a group."""
    return OF_SCATTER * float(np.median(oracle[:, :, -1].std(1, ddof=1)))


def false_steps(oracle: Reals, at: NDArray[np.int64], tolerance: float, draws: int = 50) -> float:
    """The null: share of requests that get a step where there is nothing to forget. The retrained models of
    one random half of the seeds stand for the unlearned, those of the other half for the reference."""
    generator = np.random.default_rng(6)
    half = oracle.shape[1] // 2
    counted = []
    for _ in range(draws):
        order = generator.permutation(oracle.shape[1])
        sides = oracle[:, order[:half]], oracle[:, order[half : 2 * half]]
        counted.append((steps_to_oracle(*sides, at, tolerance).settled > 0).mean())
    return float(np.mean(counted))


def halves_agree(
    unlearned: Reals, oracle: Reals, at: NDArray[np.int64], tolerance: float, draws: int = 20
) -> float:
    """Reliability: mean rank correlation of the steps by one random half of the seeds with those by the other
    half; NaN on a floor."""
    generator = np.random.default_rng(7)
    count = oracle.shape[1]
    agreed = []
    for _ in range(draws):
        order = generator.permutation(count)
        mine, theirs = (
            steps_to_oracle(unlearned[:, rows], oracle[:, rows], at, tolerance).settled.astype(np.float64)
            for rows in (order[: count // 2], order[count // 2 :])
        )
        agreed.append(spearman(mine, theirs))
    return float(np.mean(agreed))


def fifths(values: Reals) -> list[NDArray[np.int64]]:
    """Positions by fifth of the values."""
    return [part.astype(np.int64) for part in np.array_split(np.argsort(values, kind="stable"), 5)]


def attainable(steps: NDArray[np.int64]) -> float:
    """Rank correlation with the steps of a score that orders them without a fault but does not know the ties:
    the square root of ``1 - sum (t^3 - t) / (n^3 - n)`` over ties of t instances.

    >>> round(attainable(np.array([0, 0, 0, 0, 7])), 4)
    0.7071
    """
    ties = np.unique(steps, return_counts=True)[1].astype(np.float64)
    return float(np.sqrt(1 - (ties**3 - ties).sum() / (steps.size**3 - steps.size)))


def figures_of(found: Probed, target: bool) -> dict[str, Figure]:
    """The correlation with its interval, tolerances beside it, steps by fifth of the loss, floors."""
    key, course, tolerance = found.name, found.course, found.steps.tolerance
    figures = {f"{key}_tolerance": Figure(value=tolerance)}
    if course.oracle.shape[1] >= 2 * FEWEST_SEEDS:
        null = false_steps(course.oracle, course.at, tolerance)
        figures[f"{key}_null_share_with_steps"] = Figure(value=null, target=0.05 if target else None)
    if np.unique(found.steps.settled).size < 3:
        return figures | {f"{key}_floor": Figure(value=1.0)}
    if course.oracle.shape[1] >= 2 * FEWEST_SEEDS:
        agreed = halves_agree(course.unlearned, course.oracle, course.at, tolerance)
        figures[f"{key}_halves_of_seeds_agree"] = Figure(value=agreed)
    main = found.predicted()
    figures[f"{key}_rho_loss_steps"] = Figure(value=main.value, target=0.7 if target else None, at_least=True)
    figures[f"{key}_rho_loss_steps_low"] = Figure(
        value=main.low, target=0.5 if target else None, at_least=True
    )
    figures[f"{key}_rho_loss_steps_high"] = Figure(value=main.high)
    figures[f"{key}_rho_attainable"] = Figure(value=attainable(found.steps.settled))
    free = found.steps.settled > 0
    figures[f"{key}_at_once"] = Figure(value=found.steps.at_once)
    figures[f"{key}_never"] = Figure(value=found.steps.never)
    if free.sum() >= 10 and np.unique(found.steps.settled[free]).size > 2:
        above = found.predicted(free)
        figures[f"{key}_off_floor_rho"] = Figure(value=above.value)
        figures[f"{key}_off_floor_rho_low"] = Figure(value=above.low)
        figures[f"{key}_off_floor_rho_high"] = Figure(value=above.high)
    gap = rank_correlation(found.losses, found.steps.gap[:, 0])
    figures[f"{key}_rho_loss_gap_before"] = Figure(value=gap.value)
    figures[f"{key}_rho_loss_gap_before_low"] = Figure(value=gap.low)
    for other_tolerance in TOLERANCES:
        other = steps_to_oracle(course.unlearned, course.oracle, course.at, other_tolerance)
        tag = f"{key}_tolerance_{other_tolerance:g}"
        if np.unique(other.settled).size > 2:
            rho = replace(found, steps=other).predicted(draws=200)
            figures |= {f"{tag}_rho": Figure(value=rho.value), f"{tag}_rho_low": Figure(value=rho.low)}
        figures[f"{tag}_at_once"] = Figure(value=other.at_once)
        figures[f"{tag}_never"] = Figure(value=other.never)
    for number, part in enumerate(fifths(found.losses), 1):
        figures[f"{key}_steps_fifth_{number}"] = Figure(value=float(found.steps.settled[part].mean()))
        figures[f"{key}_gap_fifth_{number}"] = Figure(value=float(found.steps.gap[part, 0].mean()))
    figures[f"{key}_over_unlearned_share"] = Figure(value=float(found.steps.over.mean()))
    return figures


def scored(case: Case, training: Training, seeds: range, subsets: int) -> tuple[Difficulty, Reals]:
    """Difficulty scores of every training instance, with memorisation and the margin gap of random
    subsets, and the hypothetical loss of the run if it had the case's noise (seeds, N)."""
    course = case.trained(training, seeds, CHECKPOINTS)
    found = difficulty(course, case.train)
    norms = np.stack([gradient_norms(models, case.train) for models in course[:-1]])
    every = training.steps // (CHECKPOINTS - 1)
    losses = hypothetical_losses(norms, training, case.noisy.noise_std, every)
    scores = dict(found.scores)
    if subsets:
        scores |= memorised(case, training, subsets)
    return Difficulty(scores=scores), losses


def memorised(case: Case, training: Training, subsets: int) -> dict[str, Reals]:
    """Memorisation from models trained on 70 % of the instances each, two seeds for every subset."""
    seeds = range(500, 502)
    count = len(case.train)
    inside = np.random.default_rng(5).random((subsets // len(seeds), count)) < 0.7
    without = [np.flatnonzero(~row).tolist() for row in inside]
    run = PairedTraining(case.start(seeds), case.train, training, seeds=seeds, without=without)
    run.advance(training.steps)
    everywhere = spread(case.train, run.models.size)
    right = (outputs(run.models, everywhere).argmax(-1) == everywhere.labels).double().numpy()
    member = np.repeat(inside, len(seeds), axis=0)
    gaps = memorisation(margins(run.models, everywhere), member).value
    found = memorisation(right, member)
    return {"memorisation": found.value, "inconsistency": -found.consistency, "subset_margin_gap": gaps}


def hardest_found(scores: Reals, steps: Reals) -> float:
    """Share of the hardest fifth by measured steps that the fifth with the largest score contains, ties
    in steps counted by chance."""
    size = max(1, len(steps) // 5)
    picked = np.argsort(-scores, kind="stable")[:size]
    limit = np.sort(steps)[-size]
    sure, tied = steps > limit, steps == limit
    share = (size - sure.sum()) / tied.sum()
    return float((sure[picked].sum() + share * tied[picked].sum()) / size)


def against_scores(
    found: Probed, losses: Reals, scores: Difficulty, draws: int
) -> tuple[dict[str, Figure], dict[str, dict[str, float]]]:
    """Every score's correlation with the measured steps and with the loss; how much of the hardest
    fifth it finds, against what the loss finds (difference with a bootstrap interval over
    instances)."""
    table: dict[str, dict[str, float]] = {}
    steps = found.steps.settled.astype(np.float64)
    everything = {"privacy_loss": losses} | scores.scores
    generator = np.random.default_rng(3)
    rows = generator.integers(0, len(steps), (draws, len(steps)))
    own = found.losses
    if np.unique(steps).size < 3:
        return {}, table
    for name, values in everything.items():
        mine = values[found.probes]
        if np.unique(mine).size < 3:
            continue
        steps_rho, loss_rho = found.correlation(mine, draws), rank_correlation(losses, values, draws=draws)
        gains = [hardest_found(own[row], steps[row]) - hardest_found(mine[row], steps[row]) for row in rows]
        low, high = np.quantile(gains, [0.025, 0.975])
        table[name] = {
            "rho_steps": steps_rho.value,
            "rho_steps_low": steps_rho.low,
            "rho_steps_high": steps_rho.high,
            "rho_loss": loss_rho.value,
            "rho_loss_low": loss_rho.low,
            "rho_loss_high": loss_rho.high,
            "hardest_found": hardest_found(mine, steps),
            "loss_finds_more_low": float(low),
            "loss_finds_more_high": float(high),
        }
    better = [n for n, row in table.items() if n != "privacy_loss" and row["loss_finds_more_low"] > 0]
    worse = [n for n, row in table.items() if n != "privacy_loss" and row["loss_finds_more_high"] < 0]
    key = found.name
    figures = {
        f"{key}_proxies_that_find_fewer_of_the_hardest": Figure(value=float(len(better))),
        f"{key}_proxies_that_find_more_of_the_hardest": Figure(value=float(len(worse))),
        f"{key}_hardest_fifth_found_by_loss": Figure(value=hardest_found(own, steps)),
    }
    return figures, table
