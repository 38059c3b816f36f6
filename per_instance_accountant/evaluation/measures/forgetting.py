"""Two-sided distance from the retrained reference: a model that forgot too hard is as far as one that
remembers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student

from per_instance_accountant.errors import UsageError
from per_instance_accountant.evaluation.measures.intervals import (
    COVERAGE,
    FEWEST_SEEDS,
    Interval,
    finite,
    mean_interval,
    require,
)
from per_instance_accountant.evaluation.outcomes import accuracies, margins, mean_loss
from per_instance_accountant.finetuning.methods import Ensemble, Instances, Schedule, unlearn_ensemble
from per_instance_accountant.finetuning.methods.records import FineTune

Reals = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgetting:
    """Unlearned minus retrained, mean over models with 95 % t-interval: accuracies as shares, margin in
    nats. null: the margin gap of other retrained models, None if none were given."""

    forget: Interval
    retain: Interval
    test: Interval
    margin: Interval
    null: Interval | None = None

    @property
    def verdict(self) -> str:
        """``"over-unlearned"`` if the margin gap is below 0 beyond its interval, ``"remembers"`` if it
        is above, ``"no difference seen"`` else: few models see little."""
        if self.margin.high < 0:
            return "over-unlearned"
        return "remembers" if self.margin.low > 0 else "no difference seen"


def forgetting(
    unlearned: Ensemble,
    oracle: Ensemble,
    forget: Instances,
    retain: Instances,
    test: Instances,
    *,
    other_oracle: Ensemble | None = None,
) -> Forgetting:
    """Compare K unlearned with K retrained models on stacked instances (K, n, ...), model k with model
    k.

    other_oracle: K further retrained models, from other seeds, for the null. Raises UsageError PIA125
    for fewer than 3 models, PIA071 for numbers of models that differ, GuaranteeError PIA011 for outputs
    that are no numbers.
    """
    if unlearned.size != oracle.size or (other_oracle is not None and other_oracle.size != oracle.size):
        raise UsageError(
            "PIA071",
            f"{unlearned.size} unlearned models and {oracle.size} retrained ones",
            "They cannot be compared pair by pair",
            "forgetting(unlearned, oracle, ...) with one oracle per unlearned model",
        )
    gaps = [accuracies(unlearned, part) - accuracies(oracle, part) for part in (forget, retain, test)]
    reference = margins(oracle, forget).mean(1)
    null = None
    if other_oracle is not None:
        null = mean_interval(margins(other_oracle, forget).mean(1) - reference)
    return Forgetting(
        forget=mean_interval(gaps[0]),
        retain=mean_interval(gaps[1]),
        test=mean_interval(gaps[2]),
        margin=mean_interval(margins(unlearned, forget).mean(1) - reference),
        null=null,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepsToOracle:
    """Cost to reach the retrained reference, for R requests: lower limits, which more seeds raise.

    gap: (R, t) mean margin gap, unlearned minus oracle. doubt: (R, t) half the width of its interval,
    95 % for all looks of a request together. A look shows a difference where ``|gap| > tolerance +
    doubt``. settled: (R,) first look from which on none does. first: (R,) first look that shows none, or
    before which the gap changed its sign: whoever can stop may stop there. Both twice the last look
    where that never happens. over: (R,) whether the last look shows a gap below 0: over-unlearned."""

    at: NDArray[np.int64]
    gap: Reals
    doubt: Reals
    settled: NDArray[np.int64]
    first: NDArray[np.int64]
    over: NDArray[np.bool_]
    tolerance: float

    @property
    def never(self) -> float:
        """Share of the requests that did not settle."""
        return float((self.settled > self.at[-1]).mean())

    @property
    def at_once(self) -> float:
        """Share of the requests within tolerance before any step: a floor, on which no order can be
        seen."""
        return float((self.settled == 0).mean())


def steps_to_oracle(
    unlearned: ArrayLike, oracle: ArrayLike, at: ArrayLike, tolerance: float
) -> StepsToOracle:
    """Steps until no difference between the requests and what they are to retrained models is seen.

    unlearned, oracle: (R, S, t) margins after ``at`` (t,) steps, averaged over the S seeds; further
    dimensions (instances of a request) are averaged as well. tolerance: difference in nats that is of no
    consequence. A request whose true gap stays within it gets a step with probability 5 % at most, however
    many looks there are, if gaps are normal over seeds (Student intervals, Bonferroni over the looks).
    Raises UsageError PIA071, PIA125 for fewer than 3 seeds, GuaranteeError PIA011.

    >>> retrained = np.zeros((1, 3, 3))
    >>> steps_to_oracle(retrained + [1.0, 0.4, 0.0], retrained, [0, 10, 20], 0.5).settled.tolist()
    [10]
    """
    first, second = finite(unlearned, "margins"), finite(oracle, "margins")
    looks = np.asarray(at, dtype=np.int64)
    fits = first.shape == second.shape and first.ndim > 2 and first.size and first.shape[2] == looks.size
    if not fits or not tolerance > 0:
        raise UsageError(
            "PIA071",
            f"margins of shapes {first.shape} and {second.shape}, {looks.size} looks, tolerance {tolerance}",
            "No number of steps can be read off them",
            "steps_to_oracle(course.unlearned, course.oracle, course.at, tolerance=0.05)",
        )
    gaps = (first - second).reshape(*first.shape[:3], -1).mean(3)
    count = gaps.shape[1]
    require(count, FEWEST_SEEDS, "seeds", "seeds=range(8)")
    gap = gaps.mean(1)
    quantile = float(student.ppf(1 - (1 - COVERAGE) / (2 * looks.size), count - 1))
    doubt = quantile * gaps.std(1, ddof=1) / np.sqrt(count)
    within = np.abs(gap) <= tolerance + doubt
    crossed = within.copy()
    crossed[:, 1:] |= np.sign(gap[:, 1:]) * np.sign(gap[:, :-1]) < 0
    beyond = np.append(looks, 2 * looks[-1])
    since = looks.size - np.logical_and.accumulate(within[:, ::-1], axis=1).sum(1)
    reached = np.where(crossed.any(1), crossed.argmax(1), looks.size)
    return StepsToOracle(
        at=looks,
        gap=gap,
        doubt=doubt,
        settled=beyond[since],
        first=beyond[reached],
        over=gap[:, -1] < -tolerance - doubt[:, -1],
        tolerance=tolerance,
    )


def harmonic_score(forget: ArrayLike, utility: ArrayLike) -> Reals:
    """Harmonic mean of ``1 - |forget|`` and ``utility``, the first two-sided: forget is the difference
    of confidences to the oracle's, utility the test accuracy relative to it, cut at 1.

    >>> round(float(harmonic_score(-0.5, 1.0)), 4)
    0.6667
    """
    near = np.clip(1 - np.abs(finite(forget, "differences")), 0, 1)
    kept = np.clip(finite(utility, "ratios"), 0, 1)
    score: Reals = 2 * near * kept / np.maximum(near + kept, np.finfo(np.float64).tiny)
    return score


def relearn_steps(
    models: Ensemble, forget: Instances, loss: ArrayLike, schedule: Schedule, *, seeds: Sequence[int]
) -> NDArray[np.int64]:
    """(K,) steps of training on the forgotten instances until their mean loss is at most ``loss`` (K,),
    twice the schedule's where it never is. Models that merely hide instances relearn them faster than
    retrained ones.

    forget: (K, n, ...). Looks every ``schedule.observe_every`` steps.
    """
    wanted = np.broadcast_to(finite(loss, "losses"), (models.size,))
    taken = np.full(models.size, 2 * schedule.steps, dtype=np.int64)

    def watch(step: int, now: Ensemble) -> None:
        there = (mean_loss(now, forget) <= wanted) & (taken > schedule.steps)
        taken[there] = step

    unlearn_ensemble(FineTune(schedule=schedule), models, forget, forget, seeds=seeds, watch=watch)
    return taken
