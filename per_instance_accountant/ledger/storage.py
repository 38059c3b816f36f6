"""Where the bytes live: an owner-only directory with one writer, or memory. POSIX only.

A log appends whole frames or nothing; a source reads what was appended.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Protocol, final

from per_instance_accountant.errors import LedgerError
from per_instance_accountant.ledger.frames import ReadAt

LOG_NAME: Final = "events.log"
KEY_NAME: Final = "key"
SEAL_NAME: Final = "seal"
AUDIT_NAME: Final = "audit"
"""The last two can be made again from the first two."""
KEY_SIZE: Final = 32
_COMMON: Final = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_sync_file = getattr(os, "fdatasync", os.fsync)


class Source(Protocol):
    """Bytes of a ledger for reading, and the key of its chain."""

    @property
    def key(self) -> bytes: ...

    @property
    def path(self) -> Path | None: ...

    def reading(self) -> AbstractContextManager[tuple[ReadAt, int]]: ...


class Log(Protocol):
    """Bytes of a ledger for appending. ``end``: their number, always at a frame boundary."""

    @property
    def end(self) -> int: ...

    def append(self, frame: bytes) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


@final
class Memory:
    """A log and its source in one, with the same bytes as on disk."""

    path: None = None

    def __init__(self) -> None:
        self.key = secrets.token_bytes(KEY_SIZE)
        self._buffer = bytearray()

    @property
    def end(self) -> int:
        return len(self._buffer)

    def append(self, frame: bytes) -> None:
        self._buffer += frame

    def sync(self) -> None:
        """Memory does not outlive the process."""

    def close(self) -> None:
        """The bytes stay readable."""

    @contextmanager
    def reading(self) -> Iterator[tuple[ReadAt, int]]:
        yield lambda count, offset: bytes(self._buffer[offset : offset + count]), len(self._buffer)


@dataclass(frozen=True, slots=True)
class DirectorySource:
    """Reads ``path/events.log``; opened anew for every pass, so that it may be kept, copied and forked."""

    path: Path
    key: bytes = field(repr=False)

    @contextmanager
    def reading(self) -> Iterator[tuple[ReadAt, int]]:
        try:
            descriptor = _open_file(self.path, LOG_NAME, os.O_RDONLY)
            try:
                yield partial(os.pread, descriptor), os.fstat(descriptor).st_size
            finally:
                os.close(descriptor)
        except OSError as error:
            raise unreadable(error) from None


def directory_source(path: Path) -> DirectorySource:
    """Source of an existing ledger. Raises LedgerError PIA041 if its key is missing, a link or cut."""
    try:
        return DirectorySource(path.absolute(), _read_key(path))
    except OSError as error:
        raise unreadable(error) from None


def unreadable(error: OSError, name: str = f"{LOG_NAME} or {KEY_NAME}") -> LedgerError:
    """LedgerError PIA041 for a file that the system does not hand out."""
    return LedgerError(
        "PIA041",
        f"{name} cannot be used ({error.strerror or error})",
        "Nothing was read or recorded",
        'Ledger.open("runs/a"), an owned directory that is no symbolic link',
    )


def read_beside(path: Path, name: str, limit: int) -> bytes:
    """At most ``limit`` bytes of a file beside the log. Raises OSError."""
    descriptor = _open_file(path, name, os.O_RDONLY)
    with os.fdopen(descriptor, "rb") as file:
        return file.read(limit)


def write_beside(path: Path, name: str, content: bytes) -> None:
    """Write a file beside the log, owner-only, complete or not at all. Raises LedgerError PIA041."""
    draft = path / f".{name}.{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _COMMON
    try:
        with os.fdopen(os.open(draft, flags, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path / name)
        sync_directory(path)
    except OSError as error:
        raise unreadable(error, name) from None
    finally:
        draft.unlink(missing_ok=True)


def sync_log(source: Source) -> None:
    """Force what others appended to the device. Raises LedgerError PIA041."""
    if source.path is None:
        return
    try:
        descriptor = _open_file(source.path, LOG_NAME, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise unreadable(error) from None


def _read_key(path: Path) -> bytes:
    descriptor = _open_file(path, KEY_NAME, os.O_RDONLY)
    try:
        key = os.read(descriptor, KEY_SIZE + 1)
    finally:
        os.close(descriptor)
    if len(key) != KEY_SIZE:
        raise OSError(0, f"the key is not {KEY_SIZE} bytes long")
    return key


def _open_file(path: Path, name: str, flags: int) -> int:
    """Descriptor of a regular file directly inside ``path``; neither of the two may be a symbolic link."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _COMMON)
    try:
        descriptor = os.open(name, flags | _COMMON, 0o600, dir_fd=directory)
    finally:
        os.close(directory)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "not a regular file")
    return descriptor


