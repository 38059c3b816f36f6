"""Files of individual values: owner-only, whole or not at all, inert in a spreadsheet."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from per_instance_accountant.errors import UsageError

FORMULA_STARTS: Final = ("=", "+", "-", "@", "\t", "\r", "\n")


def write_private(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path`` with mode 0600, whole or not at all; a symbolic link is replaced, not
    followed.

    Raises UsageError PIA070 for a path that exists and is no regular file, OSError for one that the system
    refuses.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        raise UsageError(
            "PIA070",
            "the file to write is not a regular file",
            "Nothing was written",
            "name a file, new or to be replaced, in a directory that exists",
        )
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def inert(cell: Any) -> Any:
    """The cell, with an apostrophe before text that a spreadsheet would run as a formula; numbers as they
    are.

    >>> inert("=SUM(A1)"), inert(-1.5), inert("ann")
    ("'=SUM(A1)", -1.5, 'ann')
    """
    return "'" + cell if isinstance(cell, str) and cell.startswith(FORMULA_STARTS) else cell


def csv_bytes(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """A CSV file in UTF-8 whose cells are all :func:`inert`; numbers are written exactly."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow([inert(name) for name in names])
    writer.writerows([inert(cell) for cell in row] for row in rows)
    return stream.getvalue().encode("utf-8", errors="backslashreplace")
