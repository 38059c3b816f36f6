"""The facts of a ledger as Arrow tables and Parquet files, built in batches so that an export needs little
memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from per_instance_accountant.errors import LedgerError, UsageError
from per_instance_accountant.ledger.records import Phase, Step, Thresholds
from per_instance_accountant.ledger.storage import sync_directory

if TYPE_CHECKING:
    from per_instance_accountant.ledger.reader import Ledger

_ROWS: Final = 1 << 17
"""Rows after which a batch is handed on."""
_PHASE_TYPES: Final = {
    "str": pa.string(),
    "float": pa.float64(),
    "str | None": pa.string(),
    "float | None": pa.float64(),
}
_PHASE_SCHEMA: Final = pa.schema([(entry.name, _PHASE_TYPES[str(entry.type)]) for entry in fields(Phase)])
_STEP_SCHEMA: Final = pa.schema(
    [
        ("step", pa.int64()),
        ("phase", pa.int64()),
        ("drawn", pa.int64()),
        ("abandoned", pa.bool_()),
        *_PHASE_SCHEMA,
    ]
)


def to_arrow(ledger: Ledger, name: str) -> Any:
    """One of the tables in ``TABLES``. Raises UsageError PIA070 for another name."""
    if name not in TABLES:
        raise UsageError(
            "PIA070",
            f"table {name!r}, allowed are {', '.join(TABLES)}",
            "Nothing was read",
            'ledger.to_arrow("steps")',
        )
    schema, batches = TABLES[name]
    return pa.Table.from_batches(batches(ledger), schema=schema(ledger))


def export(ledger: Ledger, directory: Path, *, overwrite: bool) -> None:
    """Write ``TABLES`` as Parquet and run.json, owner-only; see ``Ledger.export``."""
    targets = {name: directory / f"{name}.parquet" for name in TABLES}
    summary = directory / "run.json"
    existing = sum(os.path.lexists(target) for target in (*targets.values(), summary))
    if existing and not overwrite:
        raise UsageError(
            "PIA070",
            f"{existing} of the {len(targets) + 1} files to write exist",
            "Nothing was written",
            "ledger.export(directory, overwrite=True)",
        )
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, target in targets.items():
            schema, batches = TABLES[name]
            with _Replacement(target) as file, pq.ParquetWriter(file, schema(ledger)) as writer:
                for batch in batches(ledger):
                    writer.write_batch(batch)
        with _Replacement(summary) as file:
            file.write(json.dumps(_summary(ledger), indent=1, sort_keys=True, allow_nan=False).encode())
    except OSError as error:
        raise LedgerError(
            "PIA041",
            f"the tables cannot be written ({error.strerror})",
            "The ledger is unchanged, the export is incomplete",
            'ledger.export("a_writable_directory", overwrite=True)',
        ) from None


class _Replacement:
    """An owner-only file that takes the place of ``target`` once it is complete, and else leaves nothing."""

    def __init__(self, target: Path) -> None:
        self._target, self._draft = target, target.with_name(f".{target.name}.{os.getpid()}")

    def __enter__(self) -> Any:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.fdopen(os.open(self._draft, flags, 0o600), "wb")
        return self._file

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with self._file:
                if kind is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
            if kind is None:
                os.replace(self._draft, self._target)
                sync_directory(self._target.parent)
        finally:
            self._draft.unlink(missing_ok=True)


def _summary(ledger: Ledger) -> dict[str, Any]:
    return {
        "num_instances": ledger.num_instances,
        "num_steps": ledger.num_steps,
        "num_abandoned_steps": ledger.num_abandoned_steps,
        "confirmed": ledger.confirmed,
        "created": ledger.created,
        "anchor": ledger.anchor.to_dict(),
        "assumptions": None if ledger.run.assumptions is None else dict(ledger.run.assumptions),
        "software": dict(ledger.run.software),
        "groups": sorted(ledger.groups),
        "phases": [asdict(phase) for phase in ledger.phases],
    }


def _step_batches(ledger: Ledger) -> Iterator[Any]:
    settings = pa.Table.from_pylist([asdict(phase) for phase in ledger.phases], schema=_PHASE_SCHEMA)
    edges = np.array(ledger.abandoned, dtype=np.int64).ravel()
    first = 0
    for rows in _chunks((1, phase, step.positions.size) for phase, step in _steps(ledger)):
        phases, drawn = np.array(rows, dtype=np.int64).T
        steps = np.arange(first, first + phases.size)
        abandoned = np.searchsorted(edges, steps, side="right") % 2 == 1
        columns = [pa.array(values) for values in (steps, phases, drawn, abandoned)]
        columns += [column.combine_chunks() for column in settings.take(pa.array(phases)).columns]
        yield pa.RecordBatch.from_arrays(columns, schema=_STEP_SCHEMA)
        first += phases.size


def _observation_batches(ledger: Ledger) -> Iterator[Any]:
    schema, steps = _instance_schema(ledger, "contribution"), _steps(ledger)
    rows = ((s.positions.size, t, s.positions, s.contributions) for t, (_, s) in enumerate(steps))
    for chunk in _chunks(rows):
        numbers, positions, contributions = zip(*chunk, strict=True)
        sizes = [values.size for values in positions]
        yield _instance_batch(
            ledger,
            schema,
            np.repeat(numbers, sizes),
            np.concatenate(positions),
            np.concatenate(contributions),
        )


def _threshold_batches(ledger: Ledger) -> Iterator[Any]:
    schema, step = _instance_schema(ledger, "threshold"), 0
    everybody = np.arange(ledger.num_instances)
    for event in ledger.events():
        step += isinstance(event, Step)
        if isinstance(event, Thresholds):
            yield _instance_batch(ledger, schema, np.full(everybody.size, step), everybody, event.values)


def _steps(ledger: Ledger) -> Iterator[tuple[int, Step]]:
    """Every step with the number of the phase it belongs to."""
    phase = -1
    for event in ledger.events():
        phase += isinstance(event, Phase)
        if isinstance(event, Step):
            yield phase, event


def _chunks(rows: Iterator[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    """Lists of rows without their first entry, the weight; each list weighs about ``_ROWS``."""
    chunk, weight = [], 0
    for own, *row in rows:
        chunk.append(tuple(row))
        weight += own
        if weight >= _ROWS:
            yield chunk
            chunk, weight = [], 0
    if chunk:
        yield chunk


def _instance_schema(ledger: Ledger, value: str) -> Any:
    ids = pa.int64() if ledger.ids.dtype.kind == "i" else pa.large_string()
    return pa.schema([("step", pa.int64()), ("position", pa.int64()), ("id", ids), (value, pa.float32())])


def _instance_batch(ledger: Ledger, schema: Any, steps: Any, positions: Any, values: Any) -> Any:
    columns = [steps, positions, ledger.ids[positions], values]
    arrays = [pa.array(column, entry.type) for column, entry in zip(columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


TABLES: Final[dict[str, tuple[Callable[[Ledger], Any], Callable[[Ledger], Iterator[Any]]]]] = {
    "steps": (lambda ledger: _STEP_SCHEMA, _step_batches),
    "observations": (lambda ledger: _instance_schema(ledger, "contribution"), _observation_batches),
    "thresholds": (lambda ledger: _instance_schema(ledger, "threshold"), _threshold_batches),
}
"""Name -> (schema, batches). ``step`` counts from 0; thresholds hold from their ``step`` on."""