def read_file(path: Path, name: str) -> bytes:
    """All bytes of a file of a ledger, none if there is no such file. Raises LedgerError PIA041."""
    try:
        with open(_open_file(path, name, os.O_RDONLY), "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise unreadable(error) from None


@final
class DirectoryLog:
    """The one writer of ``path/events.log``, or of another file, for as long as it is open.

    Raises LedgerError PIA044 if another writer holds the log, PIA041 if the system refuses.
    """

    def __init__(self, path: Path, *, create: bool, name: str = LOG_NAME) -> None:
        self._descriptor = -1
        try:
            if create:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._descriptor = _open_file(path, name, os.O_RDWR | os.O_APPEND | (os.O_CREAT if create else 0))
            self.end = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise unreadable(error) from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            busy = isinstance(error, BlockingIOError)
            raise in_use(
                "another writer holds the ledger" if busy else f"no lock ({error.strerror})"
            ) from None
        _open_logs.add(self)

    def append(self, frame: bytes) -> None:
        """Write the frame as a whole, or leave the log as it was and raise LedgerError PIA041."""
        try:
            if os.write(self._descriptor, frame) == len(frame):
                self.end += len(frame)
                return
            problem = "the device took a part of the frame"
        except OSError as error:
            problem = str(error.strerror)
        self.truncate(self.end)
        raise _not_written(problem)

    def truncate(self, end: int) -> None:
        """Cut the log at a frame boundary. If even that fails the log closes: the next writer cuts the torn
        frame."""
        try:
            os.ftruncate(self._descriptor, end)
        except OSError as error:
            self.close()
            raise _not_written(str(error.strerror)) from None
        self.end = end

    def sync(self) -> None:
        """Force everything to the device; after a failure the log closes, for what reached the device is
        unknown."""
        try:
            _sync_file(self._descriptor)
        except OSError as error:
            self.close()
            raise LedgerError(
                "PIA041",
                f"the device did not confirm the last frames ({error.strerror})",
                "They stay charged as far as they can be read, and the step must not be released",
                "LedgerWriter.resume(path, anchor) once the device works",
            ) from None

    def close(self) -> None:
        """Give the ledger free for another writer."""
        _open_logs.discard(self)
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()


_open_logs: weakref.WeakSet[DirectoryLog] = weakref.WeakSet()


def _close_in_child() -> None:
    # A forked worker shares the lock: were it to outlive a killed parent, nobody could resume.
    for log in list(_open_logs):
        log.close()


os.register_at_fork(after_in_child=_close_in_child)


def _not_written(problem: str) -> LedgerError:
    return LedgerError(
        "PIA041",
        f"a frame could not be written ({problem})",
        "The step is not recorded and must not be released",
        "free space on the device, then repeat the step",
    )


def in_use(happened: str) -> LedgerError:
    """LedgerError PIA044."""
    return LedgerError(
        "PIA044",
        happened,
        "Two writers would each record a part of the steps",
        "close the other writer, or LedgerWriter.create(another_directory, run)",
    )


def make_private(path: Path) -> None:
    """Make directory and log owner-only and put a fresh random key beside a log that holds nothing yet."""
    try:
        os.chmod(path, 0o700)
        for name, content in ((LOG_NAME, b""), (KEY_NAME, secrets.token_bytes(KEY_SIZE))):
            descriptor = _open_file(path, name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            try:
                os.fchmod(descriptor, 0o600)
                os.write(descriptor, content)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        for directory in (path, path.parent):
            sync_directory(directory)
    except OSError as error:
        raise unreadable(error) from None


def sync_directory(path: Path) -> None:
    """Force the entries of a directory to the device, as far as its file system can."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Some file systems cannot synchronise a directory; their entries are durable by themselves or not at
        # all.
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
