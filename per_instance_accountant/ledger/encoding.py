"""Records <-> payload bytes: canonical JSON for metadata, Arrow IPC for columns, raw arrays for the rest.

Encoders refuse what could not be read back. Decoders get bytes that passed the checks of their frame, and
refuse whatever is not the encoding of a record.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final

import numpy as np
import rfc8785
from numpy.typing import NDArray

from per_instance_accountant.errors import UsageError
from per_instance_accountant.ledger import frames
from per_instance_accountant.ledger.records import (
    FAMILIES,
    Disclosure,
    Drop,
    Event,
    Filter,
    Phase,
    PublicStep,
    Resume,
    Run,
    Step,
    Thresholds,
    is_hex,
)

MAX_METADATA: Final = 1 << 20
MAX_RUN: Final = 1 << 30
MAX_INSTANCES: Final = 1 << 27
"""A step of everybody must fit into one write call of the system, which takes at most 2 GiB."""
MAX_TEXT: Final = 256
"""Longest business id or group label in characters: fixed-width arrays of them must stay allocatable."""
MAX_MERGE: Final = 1 << 26
_SOURCES: Final = ("fixed", "sweep", "forget")
_GROUP: Final = "group:"
_U32: Final = struct.Struct("<I")
_NONE: Final[frozenset[str]] = frozenset()
_NUMBERS: Final = {entry.name for entry in fields(Phase) if entry.type == "float"}
_LATER: Final = "projection_radius"
"""Field of a phase that earlier versions did not have: written only where it is stated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRun:
    """The first frame: the run with its random identity, and the time it began (a comment)."""

    run: Run
    created: str

    @property
    def run_id(self) -> str:
        """32 hex digits, equal on all ranks."""
        return str(self.run.run_id)


def payload_limit(kind: int, num_instances: int) -> int:
    """Largest payload in bytes of a frame of this kind after the Run frame; -1 if it cannot occur there."""
    limits = {
        frames.PHASE: MAX_METADATA,
        frames.RESUME: MAX_METADATA,
        frames.PUBLIC: MAX_METADATA,
        frames.DISCLOSURE: MAX_METADATA,
        frames.MERGE: MAX_MERGE,
        frames.MARK: 0,
        frames.THRESHOLDS: _U32.size + 4 * num_instances,
        frames.STEP: 8 * num_instances,
        frames.FILTER: _U32.size + 16 * num_instances,
        frames.DROP: 4 * num_instances,
    }
    return limits.get(kind, -1)


def encode(event: Event, num_instances: int) -> tuple[int, bytes]:
    """Frame kind and payload of an event that passed ``Progress.check``."""
    kind, encoder = _ENCODERS[type(event)]
    return kind, encoder(event, num_instances)


def decode(kind: int, payload: bytes, num_instances: int) -> Event:
    """Inverse of :func:`encode`. Any exception means that the payload is malformed."""
    event: Event = _DECODERS[kind](payload, num_instances)
    return event


def _encode_step(step: Step, num_instances: int) -> bytes:
    return step.positions.astype("<u4").tobytes() + step.contributions.astype("<f4", copy=False).tobytes()


def _decode_step(payload: bytes, num_instances: int) -> Step:
    count, rest = divmod(len(payload), 8)
    if rest:
        raise ValueError("not a whole number of positions")
    positions = np.frombuffer(payload, "<u4", count).astype(np.int64)
    contributions = np.frombuffer(payload, "<f4", count, 4 * count)
    positions.flags.writeable = False
    return Step(positions=positions, contributions=contributions.astype(np.float32, copy=False))


def replace_contributions(payload: bytes, measured: NDArray[np.float32], num_instances: int) -> bytes:
    """The payload of a step with other contributions, none of them above the one that stands there.

    Raises UsageError PIA070 for a larger or negative one, NaN, or another number of them.
    """
    bounds = _decode_step(payload, num_instances).contributions
    # Written as what must hold, so that NaN fails it.
    if measured.shape != bounds.shape or not bool(((measured >= 0) & (measured <= bounds)).all()):
        raise UsageError(
            "PIA070",
            "contributions are not within the bounds that were promised for their step",
            "The step stays charged at the bounds",
            "promise bounds that hold whatever the gradients are",
        )
    return payload[: 4 * len(bounds)] + measured.astype("<f4", copy=False).tobytes()


