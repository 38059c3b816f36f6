"""Smaller ledgers for the archive: the same losses to the last bit, without who was drawn when."""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Final, NoReturn

import numpy as np

from per_instance_accountant.accounting.entries import ENFORCED, require_below
from per_instance_accountant.accounting.spending import Spending
from per_instance_accountant.errors import GuaranteeError, LedgerError, UnsupportedError
from per_instance_accountant.ledger import Ledger, LedgerWriter
from per_instance_accountant.ledger.merged import MOMENT
from per_instance_accountant.ledger.records import Phase, Run, Step, Thresholds
from per_instance_accountant.ledger.storage import sync_directory, unreadable

KEY: Final = "compacted_from"
"""Entry of the run's assumptions that names the digest of the ledger that was compacted."""
DRAWN_RULES: Final = ("unamplified", "last_seen")
"""Rules whose losses rest on who was drawn."""
_NOBODY: Final = Step(positions=np.empty(0, np.int64), contributions=np.empty(0, np.float32))


def compact(ledger: Ledger | str | os.PathLike[str], path: str | os.PathLike[str] | None) -> Ledger:
    """Write a ledger at ``path`` (None: in memory) that ``account`` turns into bit-identical losses.

    Every event is copied but for the steps: under the rules ``worst_case``, ``fixed_thresholds`` and
    ``sweep`` a step is charged to everybody whether drawn or not, so of each only its largest
    contribution is kept, where that exceeds the clip norm. The new ledger is a run of its own that
    names the digest of the old one in its assumptions, holds no draws, and cannot be trained on,
    planned for deletion from observations, or accounted for by a rule that needs draws.

    Raises UnsupportedError PIA060 for a run with a rule that needs draws, GuaranteeError PIA011 for a
    run whose steps show that a filter or thresholds were not kept to (that evidence would be lost),
    LedgerError PIA045 if ``path`` holds facts. ``path`` appears complete or not at all.

    >>> from per_instance_accountant.ledger import Phase, Run
    >>> writer = LedgerWriter.create(None, Run(num_instances=1000))
    >>> writer.append(Phase(
    ...     kind="train", sampling="poisson", sample_rate=0.1, noise_std=2.0, max_grad_norm=1.0,
    ...     charging="worst_case", denominator=100.0, learning_rate=0.1))
    >>> for _ in range(3):
    ...     writer.append(Step(positions=np.arange(100), contributions=np.ones(100, np.float32)))
    >>> small = compact(writer.ledger(), None)
    >>> small.num_steps, sum(len(e.positions) for e in small.events() if isinstance(e, Step))
    (3, 0)
    """
    ledger = Ledger.open(ledger)
    ledger.require_whole()
    _check(ledger)
    assumptions = {**(ledger.run.assumptions or {}), KEY: ledger.digest}
    run = replace(ledger.run, assumptions=assumptions, run_id=None)
    if path is None:
        writer = LedgerWriter.create(None, run)
        _copy(ledger, writer)
        return writer.ledger()
    return _into_directory(ledger, run, Path(path).absolute())


def _into_directory(ledger: Ledger, run: Run, path: Path) -> Ledger:
    """Written beside ``path`` and moved there when it is complete: a part of it looks like fewer steps."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        if os.path.lexists(path) and (path.is_symlink() or any(path.iterdir())):
            _refuse_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with LedgerWriter.create(draft, run) as writer:
            _copy(ledger, writer)
        os.rename(draft, path)
        sync_directory(path.parent)
    except OSError as error:
        raise unreadable(error) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Ledger.open(path)


def _refuse_path() -> NoReturn:
    raise LedgerError(
        "PIA045",
        "the path of the compacted ledger exists and is not an empty directory",
        "Nothing was written, and what is there is as it was",
        'compact(ledger, "runs/a_new_directory")',
    )


def _copy(ledger: Ledger, writer: LedgerWriter) -> None:
    """All events, steps without who was drawn, and what a merge said of its parts."""
    phase: Phase | None = None
    thresholds: Thresholds | None = None
    for event in ledger.events():
        if isinstance(event, Phase):
            phase = event
        elif isinstance(event, Thresholds):
            thresholds = event
        elif isinstance(event, Step) and phase is not None:
            if phase.charging in ENFORCED:
                require_below(event, phase, thresholds)
            event = _needed(event, phase.max_grad_norm)
        writer.append(event)
    if ledger.merge is not None:
        # Checkpoints of the old run are none of the new one.
        writer.append_merge(replace(ledger.merge, moments=np.empty(0, MOMENT)))
    writer.close(confirmed=ledger.confirmed)


def require_draws(ledger: Ledger, charging: str | None) -> None:
    """Raise GuaranteeError PIA011 for a rule that needs draws and a ledger that was compacted."""
    if charging in DRAWN_RULES and KEY in (ledger.run.assumptions or {}):
        raise GuaranteeError(
            "PIA011",
            f"the rule {charging} for a compacted ledger",
            "It charges by who was drawn, which compaction left out: everybody would be charged too little",
            "account(ledger) of the ledger before compaction, or charging=WorstCase()",
        )


def _check(ledger: Ledger) -> None:
    rules = {phase.charging for phase in ledger.phases} & set(DRAWN_RULES)
    if rules:
        raise UnsupportedError(
            "PIA060",
            f"compaction of a run that was charged by {sorted(rules)}",
            "Its losses rest on who was drawn when, which compaction leaves out",
            "keep the ledger as it is, or ledger.export('tables')",
        )
    spending = Spending.of(ledger)
    if spending is not None and not spending.kept():
        raise GuaranteeError(
            "PIA011",
            "compaction of a run whose steps show that its privacy filter was not kept to",
            "The contributions that show it would be lost, and the budgets would look certified",
            "keep the ledger as it is",
        )


def _needed(step: Step, clip: float) -> Step:
    """Nobody, or the one instance whose contribution says that the release held several clip norms."""
    if not step.contributions.max(initial=0.0) > clip:
        return _NOBODY
    largest = np.array([step.contributions.argmax()])
    return Step(positions=step.positions[largest], contributions=step.contributions[largest])
