"""Verification: recompute what a certificate claims from the files alone. Neither the planner nor torch is
used."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.accounting import ChargingRule, FixedThresholds, WorstCase
from per_instance_accountant.errors import CertificateError, PiaError
from per_instance_accountant.ledger import Anchor, Ledger
from per_instance_accountant.unlearning.applicable import ROWS, Facts
from per_instance_accountant.unlearning.assumptions import Assumptions
from per_instance_accountant.unlearning.bounds.interface import Measure
from per_instance_accountant.unlearning.canonical import ACCOUNTING_VERSION, file_digest
from per_instance_accountant.unlearning.certificate import (
    CONDITIONS,
    Certificate,
    predicate_digest,
    seal_text,
)
from per_instance_accountant.unlearning.chain import training_chain
from per_instance_accountant.unlearning.execution import Execution, read_execution, unplanned_since
from per_instance_accountant.unlearning.mechanism import Mechanism
from per_instance_accountant.unlearning.plan_file import UnlearningPlan, plan_digest
from per_instance_accountant.unlearning.signing import signature_problem

_TOLERANCE: Final = 1e-9
_CHARGING: Final[Mapping[str, ChargingRule]] = {
    "worst_case": WorstCase(),
    "fixed_thresholds": FixedThresholds(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question that a verifier asks: ``status`` is ``"ok"``, ``"failed"`` or ``"skipped"`` (evidence not
    given)."""

    name: str
    status: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationReport:
    """The outcome. Valid only if every check is ok: what was skipped is not established."""

    checks: tuple[Check, ...]

    @property
    def valid(self) -> bool:
        """Whether every check was made and holds."""
        return bool(self.checks) and all(check.status == "ok" for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.status == "failed")

    def raise_if_failed(self) -> None:
        """Raise CertificateError PIA050 unless the report is valid."""
        if self.valid:
            return
        first = next(c for c in (*self.failures, *self.checks) if c.status != "ok")
        raise CertificateError(
            "PIA050",
            f"{len(self.failures)} checks failed, the first that is not ok is {first.name!r}: {first.detail}",
            "The model must not be treated as unlearned on the strength of this certificate",
            "verify(certificate, ledger=ledger, checkpoint=path) with the evidence it was issued for",
        )


class _NotGivenError(Exception):
    """The verifier was not given the evidence that a check needs."""


class _Evidence:
    """The certificate with what the verifier was given; derived facts are read once."""

    def __init__(
        self, certificate: Certificate, ledger: Ledger | None, checkpoint: str | os.PathLike[str] | None
    ) -> None:
        self.certificate = certificate
        self.statement, self.predicate = certificate.statement, certificate.predicate
        self._ledger, self.checkpoint = ledger, checkpoint
        self._execution: Execution | None = None

    @property
    def ledger(self) -> Ledger:
        if self._ledger is None:
            raise _NotGivenError
        return self._ledger

    @property
    def execution(self) -> Execution:
        if self._execution is None:
            p = self.predicate
            self._execution = read_execution(
                self.ledger, first=p.ledger.before.steps, steps=p.steps, plan_digest=p.plan
            )
        return self._execution

    def forgotten(self) -> NDArray[np.int64] | None:
        """Positions of the request: the forget event whose ids have exactly the certified pseudonyms."""
        wanted = sorted(self.predicate.requests)
        for positions in self.execution.requests:
            if positions.size == len(wanted):
                ids = self.ledger.ids[positions].tolist()
                if sorted(self.ledger.pseudonym(i) for i in ids) == wanted:
                    return positions
        return None


Problem = str | None
"""What is wrong, or None."""


def _subject(e: _Evidence) -> Problem:
    same = "sha256:" + e.statement.subject[0].digest.sha256 == e.predicate.models.after
    if same and e.predicate.steps and e.predicate.models.before == e.predicate.models.after:
        return "the model before and after the noisy steps is the same file"
    return None if same else "the subject is not the model after unlearning"


def _digest(e: _Evidence) -> Problem:
    return (
        None
        if predicate_digest(e.predicate) == e.statement.digest
        else "the predicate was changed after it was issued"
    )


def _plan(e: _Evidence) -> Problem:
    """The digest of the plan, which the ledger holds beside its steps, commits to the request."""
    same = plan_digest(e.predicate.plan_content, e.predicate.request_id) == e.predicate.plan
    return None if same else "the plan was made for another request"


def _claim(e: _Evidence) -> Problem:
    claim = e.predicate.claim
    Measure(order=claim.order, delta=claim.delta)
    if not 0 < claim.target < math.inf:
        return "the target is not a positive number"
    if e.predicate.conditions != list(CONDITIONS):
        return "the conditions of the claim are not those of this version"
    return None if claim.value <= claim.target else "the bound is above the target"


