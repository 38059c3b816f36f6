"""The record of a plan, and its file. The file holds ids: it is as private as the data set."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from per_instance_accountant.audit.rounding import rounded_up
from per_instance_accountant.ledger import Anchor
from per_instance_accountant.results import Tabular
from per_instance_accountant.results.files import write_private
from per_instance_accountant.unlearning.applicable import NotApplicable
from per_instance_accountant.unlearning.bounds.interface import Measure
from per_instance_accountant.unlearning.canonical import (
    canonical,
    digest_of,
    read_bytes,
    unreadable,
)
from per_instance_accountant.unlearning.mechanism import Mechanism

FORMAT: Final = 2
_SAFE_INTEGER: Final = 2**53 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSteps:
    """What one requested instance would need alone: least K (None: unreachable), the bound after it, and its
    name."""

    id: int | str
    steps: int | None
    value: float
    bound: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnlearningPlan(Tabular):
    """How many noisy steps on the retained data make the model (target, order) or (target, delta) close to
    retraining.

    steps: least K for the whole request, None if no K up to the limit suffices. reachable: whether steps
    exists. value: upper bound after ``steps`` (the best value at the limit when unreachable), in nats. bound:
    the bound that gave it. deciding_id: the requested instance whose own K is largest. per_instance: each
    alone; never add them up. training_steps: steps recorded so far. cost_ratio: steps / training_steps.
    direction, reference: of the divergence. mechanism: of the unlearning steps (the last training phase's).
    contraction: upper bound per step, None if unknown. assumptions: name -> value and source. charging: rule
    name that replaced the run's own, or None. step_grid: public numbers of steps that ``steps`` was rounded
    up to, or None. max_steps: no larger number was considered. request_id: the caller's name of the whole
    request, or None. anchor: the moment of the ledger the plan was made for; it holds for no other.
    """

    ids: tuple[int | str, ...]
    steps: int | None
    reachable: bool
    value: float
    bound: str
    deciding_id: int | str
    per_instance: tuple[InstanceSteps, ...]
    training_steps: int
    cost_ratio: float | None
    target: float
    step_grid: tuple[int, ...] | None
    max_steps: int
    request_id: str | None
    measure: Measure
    direction: str
    reference: str
    basis: str
    charging: str | None
    mechanism: Mechanism
    contraction: float | None
    assumptions: Mapping[str, Mapping[str, Any]]
    not_applicable: tuple[NotApplicable, ...]
    anchor: Anchor
    accounting_version: int
    software: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values. ``value`` may be infinite: use :meth:`save` for a file."""
        content = {name: getattr(self, name) for name in self.__slots__}
        for name in ("measure", "mechanism", "anchor"):
            content[name] = asdict(content[name])
        for name in ("per_instance", "not_applicable"):
            content[name] = [asdict(row) for row in content[name]]
        content["assumptions"] = {name: dict(entry) for name, entry in self.assumptions.items()}
        content["software"] = dict(self.software)
        content["ids"] = list(self.ids)
        content["step_grid"] = None if self.step_grid is None else list(self.step_grid)
        return content

    @property
    def digest(self) -> str:
        """``"sha256:<hex>"`` that commits to the content and the request; the unlearn phase of the ledger
        carries it."""
        return plan_digest(self.content_digest, self.request_id)

    @property
    def content_digest(self) -> str:
        """``"sha256:<hex>"`` over the canonical content without ``request_id``."""
        content = _encoded(self.to_dict())
        del content["request_id"]
        return digest_of(content)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write canonical JSON, readable by the owner only."""
        content = _encoded(self.to_dict())
        write_private(path, canonical({"format": FORMAT, "plan": content, "digest": self.digest}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> UnlearningPlan:
        """Inverse of :meth:`save`. Raises CertificateError PIA051 for anything else, also for a changed
        file."""
        try:
            stored = json.loads(read_bytes(path))
            plan = _adapter().validate_python(_decoded(stored["plan"]))
            again = canonical({"format": FORMAT, "plan": _encoded(plan.to_dict()), "digest": plan.digest})
            same = again == canonical(stored)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ValidationError) as error:
            raise unreadable(f"this is not a plan file ({type(error).__name__})", "plan.save(path)") from None
        if not same:
            raise unreadable(
                "the plan file was changed after it was written", "make the plan again: plan(ledger, ...)"
            )
        return plan

    def to_arrow(self) -> pa.Table:
        """One row per requested instance alone: id, steps (null: unreachable), epsilon, bound, basis."""
        rows = self.per_instance
        return pa.table(
            {
                "id": pa.array([row.id for row in rows]),
                "steps": pa.array([row.steps for row in rows], pa.int64()),
                "epsilon": pa.array([row.value for row in rows], pa.float64()),
                "bound": pa.array([row.bound for row in rows], pa.string()),
                "basis": pa.array([self.basis] * len(rows), pa.string()),
            }
        )

    def _summary(self) -> Mapping[str, str]:
        return {
            "steps": "unreachable" if self.steps is None else str(self.steps),
            "epsilon after them": f"{rounded_up(self.value)} ({self.basis}), target {self.target:g}",
            "bound": self.bound,
            "requested instances": str(len(self.ids)),
            "training steps": str(self.training_steps),
        }

    def __repr__(self) -> str:
        found = f"{self.steps} steps by {self.bound}" if self.reachable else "unreachable"
        value = f"value {rounded_up(self.value)} for target {self.target:g}"
        return f"<UnlearningPlan: {len(self.ids)} instances, {found}, {value}>"


def plan_digest(content: str, request_id: str | None) -> str:
    """The digest of a plan from that of its content."""
    return digest_of({"content": content, "request_id": request_id})


@functools.cache
def _adapter() -> TypeAdapter[UnlearningPlan]:
    return TypeAdapter(UnlearningPlan)


def _encoded(content: dict[str, Any]) -> dict[str, Any]:
    """Values that RFC 8785 can hold: integers beyond 2^53 and infinities as tagged texts."""
    rows = [
        {**row, "id": _encode(row["id"]), "value": _encode(row["value"])} for row in content["per_instance"]
    ]
    return {
        **content,
        "ids": [_encode(value) for value in content["ids"]],
        "deciding_id": _encode(content["deciding_id"]),
        "value": _encode(content["value"]),
        "per_instance": rows,
    }


def _decoded(content: dict[str, Any]) -> dict[str, Any]:
    rows = [
        {**row, "id": _decode(row["id"]), "value": _decode(row["value"])} for row in content["per_instance"]
    ]
    return {
        **content,
        "ids": [_decode(value) for value in content["ids"]],
        "deciding_id": _decode(content["deciding_id"]),
        "value": _decode(content["value"]),
        "per_instance": rows,
    }


def _encode(value: int | str | float) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": "inf"}
    if isinstance(value, int) and abs(value) > _SAFE_INTEGER:
        return {"integer": str(value)}
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return math.inf if value == {"number": "inf"} else int(value["integer"])
    return value
