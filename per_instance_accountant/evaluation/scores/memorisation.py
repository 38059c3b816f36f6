"""Memorisation: how much worse an instance is predicted by models that did not see it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from per_instance_accountant.errors import UsageError
from per_instance_accountant.evaluation.measures.intervals import finite, require

Reals = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Memorisation:
    """value: (n,) in [-1, 1] for correctness. low, high: (n,) 95 % normal interval. consistency: (n,)
    share of the models without the instance that get it right (C-score)."""

    value: Reals
    low: Reals
    high: Reals
    consistency: Reals


def memorisation(right: ArrayLike, member: ArrayLike) -> Memorisation:
    """``P[right | i was trained on] - P[right | i was not]`` (Feldman and Zhang 2020) from models
    trained on random subsets. Margins in place of correctness give the same difference in nats.

    right: (M, n) 1 where model m classifies i correctly. member: (M, n) whether i was in its subset.
    Raises UsageError PIA071 for shapes that differ, PIA125 if some instance is in, or out of, fewer
    than 3 subsets.

    >>> seen = np.array([[1], [1], [1], [0], [0], [0]])
    >>> float(memorisation(seen, seen).value[0])
    1.0
    """
    values, inside = finite(right, "outcomes"), np.asarray(member, dtype=np.bool_)
    if values.ndim != 2 or values.shape != inside.shape:
        raise UsageError(
            "PIA071",
            f"outcomes of shape {values.shape} and subsets of shape {inside.shape}",
            "No model could be assigned to a side",
            "memorisation(right, member), both (models, instances)",
        )
    counts = [inside.sum(0), (~inside).sum(0)]
    require(
        int(min(counts[0].min(), counts[1].min())),
        3,
        "models on each side of an instance",
        "300 subsets of 70 %",
    )
    means, variances = [], []
    for side, count in zip((inside, ~inside), counts, strict=True):
        mean = (values * side).sum(0) / count
        means.append(mean)
        variances.append(((values - mean) ** 2 * side).sum(0) / (count - 1) / count)
    gap = means[0] - means[1]
    half = 1.959963984540054 * np.sqrt(variances[0] + variances[1])
    return Memorisation(value=gap, low=gap - half, high=gap + half, consistency=means[1])
