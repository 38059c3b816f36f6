"""What a command is given: ids, JSON files, ``module:attr`` references."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.errors import UsageError


def _read_text(path: str, option: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "PIA070",
            f"{option} names a file that cannot be read as text ({type(error).__name__})",
            "Nothing was computed",
            f"{option} with the path of an existing UTF-8 file",
        ) from error


def _lines(text: str) -> list[str]:
    return [line.removesuffix("\r") for line in text.split("\n")]


def _integer(text: str) -> int:
    """``int`` alone would also take ``1_000`` and digits of other scripts."""
    if not re.fullmatch(r"\s*-?[0-9]+\s*", text):
        raise ValueError
    return int(text)


def read_ids(text: str, kind: np.dtype[Any]) -> NDArray[Any]:
    """Ids from ``1,2,3``, or one on each line of ``@file`` or, for ``-``, of stdin, as the ledger's type.

    text: the value of ``--ids``. kind: dtype of the ledger's ids. Returns (k,) ids in the order given. Lines
    are taken as they stand, spaces included, so that one id cannot be mistaken for another.
    Raises UsageError PIA070 for an unreadable file, PIA071 for no ids or for text where the ledger's ids are
    integers; the message never repeats an id.

    >>> read_ids("3, 17", np.dtype(np.int64)).tolist()
    [3, 17]
    """
    if text == "-":
        parts = _lines(sys.stdin.read())
    elif text.startswith("@"):
        parts = _lines(_read_text(text[1:], "--ids @file"))
    else:
        parts = [part.strip() for part in text.split(",")]
    ids = [part for part in parts if part]
    try:
        if not ids:
            raise ValueError
        return np.array(ids) if kind.kind == "U" else np.array([_integer(one) for one in ids], dtype=kind)
    except (ValueError, OverflowError) as error:
        raise UsageError(
            "PIA071",
            f"--ids holds {len(ids)} entries that do not all read as ids of the ledger's type {kind}",
            "No instance was looked up, so nothing was planned",
            "--ids 1,2,3 or --ids @file with one id on each line",
        ) from error


def read_step_grid(text: str, max_steps: int | None) -> tuple[int, ...]:
    """``0,10,100``, or ``geometric`` or ``geometric:RATIO`` up to ``max_steps``. Raises UsageError PIA071.

    >>> read_step_grid("0, 10,100", None), read_step_grid("geometric:2", 8)
    ((0, 10, 100), (0, 1, 2, 4, 8))
    """
    from per_instance_accountant.unlearning import geometric_grid
    from per_instance_accountant.unlearning.bounds import MAX_STEPS

    kind, _, ratio = text.partition(":")
    try:
        if kind == "geometric":
            return geometric_grid(MAX_STEPS if max_steps is None else max(max_steps, 1), float(ratio or 1.25))
        return tuple(_integer(part) for part in text.split(","))
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(
            "PIA071",
            "--step-grid holds an entry that is no whole number, or a ratio that is no number",
            "Nothing was planned",
            "--step-grid 0,10,100 or --step-grid geometric:1.5",
        ) from error


def read_assumptions(path: str) -> dict[str, Any]:
    """The JSON object in a file. Raises UsageError PIA070 for an unreadable file, PIA071 for others."""
    try:
        content = json.loads(_read_text(path, "--assumptions"))
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        content = None
    if isinstance(content, dict):
        return content
    raise UsageError(
        "PIA071",
        "--assumptions names a file that holds no JSON object",
        "Bounds rest on named assumptions, and none could be read",
        '--assumptions with a file such as {"smoothness": 1.8, "clipping_never_binds": true}',
    )


def load_reference(reference: str, option: str) -> Any:
    """The object at ``module:attr``, current directory first; classes and functions are called.

    Raises UsageError PIA070 if there is no such object.

    >>> load_reference("collections:OrderedDict", "--data")
    OrderedDict()
    """
    module, _, attribute = reference.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        raise UsageError(
            "PIA070",
            f"{option} is {reference!r}, and that cannot be found ({error})",
            "No step was taken and nothing was released",
            f"{option} package.module:name, importable from the current directory",
        ) from error
    return found() if inspect.isclass(found) or inspect.isroutine(found) else found
