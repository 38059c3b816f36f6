"""The losses of the methods, per model: logits are (K, n, classes), labels (K, n), results (K,).

Derivations and the sources of each loss: ``docs/instance_wise.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from per_instance_accountant.finetuning.methods.ensemble import Weights


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """(K, n) losses in nats, one per instance.

    >>> round(float(cross_entropies(torch.zeros(1, 1, 4), torch.tensor([[2]]))), 4)
    1.3863
    """
    return functional.cross_entropy(logits.transpose(1, -1), labels, reduction="none")


def training_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """(K,) mean cross-entropy."""
    return cross_entropies(logits, labels).mean(1)


def misclassify_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """(K,) minus the mean cross-entropy over the instances that are still classified as their label, 0 if
    there is none.

    An unbounded ascent runs to NaN; here an instance is left alone as soon as another class is largest, so
    the loss is at least ``-log(classes)``.

    >>> wrong_already = torch.tensor([[[0.0, 9.0]]])
    >>> abs(float(misclassify_loss(wrong_already, torch.tensor([[0]]))))
    0.0
    """
    remembered = logits.detach().argmax(-1) == labels
    total = (cross_entropies(logits, labels) * remembered).sum(1)
    return -total / remembered.sum(1).clamp_min(1)


def relabel_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """(K,) mean cross-entropy to the wanted labels."""
    return training_loss(logits, targets)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """(K,) mean of T^2 KL(softmax(teacher / T) || softmax(student / T)), as in SCRUB (Kurmanji et al. 2023).

    >>> z = torch.tensor([[[1.0, 2.0]]])
    >>> float(distillation_loss(z, z, 2.0))
    0.0
    """
    log_q = functional.log_softmax(student / temperature, -1)
    log_p = functional.log_softmax(teacher.detach() / temperature, -1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)


def anchor_loss(parameters: Weights, start: Weights, importance: Weights) -> Tensor:
    """(K,) sum over weights of importance (weight - start)^2 / 2.

    >>> one = {"w": torch.ones(1, 2)}
    >>> float(anchor_loss({"w": torch.tensor([[3.0, 1.0]])}, one, one))
    2.0
    """
    terms = [(importance[n] * (p - start[n]).square()).flatten(1).sum(1) / 2 for n, p in parameters.items()]
    return torch.stack(terms).sum(0)


def absolute_sum(parameters: Weights) -> Tensor:
    """(K,) sum of the absolute values of all weights."""
    return torch.stack([p.abs().flatten(1).sum(1) for p in parameters.values()]).sum(0)
