"""Issuing a certificate after a plan was carried out."""

from __future__ import annotations

import os
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Literal

from per_instance_accountant.errors import CertificateError, PlanError
from per_instance_accountant.ledger import Ledger
from per_instance_accountant.unlearning.canonical import file_digest
from per_instance_accountant.unlearning.certificate import (
    CONDITIONS,
    PREDICATE_TYPE,
    STATEMENT_TYPE,
    Certificate,
    Predicate,
    predicate_digest,
    seal_text,
)
from per_instance_accountant.unlearning.plan_file import UnlearningPlan
from per_instance_accountant.unlearning.verification import verify

_RUN_CHECKS = ("ledger", "requests", "unlearning run")


def issue(
    plan: UnlearningPlan,
    ledger: Ledger | str | os.PathLike[str],
    checkpoint_before: str | os.PathLike[str],
    checkpoint_after: str | os.PathLike[str],
    *,
    noise: Literal["system", "seed"] = "system",
) -> Certificate:
    """Certify that ``plan`` was carried out: the ledger must hold its unlearn phase, its steps and its
    request.

    noise: whether batches and noise of the steps came from the system's randomness, or from a seed that
    whoever knows it can remove. The ledger must end with the last unlearning step. Everything :func:`verify`
    asks is asked before anything
    is issued.
    Raises PlanError PIA030 (unreachable plan) and PIA033 (the run does not match the plan), CertificateError
    PIA050 (the value does not hold) and PIA051 (a checkpoint cannot be read), LedgerError.
    """
    ledger = Ledger.open(ledger)
    if plan.steps is None:
        raise PlanError(
            "PIA030",
            f"the plan is unreachable, its best value is {plan.value:.6g}",
            "No number of steps carries the promise, so there is nothing to certify",
            "plan again with a larger target_epsilon, or retrain without the instances",
        )
    predicate = Predicate.model_validate(
        _predicate(plan, ledger, file_digest(checkpoint_before), file_digest(checkpoint_after))
        | {"noise": noise}
    )
    digest = predicate_digest(predicate)
    certificate = Certificate.from_dict(
        {
            "_type": STATEMENT_TYPE,
            "subject": [
                {"name": "model", "digest": {"sha256": predicate.models.after.removeprefix("sha256:")}}
            ],
            "predicateType": PREDICATE_TYPE,
            "predicate": predicate.model_dump(mode="json"),
            "digest": digest,
            "seal": ledger.pseudonym(seal_text(digest)),
        }
    )
    _refuse_unless_valid(certificate, ledger, checkpoint_after)
    return certificate


def _predicate(plan: UnlearningPlan, ledger: Ledger, before: str, after: str) -> dict[str, Any]:
    return {
        "claim": {
            "target": plan.target,
            "value": plan.value,
            "order": plan.measure.order,
            "delta": plan.measure.delta,
            "direction": plan.direction,
            "reference": plan.reference,
            "unit": "row",
            "adjacency": "zero-out",
            "basis": plan.basis,
        },
        "conditions": list(CONDITIONS),
        "request_id": plan.request_id,
        "requests": sorted(ledger.pseudonym(i) for i in plan.ids),
        "bound": plan.bound,
        "steps": plan.steps,
        "training_steps": plan.training_steps,
        "charging": plan.charging,
        "mechanism": asdict(plan.mechanism),
        "assumptions": {name: dict(entry) for name, entry in plan.assumptions.items()},
        "ledger": {"before": plan.anchor.to_dict(), "after": ledger.anchor.to_dict()},
        "models": {"before": before, "after": after},
        "plan": plan.digest,
        "plan_content": plan.content_digest,
        "accounting_version": plan.accounting_version,
        "software": dict(plan.software),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _refuse_unless_valid(
    certificate: Certificate, ledger: Ledger, checkpoint: str | os.PathLike[str]
) -> None:
    report = verify(certificate, ledger=ledger, checkpoint=checkpoint)
    mismatch = next((check for check in report.failures if check.name in _RUN_CHECKS), None)
    if mismatch is not None:
        raise PlanError(
            "PIA033",
            f"{mismatch.name}: {mismatch.detail}",
            "No certificate was issued, because the run is not what the plan promises",
            "carry out the plan as it stands, or plan again for what was run",
        )
    if not report.valid:
        first = next(check for check in report.checks if check.status != "ok")
        raise CertificateError(
            "PIA050",
            f"{first.name}: {first.detail}",
            "No certificate was issued",
            "plan again: plan(ledger, ids=ids, ...)",
        )
