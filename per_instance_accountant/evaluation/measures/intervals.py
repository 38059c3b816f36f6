"""Intervals and nulls: no number of this room should be read without them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from scipy.stats import t as student

from per_instance_accountant.errors import GuaranteeError, UsageError

Reals = NDArray[np.float64]
FEWEST_SEEDS, FEWEST_POINTS, FEWEST_MODELS = 3, 10, 8
COVERAGE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with its 95 % interval. count: seeds or instances it rests on."""

    value: float
    low: float
    high: float
    count: int

    def excludes(self, number: float) -> bool:
        """Whether the number lies outside the interval."""
        return not self.low <= number <= self.high


def require(enough: int, needed: int, what: str, fix: str) -> None:
    """Raise UsageError PIA125 for fewer than ``needed``."""
    if enough < needed:
        raise UsageError(
            "PIA125",
            f"{enough} {what}, at least {needed} are needed",
            "An interval of so few says nothing",
            fix,
        )


def finite(values: ArrayLike, what: str) -> Reals:
    """As float64. Raises GuaranteeError PIA011 for NaN or infinite values."""
    array = np.asarray(values, dtype=np.float64)
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise GuaranteeError(
            "PIA011",
            f"{bad} {what} are NaN or infinite",
            "No statistic of them means anything",
            "look for the model that diverged, and train it with a smaller learning rate",
        )
    return array


def model_pairs(unlearned: ArrayLike, oracle: ArrayLike, *, call: str, seeds: int) -> tuple[Reals, Reals]:
    """Both sides (K, n) as float64, model k of both together. call, seeds: for the advice of the errors.

    Raises UsageError PIA071 for other shapes or no instance, PIA125 for fewer than 8 models,
    GuaranteeError PIA011.
    """
    first, second = finite(unlearned, "margins"), finite(oracle, "margins")
    if first.ndim != 2 or first.shape != second.shape or not first.shape[1]:
        raise UsageError(
            "PIA071",
            f"margins of shapes {first.shape} and {second.shape}, expected the same (models, instances >= 1)",
            "Unlearned and retrained models cannot be compared",
            f"{call}(margins(unlearned, forget), margins(oracle, forget))",
        )
    require(len(first), FEWEST_MODELS, "models on each side", f"seeds=range({seeds})")
    return first, second


def mean_interval(values: ArrayLike) -> Interval:
    """Mean over independent seeds with its t-interval.

    values: (S,). Raises UsageError PIA125 for fewer than 3, GuaranteeError PIA011 for values that are
    no numbers.

    >>> mean_interval([1.0, 2.0, 3.0]).value
    2.0
    """
    array = finite(values, "values").ravel()
    require(array.size, FEWEST_SEEDS, "seeds", "seeds=range(8)")
    half = float(student.ppf((1 + COVERAGE) / 2, array.size - 1) * array.std(ddof=1) / np.sqrt(array.size))
    mean = float(array.mean())
    return Interval(value=mean, low=mean - half, high=mean + half, count=array.size)


def spearman(first: Reals, second: Reals) -> float:
    """Rank correlation, ties averaged; NaN if one of them is constant.

    >>> round(spearman(np.array([1.0, 2.0, 3.0]), np.array([2.0, 5.0, 9.0])), 12)
    1.0
    """
    a, b = rankdata(first), rankdata(second)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else float("nan")


def rank_correlation(
    first: ArrayLike,
    second: ArrayLike,
    *,
    redraw: Callable[[np.random.Generator], Reals] | None = None,
    redraw_first: Callable[[np.random.Generator], Reals] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """Spearman correlation over n instances with a percentile bootstrap interval over instances.

    redraw, redraw_first: give ``second`` and ``first`` again from resampled seeds, so that the interval
    covers instances and seeds. Without them, it holds for the seeds at hand only. Redrawn values carry
    the noise of the seeds twice, so the interval leans towards 0. Raises UsageError PIA125 for fewer
    than 10 instances or fewer than 3 distinct values (a floor, on which no order can be seen),
    GuaranteeError PIA011 for values that are no numbers.
    """
    a, b = finite(first, "scores").ravel(), finite(second, "difficulties").ravel()
    require(a.size, FEWEST_POINTS, "instances", "more instances")
    require(
        min(np.unique(a).size, np.unique(b).size), 3, "distinct values", "a smaller tolerance, more looks"
    )
    generator = np.random.default_rng(seed)
    found = np.empty(draws)
    for draw in range(draws):
        again = b if redraw is None else redraw(generator)
        before = a if redraw_first is None else redraw_first(generator)
        rows = generator.integers(0, a.size, a.size)
        found[draw] = spearman(before[rows], again[rows])
    low, high = np.nanquantile(found, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Interval(value=spearman(a, b), low=float(low), high=float(high), count=a.size)


def permuted(
    statistic: Callable[[Reals, Reals], Reals],
    first: Reals,
    second: Reals,
    *,
    draws: int,
    seed: int,
) -> Reals:
    """(draws, ...) the statistic when it is a coin which of two models, one of each side, is called
    which.

    first, second: (K, n). The null of every statistic whose two sides are exchangeable model by model,
    whether they are paired (same seed) or not.
    """
    generator = np.random.default_rng(seed)
    swaps = generator.random((draws, len(first), 1)) < 0.5
    return np.stack(
        [statistic(np.where(swap, second, first), np.where(swap, first, second)) for swap in swaps]
    )
