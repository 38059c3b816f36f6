"""A queue of deletion requests in a CSV file, ``request_id,id`` on each line, read any number of times."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.cli.inputs import _integer, _read_text
from per_instance_accountant.errors import UsageError

if TYPE_CHECKING:
    from per_instance_accountant.ledger import Ledger

HEADER = "request_id,id"


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """ids (k,): to plan for, each once, in the order of the file; all_ids: with those recorded as forgotten.
    statuses: request id -> ``"planned"``, or ``"recorded"`` when the ledger states all its instances as
    forgotten already."""

    ids: NDArray[Any]
    all_ids: NDArray[Any]
    statuses: dict[str, str]


def is_request_file(text: str) -> bool:
    """Whether the value of ``--ids`` names a file that starts with the header ``request_id,id``."""
    return text.startswith("@") and _read_text(text[1:], "--ids @file").splitlines()[:1] == [HEADER]


def read_requests(text: str, ledger: Ledger) -> Requests:
    """The requests in ``@file``. A line that occurs twice counts once; one request id may name several
    instances; instances forgotten before are left out, so that the same file can be processed again.

    Raises UsageError PIA071 for a malformed line (the message names its number, never an id), PIA070 for an
    unreadable file, PlanError PIA032 for unknown instances.
    """
    rows = list(csv.reader(io.StringIO(_read_text(text[1:], "--ids @file"))))[1:]
    kind = ledger.ids.dtype
    wanted: dict[tuple[str, Any], None] = {}
    for number, row in enumerate(rows, start=2):
        if row:
            wanted[_parsed(row, number, kind)] = None
    if not wanted:
        raise _malformed("holds no request")
    distinct = dict.fromkeys(one for _, one in wanted)
    positions = ledger.positions_of(np.array(list(distinct), dtype=None if kind.kind == "U" else kind))
    gone = ledger.forgotten
    open_ids = {one for one, position in zip(distinct, positions.tolist(), strict=True) if not gone[position]}
    statuses: dict[str, str] = {}
    for request, one in wanted:
        pending = one in open_ids or statuses.get(request) == "planned"
        statuses[request] = "planned" if pending else "recorded"
    ids = [one for one in distinct if one in open_ids]
    return Requests(
        ids=np.array(ids, dtype=kind if ids else None),
        all_ids=np.array(list(distinct), dtype=kind),
        statuses=statuses,
    )


def _parsed(row: list[str], number: int, kind: np.dtype[Any]) -> tuple[str, Any]:
    if len(row) != 2 or not row[0] or not row[1]:
        raise _malformed(f"holds a line {number} without exactly a request id and an id")
    try:
        return row[0], row[1] if kind.kind == "U" else _integer(row[1])
    except ValueError:
        raise _malformed(f"holds an id in line {number} that is not of the ledger's type {kind}") from None


def _malformed(happened: str) -> UsageError:
    return UsageError(
        "PIA071",
        f"the request file {happened}",
        "No instance was looked up, so nothing was planned",
        f"a CSV file with the header {HEADER} and one instance on each line",
    )
