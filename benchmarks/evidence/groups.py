"""Fifths of the privacy loss, forgotten as groups: accuracy, margins, barriers, attacks, distances,
relearning."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import Figure
from benchmarks.evidence.cases import Case
from benchmarks.evidence.prediction import TOLERANCES, false_steps, fifths, looks_of, tolerance_of
from per_instance_accountant.evaluation import Training, loss_barrier
from per_instance_accountant.evaluation.measures import (
    Interval,
    gaussian_renyi,
    klom,
    mean_interval,
    relearn_steps,
    simple_attacks,
    steps_to_oracle,
    u_lira,
    variational_renyi,
)
from per_instance_accountant.evaluation.oracle import Course, unlearning_course
from per_instance_accountant.evaluation.oracle.course import spread
from per_instance_accountant.evaluation.oracle.training import part
from per_instance_accountant.evaluation.outcomes import mean_loss
from per_instance_accountant.finetuning.methods import Ensemble, Instances, Schedule

Reals = NDArray[np.float64]
NAMES = ("fifth_1", "fifth_2", "fifth_3", "fifth_4", "fifth_5", "random")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grouped:
    """One course with a request for every fifth and a random one."""

    case: Case
    key: str
    course: Course
    seeds: range

    def models(self, which: int, when: int, row: int) -> Ensemble:
        count = len(self.seeds)
        return part(self.course.kept[which][when], range(row * count, (row + 1) * count))

    def forget(self, row: int) -> Instances:
        return self.case.train.select(self.course.requests[row])


def group_course(
    case: Case, key: str, losses: Reals, training: Training, fine_tuning: Training | None, seeds: range
) -> Grouped:
    """A tenth of all instances in every request."""
    generator = np.random.default_rng(1)
    size = max(2, len(losses) // 10)
    requests = [generator.choice(positions, size, replace=False) for positions in fifths(losses)]
    requests.append(generator.choice(len(losses), size, replace=False))
    course = unlearning_course(
        case.start(seeds),
        case.train,
        [request.tolist() for request in requests],
        training,
        seeds=seeds,
        at=looks_of(training),
        fine_tuning=fine_tuning,
        test=case.test,
    )
    return Grouped(case=case, key=key, course=course, seeds=seeds)


def put(figures: dict[str, Figure], key: str, found: Interval, target: float | None = None) -> None:
    figures[key] = Figure(value=found.value)
    figures[f"{key}_low"] = Figure(value=found.low, target=target, at_least=True)
    figures[f"{key}_high"] = Figure(value=found.high)


def accuracy_figures(found: Grouped) -> dict[str, Figure]:
    """Unlearned minus oracle in points on forget, retain and test, and margins in nats, before and
    after."""
    figures: dict[str, Figure] = {}
    course = found.course
    for row, name in enumerate(NAMES):
        for tag, look, when in (("before", 0, 0), ("after", len(course.at) - 1, 2)):
            key = f"{found.key}_{name}_{tag}"
            right = 100 * (course.unlearned_right - course.oracle_right)[row, :, look].mean(1)
            put(figures, f"{key}_forget_points", mean_interval(right))
            retain = 100 * (course.retain[0] - course.retain[1])[when, row]
            put(figures, f"{key}_retain_points", mean_interval(retain))
            if course.test is not None:
                test = 100 * (course.test[0] - course.test[1])[when, row]
                put(figures, f"{key}_test_points", mean_interval(test))
            margin = (course.unlearned - course.oracle)[row, :, look].mean(1)
            put(figures, f"{key}_margin_gap", mean_interval(margin))
    return figures


def steps_figures(found: Grouped, draws: int) -> tuple[dict[str, Figure], list[float]]:
    """Steps to the oracle for every group, the null, and hardest minus easiest fifth in gap and steps, over
    seeds; the steps at other tolerances beside them."""
    course, tolerance = found.course, tolerance_of(found.course.oracle)
    steps = steps_to_oracle(course.unlearned, course.oracle, course.at, tolerance).settled
    figures = {f"{found.key}_{name}_steps": Figure(value=float(steps[row])) for row, name in enumerate(NAMES)}
    figures[f"{found.key}_tolerance"] = Figure(value=tolerance)
    null = false_steps(course.oracle, course.at, tolerance)
    figures[f"{found.key}_null_share_with_steps"] = Figure(value=null, target=0.05)
    key = f"{found.key}_hardest_minus_easiest"
    put(figures, f"{key}_steps", steps_apart(course, tolerance, draws), 1.0)
    for other in TOLERANCES:
        put(figures, f"{key}_steps_tolerance_{other:g}", steps_apart(course, other, draws))
    gaps = (course.unlearned - course.oracle)[:, :, 0].mean(2)
    put(figures, f"{key}_gap", mean_interval(gaps[4] - gaps[0]), 0.0)
    return figures, steps.astype(float).tolist()


def steps_apart(course: Course, tolerance: float, draws: int) -> Interval:
    """Steps of the hardest fifth minus those of the easiest, with a bootstrap interval over seeds."""
    generator = np.random.default_rng(2)
    count = course.oracle.shape[1]

    def apart(rows: NDArray[np.int64]) -> float:
        pair = course.unlearned[[0, 4]][:, rows], course.oracle[[0, 4]][:, rows]
        easiest, hardest = steps_to_oracle(*pair, course.at, tolerance).settled
        return float(hardest - easiest)

    again = [apart(generator.integers(0, count, count)) for _ in range(draws)]
    low, high = np.quantile(again, [0.025, 0.975])
    return Interval(value=apart(np.arange(count)), low=float(low), high=float(high), count=count)


def barrier_figures(found: Grouped) -> tuple[dict[str, Figure], dict[str, list[list[float]]]]:
    """From the unlearned model to its oracle (same start and batches; before, during, after) and from
    the base model to an oracle of another seed; on the group itself and on the test set; all three
    definitions."""
    figures: dict[str, Figure] = {}
    paths: dict[str, list[list[float]]] = {}
    hardest: dict[int, Reals] = {}
    for row, name in enumerate(NAMES):
        forget = found.forget(row)
        for when, tag in enumerate(("before", "during", "after")):
            ends = found.models(0, when, row), found.models(1, when, row)
            barrier = loss_barrier(*ends, forget, points=11)
            key = f"{found.key}_{name}_barrier_{tag}"
            put(figures, f"{key}_above_mean", mean_interval(barrier.above_mean))
            figures[f"{key}_above_chord"] = Figure(value=float(barrier.above_chord.mean()))
            figures[f"{key}_above_ends"] = Figure(value=float(barrier.above_ends.mean()))
            paths.setdefault(name, []).append(barrier.path.mean(1).tolist())
            if when == 0:
                hardest[row] = barrier.above_mean
        test = loss_barrier(found.models(0, 0, row), found.models(1, 0, row), found.case.test, points=5)
        figures[f"{found.key}_{name}_barrier_test_above_mean"] = Figure(value=float(test.above_mean.mean()))
        other = part(found.models(1, 0, row), np.roll(np.arange(len(found.seeds)), 1).tolist())
        independent = loss_barrier(found.models(0, 0, row), other, forget, points=11)
        put(
            figures,
            f"{found.key}_{name}_barrier_other_seed_above_ends",
            mean_interval(independent.above_ends),
        )
    apart = mean_interval(hardest[4] - hardest[0])
    put(figures, f"{found.key}_hardest_minus_easiest_barrier", apart, 0.0)
    return figures, paths


def distance_figures(found: Grouped) -> dict[str, Figure]:
    """KLOM, U-LiRA and Renyi estimates, unlearned against oracle, before and after, with the nulls of
    exchanging the two within a seed; ``null`` compares oracles of one half of the seeds with those of
    the other, where all is chance."""
    figures: dict[str, Figure] = {}
    course, half = found.course, len(found.seeds) // 2
    last = len(course.at) - 1
    for row, name in enumerate(NAMES):
        sides = {
            "before": (course.unlearned[row, :, 0], course.oracle[row, :, 0]),
            "after": (course.unlearned[row, :, last], course.oracle[row, :, last]),
            "null": (course.oracle[row, :half, last], course.oracle[row, half : 2 * half, last]),
        }
        for tag, (mine, theirs) in sides.items():
            key = f"{found.key}_{name}_{tag}"
            distance = klom(mine, theirs, draws=40)
            figures[f"{key}_klom"] = Figure(value=float(distance.value.mean()))
            figures[f"{key}_klom_null"] = Figure(value=float(distance.null.mean()))
            figures[f"{key}_klom_beyond_chance"] = Figure(value=distance.beyond_chance)
            attack = u_lira(mine, theirs, draws=40)
            figures[f"{key}_u_lira"] = Figure(value=attack.auc)
            figures[f"{key}_u_lira_low"] = Figure(value=attack.low)
            figures[f"{key}_u_lira_high"] = Figure(value=attack.high)
            figures[f"{key}_u_lira_null_high"] = Figure(value=attack.null_high)
            if name in ("fifth_1", "fifth_5"):
                figures |= _renyi(key, mine, theirs)
    return figures


def _renyi(key: str, mine: Reals, theirs: Reals) -> dict[str, Figure]:
    plug_in = gaussian_renyi(mine, theirs, 2.0)
    ok = np.isfinite(plug_in)
    bounded = variational_renyi(mine, theirs, 2.0, draws=20)
    return {
        f"{key}_gaussian_renyi_median": Figure(value=float(np.median(plug_in[ok])) if ok.any() else -1.0),
        f"{key}_gaussian_renyi_undefined": Figure(value=float(1 - ok.mean())),
        f"{key}_variational_renyi": Figure(value=float(bounded.value.mean())),
        f"{key}_variational_renyi_null": Figure(value=float(bounded.null.mean())),
    }


def attack_figures(found: Grouped) -> dict[str, Figure]:
    """Simple attacks, forgotten against test instances, on unlearned and retrained models: the
    difference to the oracle is what counts, because easy groups have larger margins than the test set
    whether or not they were trained on."""
    figures: dict[str, Figure] = {}
    count = len(found.seeds)
    test = spread(found.case.test, count)
    for row, name in enumerate(NAMES):
        forget = spread(found.forget(row), count)
        if torch.unique(forget.labels).numel() == 1:
            continue
        seen = [simple_attacks(found.models(which, 2, row), forget, test) for which in (0, 1)]
        for statistic in ("confidence", "entropy", "modified_entropy"):
            scores = [np.array([score.auc for score in side[statistic]]) for side in seen]
            key = f"{found.key}_{name}_attack_{statistic}"
            put(figures, f"{key}_minus_oracle", mean_interval(scores[0] - scores[1]))
            inside = np.mean([score.within_null for score in seen[0][statistic]])
            figures[f"{key}_within_null"] = Figure(value=float(inside))
    return figures


def relearn_figures(found: Grouped) -> dict[str, Figure]:
    """Steps to learn the forgotten again, up to the loss of the model before, minus those of the
    oracle."""
    figures: dict[str, Figure] = {}
    schedule = Schedule(steps=60, learning_rate=0.1, momentum=0.0, batch_size=1000)
    for row in (0, 4, 5):
        forget = spread(found.forget(row), len(found.seeds))
        wanted = mean_loss(found.course.base, forget)
        taken = [
            relearn_steps(found.models(which, 2, row), forget, wanted, schedule, seeds=found.seeds)
            for which in (0, 1)
        ]
        key = f"{found.key}_{NAMES[row]}_relearn_steps"
        figures[f"{key}_oracle"] = Figure(value=float(taken[1].mean()))
        put(figures, f"{key}_minus_oracle", mean_interval((taken[0] - taken[1]).astype(float)))
    return figures


def size_figures(
    case: Case, key: str, losses: Reals, seeds: range, sizes: tuple[int, ...]
) -> dict[str, Figure]:
    """Steps and gap for requests of growing size from the easiest and the hardest fifth."""
    figures: dict[str, Figure] = {}
    generator = np.random.default_rng(4)
    parts = fifths(losses)
    for size in (n for n in sizes if n <= len(parts[0])):
        requests = [generator.choice(parts[which], size, replace=False).tolist() for which in (0, 4)]
        course = unlearning_course(
            case.start(seeds), case.train, requests, case.noisy, seeds=seeds, at=looks_of(case.noisy)
        )
        found = steps_to_oracle(course.unlearned, course.oracle, course.at, tolerance_of(course.oracle))
        for row, name in enumerate(("easiest", "hardest")):
            figures[f"{key}_size_{size}_{name}_steps"] = Figure(value=float(found.settled[row]))
            gaps = (course.unlearned - course.oracle)[row, :, 0].mean(1)
            put(figures, f"{key}_size_{size}_{name}_gap", mean_interval(gaps))
    return figures
