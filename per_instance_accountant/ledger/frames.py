"""Frames of the event log: how bytes are cut, checked and chained.

``header (24) | payload | CRC-32 of the payload (4) | chain value (32) | end mark (1)``; the header carries
its own checksum, so that a flipped length is damage and not an unfinished write. Layout and recovery rules:
docs/ledger_format.md.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, NoReturn
from zlib import crc32

from per_instance_accountant.errors import LedgerError

MAGIC: Final = b"PIAL"
VERSION: Final = 1
"""The one format version that this package writes and reads."""
RUN, PHASE, THRESHOLDS, STEP, RESUME, MARK, FILTER, DROP, PUBLIC, MERGE, DISCLOSURE = range(1, 12)
GENESIS: Final = bytes(32)

_FIELDS: Final = struct.Struct("<4sHHIQ")
_CHECK: Final = struct.Struct("<I")
HEADER_SIZE: Final = _FIELDS.size + _CHECK.size
CHAIN_SIZE: Final = 32
END: Final = b"\xa5"
"""Last byte of a frame, with four bits set: no single flipped bit makes it look like a byte never written."""
TRAILER_SIZE: Final = _CHECK.size + CHAIN_SIZE + len(END)
BLOCK: Final = 1 << 20

ReadAt = Callable[[int, int], bytes]
"""``read_at(count, offset)``: at most ``count`` bytes from ``offset``, fewer only at the end of the log."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One whole, verified frame. ``end``: offset of the first byte after it."""

    kind: int
    sequence: int
    offset: int
    end: int
    payload: bytes
    chain: bytes


def seal(key: bytes, previous: bytes, kind: int, sequence: int, payload: bytes) -> tuple[bytes, bytes]:
    """Bytes of the next frame and its chain value ``BLAKE2b(key, previous || header || payload)``.

    >>> frame, chain = seal(bytes(32), GENESIS, MARK, 1, b"")
    >>> len(frame), frame[-33:-1] == chain
    (61, True)
    """
    fields = _FIELDS.pack(MAGIC, VERSION, kind, len(payload), sequence)
    header = fields + _CHECK.pack(crc32(fields))
    chain = _chain(key, previous, header, payload).digest()
    return b"".join((header, payload, _CHECK.pack(crc32(payload)), chain, END)), chain


def _chain(key: bytes, previous: bytes, header: bytes, payload: bytes) -> blake2b:
    state = blake2b(previous, digest_size=CHAIN_SIZE, key=key, person=b"pia-ledger-chain")
    state.update(header)
    state.update(payload)
    return state


def damaged(sequence: int, offset: int, what: str) -> NoReturn:
    """Raise LedgerError PIA042 for the frame that starts at byte ``offset``."""
    raise LedgerError(
        "PIA042",
        f"frame {sequence} at byte {offset}: {what}",
        "Steps may be missing or altered, so no loss computed from this ledger would be a bound",
        'Ledger.open("runs/backup-of-this-ledger")',
    )


def read_header(header: bytes) -> tuple[int, int, int]:
    """Kind, length of the payload and sequence number; of bytes that were verified before."""
    _, _, kind, length, sequence = _FIELDS.unpack_from(header)
    return kind, length, sequence


def read_frames(
    read_at: ReadAt,
    size: int,
    key: bytes,
    limit: Callable[[int], int],
    start: tuple[int, int, bytes] = (0, 0, GENESIS),
) -> Iterator[Frame]:
    """Whole frames of the first ``size`` bytes, verified one by one; stops at an unfinished last frame.

    start: offset and sequence number of the first of them, and the chain value before it. limit: kind ->
    largest payload such a frame may have here, negative for a kind that must not occur.
    Memory is bounded by the payloads: nothing is allocated for a length before the bytes have passed the
    checks. Raises LedgerError PIA042 (damage) or PIA043 (format version).
    """
    window = _Window(read_at, size)
    offset, sequence, previous = start
    while (frame := _next_frame(window, key, limit, offset, sequence, previous)) is not None:
        offset, sequence, previous = frame.end, frame.sequence + 1, frame.chain
        yield frame


def _next_frame(
    window: _Window, key: bytes, limit: Callable[[int], int], offset: int, sequence: int, previous: bytes
) -> Frame | None:
    header = window.take(HEADER_SIZE, offset)
    if len(header) < HEADER_SIZE:
        return None
    if not _is_sound(header):
        if window.is_zero(offset + HEADER_SIZE):
            return None
        damaged(sequence, offset, "the header is not one that was written")
    _, version, kind, length, number = _FIELDS.unpack_from(header)
    if version != VERSION:
        _refuse_version(version)
    if number != sequence:
        damaged(sequence, offset, f"its sequence number is {number}")
    if length > limit(kind):
        damaged(sequence, offset, f"a frame of kind {kind} with {length} bytes of payload cannot stand here")
    end = offset + HEADER_SIZE + length + TRAILER_SIZE
    if end > window.size:
        return None
    start = offset + HEADER_SIZE
    problem, chain = _verify(window, key, previous, header, start, length)
    if problem is not None:
        if window.is_zero(end - len(END)):
            return None
        damaged(sequence, offset, problem)
    return Frame(kind, sequence, offset, end, window.take(length, start), chain)


def _is_sound(header: bytes) -> bool:
    checksum = _CHECK.unpack_from(header, _FIELDS.size)[0]
    return header.startswith(MAGIC) and checksum == crc32(header[: _FIELDS.size])


def _verify(
    window: _Window, key: bytes, previous: bytes, header: bytes, start: int, length: int
) -> tuple[str | None, bytes]:
    """What is wrong with the frame (None: nothing), and its chain value; holds one block in memory."""
    checksum, state = 0, _chain(key, previous, header, b"")
    for offset in range(start, start + length, BLOCK):
        block = window.take(min(BLOCK, start + length - offset), offset)
        checksum = crc32(block, checksum)
        state.update(block)
    trailer, chain = window.take(TRAILER_SIZE, start + length), state.digest()
    if len(trailer) < TRAILER_SIZE or _CHECK.unpack_from(trailer)[0] != checksum:
        return "the payload checksum differs", chain
    if trailer[_CHECK.size : -len(END)] != chain:
        return "the chain value differs: rewritten frames, or a key file of another ledger", chain
    if not trailer.endswith(END):
        return "its end mark differs", chain
    return None, chain


def _refuse_version(version: int) -> NoReturn:
    raise LedgerError(
        "PIA043",
        f"the ledger has format version {version}; this version of the package knows {VERSION}",
        "Facts in an unknown format cannot be turned into a bound",
        "pip install --upgrade per-instance-accountant",
    )


class _Window:
    """One block of look-ahead over ``read_at``, because most frames are far smaller than a read call is
    worth."""

    def __init__(self, read_at: ReadAt, size: int) -> None:
        self.size = size
        self._read_at, self._block, self._start = read_at, b"", 0

    def take(self, count: int, offset: int) -> bytes:
        count = max(0, min(count, self.size - offset))
        low = offset - self._start
        if low < 0 or low + count > len(self._block):
            if count >= BLOCK:
                return self._read_at(count, offset)
            self._block = self._read_at(min(BLOCK, self.size - offset), offset)
            self._start, low = offset, 0
        return self._block[low : low + count]

    def is_zero(self, offset: int) -> bool:
        """Whether every byte from ``offset`` to the end is zero: space that was reserved but never
        written."""
        for at in range(offset, self.size, BLOCK):
            block = self.take(BLOCK, at)
            if block.count(0) != len(block):
                return False
        return True