def _encode_thresholds(event: Thresholds, num_instances: int) -> bytes:
    return _U32.pack(_SOURCES.index(event.source)) + event.values.astype("<f4", copy=False).tobytes()


def _decode_thresholds(payload: bytes, num_instances: int) -> Thresholds:
    values = np.frombuffer(payload, "<f4", num_instances, _U32.size).astype(np.float32, copy=False)
    if len(payload) != _U32.size + values.nbytes:
        raise ValueError("not one threshold per instance")
    return Thresholds(values=values, source=_SOURCES[_U32.unpack_from(payload)[0]])


def _encode_phase(phase: Phase, num_instances: int) -> bytes:
    content = {name: float(v) if name in _NUMBERS else v for name, v in asdict(phase).items()}
    radius = content.pop(_LATER)
    content |= {} if radius is None else {_LATER: float(radius)}
    return canonical_json(content, "Phase", MAX_METADATA)


def _decode_phase(payload: bytes, num_instances: int) -> Phase:
    content = _strict_json(payload, {entry.name for entry in fields(Phase)} - {_LATER}, {_LATER})
    radius = float(content.pop(_LATER)) if _LATER in content else None
    if not all(isinstance(v, int | float if name in _NUMBERS else str | None) for name, v in content.items()):
        raise TypeError("a field of a phase has another type")
    # JSON has one number type; a rate of 1.0 is written as 1.
    restored: dict[str, Any] = {name: float(v) if name in _NUMBERS else v for name, v in content.items()}
    return Phase(**restored, projection_radius=radius)


def _stated(event: Resume | Disclosure) -> dict[str, Any]:
    return {name: value for name, value in asdict(event).items() if value is not None}


def _encode_resume(event: Resume, num_instances: int) -> bytes:
    return canonical_json(_stated(event), "Resume", MAX_METADATA)


def _decode_resume(payload: bytes, num_instances: int) -> Resume:
    return Resume(**_strict_json(payload, {"at_step"}, {"session"}))


def _encode_public(event: PublicStep, num_instances: int) -> bytes:
    return canonical_json(asdict(event), "PublicStep", MAX_METADATA)


def _decode_public(payload: bytes, num_instances: int) -> PublicStep:
    return PublicStep(**_strict_json(payload, {"count"}))


def _encode_disclosure(event: Disclosure, num_instances: int) -> bytes:
    return canonical_json(_stated(event), "Disclosure", MAX_METADATA)


def _decode_disclosure(payload: bytes, num_instances: int) -> Disclosure:
    content = _strict_json(payload, {"kind", "epsilon"}, {"identity"})
    if type(content["epsilon"]) not in (int, float):
        raise TypeError("a field of a disclosure has another type")
    return Disclosure(**(content | {"epsilon": float(content["epsilon"])}))


def _encode_filter(event: Filter, num_instances: int) -> bytes:
    columns = event.orders.astype("<f8", copy=False).tobytes() + event.budgets.astype("<f8").tobytes()
    return _U32.pack(FAMILIES.index(event.family)) + columns


def _decode_filter(payload: bytes, num_instances: int) -> Filter:
    if len(payload) != _U32.size + 16 * num_instances:
        raise ValueError("not one order and one budget per instance")
    columns = np.frombuffer(payload, "<f8", 2 * num_instances, _U32.size).astype(np.float64, copy=False)
    orders, budgets = columns.reshape(2, num_instances)
    return Filter(family=FAMILIES[_U32.unpack_from(payload)[0]], orders=orders, budgets=budgets)


def _encode_drop(event: Drop, num_instances: int) -> bytes:
    return event.positions.astype("<u4").tobytes()


def _decode_drop(payload: bytes, num_instances: int) -> Drop:
    positions = np.frombuffer(payload, "<u4").astype(np.int64)
    positions.flags.writeable = False
    return Drop(positions=positions)


