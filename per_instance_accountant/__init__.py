"""Per-instance Renyi privacy accounting for Opacus.

Importing this package loads neither torch nor opacus; the names below are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Eager because the function shares its name with its room: a later import of the room would otherwise
# bind the module over the function. The room itself is light.
from per_instance_accountant.audit import audit

if TYPE_CHECKING:
    from per_instance_accountant.accounting import (
        Basis,
        FixedThresholds,
        IndividualLoss,
        LastSeen,
        PrivacyFilter,
        Sweep,
        Unamplified,
        WorstCase,
        account,
    )
    from per_instance_accountant.ledger import Ledger
    from per_instance_accountant.opacus_adapter import PrivacyEngine, attach
    from per_instance_accountant.unlearning import plan, verify

__version__ = "0.1.0"

_HOME = {
    "Basis": "accounting",
    "FixedThresholds": "accounting",
    "IndividualLoss": "accounting",
    "LastSeen": "accounting",
    "Ledger": "ledger",
    "PrivacyEngine": "opacus_adapter",
    "PrivacyFilter": "accounting",
    "Sweep": "accounting",
    "Unamplified": "accounting",
    "WorstCase": "accounting",
    "account": "accounting",
    "attach": "opacus_adapter",
    "plan": "unlearning",
    "verify": "unlearning",
}

__all__ = [
    "Basis",
    "FixedThresholds",
    "IndividualLoss",
    "LastSeen",
    "Ledger",
    "PrivacyEngine",
    "PrivacyFilter",
    "Sweep",
    "Unamplified",
    "WorstCase",
    "account",
    "attach",
    "audit",
    "plan",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
