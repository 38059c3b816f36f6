"""Judgement: individual budgets, groups, the statement of what the numbers mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from per_instance_accountant.audit.budget import BudgetAudit

__all__ = ["audit"]


def audit(*args: object, **kwargs: object) -> BudgetAudit:
    raise NotImplementedError
