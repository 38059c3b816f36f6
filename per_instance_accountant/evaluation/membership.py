"""A simple membership attack: does the margin tell the instances to forget from instances never seen?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from per_instance_accountant.errors import UsageError
from per_instance_accountant.evaluation.outcomes import margins
from per_instance_accountant.finetuning.methods import Ensemble, Instances

_COVERAGE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackScore:
    """auc: chance that an instance to forget has a larger margin than an unseen one, ties counted half;
    1/2 is no difference, above it remembers, below it was forgotten too hard, which tells membership as
    well. null_low, null_high: central 95 % of the score if the instances were unseen ones. An estimate
    from one model; stronger attacks exist."""

    auc: float
    null_low: float
    null_high: float

    @property
    def within_null(self) -> bool:
        """Whether chance explains the score."""
        return self.null_low <= self.auc <= self.null_high


def membership_attack(
    models: Ensemble, forget: Instances, unseen: Instances, *, draws: int = 2000, seed: int = 0
) -> list[AttackScore]:
    """One score per model. The null is that of ``draws`` random relabellings of who is to be forgotten:
    it depends on the two sizes only and is wide for few instances.

    Raises UsageError PIA070 for fewer than two unseen instances or less than 100 draws.
    """
    if len(unseen) < 2 or draws < 100:
        raise UsageError(
            "PIA070",
            f"{len(unseen)} unseen instances and {draws} draws",
            "Without unseen instances and a null no score says anything",
            "membership_attack(models, forget, test, draws=2000)",
        )
    first, second = margins(models, forget), margins(models, unseen)
    low, high = null_interval(first.shape[1], second.shape[1], draws, seed)
    return [
        AttackScore(auc=auc, null_low=low, null_high=high)
        for auc in (area(a, b) for a, b in zip(first, second, strict=True))
    ]


def area(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Mann-Whitney: share of pairs in which the value of ``first`` is larger, ties counted half.

    >>> area(np.array([2.0, 1.0]), np.array([1.0, 0.0]))
    0.875
    """
    ranks = rankdata(np.concatenate([first, second]))[: first.size]
    return float((ranks.sum() - first.size * (first.size + 1) / 2) / (first.size * second.size))


def null_interval(forget: int, unseen: int, draws: int, seed: int) -> tuple[float, float]:
    """Central 95 % of ``area`` when both groups come from one distribution without ties."""
    generator = np.random.default_rng(seed)
    total = forget + unseen
    ranks = np.argsort(generator.random((draws, total)), axis=1)[:, :forget] + 1
    scores = (ranks.sum(1) - forget * (forget + 1) / 2) / (forget * unseen)
    low, high = np.quantile(scores, [(1 - _COVERAGE) / 2, (1 + _COVERAGE) / 2])
    return float(low), float(high)
