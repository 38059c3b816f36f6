"""The seal of a ledger: what a full verification found, kept beside the log for opening a large ledger fast.

A seal names a moment of the log, the digest of all bytes up to it and its chain value, under a tag that needs
the key. Whoever opens by a seal compares all bytes with the digest and verifies what was appended since; that
the frames before are well formed, in order and chained was verified by whoever made the seal. What this
promises: docs/ledger_format.md.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, NoReturn

from per_instance_accountant.errors import LedgerError, UsageError
from per_instance_accountant.ledger import frames
from per_instance_accountant.ledger.frames import Frame, ReadAt, damaged
from per_instance_accountant.ledger.storage import (
    SEAL_NAME,
    Source,
    read_beside,
    sync_log,
    unreadable,
    write_beside,
)
from per_instance_accountant.ledger.walk import DIGEST_PREFIX, RunningDigest, Walk, walk_to_end

_SEAL: Final = struct.Struct("<8sQQ32s32s")
_MAGIC: Final = b"PIASEAL1"
TAG_SIZE: Final = 32


@dataclass(frozen=True, slots=True)
class Seal:
    """The moment at the end of frame ``sequence``, ``end`` bytes into the log."""

    sequence: int
    end: int
    digest: bytes
    """SHA-256 of these bytes."""
    chain: bytes


def write_seal(source: Source, seal: Seal) -> None:
    """Put the seal beside the log, owner-only, complete or not at all. Raises LedgerError PIA041."""
    content = _SEAL.pack(_MAGIC, seal.sequence, seal.end, seal.digest, seal.chain)
    # Before the seal: else a power loss could leave a log that is shorter than its seal.
    sync_log(source)
    write_tagged(source, SEAL_NAME, content)


def walk_by_seal(source: Source) -> tuple[Walk, str | None]:
    """The walk at the end of the log, and the digest of the log; verifies everything, and gives no digest, if
    there is no seal. Raises LedgerError PIA042 for bytes that differ from what was sealed."""
    content = read_tagged(source, SEAL_NAME, _SEAL.size)
    if content is None:
        return walk_to_end(source), None
    if len(content) != _SEAL.size or not content.startswith(_MAGIC):
        _refuse_tag(SEAL_NAME)
    _, *values = _SEAL.unpack(content)
    seal, digest = Seal(*values), RunningDigest(source)
    with source.reading() as (read_at, size):
        if size < seal.end:
            damaged(
                seal.sequence, size, f"the log ends {seal.end - size} bytes before the end that was sealed"
            )
        if digest.upto(seal.end) != DIGEST_PREFIX + seal.digest.hex():
            damaged(seal.sequence, 0, "the bytes differ from those that were sealed")
        walk = Walk(source.key, read_at, size)
        walk.skip(_sealed_frames(read_at, seal), seal.sequence, seal.end, seal.chain)
        for _ in walk.events():
            pass
    return walk, digest.upto(walk.end)


def _sealed_frames(read_at: ReadAt, seal: Seal) -> Iterator[Frame]:
    """The frames of bytes that were compared with the seal; those of steps without their payload."""
    offset = number = 0
    while offset < seal.end:
        header = read_at(frames.HEADER_SIZE, offset)
        kind, length, sequence = (
            frames.read_header(header) if len(header) == frames.HEADER_SIZE else (0, 0, -1)
        )
        if sequence != number:
            damaged(number, offset, "what was sealed is no sequence of frames")
        start, end = offset + frames.HEADER_SIZE, offset + frames.HEADER_SIZE + length + frames.TRAILER_SIZE
        payload = b"" if kind == frames.STEP else read_at(length, start)
        yield Frame(kind, sequence, offset, end, payload, b"")
        offset, number = end, number + 1
    if (offset, number) != (seal.end, seal.sequence + 1):
        damaged(number, offset, "what was sealed ends inside of a frame")


def write_tagged(source: Source, name: str, content: bytes) -> None:
    """Put a file beside the log that nobody can make without the key."""
    if source.path is None:
        raise UsageError(
            "PIA071",
            "a ledger in memory has no directory",
            "Nothing was written",
            'LedgerWriter.create("runs/a", run)',
        )
    write_beside(source.path, name, content + _tag(source.key, name, content))


def read_tagged(source: Source, name: str, limit: int) -> bytes | None:
    """What :func:`write_tagged` put there, of at most ``limit`` bytes; None if there is no such file.

    Raises LedgerError PIA042 for a file of another key or with other bytes, PIA041.
    """
    if source.path is None:
        return None
    try:
        content = read_beside(source.path, name, limit + TAG_SIZE + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(error, name) from None
    body, tag = content[:-TAG_SIZE], content[-TAG_SIZE:]
    if not hmac.compare_digest(tag, _tag(source.key, name, body)):
        _refuse_tag(name)
    return body


def _tag(key: bytes, name: str, content: bytes) -> bytes:
    state = blake2b(name.encode() + b"\0", digest_size=TAG_SIZE, key=key, person=b"pia-ledger-file")
    state.update(content)
    return state.digest()


def _refuse_tag(name: str) -> NoReturn:
    raise LedgerError(
        "PIA042",
        f"the file {name!r} of the ledger is damaged, or was made with another key",
        "It says nothing about this ledger; the log itself may be sound",
        "Ledger.open(path).seal(), which verifies the log from the first byte to the last",
    )
