"""What a writer of a ledger refuses before it touches anything."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from per_instance_accountant.errors import LedgerError, UsageError
from per_instance_accountant.ledger import frames
from per_instance_accountant.ledger.encoding import MAX_RUN
from per_instance_accountant.ledger.reader import Anchor, Ledger
from per_instance_accountant.ledger.storage import KEY_NAME, KEY_SIZE, LOG_NAME, DirectorySource, unreadable


def check_fsync(fsync: str) -> None:
    """Raise UsageError PIA070 for an unknown policy."""
    if fsync not in ("close", "step"):
        raise UsageError(
            "PIA070",
            f"fsync is {fsync!r}, allowed are 'close' and 'step'",
            "Nobody could say which steps survive a power loss",
            'LedgerWriter.create(path, run, fsync="step")',
        )


def refuse_foreign(directory: Path) -> None:
    """A ledger makes its directory owner-only, which must not happen to a directory with other contents."""
    try:
        foreign = set(os.listdir(directory)) - {LOG_NAME, KEY_NAME}
    except FileNotFoundError:
        return
    except OSError as error:
        raise unreadable(error) from None
    if foreign:
        raise LedgerError(
            "PIA045",
            f"the directory holds {len(foreign)} files that are no part of a ledger",
            "Nothing was recorded",
            'LedgerWriter.create("runs/a_new_directory", run)',
        )


def refuse_facts(directory: Path) -> None:
    """Raise LedgerError PIA045 where there are facts: only a log without a whole frame (an interrupted
    creation) may be started afresh."""
    # The key may be gone while the facts are not, so it has no say: a wrong one makes every frame an error.
    source = DirectorySource(directory, bytes(KEY_SIZE))
    with source.reading() as (read_at, size), suppress(LedgerError):
        if next(frames.read_frames(read_at, size, source.key, lambda kind: MAX_RUN), None) is None:
            return
    raise LedgerError(
        "PIA045",
        "the directory already holds a ledger",
        "A second run in it would hide the steps of the first",
        "LedgerWriter.resume(path, anchor=anchor_of_the_checkpoint), or choose a new directory",
    )


def refuse_anchor(anchor: Anchor, ledger: Ledger) -> NoReturn:
    """Raise LedgerError PIA040 for a checkpoint that is newer than the ledger, or of another run."""
    same = anchor.run_id == ledger.anchor.run_id
    raise LedgerError(
        "PIA040",
        f"the checkpoint was saved after {anchor.steps} steps and the ledger holds {ledger.num_steps}"
        + ("" if same else ", of another run"),
        "Steps that this model has taken would not be charged",
        "LedgerWriter.resume(path_of_the_ledger_saved_with_this_checkpoint, anchor)",
    )
