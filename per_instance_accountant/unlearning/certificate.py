"""The certificate: an in-toto Statement about one model file, in canonical JSON, without any id in clear."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from per_instance_accountant.results.files import write_private
from per_instance_accountant.unlearning.canonical import (
    canonical,
    digest_of,
    read_bytes,
    unreadable,
)

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://per-instance-accountant.dev/unlearning/v1"

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Pseudonym = Annotated[str, Field(pattern=r"^hmac-sha256:[0-9a-f]{64}$")]
Real = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


CONDITIONS: Final = (
    "Only the model after unlearning is seen: bounds other than R0 do not hold against whoever also has the"
    " model before it, checkpoints or logs.",
    "Deletion requests do not depend on a released model: for requests that do, the guarantee needs"
    " differential privacy of the retained data as well.",
    "The number of steps was not chosen by the accuracy or the loss on the forgotten instances.",
    "The schedule of training (number of steps, rates, noise, clip norms, learning rates) did not depend on"
    " its course: early stopping and plateau schedules are not covered.",
    "What the unlearning steps do not move (frozen parameters, buffers) holds nothing of the instances:"
    " training did not move it either.",
)
"""What the claim rests on outside the ledger; every plan and certificate states it."""


class _Strict(BaseModel):
    """Exactly these fields, with exactly these types, unchangeable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)


class ClaimRecord(_Strict):
    """D(P || Q) (and D(Q || P) for direction both) at ``order``, or epsilon at ``delta``, is at most ``value
    <= target``."""

    target: NonNegative
    value: NonNegative
    order: Real | None
    delta: Real | None
    direction: Literal["both", "remove"]
    reference: Literal["retrain-and-continue"]
    unit: Literal["row"]
    adjacency: Literal["zero-out"]
    basis: Literal["CERTIFIED"]


class MechanismRecord(_Strict):
    """One unlearning step, as the ledger records it."""

    learning_rate: NonNegative
    denominator: NonNegative
    noise_std: NonNegative
    sampling: Literal["poisson", "shuffled"]
    sample_rate: NonNegative
    weight_decay: NonNegative
    max_grad_norm: NonNegative
    optimizer: str
    momentum: NonNegative
    projection_radius: NonNegative | None


class AssumptionRecord(_Strict):
    """A fact the bound rests on, and where it comes from. ``"user"`` facts are stated, not checked."""

    value: bool | int | float
    source: Literal["derived", "user", "run"]


class AnchorRecord(_Strict):
    """A moment of the ledger."""

    sequence: Count
    steps: Count
    digest: Digest
    run_id: str


class LedgerRecord(_Strict):
    """The ledger before the first and after the last unlearning step."""

    before: AnchorRecord
    after: AnchorRecord


class ModelsRecord(_Strict):
    """Digests of the checkpoint files before and after unlearning."""

    before: Digest
    after: Digest


class Predicate(_Strict):
    """What is certified, and everything a verifier recomputes it from."""

    claim: ClaimRecord
    conditions: Annotated[list[str], Field(min_length=1)]
    request_id: Annotated[str, Field(min_length=1, max_length=200)] | None
    requests: Annotated[list[Pseudonym], Field(min_length=1)]
    bound: str
    steps: Count
    training_steps: Count
    charging: str | None
    mechanism: MechanismRecord
    assumptions: dict[str, AssumptionRecord]
    ledger: LedgerRecord
    models: ModelsRecord
    noise: Literal["system", "seed"]
    plan: Digest
    plan_content: Digest
    accounting_version: Count
    software: dict[str, str]
    created: str


class SubjectDigest(_Strict):
    """Hex digest of the unlearned model's file."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Subject(_Strict):
    """The unlearned model."""

    name: Literal["model"]
    digest: SubjectDigest


class Statement(_Strict):
    """in-toto Statement v1, with the digest of the predicate and its seal under the ledger's key."""

    type_: Annotated[Literal["https://in-toto.io/Statement/v1"], Field(alias="_type")]
    subject: Annotated[list[Subject], Field(min_length=1, max_length=1)]
    predicate_type: Annotated[
        Literal["https://per-instance-accountant.dev/unlearning/v1"], Field(alias="predicateType")
    ]
    predicate: Predicate
    digest: Digest
    seal: Pseudonym


@dataclass(frozen=True, slots=True)
class Certificate:
    """A well-formed statement. Well-formed is not valid: :func:`verify` decides that."""

    statement: Statement

    @property
    def predicate(self) -> Predicate:
        """What is certified."""
        return self.statement.predicate

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Certificate:
        """Raises CertificateError PIA051 for missing, unknown or malformed fields."""
        try:
            statement = Statement.model_validate_json(json.dumps(content))
        except (ValidationError, ValueError, TypeError, RecursionError) as error:
            raise unreadable(
                f"this is not a certificate of this version ({_first(error)})",
                "issue(plan, ledger, before, after)",
            ) from None
        return cls(statement)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Certificate:
        """Raises CertificateError PIA051 if the file cannot be read or is no certificate."""
        try:
            content = json.loads(read_bytes(path))
        except (ValueError, RecursionError):
            raise unreadable("the file is not JSON", "pass the certificate as it was issued") from None
        return cls.from_dict(content)

    def to_dict(self) -> dict[str, Any]:
        """The statement as plain values."""
        return self.statement.model_dump(mode="json", by_alias=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write canonical JSON, readable by the owner only."""
        write_private(path, canonical(self.to_dict()))


def certificate_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a certificate file, for readers that do not use this package.

    >>> certificate_schema()["required"]
    ['_type', 'subject', 'predicateType', 'predicate', 'digest', 'seal']
    """
    schema = Statement.model_json_schema(by_alias=True)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"{PREDICATE_TYPE}/certificate.schema.json",
        **schema,
    }


def predicate_digest(predicate: Predicate) -> str:
    """``"sha256:<hex>"`` over the canonical predicate."""
    return digest_of(predicate.model_dump(mode="json"))


def seal_text(digest: str) -> str:
    """The text whose pseudonym under the ledger's key seals a certificate: only a holder of the key can make
    it."""
    return f"certificate of {digest}"


def _first(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return type(error).__name__
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'statement'}: {first['msg']}"