_ENCODERS: Final[dict[type, tuple[int, Any]]] = {
    Phase: (frames.PHASE, _encode_phase),
    Thresholds: (frames.THRESHOLDS, _encode_thresholds),
    Step: (frames.STEP, _encode_step),
    PublicStep: (frames.PUBLIC, _encode_public),
    Disclosure: (frames.DISCLOSURE, _encode_disclosure),
    Resume: (frames.RESUME, _encode_resume),
    Filter: (frames.FILTER, _encode_filter),
    Drop: (frames.DROP, _encode_drop),
}
_DECODERS: Final[dict[int, Any]] = {
    frames.PHASE: _decode_phase,
    frames.THRESHOLDS: _decode_thresholds,
    frames.STEP: _decode_step,
    frames.PUBLIC: _decode_public,
    frames.DISCLOSURE: _decode_disclosure,
    frames.RESUME: _decode_resume,
    frames.FILTER: _decode_filter,
    frames.DROP: _decode_drop,
}


def canonical_json(content: Mapping[str, Any], name: str, limit: int) -> bytes:
    """RFC 8785 bytes. Raises UsageError PIA071 for NaN, other types and integers beyond 2**53."""
    try:
        text = rfc8785.dumps(dict(content))
    except (rfc8785.CanonicalizationError, RecursionError, UnicodeError) as error:
        raise _not_storable(f"{name} is not plain JSON ({type(error).__name__})") from None
    if len(text) > limit:
        raise _not_storable(f"{name} takes {len(text)} bytes, allowed are {limit}")
    return text


def _not_storable(happened: str) -> UsageError:
    return UsageError(
        "PIA071",
        happened,
        "The fact was not recorded, because it could not be read back as it is",
        "use str, int, float, bool, None, list and dict with finite numbers",
    )


def _strict_json(
    payload: bytes, names: set[str], together: frozenset[str] | set[str] = _NONE
) -> dict[str, Any]:
    """The object with exactly these names, or with all those that may be there ``together`` as well."""
    content = json.loads(payload, parse_int=_number)
    if not isinstance(content, dict) or set(content) not in (names, names | together):
        raise ValueError("not the fields of the record")
    if rfc8785.dumps(content) != payload or any(content.get(name, "") is None for name in together):
        raise ValueError("not the canonical form of the record")
    return content


def _number(digits: str) -> int | float:
    """RFC 8785 writes large floats without a point; integers beyond 2**53 it does not write."""
    value = int(digits)
    return value if abs(value) < 1 << 53 else float(value)


def encode_run(stored: StoredRun) -> bytes:
    """Payload of the first frame: length of the JSON (4) | JSON | Arrow IPC stream of ids and groups."""
    run = stored.run
    content = {
        "format": frames.VERSION,
        "run_id": stored.run_id,
        "created": stored.created,
        "num_instances": run.num_instances,
        "assumptions": None if run.assumptions is None else dict(run.assumptions),
        "software": dict(run.software),
    }
    # Written for parts only, so that the bytes of other ledgers are as they were.
    content |= {} if run.world_size == 1 else {"rank": run.rank, "world_size": run.world_size}
    text = canonical_json(content, "Run", MAX_METADATA)
    payload = _U32.pack(len(text)) + text + _encode_columns(run)
    if len(payload) > MAX_RUN:
        raise _not_storable(f"ids and groups take {len(payload)} bytes, allowed are {MAX_RUN}")
    return payload


def decode_run(payload: bytes) -> StoredRun:
    """Inverse of :func:`encode_run`. Any exception means that the payload is malformed."""
    end = _U32.size + _U32.unpack_from(payload)[0]
    names = {"format", "run_id", "created", "num_instances", "assumptions", "software"}
    content = _strict_json(payload[_U32.size : end], names, {"rank", "world_size"})
    version, run_id, created = content.pop("format"), content.pop("run_id"), content.pop("created")
    if version != frames.VERSION or not is_hex(run_id, 32) or not isinstance(created, str):
        raise ValueError("not the identity of a run")
    if not isinstance(content["assumptions"], dict | None) or not isinstance(content["software"], dict):
        raise TypeError("a field of the run has another type")
    columns = _decode_columns(payload[end:])
    groups = {name.removeprefix(_GROUP): values for name, values in columns.items() if name != "ids"}
    if content.get("world_size") == 1:
        raise ValueError("not the canonical form of the record")
    run = checked_run(Run(ids=columns.get("ids"), groups=groups, run_id=run_id, **content))
    return StoredRun(run=run, created=created)


