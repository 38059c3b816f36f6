"""An audit that is kept beside its ledger, so that top losses and quantiles need no second fold.

It is bound to the bytes of the ledger, to its key and to the code that computed it. It serves for looking
again and for nothing else: plans, certificates and published statistics start from the facts.
"""

from __future__ import annotations

import json
import os
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any, Final, NoReturn

import numpy as np

from per_instance_accountant.accounting import Basis
from per_instance_accountant.audit.budget import BudgetAudit
from per_instance_accountant.errors import LedgerError
from per_instance_accountant.ledger import Ledger
from per_instance_accountant.ledger.encoding import MAX_METADATA, canonical_json
from per_instance_accountant.ledger.sealing import read_tagged, write_tagged
from per_instance_accountant.ledger.storage import AUDIT_NAME

_ROOMS: Final = ("accounting", "audit", "divergence", "ledger")
_NUMBERS: Final = ("delta", "worst_case", "worst_case_tight")


def keep_audit(audit: BudgetAudit) -> None:
    """Seal the ledger of the audit and keep the audit beside it, owner-only, in place of an earlier one.

    Raises UsageError PIA071 for a ledger in memory, LedgerError PIA041 if it cannot be written.
    """
    if audit.ledger is None:
        _refuse("the audit does not know its ledger")
    header = {
        "ledger": audit.digest,
        "code": _code_digest(),
        "basis": audit.basis.name,
        "charging": list(audit.charging),
        "certified": audit.certified_budget is not None,
    } | {name: float(getattr(audit, name)).hex() for name in _NUMBERS}
    columns = [audit.epsilon] + ([] if audit.certified_budget is None else [audit.certified_budget])
    text = canonical_json(header, "audit", MAX_METADATA)
    content = b"".join(column.astype("<f8").tobytes() for column in columns)
    audit.ledger.seal()
    write_tagged(audit.ledger.source, AUDIT_NAME, len(text).to_bytes(4, "little") + text + content)


def kept_audit(path: str | os.PathLike[str]) -> BudgetAudit:
    """The audit that ``audit(path, delta).keep()`` kept: the same numbers, without reading a step.

    All bytes of the ledger are compared with its seal (``Ledger.open_sealed``), and the audit is returned
    only if it is of these bytes and of this version of the code. Raises LedgerError PIA041 if none was kept,
    PIA040 if the ledger has grown since or the code has changed, PIA042 for damage, and what ``open_sealed``
    raises.

    >>> import tempfile
    >>> from per_instance_accountant import audit
    >>> from per_instance_accountant.ledger import LedgerWriter, Phase, Run, Step
    >>> folder = tempfile.TemporaryDirectory()
    >>> with LedgerWriter.create(folder.name, Run(num_instances=2)) as writer:
    ...     writer.append(Phase(
    ...         kind="train", sampling="poisson", sample_rate=0.01, noise_std=1.0, max_grad_norm=1.0,
    ...         charging="worst_case", denominator=1.0, learning_rate=0.1))
    ...     writer.append(Step(positions=np.array([1]), contributions=np.ones(1, np.float32)))
    >>> audit(folder.name, delta=1e-5, tight=False).keep()
    >>> round(kept_audit(folder.name).top(1)[0]["epsilon"], 3)
    0.956
    >>> folder.cleanup()
    """
    ledger = Ledger.open_sealed(path)
    size = ledger.num_instances
    content = read_tagged(ledger.source, AUDIT_NAME, 4 + MAX_METADATA + 16 * size)
    if content is None:
        raise LedgerError(
            "PIA041",
            "no audit is kept beside this ledger",
            "Nothing was read",
            "audit(path, delta=1e-5).keep(), or pia audit PATH --keep",
        )
    start = 4 + int.from_bytes(content[:4], "little")
    header: dict[str, Any] = json.loads(content[4:start])
    if header["ledger"] != ledger.digest:
        _refuse("the ledger holds other facts than when the audit was kept")
    if header["code"] != _code_digest():
        _refuse("the audit was kept by another version of the package")
    columns = np.frombuffer(content, "<f8", offset=start).astype(np.float64).reshape(-1, size)
    numbers = {name: float.fromhex(header[name]) for name in _NUMBERS}
    return BudgetAudit(
        epsilon=columns[0],
        ids=ledger.ids,
        basis=Basis[header["basis"]],
        charging=tuple(header["charging"]),
        num_steps=ledger.num_steps,
        num_abandoned_steps=ledger.num_abandoned_steps,
        groups=ledger.groups,
        phases=ledger.phases,
        digest=ledger.digest,
        certified_budget=columns[1] if header["certified"] else None,
        ledger=ledger,
        **numbers,
    )


@cache
def _code_digest() -> str:
    """Of all code that turns facts into numbers: another version of it may give others."""
    digest = sha256()
    for room in _ROOMS:
        folder = files("per_instance_accountant") / room
        for file in sorted(folder.iterdir(), key=lambda file: file.name):
            if file.name.endswith(".py"):
                digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _refuse(happened: str) -> NoReturn:
    raise LedgerError(
        "PIA040",
        happened,
        "Its numbers are not those of this ledger",
        "audit(path, delta=1e-5).keep(), or pia audit PATH --keep",
    )
