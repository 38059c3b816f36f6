"""Every difficulty score that one trained run gives for little extra, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from per_instance_accountant.errors import UsageError
from per_instance_accountant.evaluation.measures.intervals import Interval, rank_correlation, require
from per_instance_accountant.evaluation.outcomes import outputs
from per_instance_accountant.evaluation.scores.boundary import boundary_distance
from per_instance_accountant.evaluation.scores.gradients import expansion, gradient_norms, last_layer
from per_instance_accountant.evaluation.scores.stein import stein_scores
from per_instance_accountant.finetuning.methods import Ensemble, Instances, ensemble_of

Reals = NDArray[np.float64]
_FEWEST = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Difficulty:
    """scores: name -> (n,), all oriented so that larger means harder, none of them a guarantee
    (ESTIMATE).

    el2n: |softmax - label| at the early checkpoint; grand: gradient norm there (both Paul et al. 2021);
    forgetting_events: falls from right to wrong between checkpoints, never-learned counts as one more
    than all (Toneva et al. 2019); mean_confidence: minus the mean probability of the label over
    checkpoints; mean_gradient_norm: over checkpoints; gradient_sum: sum of squared norms, the privacy
    loss up to constants; final_loss; final_margin: minus the log odds; variance_of_gradients: of the
    label's output with respect to the input, over checkpoints (Agarwal et al. 2022); boundary: minus
    the distance to the boundary; expansion: see :func:`expansion`; stein_marginal, stein_own: see
    :func:`stein_scores`. Means over the models of an ensemble.
    """

    scores: dict[str, Reals]

    def against(self, target: ArrayLike, *, draws: int = 500, seed: int = 0) -> dict[str, Interval]:
        """Rank correlation of every score with (n,) measured difficulties. Raises UsageError PIA125."""
        return {
            name: rank_correlation(score, target, draws=draws, seed=seed)
            for name, score in self.scores.items()
            if np.unique(score).size > 2
        }


def difficulty(
    checkpoints: Sequence[nn.Module | Ensemble],
    instances: Instances,
    *,
    early: int | None = None,
    kernel_limit: int = 2000,
) -> Difficulty:
    """Score n training instances from checkpoints of one training, in order, the last one trained to
    the end.

    instances: without leading dimension. early: which checkpoint EL2N and GraNd look at, default the
    first after a fifth of them. Scores that need all pairs of instances are left out above
    ``kernel_limit`` instances, those that need a linear last layer for other models. Raises UsageError
    PIA125 for fewer than 3 checkpoints, PIA071 for checkpoints of different models, GuaranteeError
    PIA011 for outputs or gradients that are no numbers.
    """
    models = [one if isinstance(one, Ensemble) else ensemble_of([one]) for one in checkpoints]
    require(len(models), _FEWEST, "checkpoints", "checkpoints=[after_each_epoch]")
    shapes = [{name: value.shape for name, value in one.parameters.items()} for one in models]
    if any(shape != shapes[0] for shape in shapes) or instances.labels.ndim != 1:
        raise UsageError(
            "PIA071",
            "checkpoints of different architectures, or instances of several models",
            "They are not of one training",
            "difficulty([model_after_epoch_1, ...], Instances(inputs=x, labels=y))",
        )
    begin = max(1, len(models) // 5) if early is None else early
    course = [_seen(one, instances) for one in models]
    norms = np.stack([gradient_norms(one, instances) for one in models])
    right = np.stack([seen.right for seen in course])
    falls = (right[:-1] & ~right[1:]).sum(0) + np.where(right.any(0), 0, len(models))
    scores = {
        "el2n": course[begin].error.mean(0),
        "grand": norms[begin].mean(0),
        "forgetting_events": falls.mean(0),
        "mean_confidence": -np.stack([seen.confidence for seen in course]).mean((0, 1)),
        "mean_gradient_norm": norms.mean((0, 1)),
        "gradient_sum": (norms**2).sum(0).mean(0),
        "final_loss": course[-1].loss.mean(0),
        "final_margin": -course[-1].margin.mean(0),
        "variance_of_gradients": _variance_of_gradients(models, instances),
        "boundary": -np.minimum(boundary_distance(models[-1], instances), 1e9).mean(0),
    }
    if len(instances) <= kernel_limit:
        stein = stein_scores(models[-1], instances)
        scores |= {"stein_marginal": stein.marginal, "stein_own": stein.own}
        if _ends_linear(models[-1], instances):
            scores["expansion"] = expansion(models[-1], instances)
    return Difficulty(scores=scores)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Seen:
    """(K, n) each."""

    right: NDArray[np.bool_]
    confidence: Reals
    loss: Reals
    margin: Reals
    error: Reals


def _seen(models: Ensemble, instances: Instances) -> _Seen:
    logits = outputs(
        models,
        Instances(
            inputs=instances.inputs.expand(models.size, *instances.inputs.shape),
            labels=instances.labels.expand(models.size, -1),
        ),
    )
    labels = instances.labels.expand(models.size, -1)[..., None]
    log_p = torch.log_softmax(logits, -1)
    own = log_p.gather(-1, labels)[..., 0]
    others = log_p.scatter(-1, labels, -torch.inf).logsumexp(-1)
    error = log_p.exp().scatter_add(-1, labels, -torch.ones_like(labels, dtype=log_p.dtype))
    return _Seen(
        right=(logits.argmax(-1) == labels[..., 0]).numpy(),
        confidence=own.exp().numpy(),
        loss=-own.numpy(),
        margin=(own - others).numpy(),
        error=error.norm(dim=-1).numpy(),
    )


def _variance_of_gradients(models: Sequence[Ensemble], instances: Instances) -> Reals:
    """(n,) variance over checkpoints of the input gradient of the label's output, mean over inputs and
    models."""
    slopes = []
    for one in models:
        points = instances.inputs.expand(one.size, *instances.inputs.shape).clone().requires_grad_(True)
        labels = instances.labels.expand(one.size, -1)[..., None]
        own = one.logits(points).gather(-1, labels).sum()
        slopes.append(torch.autograd.grad(own, points)[0].flatten(2).double())
    variance: Reals = torch.stack(slopes).var(0).mean((0, 2)).numpy()
    return variance


def _ends_linear(models: Ensemble, instances: Instances) -> bool:
    try:
        hidden, _ = last_layer(models, instances.select([0]))
    except (UsageError, IndexError):
        return False
    return hidden.ndim == 3
