"""The ledger: facts about a training run, append-only, crash-safe, owner-only. No conclusion is stored as a
fact."""

from per_instance_accountant.ledger.merged import Merge
from per_instance_accountant.ledger.merging import merge_parts
from per_instance_accountant.ledger.reader import Anchor, Ledger
from per_instance_accountant.ledger.records import (
    Disclosure,
    Drop,
    Event,
    Filter,
    Phase,
    PublicStep,
    Resume,
    Run,
    Step,
    Thresholds,
    new_run_id,
)
from per_instance_accountant.ledger.writer import LedgerWriter

__all__ = [
    "Anchor",
    "Disclosure",
    "Drop",
    "Event",
    "Filter",
    "Ledger",
    "LedgerWriter",
    "Merge",
    "Phase",
    "PublicStep",
    "Resume",
    "Run",
    "Step",
    "Thresholds",
    "merge_parts",
    "new_run_id",
]
