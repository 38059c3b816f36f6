"""Judgement: individual budgets, groups, the statement of what the numbers mean.

This room is imported with the package, so it stays light: the arithmetic is loaded on the first call.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from per_instance_accountant.accounting import ChargingRule
    from per_instance_accountant.audit.budget import BudgetAudit
    from per_instance_accountant.ledger import Ledger

__all__ = ["audit"]


def audit(
    ledger: Ledger | str | os.PathLike[str],
    delta: float = 1e-5,
    *,
    charging: ChargingRule | None = None,
    tight: bool = True,
    memory: int = 1 << 30,
) -> BudgetAudit:
    """Individual (epsilon, delta) of every instance, the worst case, and what they mean.

    ledger: an open Ledger or the path of one. delta: in (0, 1). charging: a rule, or None for that
    of the run.
    tight: whether CERTIFIED epsilons come from the law of the privacy loss (5 to 40 % smaller, some
    seconds) and not from Renyi divergences only; other bases rest on Renyi divergences in any case.
    memory: bytes that Renyi curves may take; data sets beyond it are folded in parts, each of which
    reads the ledger once. Every epsilon is an upper bound on the basis that the result names. Raises
    what :func:`per_instance_accountant.account` raises, and UsageError PIA070 for a delta outside
    (0, 1).
    """
    from per_instance_accountant.audit.budget import audit_budgets

    return audit_budgets(ledger, delta, charging, tight, memory)
