"""Distance of an instance to the decision boundary."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from per_instance_accountant.evaluation.outcomes import outputs
from per_instance_accountant.finetuning.methods import Ensemble, Instances
from per_instance_accountant.finetuning.methods.ensemble import Weights

Reals = NDArray[np.float64]
_OVERSHOOT = 1.02


def boundary_distance(models: Ensemble, instances: Instances, *, iterations: int = 30) -> Reals:
    """(K, n) L2 distance to the nearest point found that is not classified as the label, in units of
    the input; 0 where the instance itself is not; inf where none was found. An upper bound on the true
    distance up to 2 %, from linearisation to each other class in turn (DeepFool, Moosavi-Dezfooli et
    al. 2016).

    >>> from per_instance_accountant.finetuning.methods import ensemble_of
    >>> model = torch.nn.Linear(1, 2, bias=False)
    >>> _ = model.load_state_dict({"weight": torch.tensor([[1.0], [-1.0]])})
    >>> some = Instances(inputs=torch.tensor([[0.5]]), labels=torch.tensor([0]))
    >>> 0.5 <= float(boundary_distance(ensemble_of([model]), some)[0, 0]) <= 0.52
    True
    """
    start = instances.inputs.expand(models.size, *instances.inputs.shape)
    labels = instances.labels.expand(models.size, -1)
    outputs(models, Instances(inputs=start, labels=labels))
    moved = start.clone()
    nearest = torch.full(labels.shape, torch.inf, dtype=torch.float64)
    for turn in range(iterations + 1):
        points = moved.detach().requires_grad_(True)
        logits = models.logits(points)
        wrong = logits.detach().argmax(-1) != labels
        apart = (moved - start).double().flatten(2).norm(dim=2)
        nearest = torch.where(wrong & torch.isinf(nearest), apart, nearest)
        if turn == iterations or not bool(torch.isinf(nearest).any()):
            break
        moved = torch.where(
            _shaped(torch.isinf(nearest), moved), moved + _step(logits, labels, points), moved
        )
    return nearest.numpy()


def _shaped(flags: Tensor, like: Tensor) -> Tensor:
    return flags.reshape(flags.shape + (1,) * (like.ndim - flags.ndim))


def _step(logits: Tensor, labels: Tensor, points: Tensor) -> Tensor:
    """To the nearest of the linearised boundaries, and a little beyond."""
    best: Weights = {}
    for other in range(logits.shape[-1]):
        ahead = logits.gather(-1, labels[..., None])[..., 0] - logits[..., other]
        (slope,) = torch.autograd.grad(ahead.sum(), points, retain_graph=True)
        length = slope.flatten(2).norm(dim=2).clamp_min(1e-12)
        radius = (ahead.detach() + 1e-4) / length
        radius = torch.where(labels == other, torch.full_like(radius, torch.inf), radius)
        step = -_shaped(_OVERSHOOT * radius.nan_to_num(posinf=0.0) / length, slope) * slope
        if not best:
            best = {"radius": radius, "step": step}
            continue
        closer = radius < best["radius"]
        best = {
            "radius": torch.where(closer, radius, best["radius"]),
            "step": torch.where(_shaped(closer, step), step, best["step"]),
        }
    return best["step"].detach()
