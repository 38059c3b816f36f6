"""Loss barriers on the straight line between two models, in three definitions that disagree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.errors import UsageError
from per_instance_accountant.evaluation.outcomes import mean_loss
from per_instance_accountant.finetuning.methods import Ensemble, Instances


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossBarrier:
    """(K,) each, in nats. above_mean: largest loss on the line minus the mean of its ends (Frankle et al.
    2020; half the gap of the ends where nothing bulges); above_chord: largest excess over the straight line
    between the losses of the ends; above_ends: largest loss minus that of the worse end, at least 0.
    path: (points, K) losses on the line."""

    above_mean: NDArray[np.float64]
    above_chord: NDArray[np.float64]
    above_ends: NDArray[np.float64]
    path: NDArray[np.float64]


def loss_barrier(first: Ensemble, second: Ensemble, instances: Instances, *, points: int = 21) -> LossBarrier:
    """Barrier between models k of both ensembles on the given instances. The set, the definition and the
    seeds decide the result, so say all three. Only parameters move; buffers are those of ``first``.

    Lower bounds: the largest loss between two points of the line is not seen. Raises UsageError PIA071 for
    different architectures, PIA070 for fewer than 3 points.
    """
    shapes = [{name: value.shape for name, value in part.parameters.items()} for part in (first, second)]
    if shapes[0] != shapes[1] or points < 3:
        raise UsageError(
            "PIA071" if points >= 3 else "PIA070",
            f"{points} points between models of {'one' if points < 3 else 'different'} architecture",
            "There is no line to walk",
            "loss_barrier(ensemble_of([before]), ensemble_of([after]), instances, points=21)",
        )
    shares = np.linspace(0, 1, points)
    path = np.stack(
        [
            mean_loss(
                first.with_parameters(
                    {
                        name: (1 - share) * value + share * second.parameters[name]
                        for name, value in first.parameters.items()
                    }
                ),
                instances,
            )
            for share in shares
        ]
    )
    chord = (1 - shares)[:, None] * path[0] + shares[:, None] * path[-1]
    largest = path.max(0)
    return LossBarrier(
        above_mean=largest - (path[0] + path[-1]) / 2,
        above_chord=(path - chord).max(0),
        above_ends=largest - np.maximum(path[0], path[-1]),
        path=path,
    )
