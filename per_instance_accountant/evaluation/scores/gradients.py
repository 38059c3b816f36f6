"""What an instance's own gradient says of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.func import grad, vmap

from per_instance_accountant.errors import GuaranteeError, UsageError
from per_instance_accountant.evaluation.measures.intervals import finite
from per_instance_accountant.finetuning.methods import Ensemble, Instances
from per_instance_accountant.finetuning.methods.ensemble import Weights

Reals = NDArray[np.float64]
_ENTRIES = 2**24
"""Gradient entries held at once: 64 MiB of float32."""


def _loss(models: Ensemble, parameters: Weights, fixed: Weights, row: Tensor, label: Tensor) -> Tensor:
    outputs = models._one(parameters, fixed, row[None])
    return torch.nn.functional.cross_entropy(outputs, label[None])


def _batches(models: Ensemble, count: int) -> list[range]:
    entries = sum(value[0].numel() for value in models.parameters.values()) * models.size
    size = max(1, _ENTRIES // max(entries, 1))
    return [range(begin, min(begin + size, count)) for begin in range(0, count, size)]


def gradient_norms(models: Ensemble, instances: Instances) -> Reals:
    """(K, n) L2 norms of the gradients of each instance's own cross-entropy, in evaluation mode.

    instances: without leading dimension, the same for all models. Raises GuaranteeError PIA011 for
    gradients that are NaN or infinite.

    >>> from per_instance_accountant.finetuning.methods import ensemble_of
    >>> model = torch.nn.Linear(1, 2, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> some = Instances(inputs=torch.tensor([[2.0]]), labels=torch.tensor([1]))
    >>> round(float(gradient_norms(ensemble_of([model]), some)[0, 0]), 4)
    1.4142
    """

    def one(parameters: Weights, fixed: Weights, row: Tensor, label: Tensor) -> Tensor:
        slopes = grad(lambda p: _loss(models, p, fixed, row, label))(parameters)
        return torch.stack([slope.square().sum() for slope in slopes.values()]).sum()

    over_rows = vmap(one, in_dims=(None, None, 0, 0))
    squares = [
        vmap(over_rows, in_dims=(0, 0, None, None))(
            models.parameters, models.fixed, instances.inputs[rows], instances.labels[rows]
        )
        for rows in _batches(models, len(instances))
    ]
    return np.sqrt(finite(torch.cat(squares, 1).double().cpu().numpy(), "squared gradient norms"))


def self_influence(checkpoints: Sequence[Ensemble], rates: ArrayLike, instances: Instances) -> Reals:
    """(K, n) sum over checkpoints of ``rate * norm^2``: TracIn's influence of an instance on itself
    (Pruthi et al. 2020), and up to constants the privacy loss of full-batch Gaussian steps, ``order
    norm^2 / (2 noise_std^2)`` each.

    rates: (c,) one per checkpoint. Raises UsageError PIA071.
    """
    weights = finite(rates, "rates").ravel()
    if weights.size != len(checkpoints) or not weights.size:
        raise UsageError(
            "PIA071",
            f"{weights.size} rates for {len(checkpoints)} checkpoints",
            "The sum is not defined",
            "self_influence(checkpoints, [learning_rate] * len(checkpoints), instances)",
        )
    squares = np.stack([gradient_norms(models, instances) ** 2 for models in checkpoints])
    total: Reals = np.tensordot(weights, squares, 1)
    return total


def last_layer(models: Ensemble, instances: Instances) -> tuple[Tensor, Tensor]:
    """(K, n, h) inputs of the last linear layer, and (K, n, classes) softmax minus label. Raises
    UsageError PIA071 if the model does not end in a linear layer that is used once."""
    layers = [part for part in models.module.modules() if isinstance(part, torch.nn.Linear)]
    if not layers:
        raise UsageError(
            "PIA071",
            "the model has no linear layer",
            "The closed form of its last gradients does not apply",
            "a classifier that ends in torch.nn.Linear",
        )
    stacked = instances.inputs.expand(models.size, *instances.inputs.shape)
    hidden: list[Tensor] = []
    logits: list[Tensor] = []
    with torch.no_grad():
        for number in range(models.size):
            one = Ensemble(
                module=models.module,
                parameters={name: value[number : number + 1] for name, value in models.parameters.items()},
                fixed={name: value[number : number + 1] for name, value in models.fixed.items()},
            )
            kept: list[Tensor] = []
            hook = layers[-1].register_forward_pre_hook(lambda _, given, kept=kept: kept.append(given[0]))
            try:
                logits.append(one.logits(stacked[number : number + 1])[0])
            finally:
                hook.remove()
            hidden.append(kept[-1])
    outputs = torch.stack(logits).double()
    if not bool(torch.isfinite(outputs).all()):
        raise GuaranteeError(
            "PIA011", "outputs are NaN or infinite", "No score means anything", "train with a smaller rate"
        )
    errors = torch.softmax(outputs, -1)
    errors = errors - torch.nn.functional.one_hot(instances.labels, errors.shape[-1])
    return torch.stack(hidden).double(), errors


def expansion(models: Ensemble, instances: Instances, *, threshold: float = 0.0) -> Reals:
    """(n,) size of the unlearning expansion: how much of the other instances' learning a step on
    instance i moves, ``sum_{j != i} max(0, <g_i, g_j> - threshold)`` over last-layer gradients, mean
    over the models. Our definition; with ``h`` the inputs of the last layer and ``e`` softmax minus
    label, ``<g_i, g_j> = (h_i h_j + 1) (e_i e_j)``.
    """
    hidden, errors = last_layer(models, instances)
    kernel = (hidden @ hidden.transpose(1, 2) + 1) * (errors @ errors.transpose(1, 2))
    kernel = (kernel - threshold).clamp_min(0)
    total: Reals = (kernel.sum(2) - kernel.diagonal(dim1=1, dim2=2)).mean(0).numpy()
    return total
