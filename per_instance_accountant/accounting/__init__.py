"""The fold from facts to individual losses, and the charging rules it applies."""

from per_instance_accountant.accounting.fold import account
from per_instance_accountant.accounting.loss import IndividualLoss
from per_instance_accountant.accounting.rules import (
    Basis,
    ChargingRule,
    FixedThresholds,
    LastSeen,
    Sweep,
    Unamplified,
    WorstCase,
)

__all__ = [
    "Basis",
    "ChargingRule",
    "FixedThresholds",
    "IndividualLoss",
    "LastSeen",
    "Sweep",
    "Unamplified",
    "WorstCase",
    "account",
]
