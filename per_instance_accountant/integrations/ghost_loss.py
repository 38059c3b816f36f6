"""Ghost clipping in loops that scale, log and differentiate a loss as they like.

Opacus' criterion returns an object whose ``backward`` runs two passes. Frameworks want a tensor. Here the two
passes run inside of the one backward pass of an ordinary tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

from per_instance_accountant.errors import AlignmentError, UnsupportedError


class _TwoPasses(torch.autograd.Function):
    """A number whose backward pass is that of a ghost loss, at the scale that arrives."""

    @staticmethod
    def forward(
        context: Any, leaf: torch.Tensor, loss: DPTensorFastGradientClipping, owner: FrameworkLoss
    ) -> torch.Tensor:
        context.loss, context.owner = loss, owner
        each = loss.loss_per_sample.detach()
        return each.mean() if loss.loss_reduction == "mean" else each.sum()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        loss, context.loss = context.loss, None
        if loss is None:
            raise AlignmentError(
                "PIA005",
                "a second backward pass of one loss under ghost clipping",
                "Gradients would be released without being recorded, or lost",
                "one backward pass for each batch",
            )
        context.owner.refuse_other_terms()
        with torch.enable_grad():
            # What a framework divides by is undone, as for the rows of the other modes.
            (loss * (gradient.detach() * loss.optimizer.gradient_scale)).backward()
        return None, None, None


class FrameworkLoss:
    """A criterion for loops of frameworks: ordinary tensors, and ghost clipping once :meth:`bind` was called.

    plain: the criterion itself, for evaluation and other ways of clipping.

    >>> FrameworkLoss(torch.nn.MSELoss())(torch.ones(2), torch.zeros(2)).item()
    1.0
    """

    def __init__(self, plain: Callable[..., torch.Tensor]) -> None:
        self._plain = plain
        self._private: Callable[..., DPTensorFastGradientClipping] | None = None
        self._others = 0
        """Gradients that reached parameters since the loss was computed, and are not of its two passes."""

    def bind(self, private: Any) -> None:
        """Use the criterion that ``make_private`` returned for passes that are differentiated."""
        self._private = private
        for p in private.optimizer.params:
            p.register_post_accumulate_grad_hook(self._count)

    def _count(self, parameter: torch.Tensor) -> None:
        self._others += 1

    def refuse_other_terms(self) -> None:
        """Raise UnsupportedError PIA060 where something else was differentiated with the loss: the two passes
        begin by dropping its gradient."""
        if self._others:
            raise UnsupportedError(
                "PIA060",
                "a term that belongs to no instance was combined with the loss under ghost clipping",
                "Its gradient is neither clipped nor kept; nothing was added",
                "optimizer weight_decay=... for an L2 penalty, or grad_sample_mode='hooks'",
            )

    def __call__(self, *arguments: Any, **named: Any) -> torch.Tensor:
        if self._private is None or not torch.is_grad_enabled():
            return self._plain(*arguments, **named)
        leaf, self._others = torch.zeros((), requires_grad=True), 0
        loss: torch.Tensor = _TwoPasses.apply(leaf, self._private(*arguments, **named), self)
        return loss


def ghost_criterion(private: Any) -> FrameworkLoss:
    """The criterion that ``make_private`` returned for ghost clipping, for frameworks."""
    loss = FrameworkLoss(private.criterion)
    loss.bind(private)
    return loss


class LabelLosses:
    """Losses of a Hugging Face model's outputs, one for each instance, as Opacus' ghost clipping asks for.

    losses: a function of outputs and labels that returns (B,), or None for cross entropy of logits
    (B, classes) and labels (B,). Raises UnsupportedError PIA060 for logits of another shape.

    >>> loss = LabelLosses(None, "sum")({"logits": torch.zeros(3, 2)}, torch.tensor([0, 1, 1]))
    >>> round(loss.item(), 4)
    2.0794
    """

    def __init__(self, losses: Callable[[Any, torch.Tensor], torch.Tensor] | None, reduction: str) -> None:
        self._losses, self.reduction = _classification if losses is None else losses, reduction

    def __call__(self, outputs: Any, labels: Any) -> torch.Tensor:
        labels = labels["labels"] if isinstance(labels, Mapping) else labels
        each = self._losses(outputs, labels)
        return each if self.reduction == "none" else each.mean() if self.reduction == "mean" else each.sum()


def _classification(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = outputs["logits"]
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise UnsupportedError(
            "PIA060",
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} under ghost clipping",
            "The loss of each single instance is needed, and only that of a classification is known",
            "IndividualPrivacyCallback(..., criterion=losses), losses(outputs, labels) of shape (B,)",
        )
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")
