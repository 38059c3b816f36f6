"""Writing a ledger: every fact is checked against the facts before it, then written as one frame."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, final

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.errors import LedgerError
from per_instance_accountant.ledger import frames
from per_instance_accountant.ledger.encoding import (
    StoredRun,
    checked_run,
    decode,
    decode_run,
    encode,
    encode_run,
    replace_contributions,
)
from per_instance_accountant.ledger.merged import Merge, encode_merge
from per_instance_accountant.ledger.progress import Progress
from per_instance_accountant.ledger.promises import (
    Promise,
    Promises,
    outstanding,
    promised_bytes,
    remove_promises,
)
from per_instance_accountant.ledger.reader import Anchor, Ledger
from per_instance_accountant.ledger.records import Event, Phase, Resume, Run, Step, new_run_id
from per_instance_accountant.ledger.refusals import check_fsync, refuse_anchor, refuse_facts, refuse_foreign
from per_instance_accountant.ledger.storage import (
    DirectoryLog,
    Log,
    Memory,
    Source,
    directory_source,
    in_use,
    make_private,
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
        self._promises = Promises(source.path, source.key)

    @classmethod
    def create(cls, path: str | os.PathLike[str] | None, run: Run, *, fsync: Fsync = "close") -> LedgerWriter:
        """Begin a ledger in a new or empty directory, or in memory for None.

        Raises LedgerError PIA045 if there are recorded facts, PIA044 if another writer is active, PIA041 if
        the system refuses; UsageError PIA070, PIA071 for ids, groups or assumptions that cannot be stored.
        """
        check_fsync(fsync)
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
        refuse_foreign(directory)
        log = DirectoryLog(directory, create=True)
        try:
            refuse_facts(directory)
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

        Steps that were promised and never measured stay charged as promised. A ledger that is ahead of the
        anchor gets ``Resume(at_step=anchor.steps)``: the later steps stay
        charged, and a Phase or Thresholds stated since the anchor must be stated again. Without an anchor the
        writer goes on where the ledger ends. An unfinished last frame is cut off. A merged ledger takes the
        anchors of its parts as well as its own.

        session: for the part of a rank, one ``new_run_id()`` for all ranks that are started together, another
        one at each start. A part always gets a Resume that names it, so that sessions are put side by side as
        they ran, whichever ranks were killed before or after they began one.

        Raises LedgerError PIA040 (anchor newer than the ledger, or of another run), PIA041, PIA042, PIA043,
        PIA044; UsageError PIA070 for a part without a session.
        """
        check_fsync(fsync)
        directory = Path(path)
        source = directory_source(directory)
        log = DirectoryLog(directory, create=False)
        try:
            walk = walk_to_end(source)
            ledger = Ledger(source, walk)
            if anchor is not None and not ledger.holds(anchor):
                refuse_anchor(anchor, ledger)
            promises = list(outstanding(promised_bytes(source), walk, source.key))
            if log.end != walk.end:
                log.truncate(walk.end)
            writer = cls(log, source, walk, fsync)
            writer._take_over(promises)
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
        self._keep_promises()
        self._record(kind, payload, event)
        if self._fsync == "step" or kind == frames.THRESHOLDS:
            self._log.sync()

    def promise(self, event: Phase | Step) -> int:
        """Record a fact now whose contributions are upper bounds until :meth:`fulfil` replaces them: its
        number, for that.

        As durable as :meth:`append` and charged like it; raises as it does. For steps that are released
        before their contributions have come from an accelerator.

        >>> phase = Phase(kind="train", sampling="poisson", sample_rate=0.5, noise_std=1.0, max_grad_norm=1.0,
        ...               charging="worst_case", denominator=2.0, learning_rate=0.1)
        >>> writer = LedgerWriter.create(None, Run(num_instances=3))
        >>> writer.append(phase)
        >>> number = writer.promise(Step(positions=np.array([1]), contributions=np.ones(1, np.float32)))
        >>> writer.fulfil([(number, np.full(1, 0.25, np.float32))])
        >>> [float(event.contributions[0]) for event in writer.ledger().events() if isinstance(event, Step)]
        [0.25]
        """
        self._require_open()
        progress = self._walk.progress
        progress.check(event)
        kind, payload = encode(event, progress.num_instances)
        number = self._walk.sequence + len(self._promises) + 1
        self._intact = False
        try:
            self._promises.add(Promise(number, kind, payload), sync=self._fsync == "step")
        except LedgerError:
            self._intact = True
            raise
        progress.apply(event)
        self._intact = True
        return number

    def fulfil(self, steps: Sequence[tuple[int, NDArray[np.float32]]]) -> None:
        """Write promised steps with their contributions: (number, (B,) contributions), oldest first.

        What was promised before one of them and is not among them is written as promised, and what was
        written as promised already, because another fact followed, stays so. Raises UsageError PIA070 for
        contributions that are not within what was promised, LedgerError PIA041; a step that was not written
        stays promised.
        """
        self._require_open()
        try:
            for number, measured in steps:
                while len(self._promises) and self._promises.oldest.sequence < number:
                    self._write_oldest()
                if len(self._promises) and self._promises.oldest.sequence == number:
                    self._write_oldest(measured)
        finally:
            if self._intact:
                self._clear_promises()

    def _write_oldest(self, measured: NDArray[np.float32] | None = None) -> None:
        promise = self._promises.oldest
        payload = promise.payload
        if measured is not None:
            payload = replace_contributions(payload, measured, self._walk.progress.num_instances)
        self._write(promise.kind, payload)
        self._promises.written()
        self._intact = True

    def _clear_promises(self) -> None:
        if self._fsync == "step":
            self._log.sync()
        self._intact = False
        try:
            self._promises.clear(sync=self._fsync == "step")
        except LedgerError:
            self._intact = True  # The file is as it was.
            raise
        self._intact = True

    def _keep_promises(self) -> None:
        """Write what is promised as it was promised, because something else is to follow."""
        if len(self._promises):
            while len(self._promises):
                self._write_oldest()
            self._clear_promises()

    def _take_over(self, promises: list[Promise]) -> None:
        """Write what an earlier session promised and did not write."""
        for promise in promises:
            event = decode(promise.kind, promise.payload, self._walk.progress.num_instances)
            self._walk.progress.check(event)
            self._record(promise.kind, promise.payload, event)
        if promises:
            self._log.sync()
        if self.source.path is not None:
            remove_promises(self.source.path)

    def append_merge(self, merge: Merge) -> None:
        """Not for callers: state once how :func:`merge_parts` made this ledger."""
        self._require_open()
        self._keep_promises()
        self._record(frames.MERGE, encode_merge(merge), merge)

    def flush(self) -> None:
        """Record that the last step was released, and force everything to the device."""
        self._require_open()
        self._keep_promises()
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
        """What is recorded so far, without reading it again. Steps still promised stay as promised."""
        if not self._closed:
            self._require_open()
            self._keep_promises()
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
        if self._process == os.getpid():
            if self._intact:
                # What cannot be written now stays in the file of promises, and counts.
                with suppress(LedgerError):
                    self._keep_promises()
            self._promises.close(remove=self._intact)
        self._log.close()

    def _write(self, kind: int, payload: bytes) -> None:
        """Append one frame; the writer is intact again when its caller has taken note."""
        walk = self._walk
        frame, chain = frames.seal(self.source.key, walk.chain, kind, walk.sequence + 1, payload)
        self._intact = False
        try:
            self._log.append(frame)
        except LedgerError:
            self._intact = True
            raise
        walk.sequence, walk.end, walk.chain = walk.sequence + 1, walk.end + len(frame), chain

    def _record(self, kind: int, payload: bytes, event: Event | Merge | None) -> None:
        self._write(kind, payload)
        walk = self._walk
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
