"""Kernelised Stein discrepancy of one instance against the rest, as a score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from per_instance_accountant.errors import UsageError
from per_instance_accountant.evaluation.measures.intervals import finite
from per_instance_accountant.evaluation.outcomes import outputs
from per_instance_accountant.finetuning.methods import Ensemble, Instances

Reals = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SteinScores:
    """marginal: (n,) mean over j of u(z_i, z_j); own: (n,) u(z_i, z_i)."""

    marginal: Reals
    own: Reals


def stein_scores(models: Ensemble, instances: Instances, *, temperature: float = 1.0) -> SteinScores:
    """Stein kernel of ``z = (x, one-hot y)`` under the model, mean over the models.

    With ``s = (grad_x log p(y | x), p(. | x))``, ``k = exp(-|z - z'|^2 / (2 w))``, ``w = temperature *
    dim z``: ``u = k (s s' + (s - s') (z - z') / w + (dim z - |z - z'|^2 / w) / w)``. A reading of what
    Rizwan et al. 2024 use; the score in y is the softmax vector, as in the published code of its
    explainer. Costs n^2 dim z. Raises UsageError PIA070, GuaranteeError PIA011.
    """
    if not temperature > 0:
        raise UsageError(
            "PIA070",
            f"temperature is {temperature}",
            "No kernel has it",
            "stein_scores(..., temperature=1.0)",
        )
    inputs = instances.inputs.expand(models.size, *instances.inputs.shape)
    labels = instances.labels.expand(models.size, -1)
    probabilities = torch.softmax(outputs(models, Instances(inputs=inputs, labels=labels)), -1)
    points = inputs.detach().clone().requires_grad_(True)
    own = torch.log_softmax(models.logits(points), -1).gather(-1, labels[..., None]).sum()
    (slope,) = torch.autograd.grad(own, points)
    one_hot = torch.nn.functional.one_hot(instances.labels, probabilities.shape[-1])
    z = torch.cat([instances.inputs.flatten(1), one_hot], 1).double().numpy()
    s = torch.cat([slope.flatten(2).double(), probabilities], 2).numpy()
    kernels = [stein_kernel(z, finite(one, "input gradients"), temperature * z.shape[1]) for one in s]
    kernel = np.mean(kernels, axis=0)
    return SteinScores(marginal=kernel.mean(1), own=np.diag(kernel).copy())


def stein_kernel(z: Reals, s: Reals, width: float) -> Reals:
    """(n, n) Stein kernel for points z and scores s, both (n, p)."""
    squares = (z**2).sum(1)
    distance = np.maximum(squares[:, None] + squares - 2 * z @ z.T, 0.0)
    np.fill_diagonal(distance, 0.0)
    along = s @ z.T
    cross = np.diag(along)[:, None] - along - along.T + np.diag(along)
    bracket = s @ s.T + cross / width + (z.shape[1] - distance / width) / width
    kernel: Reals = np.exp(-distance / (2 * width)) * bracket
    return kernel