def _versions(e: _Evidence) -> Problem:
    stated = e.predicate.accounting_version
    if stated == ACCOUNTING_VERSION:
        return None
    age = (
        "older: verify it with the release that issued it" if stated < ACCOUNTING_VERSION else "unknown here"
    )
    return f"accounting version {stated} is {age}; this release computes version {ACCOUNTING_VERSION}"


def _checkpoint(e: _Evidence) -> Problem:
    if e.checkpoint is None:
        raise _NotGivenError
    return (
        None
        if file_digest(e.checkpoint) == e.predicate.models.after
        else "the file is not the certified model"
    )


def _seal(e: _Evidence) -> Problem:
    same = e.ledger.pseudonym(seal_text(e.statement.digest)) == e.statement.seal
    return None if same else "not sealed by the owner of this ledger"


def _anchors(e: _Evidence) -> Problem:
    before, after = (
        Anchor.from_dict(a.model_dump()) for a in (e.predicate.ledger.before, e.predicate.ledger.after)
    )
    if not (e.ledger.holds(before) and e.ledger.holds(after)):
        return "the ledger is another one, or was rolled back or rewritten"
    if before.sequence > after.sequence or before.steps + e.predicate.steps != after.steps:
        return (
            f"{after.steps - before.steps} steps lie between the moments, {e.predicate.steps} are certified"
        )
    return None if before.steps == e.predicate.training_steps else "the number of training steps differs"


def _requests(e: _Evidence) -> Problem:
    if len(set(e.predicate.requests)) != len(e.predicate.requests):
        return "an instance is named twice"
    return (
        "no deletion request in the ledger names exactly these instances" if e.forgotten() is None else None
    )


def _run(e: _Evidence) -> Problem:
    p, run = e.predicate, e.execution
    if run.went_back or run.drawn:
        return "unlearning steps were abandoned" if run.went_back else "a forgotten instance was drawn"
    if run.strays:
        return f"{run.strays} steps of the plan lie outside the certified ones"
    unplanned = unplanned_since(e.ledger, p.ledger.before.sequence, p.ledger.after.sequence)
    if unplanned:
        return f"{unplanned} published statistics or public updates came after the plan, which counts none"
    if p.steps and len(run.phases) != 1:
        return f"{len(run.phases)} mechanisms were in force during the unlearning steps"
    for phase in run.phases:
        if phase.kind != "unlearn" or phase.plan_digest != p.plan:
            return "the steps were not taken for this plan"
        if not Mechanism.of(phase).agrees_with(Mechanism(**p.mechanism.model_dump())):
            return "the mechanism of the steps is not the certified one"
    return None


def _stated(e: _Evidence) -> Problem:
    """Facts said to come from the run must stand there."""
    run = Assumptions.from_dict(e.ledger.run.assumptions or {}, source="run").to_dict()
    for name, entry in e.predicate.assumptions.items():
        if entry.source == "run" and run.get(name) != entry.model_dump():
            return f"the run does not state {name} as the certificate does"
    return None


def _value(e: _Evidence) -> Problem:
    """Recompute the bound from the ledger."""
    p = e.predicate
    forgotten = e.forgotten()
    row = next((row for row in ROWS if row.name == p.bound), None)
    if forgotten is None or row is None or (p.charging is not None and p.charging not in _CHARGING):
        return "the request, the bound or the charging rule is unknown"
    known = Assumptions.from_dict({name: entry.model_dump() for name, entry in p.assumptions.items()})
    measure = Measure(order=p.claim.order, delta=p.claim.delta)
    mechanism = Mechanism(**p.mechanism.model_dump())
    rule = None if p.charging is None else _CHARGING[p.charging]
    trained = training_chain(e.ledger, forgotten, rule, stop=p.training_steps)
    if trained.num_steps != p.training_steps or trained.forgotten.any() or trained.num_steps == 0:
        return "the instances were not in training"
    unlearned = training_chain(
        e.ledger, forgotten, WorstCase(), first=p.training_steps, stop=p.training_steps + p.steps
    )
    facts = Facts(chain=trained, assumptions=known, measure=measure, mechanism=mechanism)
    after = Facts(chain=unlearned, assumptions=known, measure=measure, mechanism=mechanism)
    for need in row.requirements:
        reason = need(facts) or (need(after) if p.steps else None)
        if reason is not None:
            return reason
    bound = row.build(facts)
    if p.claim.direction == "both" and bound.direction != "both":
        return "the bound covers one direction only"
    value = bound.value(p.steps)
    if not value <= p.claim.value * (1 + _TOLERANCE):
        return f"the ledger gives {value:.9g}, the certificate claims {p.claim.value:.9g}"
    return None


