"""What an optimizer's update rule is called, and what a ledger says about thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer

from per_instance_accountant.ledger import Ledger, Resume, Step, Thresholds


def recorded_thresholds(ledger: Ledger) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
    """Thresholds last stated as fixed, and those in force: a resume leaves behind what was stated after
    it."""
    fixed = in_force = None
    steps = stated_at = 0
    for event in ledger.events():
        if isinstance(event, Thresholds):
            in_force, stated_at = event.values, steps
            fixed = event.values if event.source == "fixed" else fixed
        elif isinstance(event, Resume) and stated_at >= event.at_step:
            in_force = None
        steps += isinstance(event, Step)
    return fixed, in_force


def group_rule(group: Mapping[str, Any]) -> tuple[float, float, float, bool]:
    """Learning rate, weight decay, momentum and direction of one parameter group."""
    decay, momentum = group.get("weight_decay", 0.0), group.get("momentum", 0.0)
    return float(group["lr"]), float(decay), float(momentum), bool(group.get("maximize", False))


def optimizer_name(private: DPOptimizer, rules: Sequence[tuple[Any, ...]]) -> str:
    """Name of the update rule: ``"SGD"`` only when every parameter moves by one plain descent rule, which
    bounds can rely on."""
    optimizer, clipping = private.original_optimizer, getattr(private, "clipping", "flat")
    name = type(optimizer).__name__
    if clipping != "flat":
        return f"{name} with {clipping} clipping"
    if type(optimizer) is not torch.optim.SGD:
        return name if name != "SGD" else "a class named SGD"
    if len(set(rules)) > 1:
        return "SGD with different groups"
    return "SGD maximizing" if rules[0][-1] else "SGD"
