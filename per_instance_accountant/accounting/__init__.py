"""The fold from facts to individual losses, and the charging rules it applies."""

from per_instance_accountant.accounting.compaction import compact
from per_instance_accountant.accounting.expectation import (
    ExpectedLoss,
    expectation_orders,
    expected_composition,
)
from per_instance_accountant.accounting.filter import PrivacyFilter
from per_instance_accountant.accounting.fold import account
from per_instance_accountant.accounting.groups import account_groups
from per_instance_accountant.accounting.loss import IndividualLoss
from per_instance_accountant.accounting.odometer import Odometer
from per_instance_accountant.accounting.partitions import account_in_parts, dask_mapper, join, partitions
from per_instance_accountant.accounting.rules import (
    Basis,
    ChargingRule,
    FixedThresholds,
    LastSeen,
    Sweep,
    Unamplified,
    WorstCase,
)
from per_instance_accountant.accounting.running import RunningLoss
from per_instance_accountant.accounting.spending import CertifiedBudget, Spending, certified_budget
from per_instance_accountant.accounting.statements import output_budgets, output_specific

__all__ = [
    "Basis",
    "CertifiedBudget",
    "ChargingRule",
    "ExpectedLoss",
    "FixedThresholds",
    "IndividualLoss",
    "LastSeen",
    "Odometer",
    "PrivacyFilter",
    "RunningLoss",
    "Spending",
    "Sweep",
    "Unamplified",
    "WorstCase",
    "account",
    "account_groups",
    "account_in_parts",
    "certified_budget",
    "compact",
    "dask_mapper",
    "expectation_orders",
    "expected_composition",
    "join",
    "output_budgets",
    "output_specific",
    "partitions",
]
