"""Do algorithms agree on which instances are hard, how far can the measurement agree with itself, and which
factors rank the instances?

Candidate factors, our definitions: expansion (of ``scores.expansion``), membership (margin before minus the
oracle's, in oracle standard deviations: what an attacker with shadow models sees), confidence and boundary
distance (signs turned), privacy loss (ledger); and after unlearning, per algorithm, parameter shift, loss of
test accuracy, and the steps of fine-tuning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import Figure
from benchmarks.evidence.algorithms import LOOKS, Outcome, methods, outcome, started
from benchmarks.evidence.cases import Case
from benchmarks.evidence.prediction import spread_over, tolerance_of
from per_instance_accountant.evaluation import difficulty
from per_instance_accountant.evaluation.measures import Interval, rank_correlation
from per_instance_accountant.evaluation.measures.intervals import FEWEST_POINTS, FEWEST_SEEDS, spearman
from per_instance_accountant.evaluation.oracle import Course
from per_instance_accountant.finetuning.methods import Schedule

Reals = NDArray[np.float64]
Rows = NDArray[np.bool_]
FLOOR = 0.5
"""An algorithm has a floor where more than this share of the instances that leave a trace reaches the oracle
within two steps, and a ceiling where more than this share never does."""

FACTORS = (
    "privacy_loss",
    "expansion",
    "membership",
    "confidence",
    "boundary",
    "parameter_shift",
    "performance_shift",
    "fine_tune_steps",
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Compared:
    """Outcomes of one sample of instances. traced: (R,) whether a difference is seen before any step. The
    others are at the floor of every algorithm alike, and agree by that alone."""

    found: Mapping[str, Outcome]
    tolerance: float
    traced: Rows

    def steps(self, name: str, seeds: slice | NDArray[np.int64] = slice(None)) -> Reals:
        """(R,) first steps, from some seeds."""
        return self.found[name].reached(self.tolerance, seeds).first.astype(np.float64)

    def agreement(self, name: str, other: str, rows: Rows, draws: int) -> Interval | None:
        """Rank correlation of the steps of two algorithms, over instances and seeds; None on a floor."""
        first, second = self.steps(name)[rows], self.steps(other)[rows]
        if rows.sum() < FEWEST_POINTS or min(np.unique(first).size, np.unique(second).size) < 3:
            return None

        def again(which: str, generator: np.random.Generator) -> Reals:
            count = self.found[which].oracle.shape[1]
            drawn = generator.integers(0, count, size=count)
            return self.steps(which, drawn)[rows]

        return rank_correlation(
            first,
            second,
            redraw=lambda generator: again(other, generator),
            redraw_first=lambda generator: again(name, generator),
            draws=draws,
        )

    def across_halves(self, name: str, other: str, rows: Rows) -> float:
        """Correlation of one algorithm on one half of the seeds with another (or itself) on the other half:
        no noise is shared, and what it falls short of 1 for one algorithm is noise. NaN for fewer than six
        seeds."""
        half = self.found[name].oracle.shape[1] // 2
        if half < FEWEST_SEEDS:
            return float("nan")
        sides = slice(0, half), slice(half, None)
        mine, theirs = ([self.steps(which, side)[rows] for side in sides] for which in (name, other))
        return (spearman(mine[0], theirs[1]) + spearman(mine[1], theirs[0])) / 2

    def ends(self, name: str) -> tuple[float, float]:
        """Shares of the traced that reach the oracle within two steps, and never."""
        steps = self.steps(name)[self.traced]
        return float((steps <= 2).mean()), float((steps > LOOKS[-1]).mean())

    def ranks(self, name: str) -> bool:
        """Whether the algorithm has neither a floor nor a ceiling."""
        return max(self.ends(name)) <= FLOOR


def compared(
    case: Case, losses: Reals, rates: Mapping[str, float], probes: int, seeds: range, draws: int = 300
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """All algorithms on one sample over the whole range of the loss: agreement, factors, floors."""
    course = started(case, spread_over(losses, probes), seeds)
    known: dict[Schedule, Reals] = {}
    found = {
        name: outcome(case, course, method, seeds, known) for name, method in methods(case, rates).items()
    }
    tolerance = tolerance_of(found["fine_tune"].oracle)
    traced = found["fine_tune"].reached(tolerance).first > 0
    both = Compared(found=found, tolerance=tolerance, traced=traced)
    agreed, table = agreements(case.name, both, draws)
    figures = floors(case.name, both) | agreed
    given = factors(case, course, seeds, losses)
    everything = np.ones_like(traced)
    table["factors"] = {
        tag: against_factors(both, given, rows, draws)
        for tag, rows in (("all", everything), ("traced", traced))
    }
    return figures, table


def floors(key: str, both: Compared) -> dict[str, Figure]:
    """How many instances leave a trace, and where an algorithm cannot rank them."""
    figures = {
        f"{key}_tolerance": Figure(value=both.tolerance),
        f"{key}_traced": Figure(value=float(both.traced.sum())),
        f"{key}_floor_of_all": Figure(value=float(1 - both.traced.mean())),
    }
    for name in both.found if both.traced.any() else ():
        floor, ceiling = both.ends(name)
        figures[f"{key}_{name}_within_two_steps"] = Figure(value=floor)
        figures[f"{key}_{name}_never"] = Figure(value=ceiling)
        median = float(np.median(both.steps(name)[both.traced]))
        figures[f"{key}_{name}_steps_median"] = Figure(value=median)
    return figures


def agreements(key: str, both: Compared, draws: int) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Every pair: the traced, with an interval and across halves of the seeds; all instances; the gap after
    the last step. The target is for pairs without a floor or ceiling."""
    figures: dict[str, Figure] = {}
    table: dict[str, Any] = {"agreement": {}, "agreement_all": {}, "halves": {}, "final_gap_agreement": {}}
    everything = np.ones_like(both.traced)
    gaps = {n: np.abs((one.unlearned - one.oracle)[:, :, -1].mean(1)) for n, one in both.found.items()}
    for name in both.found:
        table["halves"][f"{name} {name}"] = _number(both.across_halves(name, name, both.traced))
    for name, other in combinations(both.found, 2):
        pair = f"{name} {other}"
        final = rank_correlation(gaps[name], gaps[other], draws=draws)
        table["final_gap_agreement"][pair] = _row(final)
        table["agreement_all"][pair] = _row(both.agreement(name, other, everything, draws))
        rho = both.agreement(name, other, both.traced, draws)
        table["agreement"][pair] = _row(rho)
        table["halves"][pair] = _number(both.across_halves(name, other, both.traced))
        if rho is not None:
            free = both.ranks(name) and both.ranks(other)
            tag = f"{key}_agreement_{name}_{other}"
            figures[tag] = Figure(value=rho.value, target=0.7 if free else None, at_least=True)
            figures |= {f"{tag}_low": Figure(value=rho.low), f"{tag}_high": Figure(value=rho.high)}
    negative = [row for row in table["final_gap_agreement"].values() if row[2] < 0]
    figures[f"{key}_final_gap_pairs_that_disagree_in_sign"] = Figure(value=float(len(negative)))
    return figures, table


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


def against_factors(both: Compared, given: Mapping[str, Reals], rows: Rows, draws: int) -> dict[str, Any]:
    """Rank correlation of every factor with the steps of every algorithm; None on a floor."""
    table: dict[str, Any] = {}
    for name, one in both.found.items():
        steps = both.steps(name)[rows]
        after = {"parameter_shift": one.shift, "performance_shift": one.damage}
        if name != "fine_tune":
            after["fine_tune_steps"] = both.steps("fine_tune")
        table[name] = {}
        for factor, values in (dict(given) | after).items():
            flat = min(np.unique(values[rows]).size, np.unique(steps).size) < 3
            few = flat or rows.sum() < FEWEST_POINTS
            table[name][factor] = None if few else _row(rank_correlation(values[rows], steps, draws=draws))
    return table


def _row(found: Interval | None) -> list[float] | None:
    return None if found is None else [found.value, found.low, found.high]


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None
