"""Loss barriers on the straight line between two models, in three definitions that disagree."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from per_instance_accountant.errors import UsageError
from per_instance_accountant.evaluation.outcomes import outputs
from per_instance_accountant.finetuning.methods import Ensemble, Instances, ensemble_of
from per_instance_accountant.finetuning.methods.losses import cross_entropies

Reals = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossBarrier:
    """above_mean: largest loss on the line minus the mean of its ends (Frankle et al. 2020; half the
    gap of the ends where nothing bulges); above_chord: largest excess over the straight line between
    the losses of the ends; above_ends: largest loss minus that of the worse end, at least 0. In nats,
    (K,) for the mean over the instances.

    path: (points, K) mean losses on the line. losses: (points, K, n) those of every instance.
    """

    above_mean: Reals
    above_chord: Reals
    above_ends: Reals
    path: Reals
    losses: Reals

    def per_instance(self) -> LossBarrier:
        """The same with (K, n) barriers, one per instance: of its own loss on the line."""
        return _barrier(self.losses, self.losses)

    def per_group(self, labels: ArrayLike) -> dict[str, LossBarrier]:
        """The barrier of the mean loss of every group; labels: (n,). Raises UsageError PIA071.

        The barrier of a mean is not the mean of the barriers.
        """
        names = np.asarray(labels)
        if names.shape != self.losses.shape[2:]:
            raise UsageError(
                "PIA071",
                f"labels of shape {names.shape} for {self.losses.shape[2]} instances",
                "No group is known",
                "barrier.per_group(labels) with one label per instance",
            )
        members = {str(name): self.losses[..., names == name] for name in np.unique(names)}
        return {name: _barrier(losses.mean(2), losses) for name, losses in members.items()}


def _barrier(path: Reals, losses: Reals) -> LossBarrier:
    shares = np.linspace(0, 1, len(path)).reshape((-1,) + (1,) * (path.ndim - 1))
    chord = (1 - shares) * path[0] + shares * path[-1]
    largest = path.max(0)
    return LossBarrier(
        above_mean=largest - (path[0] + path[-1]) / 2,
        above_chord=(path - chord).max(0),
        above_ends=largest - np.maximum(path[0], path[-1]),
        path=path,
        losses=losses,
    )


def loss_barrier(
    first: nn.Module | Ensemble,
    second: nn.Module | Ensemble,
    instances: Instances,
    *,
    points: int = 21,
    statistics: Instances | None = None,
) -> LossBarrier:
    """Barrier between two models, or models k of two ensembles, on the given instances. The set, the
    definition and the seeds decide the result, so say all three.

    Models whose running statistics differ (batch normalisation) have no straight line between them that
    means anything: refused, unless ``statistics`` (unlabelled use; (m, ...) of one model) is given,
    from which they are estimated again at every point, the ends included. Lower bounds: the largest
    loss between two points of the line is not seen.

    Raises UsageError PIA071 for different architectures, PIA070 for fewer than 3 points, PIA127 for
    other running statistics, GuaranteeError PIA011 for outputs that are NaN or infinite.

    >>> one, other = nn.Linear(1, 2, bias=False), nn.Linear(1, 2, bias=False)
    >>> _ = one.load_state_dict({"weight": torch.tensor([[2.0], [0.0]])})
    >>> _ = other.load_state_dict({"weight": torch.tensor([[0.0], [0.0]])})
    >>> some = Instances(inputs=torch.tensor([[1.0]]), labels=torch.tensor([0]))
    >>> barrier = loss_barrier(one, other, some)
    >>> round(float(barrier.above_mean[0]), 4), float(barrier.above_ends[0])
    (0.2831, 0.0)
    """
    ends = [one if isinstance(one, Ensemble) else ensemble_of([one]) for one in (first, second)]
    shapes = [{name: value.shape for name, value in (part.parameters | part.fixed).items()} for part in ends]
    if shapes[0] != shapes[1] or points < 3:
        raise UsageError(
            "PIA071" if points >= 3 else "PIA070",
            f"{points} points between models of {'one' if points < 3 else 'different'} architecture",
            "There is no line to walk",
            "loss_barrier(before, after, instances, points=21)",
        )
    renewed = _renewal(ends[0], ends[1], statistics)
    losses = np.stack(
        [
            _losses(renewed(_between(ends[0], ends[1], share)), instances)
            for share in np.linspace(0, 1, points)
        ]
    )
    return _barrier(losses.mean(2), losses)


def _between(first: Ensemble, second: Ensemble, share: float) -> Ensemble:
    return first.with_parameters(
        {
            name: (1 - share) * value + share * second.parameters[name]
            for name, value in first.parameters.items()
        }
    )


def _losses(models: Ensemble, instances: Instances) -> Reals:
    stacked = instances.stacked
    if len(stacked.labels) != models.size:
        stacked = Instances(
            inputs=stacked.inputs.expand(models.size, *stacked.inputs.shape[1:]),
            labels=stacked.labels.expand(models.size, -1),
        )
    losses: Reals = cross_entropies(outputs(models, stacked), stacked.labels).numpy()
    return losses


def _renewal(
    first: Ensemble, second: Ensemble, statistics: Instances | None
) -> Callable[[Ensemble], Ensemble]:
    """What to do with running statistics at every point of the line."""
    moved = [name for name, value in first.fixed.items() if not torch.equal(value, second.fixed[name])]
    if statistics is not None:
        return lambda models: renewed_statistics(models, statistics)
    if moved:
        raise UsageError(
            "PIA127",
            f"{len(moved)} buffers of the models differ, such as running statistics of batch norm",
            "Between two sets of statistics lies none that fits the weights between",
            "loss_barrier(before, after, instances, statistics=training_instances)",
        )
    return lambda models: models


def renewed_statistics(models: Ensemble, instances: Instances) -> Ensemble:
    """The models with running statistics of batch normalisation estimated on the instances, in one
    batch."""
    inputs = instances.inputs if instances.labels.ndim == 1 else instances.inputs[0]
    members = []
    for number in range(models.size):
        model = copy.deepcopy(models.member(number)).eval()
        layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
        with torch.no_grad():
            model(inputs)
        members.append(model.eval())
    renewed = ensemble_of(members)
    return Ensemble(module=models.module, parameters=models.parameters, fixed=renewed.fixed)
