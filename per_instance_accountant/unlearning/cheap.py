"""Training for cheap deletion: the thresholds under which everybody can be forgotten in a given number of
steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np

from per_instance_accountant.ledger import Phase
from per_instance_accountant.unlearning.applicable import Facts, applicable
from per_instance_accountant.unlearning.assumptions import Assumptions
from per_instance_accountant.unlearning.bounds.interface import Measure, require
from per_instance_accountant.unlearning.chain import TrainingChain
from per_instance_accountant.unlearning.mechanism import Mechanism
from per_instance_accountant.unlearning.planner import Question

_HALVINGS: Final = 24


def largest_threshold(
    phase: Phase,
    *,
    training_steps: int,
    num_instances: int,
    steps: int,
    target_epsilon: float,
    order: float | None = None,
    target_delta: float | None = None,
    assumptions: Assumptions | Mapping[str, Any] | None = None,
    direction: str = "both",
) -> float:
    """Largest threshold c, at most the clip norm, such that an instance clipped at c in each of
    ``training_steps`` steps of ``phase`` can be forgotten in ``steps`` steps; rounded down to a float32, in
    which thresholds are stored; 0.0 if there is none.

    Chosen before training, it makes deletion cheap for everybody: ``FixedThresholds`` at most c, and data
    whose gradients cannot exceed it (for a linear model, rows scaled to norm ``c / sqrt(2)``), so that
    clipping never binds. A distance filter that drops an instance by its measured norms cannot replace it
    (docs/math/unlearning_bounds.md). Raises UsageError PIA070, PlanError PIA031 (assumptions).

    >>> from per_instance_accountant.unlearning import softmax_regression
    >>> phase = Phase(kind="train", sampling="poisson", sample_rate=1.0, noise_std=10.0, max_grad_norm=1.42,
    ...     charging="fixed_thresholds", denominator=200.0, learning_rate=1.0, weight_decay=0.02)
    >>> known = softmax_regression(feature_norm=1.0, num_instances=200, denominator=200.0)
    >>> round(largest_threshold(phase, training_steps=100, num_instances=200, steps=50, target_epsilon=0.5,
    ...     target_delta=1e-5, assumptions=known), 2)
    0.45
    """
    for name, value, least in (
        ("training_steps", training_steps, 1),
        ("num_instances", num_instances, 2),
        ("steps", steps, 0),
    ):
        require(value >= least and value == int(value), name, value, f"[{least}, inf)")
    question = Question.of(target_epsilon, direction, steps, None)
    if assumptions is not None and not isinstance(assumptions, Assumptions):
        assumptions = Assumptions.from_dict(assumptions)
    mechanism = Mechanism.of(phase)
    facts = Facts(
        chain=_alone(mechanism, 0.0, training_steps, num_instances),
        assumptions=assumptions or Assumptions(),
        measure=Measure(order=order, delta=target_delta),
        mechanism=mechanism,
    )

    def enough(threshold: float) -> bool:
        chain = replace(facts.chain, thresholds=np.array([[threshold]]))
        bounds, _ = applicable(replace(facts, chain=chain), direction)
        return any(bound.value(question.limit) <= question.target for bound in bounds)

    low, high = 0.0, float(phase.max_grad_norm)
    if enough(high):
        return high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    stored = np.float32(low)
    return float(stored if stored <= low else np.nextafter(stored, np.float32(0)))


def _alone(mechanism: Mechanism, threshold: float, steps: int, num_instances: int) -> TrainingChain:
    """What the ledger of such a run will say of one instance with this threshold."""
    return TrainingChain(
        counts=np.array([steps], dtype=np.int64),
        mechanisms=(mechanism,),
        thresholds=np.array([[threshold]]),
        forgotten=np.zeros(1, dtype=np.bool_),
        smallest_threshold=np.array([np.inf]),
        thresholds_from_sweep=np.zeros(1, dtype=np.bool_),
        abandoned_steps=0,
        at_threshold=0,
        above_clip=0,
        largest_contribution=0.0,
        num_instances=num_instances,
        last_training=mechanism,
    )
