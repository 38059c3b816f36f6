"""What a command prints: one page, written as text tables, as one JSON object, or as CSV."""

from __future__ import annotations

import csv
import enum
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from per_instance_accountant.results.files import inert
from per_instance_accountant.results.rounding import not_nan, rounded_up

SENSITIVE = "Individual values are computed from the training data and are as sensitive as the training data."


class Format(enum.StrEnum):
    """How a command writes its result."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under named columns; numbers in a row are upper bounds or counts."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[object]]

    @classmethod
    def of(cls, records: Sequence[Mapping[str, object]]) -> Table:
        """One row per record; the first record names the columns.

        >>> Table.of([{"id": 3, "epsilon": 0.5}]).columns
        ('id', 'epsilon')
        """
        return cls(
            columns=tuple(records[0]) if records else (), rows=[tuple(record.values()) for record in records]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One result. head: lines above the tables; notes: lines below; document: the same as JSON.

    CSV writes the last table to stdout and the notes to stderr.
    """

    head: Sequence[str]
    tables: Sequence[Table]
    document: Mapping[str, object]
    notes: Sequence[str] = ()


def _text(cell: object) -> str:
    """A cell for the terminal; control characters are spelled out, so that no id can steer it."""
    plain = as_json(cell)
    if plain is None:
        return "-"
    if isinstance(plain, float):
        return rounded_up(plain)
    text = str(plain)
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def as_csv_cell(cell: object) -> object:
    """Text that a spreadsheet would run as a formula gets a leading apostrophe; numbers stay exact.

    >>> as_csv_cell("=SUM(A1)"), as_csv_cell(-1.5), as_csv_cell("ann")
    ("'=SUM(A1)", -1.5, 'ann')
    """
    return inert(as_json(cell))


def as_json(value: Any) -> Any:
    """JSON-able copy: numpy values become Python values, infinities the text ``"inf"``.

    Raises GuaranteeError PIA011 for NaN.

    >>> as_json({"epsilon": float("inf"), "steps": (1, 2)})
    {'epsilon': 'inf', 'steps': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {str(key): as_json(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):
        return as_json(value.tolist())
    if isinstance(value, (list, tuple)):
        return [as_json(entry) for entry in value]
    if isinstance(value, float):
        return str(value) if math.isinf(not_nan(value)) else value
    return str(value) if isinstance(value, enum.Enum) else value


def _aligned(table: Table) -> str:
    cells = [table.columns, *([_text(cell) for cell in row] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def _print_text(page: Page) -> None:
    blocks = ["\n".join(page.head), *map(_aligned, page.tables), "\n".join(page.notes)]
    print("\n\n".join(block for block in blocks if block))


def _print_json(page: Page) -> None:
    print(json.dumps(as_json(page.document), indent=2, allow_nan=False))


def _print_csv(page: Page) -> None:
    table = page.tables[-1]
    rows = [[as_csv_cell(cell) for cell in row] for row in table.rows]
    csv.writer(sys.stdout, lineterminator="\n").writerows([table.columns, *rows])
    for line in page.notes:
        print(line, file=sys.stderr)


_WRITERS = {Format.TABLE: _print_text, Format.JSON: _print_json, Format.CSV: _print_csv}


def emit(page: Page, output_format: Format) -> None:
    """Write the page to stdout. Raises GuaranteeError PIA011, with nothing written, if a value is NaN."""
    _WRITERS[output_format](page)
