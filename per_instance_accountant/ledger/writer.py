"""Writing a ledger: every fact is checked against the facts before it, then written as one frame."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Literal, NoReturn, Self, final

from per_instance_accountant.errors import LedgerError, UsageError
from per_instance_accountant.ledger import frames
from per_instance_accountant.ledger.encoding import (
    MAX_RUN,
    StoredRun,
    checked_run,
    decode_run,
    encode,
    encode_run,
)
from per_instance_accountant.ledger.merged import Merge, encode_merge
from per_instance_accountant.ledger.progress import Progress
from per_instance_accountant.ledger.reader import Anchor, Ledger
from per_instance_accountant.ledger.records import Event, Resume, Run, new_run_id
from per_instance_accountant.ledger.storage import (
    KEY_NAME,
    KEY_SIZE,
    LOG_NAME,
    DirectoryLog,
    DirectorySource,
    Log,
    Memory,
    Source,
    directory_source,
    in_use,
    make_private,
    unreadable,
)
from per_instance_accountant.ledger.walk import RunningDigest, Walk, walk_to_end

Fsync = Literal["close", "step"]
"""``"close"``: thresholds, flush and close force all facts to the device. A killed process loses nothing, a
power loss at most the steps since then. ``"step"``: every append does."""


@final
class LedgerWriter:
    """The one writer of a ledger; use it in a ``with`` block.

    A step is appended BEFORE its noise is added: from then on it is charged, whatever happens next. If
    ``append`` raises, the ledger is as it was and the step must not be released.

    >>> import numpy as np
    >>> from per_instance_accountant.ledger.records import Phase, Step
    >>> with LedgerWriter.create(None, Run(num_instances=3)) as writer:
    ...     writer.append(Phase(kind="train", sampling="poisson", sample_rate=0.5, noise_std=1.0,
    ...                         max_grad_norm=1.0, charging="worst_case", denominator=2.0, learning_rate=0.1))
    ...     writer.append(Step(positions=np.array([1]), contributions=np.ones(1, np.float32)))
    >>> writer.anchor.steps, writer.ledger().confirmed
    (1, True)
    """

    def __init__(self, log: Log, source: Source, walk: Walk, fsync: Fsync) -> None:
        """Not for callers: use :meth:`create` or :meth:`resume`."""
        self._log, self.source, self._walk, self._fsync = log, source, walk, fsync
        self._digest = RunningDigest(source)
        self._process, self._closed, self._intact = os.getpid(), False, True

    @classmethod
    def create(cls, path: str | os.PathLike[str] | None, run: Run, *, fsync: Fsync = "close") -> LedgerWriter:
        """Begin a ledger in a new or empty directory, or in memory for None.

        Raises LedgerError PIA045 if there are recorded facts, PIA044 if another writer is active, PIA041 if
        the system refuses; UsageError PIA070, PIA071 for ids, groups or assumptions that cannot be stored.
        """
        _check_fsync(fsync)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        stored = replace(checked_run(run), run_id=run.run_id or new_run_id())
        return cls.create_stored(path, StoredRun(run=stored, created=created), fsync)

    @classmethod
    def create_stored(
        cls, path: str | os.PathLike[str] | None, stored: StoredRun, fsync: Fsync = "close"
    ) -> LedgerWriter:
        """Not for callers: as :meth:`create`, with an identity and a time that are given."""
        payload = encode_run(stored)
        if path is None:
            memory = Memory()
            return cls._begin(memory, memory, payload, fsync)
        directory = Path(path)
        _refuse_foreign(directory)
        log = DirectoryLog(directory, create=True)
        try:
            _refuse_facts(directory)
            log.truncate(0)
            make_private(directory)
            return cls._begin(log, directory_source(directory), payload, fsync)
        except BaseException:
            log.close()
            raise

    @classmethod
    def _begin(cls, log: Log, source: Source, payload: bytes, fsync: Fsync) -> LedgerWriter:
        walk = Walk(source.key, lambda count, offset: b"", 0)
        walk.stored = decode_run(payload)
        walk.progress = Progress(walk.stored.run.num_instances, part=walk.stored.run.world_size > 1)
        writer = cls(log, source, walk, fsync)
        writer._record(frames.RUN, payload, None)
        log.sync()
        return writer

    @classmethod
    def resume(
        cls,
        path: str | os.PathLike[str],
        anchor: Anchor | None = None,
        *,
        session: str | None = None,
        fsync: Fsync = "close",
    ) -> LedgerWriter:
        """Continue a ledger from the model checkpoint that ``anchor`` was saved with.

        A ledger that is ahead of the anchor gets ``Resume(at_step=anchor.steps)``: the later steps stay
        charged, and a Phase or Thresholds stated since the anchor must be stated again. Without an anchor the
        writer goes on where the ledger ends. An unfinished last frame is cut off. A merged ledger takes the
        anchors of its parts as well as its own.

        session: for the part of a rank, one ``new_run_id()`` for all ranks that are started together, another
        one at each start. A part always gets a Resume that names it, so that sessions are put side by side as
        they ran, whichever ranks were killed before or after they began one.

        Raises LedgerError PIA040 (anchor newer than the ledger, or of another run), PIA041, PIA042, PIA043,
        PIA044; UsageError PIA070 for a part without a session.
        """
        _check_fsync(fsync)
        directory = Path(path)
        source = directory_source(directory)
        log = DirectoryLog(directory, create=False)
        try:
            walk = walk_to_end(source)
            ledger = Ledger(source, walk)
            if anchor is not None and not ledger.holds(anchor):
                _refuse_anchor(anchor, ledger)
            if log.end != walk.end:
                log.truncate(walk.end)
            writer = cls(log, source, walk, fsync)
            if (at_step := _step_to_resume(ledger, walk, anchor)) is not None:
                writer.append(Resume(at_step=at_step, session=session))
            return writer
        except BaseException:
            log.close()
            raise

    @property
    def num_steps(self) -> int:
        """Steps recorded so far, each of which is charged."""
        return self._walk.progress.num_steps

    @property
    def progress(self) -> Progress:
        """Not for callers: what the facts so far allow next."""
        return self._walk.progress

    @property
    def run(self) -> Run:
        """What is fixed for the whole run."""
        return self._walk.stored.run

    @property
    def anchor(self) -> Anchor:
        """This moment, for a checkpoint or certificate; flushes first."""
        if not self._closed:
            self.flush()
        return Anchor(
            sequence=self._walk.sequence,
            steps=self.num_steps,
            digest=self._digest.upto(self._walk.end),
            run_id=self._walk.stored.run_id,
        )

    def append(self, event: Event) -> None:
        """Record one fact.

        Raises LedgerError PIA045 (contradicts recorded facts), PIA044 (closed, or a forked child), PIA041
        (cannot be written); UsageError PIA070, PIA071 (NaN, negative, wrong type). The ledger is then as it
        was, except that a step whose fsync failed stays recorded and the writer is of no further use.
        """
        self._require_open()
        progress = self._walk.progress
        progress.check(event)
        kind, payload = encode(event, progress.num_instances)
        self._record(kind, payload, event)
        if self._fsync == "step" or kind == frames.THRESHOLDS:
            self._log.sync()

    def append_merge(self, merge: Merge) -> None:
        """Not for callers: state once how :func:`merge_parts` made this ledger."""
        self._require_open()
        self._record(frames.MERGE, encode_merge(merge), merge)

    def flush(self) -> None:
        """Record that the last step was released, and force everything to the device."""
        self._require_open()
        if self._walk.progress.pending:
            self._record(frames.MARK, b"", None)
        self._log.sync()

    def close(self, *, confirmed: bool = True) -> None:
        """Flush and end; further calls do nothing. A forked child or an interrupted writer writes nothing.

        confirmed: False if nobody knows whether the last step was released.
        """
        if self._closed:
            return
        try:
            if self._process == os.getpid() and self._intact:
                if confirmed:
                    self.flush()
                self._log.sync()
        finally:
            self._end()

    def ledger(self) -> Ledger:
        """What is written so far, without reading it again."""
        return Ledger(self.source, self._walk)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            # Nobody knows whether the last step was released before the exception: it stays unconfirmed.
            self._end()

    def _end(self) -> None:
        self._closed = True
        self._log.close()

    def _record(self, kind: int, payload: bytes, event: Event | Merge | None) -> None:
        walk = self._walk
        frame, chain = frames.seal(self.source.key, walk.chain, kind, walk.sequence + 1, payload)
        self._intact = False
        try:
            self._log.append(frame)
        except LedgerError:
            self._intact = True
            raise
        walk.sequence, walk.end, walk.chain = walk.sequence + 1, walk.end + len(frame), chain
        if event is None:
            walk.progress.apply_mark()
        elif isinstance(event, Merge):
            walk.merge = event
        else:
            walk.progress.apply(event)
        self._intact = True

    def _require_open(self) -> None:
        if self._closed:
            raise in_use("the writer was closed")
        if self._process != os.getpid():
            raise in_use("the writer belongs to the process that forked this one")
        if not self._intact:
            # For instance a keyboard interrupt between the system call and the bookkeeping.
            raise in_use("an append was interrupted, so this writer no longer knows where the log ends")


def _step_to_resume(ledger: Ledger, walk: Walk, anchor: Anchor | None) -> int | None:
    """Where the session that begins now starts, in steps of this ledger; None if it just goes on."""
    if anchor is None:
        return walk.progress.num_steps if walk.progress.pending or ledger.run.world_size > 1 else None
    if (merged := ledger.steps_of_part(anchor)) is not None:
        return merged
    behind = anchor.sequence < walk.sequence
    return anchor.steps if behind or ledger.run.world_size > 1 else None


def _check_fsync(fsync: str) -> None:
    if fsync not in ("close", "step"):
        raise UsageError(
            "PIA070",
            f"fsync is {fsync!r}, allowed are 'close' and 'step'",
            "Nobody could say which steps survive a power loss",
            'LedgerWriter.create(path, run, fsync="step")',
        )


def _refuse_foreign(directory: Path) -> None:
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


def _refuse_facts(directory: Path) -> None:
    """Only a log without a whole frame (an interrupted creation) may be started afresh."""
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


def _refuse_anchor(anchor: Anchor, ledger: Ledger) -> NoReturn:
    same = anchor.run_id == ledger.anchor.run_id
    raise LedgerError(
        "PIA040",
        f"the checkpoint was saved after {anchor.steps} steps and the ledger holds {ledger.num_steps}"
        + ("" if same else ", of another run"),
        "Steps that this model has taken would not be charged",
        "LedgerWriter.resume(path_of_the_ledger_saved_with_this_checkpoint, anchor)",
    )
