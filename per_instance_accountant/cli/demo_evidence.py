"""What ``pia demo`` measures on its own models, for the page: loss barriers, and an attack on one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from per_instance_accountant.cli import demo_training as training
from per_instance_accountant.evaluation import loss_barrier, margins, one_run_epsilon
from per_instance_accountant.finetuning.methods import Instances, ensemble_of
from per_instance_accountant.report import BarrierEvidence, ClaimEvidence, Evidence

CONFIDENCE = 0.95
_ATTACK = (
    "One more run was attacked, in which a coin decided for each instance whether it took part; the attack "
    "guesses from the margins of the final model."
)
_COINS = 20_011
"""Added to the seed, so that who takes part is independent of batches and noise."""


def snapshot(model: nn.Module) -> nn.Module:
    """The weights of a convex model in a fresh module, without the hooks that training left."""
    copy = training.convex_model()
    (weight,) = model.parameters()
    copy.weight.data.copy_(weight.detach())
    return copy


def measure(
    digits: training.Digits,
    models: Sequence[Mapping[str, nn.Module]],
    ids: Sequence[int],
    *,
    seed: int,
    steps: int,
    claimed: float,
    delta: float,
) -> Evidence:
    """models: ``original``, ``unlearned`` and ``retrained`` per seed. ids: who was forgotten. claimed: the
    CERTIFIED epsilon at ``delta`` of everybody after ``steps`` steps, which is attacked."""
    forgotten = Instances(inputs=digits.features[list(ids)], labels=digits.labels[list(ids)])
    original = ensemble_of([each["original"] for each in models])
    barriers = [
        BarrierEvidence.of(
            loss_barrier(original, ensemble_of([each[other] for each in models]), forgotten).path,
            on=f"the {len(ids)} forgotten digits",
            between=f"the original and the {other} model",
        )
        for other in ("unlearned", "retrained")
    ]
    claim = ClaimEvidence(
        name="worst case",
        claimed=claimed,
        lower=_demonstrated(digits, seed=seed, steps=steps, delta=delta),
    )
    return Evidence(barriers=tuple(barriers), claims=(claim,), confidence=CONFIDENCE, attack=_ATTACK)


def _demonstrated(digits: training.Digits, *, seed: int, steps: int, delta: float) -> float:
    """Lower bound on epsilon from one more run with the same noise, clip norm, rate and denominator, of
    which a fair coin decided for every digit whether it took part (Steinke, Nasr and Jagielski 2023)."""
    included = np.random.default_rng(seed + _COINS).random(training.TRAINING_SET) < 0.5
    _, model = training.train_convex(
        digits, seed=seed, ledger=None, steps=steps, without=np.flatnonzero(~included).tolist()
    )
    everybody = Instances(inputs=digits.features, labels=digits.labels)
    with torch.no_grad():
        scores = margins(ensemble_of([snapshot(model)]), everybody)[0]
    return one_run_epsilon(scores, included, delta=delta, confidence=CONFIDENCE).epsilon
