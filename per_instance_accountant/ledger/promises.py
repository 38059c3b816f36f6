"""Steps that are released before their contributions are known, as they are on an accelerator.

A promise is a fact with an upper bound in place of each contribution. It is durable before the release, in a
file beside the log, and gives way to the true fact once that is in the log. Whatever is still promised when a
ledger is read counts as it was promised: nothing that was released is ever uncharged.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from per_instance_accountant.ledger import frames
from per_instance_accountant.ledger.encoding import payload_limit
from per_instance_accountant.ledger.frames import ReadAt
from per_instance_accountant.ledger.storage import DirectoryLog, Source, read_file, unreadable
from per_instance_accountant.ledger.walk import Walk, walk_to_end

PROMISES_NAME: Final = "promises.log"
_NUMBER: Final = struct.Struct("<Q")
"""Sequence number that the fact gets in the log; the payload of the fact follows."""


@dataclass(frozen=True, slots=True)
class Promise:
    """One promised fact: its frame kind and payload, and its number in the log."""

    sequence: int
    kind: int
    payload: bytes


@final
class Promises:
    """What one writer promised and did not yet write, oldest first; kept on disk where the log is.

    directory: None for a ledger in memory. Raises LedgerError PIA041 if the system refuses.
    """

    def __init__(self, directory: Path | None, key: bytes) -> None:
        self._directory, self._key = directory, key
        self._waiting: deque[Promise] = deque()
        self._log: DirectoryLog | None = None
        self._count, self._chain = 0, frames.GENESIS

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def oldest(self) -> Promise:
        """The one that is to be written next."""
        return self._waiting[0]

    def add(self, promise: Promise, *, sync: bool) -> None:
        """Promise one more fact. If this raises, it is not promised."""
        if self._directory is not None:
            if self._log is None:
                self._log = DirectoryLog(self._directory, create=True, name=PROMISES_NAME)
                self._log.truncate(0)
            self._count, self._chain = self._append(self._log, promise, self._count, self._chain)
            if sync:
                self._log.sync()
        self._waiting.append(promise)

    def written(self) -> None:
        """The oldest is in the log: from there on its number says that the promise is void."""
        self._waiting.popleft()

    def clear(self, *, sync: bool) -> None:
        """Take what is in the log out of the file."""
        if self._log is None or self._directory is None:
            return
        if not self._waiting:
            self._log.truncate(0)
            self._count, self._chain = 0, frames.GENESIS
            return
        # Beside the old file and renamed: at no moment is a promise that waits in neither.
        name, count, chain = PROMISES_NAME + ".new", 0, frames.GENESIS
        log = DirectoryLog(self._directory, create=True, name=name)
        try:
            log.truncate(0)
            for promise in self._waiting:
                count, chain = self._append(log, promise, count, chain)
            if sync:
                log.sync()
            os.rename(self._directory / name, self._directory / PROMISES_NAME)
        except BaseException as error:
            log.close()
            raise (unreadable(error) if isinstance(error, OSError) else error) from None
        self._log.close()
        self._log, self._count, self._chain = log, count, chain

    def close(self, *, remove: bool) -> None:
        """End. remove: the file, if nothing waits; what waits stays on disk and counts."""
        log, self._log = self._log, None
        if log is not None and self._directory is not None:
            log.close()
            if remove and not self._waiting:
                remove_promises(self._directory)

    def _append(self, log: DirectoryLog, promise: Promise, count: int, chain: bytes) -> tuple[int, bytes]:
        payload = _NUMBER.pack(promise.sequence) + promise.payload
        frame, chain = frames.seal(self._key, chain, promise.kind, count, payload)
        log.append(frame)
        return count + 1, chain


def remove_promises(directory: Path) -> None:
    """Remove the file of promises, all of which are in the log. Raises LedgerError PIA041."""
    try:
        for name in (PROMISES_NAME, PROMISES_NAME + ".new"):
            (directory / name).unlink(missing_ok=True)
    except OSError as error:
        raise unreadable(error) from None


def promised_bytes(source: Source) -> bytes:
    """The file of promises; to be read BEFORE the log, which may take promises over in the meantime."""
    return b"" if source.path is None else read_file(source.path, PROMISES_NAME)


def outstanding(content: bytes, walk: Walk, key: bytes) -> Iterator[Promise]:
    """The promises that the log does not hold yet. Raises LedgerError PIA042 for damage."""

    def limit(kind: int) -> int:
        allowed = kind in (frames.PHASE, frames.STEP)
        return payload_limit(kind, walk.progress.num_instances) + _NUMBER.size if allowed else -1

    def read_at(count: int, offset: int) -> bytes:
        return content[offset : offset + count]

    for frame in frames.read_frames(read_at, len(content), key, limit):
        number = _NUMBER.unpack_from(frame.payload)[0]
        if number > walk.sequence:
            yield Promise(number, frame.kind, frame.payload[_NUMBER.size :])


def read_all(source: Source) -> tuple[Source, Walk]:
    """Verify a ledger with its outstanding promises: a source that holds them after the log, as a resuming
    writer would write them, and the pass over it. Raises LedgerError PIA041, PIA042, PIA043."""
    content = promised_bytes(source)
    walk = walk_to_end(source)
    sequence, chain, tail = walk.sequence, walk.chain, b""
    for promise in outstanding(content, walk, source.key):
        sequence += 1
        frame, chain = frames.seal(source.key, chain, promise.kind, sequence, promise.payload)
        tail += frame
    if not tail:
        return source, walk
    both = WithPromises(source, walk.end, tail)
    return both, walk_to_end(both)


@dataclass(frozen=True, slots=True)
class WithPromises:
    """The first ``end`` bytes of a source, and after them frames of outstanding promises."""

    inner: Source
    end: int
    tail: bytes

    @property
    def key(self) -> bytes:
        return self.inner.key

    @property
    def path(self) -> Path | None:
        return self.inner.path

    @contextmanager
    def reading(self) -> Iterator[tuple[ReadAt, int]]:
        with self.inner.reading() as (read_at, _):

            def read(count: int, offset: int) -> bytes:
                head = read_at(min(count, self.end - offset), offset) if offset < self.end else b""
                start = max(0, offset - self.end)
                return head + self.tail[start : start + count - len(head)]

            yield read, self.end + len(self.tail)