def _encode_columns(run: Run) -> bytes:
    columns = {} if run.ids is None else {"ids": run.ids}
    columns |= {_GROUP + name: values for name, values in run.groups.items()}
    if not columns:
        return b""
    # Arrow takes longer to import than a small ledger takes to read.
    import pyarrow as pa

    try:
        table = pa.table({name: pa.array(values, _arrow_type(values)) for name, values in columns.items()})
    except (pa.ArrowException, UnicodeError):
        raise _bad_column("PIA070", "an id, a label or the name of a group is not valid Unicode") from None
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _arrow_type(values: NDArray[Any]) -> Any:
    import pyarrow as pa

    return pa.int64() if values.dtype.kind == "i" else pa.large_string()


def _decode_columns(buffer: bytes) -> dict[str, NDArray[Any]]:
    if not buffer:
        return {}
    import pyarrow as pa
    import pyarrow.compute as pc

    with pa.ipc.open_stream(pa.py_buffer(buffer)) as reader:
        table = reader.read_all()
    table.validate(full=True)
    columns = {}
    for name in table.column_names:
        column = table.column(name)
        if column.null_count or column.type not in (pa.int64(), pa.large_string()):
            raise ValueError("a column is neither int64 nor text")
        if column.type == pa.int64():
            columns[name] = column.to_numpy()
        elif (pc.max(pc.utf8_length(column)).as_py() or 0) <= MAX_TEXT:
            columns[name] = column.to_numpy().astype(np.str_)
        else:
            raise ValueError("a text is too long")
    return columns


def checked_run(run: Run) -> Run:
    """The run with ids and groups as read-only int64 or text vectors of length N.

    Raises UsageError PIA070 (repeated ids, size) or PIA071 (type, shape); messages hold counts, never ids.
    """
    count = run.num_instances
    if type(count) is not int or count > MAX_INSTANCES:
        raise _bad_column("PIA070", f"num_instances is {count!r}, allowed is an int up to {MAX_INSTANCES}")
    groups = {}
    for name, values in run.groups.items():
        if not isinstance(name, str) or not name:
            raise _bad_column("PIA071", "the name of a group is not a text")
        groups[name] = _checked_column(values, count, "a group")
    ids = None if run.ids is None else _checked_column(run.ids, count, "ids")
    if ids is not None and (repeated := count - np.unique(ids).size):
        raise _bad_column("PIA070", f"{repeated} of {count} ids are repeated")
    return replace(run, num_instances=count, ids=ids, groups=groups)


def _checked_column(values: Any, count: int, name: str) -> NDArray[Any]:
    column: NDArray[Any] = np.asarray(values)
    if column.dtype.kind == "O" and set(map(type, column.ravel().tolist())) <= {str, np.str_}:
        column = column.astype(np.str_)
    if column.shape != (count,):
        raise _bad_column("PIA071", f"{name} has shape {column.shape}, expected ({count},)")
    if column.dtype.kind == "u" and column.size and column.max() > np.iinfo(np.int64).max:
        raise _bad_column("PIA070", f"{name} has integers beyond int64")
    if column.dtype.kind not in "iuU":
        raise _bad_column("PIA071", f"{name} has dtype {column.dtype}, allowed are integers and str")
    if column.dtype.kind == "U" and column.dtype.itemsize > 4 * MAX_TEXT:
        raise _bad_column("PIA070", f"{name} has texts longer than {MAX_TEXT} characters")
    column = column.astype(column.dtype if column.dtype.kind == "U" else np.int64)
    column.flags.writeable = False
    return column


def _bad_column(code: str, happened: str) -> UsageError:
    meaning = "The ledger was not created, because facts could not be assigned to instances"
    return UsageError(
        code, happened, meaning, "Run(num_instances=N, ids=np.arange(N), groups={'class': labels})"
    )