CHECKS: Final[tuple[tuple[str, Callable[[_Evidence], Problem], str], ...]] = (
    ("subject", _subject, "the subject is the model after unlearning"),
    ("digest", _digest, "the predicate is as it was issued"),
    ("plan", _plan, "the plan is that of the request"),
    ("claim", _claim, "the certified value is at most the target"),
    ("accounting version", _versions, "computed by this version of the accounting"),
    ("checkpoint", _checkpoint, "the file is the certified model"),
    ("seal", _seal, "sealed under the key of this ledger"),
    ("ledger", _anchors, "the ledger holds training and unlearning as certified"),
    ("requests", _requests, "the ledger records the deletion request"),
    ("unlearning run", _run, "the certified steps were taken without the forgotten instances"),
    ("assumptions", _stated, "facts of the run are as the run states them"),
    ("value", _value, "the recomputed bound is at most the certified value"),
)
"""Name, question, and what it means when it holds."""


def verify(
    certificate: Certificate | Mapping[str, Any] | str | os.PathLike[str],
    ledger: Ledger | str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    signature: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    public_key: str | os.PathLike[str] | None = None,
    require_signature: bool = False,
    plan: UnlearningPlan | str | os.PathLike[str] | None = None,
    request_id: str | None = None,
) -> VerificationReport:
    """Check a certificate against the ledger and the model file it was issued for.

    Without ``ledger`` or ``checkpoint`` the checks that need them are skipped, and the report is not valid.
    Facts with source ``"user"`` are taken as stated. signature, public_key: the envelope that :func:`sign`
    made, and the Ed25519 key to check it with (extra ``sign``); with either of them, or with
    ``require_signature``, a signature that is missing or wrong is a failed check. plan, request_id: if given,
    the certificate must be of this plan and of this request.

    Raises CertificateError PIA051 when the certificate file cannot be read; every other fault is a failed
    check.

    >>> verify({"_type": "something else"}).valid
    False
    """
    try:
        parsed = _parsed(certificate)
    except CertificateError as error:
        if not isinstance(certificate, Mapping):
            raise
        return VerificationReport(checks=(Check(name="format", status="failed", detail=error.happened),))
    try:
        opened = None if ledger is None else Ledger.open(ledger)
    except PiaError as error:
        return VerificationReport(checks=(Check(name="ledger", status="failed", detail=error.happened),))
    evidence = _Evidence(parsed, opened, checkpoint)
    checks = [*CHECKS]
    if plan is not None:
        checks.append(("given plan", lambda e: _plan_problem(e, plan), "issued for the given plan"))
    if request_id is not None:
        checks.append(("request id", lambda e: _request_problem(e, request_id), "of the given request"))
    if require_signature or signature is not None or public_key is not None:

        def signed(e: _Evidence) -> Problem:
            if signature is None or public_key is None:
                return f"no {'signature' if signature is None else 'public key'} was given"
            return signature_problem(e.certificate, signature, public_key)

        checks.append(("signature", signed, "signed by the holder of the given key"))
    return VerificationReport(checks=tuple(_made(name, ask, holds, evidence) for name, ask, holds in checks))


def _plan_problem(e: _Evidence, plan: UnlearningPlan | str | os.PathLike[str]) -> Problem:
    made = plan if isinstance(plan, UnlearningPlan) else UnlearningPlan.load(plan)
    return None if made.digest == e.predicate.plan else "the certificate was issued for another plan"


def _request_problem(e: _Evidence, request_id: str) -> Problem:
    return None if e.predicate.request_id == request_id else "the certificate is of another request"


def _parsed(certificate: Certificate | Mapping[str, Any] | str | os.PathLike[str]) -> Certificate:
    if isinstance(certificate, Certificate):
        return certificate
    if isinstance(certificate, Mapping):
        return Certificate.from_dict(certificate)
    return Certificate.load(certificate)


def _made(name: str, ask: Callable[[_Evidence], Problem], holds: str, evidence: _Evidence) -> Check:
    try:
        problem = ask(evidence)
    except _NotGivenError:
        return Check(name=name, status="skipped", detail="not established: the evidence was not given")
    except PiaError as error:
        problem = error.happened
    except (ValueError, ArithmeticError, LookupError) as error:
        problem = f"the certificate holds numbers that cannot be evaluated ({type(error).__name__})"
    return Check(name=name, status="failed" if problem else "ok", detail=problem or holds)
