"""Output-specific statements: what a realised loss promises, for budgets that were fixed before
training."""

from __future__ import annotations

import decimal
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import numpy as np

from per_instance_accountant.accounting.fold import account
from per_instance_accountant.accounting.rules import Basis
from per_instance_accountant.divergence import rdp_to_epsilon
from per_instance_accountant.errors import GuaranteeError, UsageError
from per_instance_accountant.ledger import Ledger

KEY: Final = "output_budgets"
"""Entry of the run's assumptions, which are written before the first step and never change."""


def output_budgets(*, order: float, budgets: Sequence[float], delta: float) -> dict[str, Any]:
    """The assumption that fixes a grid of Renyi budgets before training; the statements share ``delta``.

    Use: ``PrivacyEngine(assumptions=output_budgets(order=8, budgets=[0.5, 1, 2], delta=1e-5))``.
    order: above 1. budgets: rising and positive, in nats at this order. Raises UsageError PIA070.

    >>> output_budgets(order=8, budgets=[0.5, 1.0], delta=1e-5)
    {'output_budgets': {'order': 8.0, 'budgets': [0.5, 1.0], 'delta': 1e-05}}
    """
    values = [float(budget) for budget in budgets]
    rising = all(low < high for low, high in zip([0.0, *values], values, strict=False))
    if not (values and rising and math.isfinite(values[-1]) and 1 < order < math.inf and 0 < delta < 1):
        raise UsageError(
            "PIA070",
            f"{len(values)} budgets that do not rise from above 0, or order={order!r}, delta={delta!r}",
            "No statement could rest on such a grid",
            "output_budgets(order=8, budgets=[0.5, 1, 2], delta=1e-5)",
        )
    return {KEY: {"order": float(order), "budgets": values, "delta": float(delta)}}


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputStatement:
    """For every set S of courses of training on which the instance's realised loss stays at most
    ``budget``: ``P(S) <= e^epsilon Q(S) + delta_share`` and the same with P and Q exchanged;
    OUTPUT_SPECIFIC.

    order: of the realised loss. delta_total: of all budgets of the grid together.
    """

    epsilon: float
    budget: float
    order: float
    delta_share: float
    delta_total: float
    num_budgets: int

    def text(self) -> str:
        """The statement in plain words; it names neither the instance nor its realised loss."""
        share = f"{self.delta_share:.3g}"
        return (
            f"Before training, {self.num_budgets} loss budgets were written down, together with a total "
            f"failure probability of {self.delta_total:g}; each budget has {share} of it.\n"
            "In the run that took place, the loss of this record stayed within one of them.\n"
            "Consider any event that concerns only courses of training in which that is so. With the "
            "record and without it, the probabilities of the event differ by a factor of at most "
            f"{_up(math.exp(self.epsilon))} (epsilon {_up(self.epsilon)}), up to {share}, in both "
            "directions.\n"
            "This is OUTPUT_SPECIFIC. It says nothing about courses of training in which the loss would "
            "have been larger, and it is no bound that was known before the run.\n"
            "Which budget it was depends on the record: treat this statement like the record itself."
        )


def _up(value: float) -> str:
    """Four significant digits, never below the value."""
    context = decimal.Context(prec=4, rounding=decimal.ROUND_CEILING)
    return f"{float(context.create_decimal(repr(value))):.4g}"


def output_specific(ledger: Ledger | str | os.PathLike[str], id: Any) -> OutputStatement:
    """The statement for one business id, by the smallest budget of the run's grid that its realised
    loss kept to.

    A budget that is chosen after the loss is known supports no statement, so the grid must be in the
    run's assumptions (:func:`output_budgets`). Source: Yu et al. 2023 for the notion; proof in
    docs/math/filters.md. Raises GuaranteeError PIA011 without a grid or beyond it, PIA012 for
    estimates, PlanError PIA032 for an unknown id.
    """
    ledger = Ledger.open(ledger)
    grid = (ledger.run.assumptions or {}).get(KEY)
    if grid is None:
        _refuse("the run states no grid of budgets", "PrivacyEngine(assumptions=output_budgets(...))")
    checked = output_budgets(**grid)[KEY]
    position = int(ledger.positions_of([id])[0])
    loss = account(ledger, orders=[checked["order"]], partition=(position, position + 1))
    if loss.basis is Basis.ESTIMATE:
        raise GuaranteeError(
            "PIA012",
            "an output-specific statement on estimated losses",
            "Norms that nothing enforced bound nothing",
            "train with charging=Sweep(every=50)",
        )
    fitting = [budget for budget in checked["budgets"] if loss.rdp[0, 0] <= budget]
    if not fitting:
        _refuse(
            "the realised loss is beyond the largest budget", "a grid with a larger budget, in the next run"
        )
    share = checked["delta"] / len(checked["budgets"]) * (1 - 1e-15)
    epsilon = float(rdp_to_epsilon([checked["order"]], np.array([fitting[0]]), share))
    return OutputStatement(
        epsilon=epsilon,
        budget=fitting[0],
        order=checked["order"],
        delta_share=share,
        delta_total=checked["delta"],
        num_budgets=len(checked["budgets"]),
    )


def _refuse(happened: str, fix: str) -> NoReturn:
    raise GuaranteeError("PIA011", happened, "No output-specific statement holds for this instance", fix)
