"""Passing over the bytes of a ledger: verified events, and the digest of a prefix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import Final, final

from per_instance_accountant.errors import LedgerError
from per_instance_accountant.ledger import frames
from per_instance_accountant.ledger.encoding import MAX_RUN, StoredRun, decode, decode_run, payload_limit
from per_instance_accountant.ledger.frames import BLOCK, Frame, ReadAt, damaged, read_frames
from per_instance_accountant.ledger.merged import Merge, decode_merge
from per_instance_accountant.ledger.progress import Progress
from per_instance_accountant.ledger.records import Event
from per_instance_accountant.ledger.storage import Source

DIGEST_PREFIX: Final = "sha256:"


@final
class Walk:
    """One verified pass over a source; afterwards it knows the run, the progress and the last whole frame."""

    stored: StoredRun
    progress: Progress

    def __init__(self, key: bytes, read_at: ReadAt, size: int) -> None:
        self.sequence, self.end, self.chain = -1, 0, frames.GENESIS
        self.merge: Merge | None = None
        self._key, self._read_at, self._size = key, read_at, size
        self._frames = read_frames(read_at, size, key, self._limit)

    def _limit(self, kind: int) -> int:
        if self.sequence < 0:
            return MAX_RUN if kind == frames.RUN else -1
        return payload_limit(kind, self.progress.num_instances)

    def skip(self, known: Iterable[Frame], sequence: int, end: int, chain: bytes) -> None:
        """Pass over frames that were verified before, of steps without looking into them, and go on behind
        them, at the end of frame ``sequence``."""
        for frame in known:
            if frame.kind == frames.STEP:
                self.progress.count_step()
            else:
                self._take_or_refuse(frame)
        self.sequence, self.end, self.chain = sequence, end, chain
        start = (end, sequence + 1, chain)
        self._frames = read_frames(self._read_at, self._size, self._key, self._limit, start)

    def events(self) -> Iterator[Event | None]:
        """Every event in order; None for Run, marks and a merge. Raises LedgerError PIA042, PIA043."""
        for frame in self._frames:
            event = self._take_or_refuse(frame)
            self.sequence, self.end, self.chain = frame.sequence, frame.end, frame.chain
            yield event

    def _take_or_refuse(self, frame: Frame) -> Event | None:
        try:
            return self._take(frame)
        # Whatever a parser or a record raises: these bytes are no facts, and the text may hold ids.
        except Exception as error:
            reason = getattr(error, "code", type(error).__name__)
            damaged(frame.sequence, frame.offset, f"its payload is refused ({reason})")

    def _take(self, frame: Frame) -> Event | None:
        if frame.kind == frames.RUN:
            self.stored = decode_run(frame.payload)
            self.progress = Progress(self.stored.run.num_instances, part=self.stored.run.world_size > 1)
            return None
        if frame.kind == frames.MARK:
            self.progress.apply_mark()
            return None
        if frame.kind == frames.MERGE:
            if self.merge is not None or self.stored.run.world_size > 1:
                raise ValueError("a second merge, or one inside a part")
            self.merge = decode_merge(frame.payload, self.progress.num_steps)
            return None
        event = decode(frame.kind, frame.payload, self.progress.num_instances)
        self.progress.check(event)
        self.progress.apply(event)
        return event


def walk_to_end(source: Source) -> Walk:
    """Verify the whole ledger. Raises LedgerError PIA041 (missing or empty), PIA042, PIA043."""
    with source.reading() as (read_at, size):
        walk = Walk(source.key, read_at, size)
        for _ in walk.events():
            pass
    if walk.sequence < 0:
        raise LedgerError(
            "PIA041",
            "the log holds no whole frame: its creation was interrupted",
            "No step was ever recorded in it",
            "LedgerWriter.create(path, run)",
        )
    return walk


class RunningDigest:
    """SHA-256 over a growing prefix, reading each byte once."""

    def __init__(self, source: Source) -> None:
        self._source, self._hash, self._end = source, sha256(), 0

    def upto(self, end: int) -> str:
        """``"sha256:<hex>"`` over the first ``end`` bytes; ``end`` must not fall from call to call."""
        with self._source.reading() as (read_at, _):
            for offset in range(self._end, end, BLOCK):
                self._hash.update(read_at(min(BLOCK, end - offset), offset))
        self._end = end
        return DIGEST_PREFIX + self._hash.hexdigest()
