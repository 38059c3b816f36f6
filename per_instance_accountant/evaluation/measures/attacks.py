"""Membership attacks and what they score by chance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from per_instance_accountant.errors import UsageError
from per_instance_accountant.evaluation.measures.intervals import COVERAGE, model_pairs, permuted
from per_instance_accountant.evaluation.membership import AttackScore, area, null_interval
from per_instance_accountant.evaluation.outcomes import outputs
from per_instance_accountant.finetuning.methods import Ensemble, Instances

Reals = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LikelihoodAttack:
    """U-LiRA. auc: area under the curve over all (model, instance) pairs, 1/2 when unlearned and
    retrained models cannot be told apart. low, high: 95 % bootstrap interval over models. null_low,
    null_high: central 95 % when chance decides which model is called unlearned. per_instance: (n,)
    areas. tpr: true-positive rate at ``fpr``."""

    auc: float
    low: float
    high: float
    null_low: float
    null_high: float
    per_instance: Reals
    tpr: float
    fpr: float

    @property
    def within_null(self) -> bool:
        return self.null_low <= self.auc <= self.null_high


def u_lira(
    unlearned: ArrayLike,
    oracle: ArrayLike,
    *,
    fpr: float = 0.01,
    draws: int = 100,
    seed: int = 0,
) -> LikelihoodAttack:
    """Per instance, a normal law is fitted to the margins of all unlearned models but one, another to
    those of all retrained models but one; the left-out pair is scored by the log likelihood ratio
    (Hayes et al. 2024).

    unlearned, oracle: (K, n) margins, model k of both from the same seed or from independent ones; a
    pair is left out together. Raises UsageError PIA071 for other shapes, PIA125 for fewer than 8
    models, GuaranteeError PIA011.
    """
    first, second = model_pairs(unlearned, oracle, call="u_lira", seeds=64)
    scores = _ratios(first, second), _ratios(second, first)
    score_in, score_out = scores[0], -scores[1]

    def pooled(a: Reals, b: Reals) -> Reals:
        return np.array(area(_ratios(a, b).ravel(), -_ratios(b, a).ravel()))

    generator = np.random.default_rng(seed)
    rows = generator.integers(0, len(first), (draws, len(first)))
    again = [area(score_in[row].ravel(), score_out[row].ravel()) for row in rows]
    tails = [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2]
    low, high = np.quantile(again, tails)
    null_low, null_high = np.quantile(permuted(pooled, first, second, draws=draws, seed=seed + 1), tails)
    threshold = np.quantile(score_out, 1 - fpr)
    return LikelihoodAttack(
        auc=area(score_in.ravel(), score_out.ravel()),
        low=float(low),
        high=float(high),
        null_low=float(null_low),
        null_high=float(null_high),
        per_instance=np.array([area(a, b) for a, b in zip(score_in.T, score_out.T, strict=True)]),
        tpr=float((score_in > threshold).mean()),
        fpr=fpr,
    )


def _ratios(own: Reals, other: Reals) -> Reals:
    """(K, n) log likelihood of each own value under the others of its side minus under the other
    side's, both without pair k."""
    (mean1, var1), (mean2, var2) = _left_out(own), _left_out(other)
    near = np.log(var1) + (own - mean1) ** 2 / var1
    far = np.log(var2) + (own - mean2) ** 2 / var2
    return (far - near) / 2


def _left_out(values: Reals) -> tuple[Reals, Reals]:
    """(K, n) mean and variance without row k."""
    rest = len(values) - 1
    mean = (values.sum(0) - values) / rest
    centred = values - values.mean(0)
    squares = (centred**2).sum(0) - centred**2
    variance = (squares - rest * ((centred.sum(0) - centred) / rest) ** 2) / (rest - 1)
    return mean, np.maximum(variance, 1e-6)


def attack_statistics(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Reals]:
    """What the simple attacks look at; larger means "was trained on".

    logits: (..., n, classes), labels: (..., n). correctness: 1 if the label is predicted; confidence:
    probability of the label; loss: minus the cross-entropy; entropy: minus that of the probabilities;
    modified_entropy: minus ``-(1 - p_y) log p_y - sum_{c != y} p_c log(1 - p_c)`` (Song and Mittal
    2021).

    >>> found = attack_statistics(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    >>> round(float(found["modified_entropy"][0]), 4), float(found["confidence"][0])
    (-0.6931, 0.5)
    """
    log_p = torch.log_softmax(logits.double(), -1)
    p = log_p.exp()
    own = log_p.gather(-1, labels[..., None])[..., 0]
    # log(1 - p) from the other outputs: 1 - p is 0 in floating point for confident models.
    others = torch.stack(
        [
            log_p.index_fill(-1, torch.tensor([c], device=log_p.device), -torch.inf).logsumexp(-1)
            for c in range(log_p.shape[-1])
        ],
        -1,
    )
    wrong = torch.ones_like(p).scatter(-1, labels[..., None], 0.0)
    rest = -(wrong * p * others).sum(-1)
    values = {
        "correctness": (logits.argmax(-1) == labels).double(),
        "confidence": own.exp(),
        "loss": own,
        "entropy": torch.special.xlogy(p, p).sum(-1),
        "modified_entropy": -(-torch.expm1(own) * -own + rest),
    }
    return {name: value.cpu().numpy() for name, value in values.items()}


def simple_attacks(
    models: Ensemble, forget: Instances, unseen: Instances, *, draws: int = 2000, seed: int = 0
) -> dict[str, list[AttackScore]]:
    """Every simple attack on K models: instances to forget against instances never seen, with the null
    of ranks.

    forget, unseen: stacked (K, n, ...). Raises UsageError PIA126 if several instances to forget have
    one class and the unseen do not: the attack would then tell classes apart; PIA070 for fewer than two
    unseen instances.
    """
    if len(unseen) < 2 or draws < 100:
        raise UsageError(
            "PIA070",
            f"{len(unseen)} unseen instances and {draws} draws",
            "Without unseen instances and a null no score says anything",
            "simple_attacks(models, forget, test)",
        )
    classes = [torch.unique(part.labels).tolist() for part in (forget, unseen)]
    if len(forget) > 1 and len(classes[0]) == 1 and classes[1] != classes[0]:
        raise UsageError(
            "PIA126",
            f"{len(forget)} instances to forget have one class, the unseen ones {len(classes[1])}",
            "The attack would tell classes apart, not members",
            "simple_attacks(models, forget, unseen.select(positions_of_that_class))",
        )
    first = attack_statistics(outputs(models, forget), forget.stacked.labels)
    second = attack_statistics(outputs(models, unseen), unseen.stacked.labels)
    low, high = null_interval(len(forget), len(unseen), draws, seed)
    return {
        name: [
            AttackScore(auc=area(a, b), null_low=low, null_high=high)
            for a, b in zip(first[name], second[name], strict=True)
        ]
        for name in first
    }
