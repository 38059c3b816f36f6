"""What the recorded contributions of a step say about the bounds at which it is charged."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from per_instance_accountant.errors import GuaranteeError
from per_instance_accountant.ledger.records import Phase, Step, Thresholds

ENFORCED: Final = ("fixed_thresholds", "sweep")
"""Rules that charge at the thresholds at which instances were clipped."""
_SLACK: Final = 1e-6
"""Relative; contributions are rounded up to float32."""


def clip_norms(step: Step, phase: Phase) -> int:
    """How many clip norms the largest contribution needs: above 1 if an instance was drawn several times."""
    return math.ceil(float(step.contributions.max(initial=0.0)) / phase.max_grad_norm - _SLACK)


def above_bounds(step: Step, phase: Phase, thresholds: Thresholds | None) -> bool:
    """Whether a contribution lies above the threshold of its instance, and none above the clip norm: then
    everybody is charged at least as much as the largest of them."""
    if thresholds is None or clip_norms(step, phase) > 1:
        return False
    bounds = thresholds.values[step.positions].astype(np.float64)
    return bool((step.contributions > bounds * (1 + _SLACK)).any())


def require_below(step: Step, phase: Phase, thresholds: Thresholds | None) -> None:
    """Raise GuaranteeError PIA011 if :func:`above_bounds`: then clipping did not enforce what is charged."""
    if above_bounds(step, phase, thresholds):
        raise GuaranteeError(
            "PIA011",
            "a step records a contribution above the threshold of its instance",
            "It was not clipped there, or drawn several times, so no individual number of this run holds",
            "account(ledger, charging=WorstCase()); train again with the optimizer of make_private",
        )


def rule_in_fact(rule: str, thresholds: Thresholds | None) -> str:
    """``sweep`` for fixed thresholds that were stated as shaped by what was released; else ``rule``.

    >>> rule_in_fact("fixed_thresholds", Thresholds(values=np.ones(1, np.float32), source="sweep"))
    'sweep'
    """
    shaped = thresholds is not None and thresholds.source == "sweep"
    return "sweep" if rule == "fixed_thresholds" and shaped else rule
