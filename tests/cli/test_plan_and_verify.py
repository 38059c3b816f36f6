"""``pia plan`` and ``pia verify`` on a smooth, convex training run, from its ledger to the certificate."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from per_instance_accountant.ledger import Ledger, LedgerWriter, Phase, Run, Step, Thresholds
from per_instance_accountant.unlearning import UnlearningPlan, issue, plan, softmax_regression
from tests.cli.conftest import Pia

NUM_INSTANCES, NUM_STEPS = 60, 40
PHASE = Phase(
    kind="train",
    sampling="poisson",
    sample_rate=0.1,
    noise_std=4.0,
    max_grad_norm=1.5,
    charging="worst_case",
    denominator=6.0,
    learning_rate=0.1,
    weight_decay=0.1,
)
KNOWN = softmax_regression(feature_norm=1.0, num_instances=NUM_INSTANCES, denominator=6.0).to_dict()
NOBODY = Step(positions=np.empty(0, np.int64), contributions=np.empty(0, np.float32))


def trained(path: Path, *, assumptions: dict[str, Any] | None = None, charging: str = "worst_case") -> Path:
    run = Run(num_instances=NUM_INSTANCES, ids=np.arange(1000, 1000 + NUM_INSTANCES), assumptions=assumptions)
    with LedgerWriter.create(path, run) as writer:
        writer.append(dataclasses.replace(PHASE, charging=charging))
        for _ in range(NUM_STEPS):
            writer.append(NOBODY)
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return trained(tmp_path / "runs", assumptions=KNOWN)


def request(ledger: Path, *more: object) -> tuple[object, ...]:
    return ("plan", ledger, "--ids", "1017,1003", "--target-epsilon", 0.1, "--order", 8, *more)


def test_a_plan_is_the_rooms_plan_and_its_file_is_private(pia: Pia, runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    done = pia(*request(runs, "--output", path, "--format", "json"))
    document = json.loads(done.out)
    expected = plan(runs, ids=[1017, 1003], target_epsilon=0.1, order=8)
    assert done.code == 0
    assert document["steps"] == expected.steps
    assert document["value"] == expected.value <= 0.1
    assert document["basis"] == "CERTIFIED"
    assert UnlearningPlan.load(path).digest == expected.digest
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "1017" not in done.err


@pytest.mark.parametrize("place", ["missing/plan.json", "."])
def test_a_plan_that_cannot_be_written_exits_with_2(pia: Pia, runs: Path, tmp_path: Path, place: str) -> None:
    done = pia(*request(runs, "--output", tmp_path / place))
    assert (done.code, done.out) == (2, "")
    assert "PIA070" in done.err


def test_shown_values_are_bounds_with_their_basis(pia: Pia, runs: Path) -> None:
    shown = pia(*request(runs))
    rows = list(csv.DictReader(io.StringIO(pia(*request(runs, "--format", "csv")).out)))
    expected = plan(runs, ids=[1017, 1003], target_epsilon=0.1, order=8)
    assert [float(row["epsilon"]) for row in rows] == [row.value for row in expected.per_instance]
    assert {row["basis"] for row in rows} == {"CERTIFIED"}
    claim = next(line for line in shown.out.splitlines() if line.startswith("After them"))
    assert float(claim.split("epsilon ")[1].split()[0]) >= expected.value
    assert "smoothness" in shown.out
    assert "sensitive" in shown.out


def test_assumptions_and_ids_from_files(pia: Pia, tmp_path: Path) -> None:
    bare = trained(tmp_path / "bare")
    (tmp_path / "known.json").write_text(json.dumps(KNOWN))
    (tmp_path / "ids.txt").write_text("1017\n1003\n")
    more = ("--target-epsilon", 0.1, "--order", 8, "--format", "json")
    ids = f"@{tmp_path / 'ids.txt'}"
    unknown = pia("plan", bare, "--ids", ids, *more)
    known = pia("plan", bare, "--ids", ids, "--assumptions", tmp_path / "known.json", *more)
    assert (unknown.code, json.loads(unknown.out)["reachable"]) == (1, False)
    assert (known.code, json.loads(known.out)["reachable"]) == (0, True)


def test_an_uncertified_run_needs_the_worst_case(pia: Pia, tmp_path: Path) -> None:
    estimated = trained(tmp_path / "estimated", assumptions=KNOWN, charging="last_seen")
    refused = pia(*request(estimated))
    assert (refused.code, refused.out) == (2, "")
    assert "PIA012" in refused.err
    assert pia(*request(estimated, "--charging", "worst-case")).code == 0


@pytest.mark.parametrize("ids", ["5", "1001,1001", ",".join(map(str, range(1000, 1060)))])
def test_bad_requests_exit_with_2(pia: Pia, runs: Path, ids: str) -> None:
    done = pia("plan", runs, "--ids", ids, "--target-epsilon", 0.1, "--order", 8)
    assert (done.code, done.out) == (2, "")
    assert "PIA032" in done.err


@pytest.mark.parametrize("measure", [(), ("--order", 8, "--target-delta", 1e-5), ("--order", "nan")])
def test_exactly_one_measure(pia: Pia, runs: Path, measure: tuple[object, ...]) -> None:
    done = pia("plan", runs, "--ids", "1003", "--target-epsilon", 0.1, *measure)
    assert (done.code, done.out) == (2, "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    certificate: Path
    ledger: Path
    checkpoint: Path


@pytest.fixture
def evidence(runs: Path, tmp_path: Path) -> Evidence:
    """The plan carried out: request stated, steps recorded, a certificate issued for two checkpoint files."""
    made = plan(runs, ids=[1017, 1003], target_epsilon=0.1, order=8)
    thresholds = np.full(NUM_INSTANCES, PHASE.max_grad_norm, np.float32)
    thresholds[Ledger.open(runs).positions_of([1017, 1003])] = 0
    with LedgerWriter.resume(runs) as writer:
        writer.append(dataclasses.replace(PHASE, kind="unlearn", plan_digest=made.digest))
        writer.append(Thresholds(values=thresholds, source="forget"))
        for _ in range(made.steps or 0):
            writer.append(NOBODY)
    before, after = tmp_path / "before.pt", tmp_path / "after.pt"
    before.write_bytes(b"before")
    after.write_bytes(b"after")
    path = tmp_path / "certificate.json"
    issue(made, runs, before, after).save(path)
    return Evidence(certificate=path, ledger=runs, checkpoint=after)


def verify_args(evidence: Evidence, *more: object) -> tuple[object, ...]:
    given = ("--ledger", evidence.ledger, "--checkpoint", evidence.checkpoint)
    return ("verify", evidence.certificate, *given, *more)


def test_a_certificate_verifies(pia: Pia, evidence: Evidence) -> None:
    done = pia(*verify_args(evidence))
    document = json.loads(pia(*verify_args(evidence, "--format", "json")).out)
    assert done.code == 0
    assert "VALID (" in done.out
    assert "NOT VALID" not in done.out
    assert document["valid"] is True
    assert {row["status"] for row in document["checks"]} == {"ok"}
    assert len(document["checks"]) == document["counts"]["ok"] > 3


def test_missing_evidence_is_not_validity(pia: Pia, evidence: Evidence) -> None:
    done = pia("verify", evidence.certificate)
    assert done.code == 1
    assert "NOT VALID" in done.out


def test_another_model_fails(pia: Pia, evidence: Evidence) -> None:
    evidence.checkpoint.write_bytes(b"another")
    done = pia(*verify_args(evidence, "--format", "json"))
    assert (done.code, json.loads(done.out)["valid"]) == (1, False)
    assert json.loads(done.out)["counts"]["failed"] >= 1


def test_another_training_fails(pia: Pia, evidence: Evidence, tmp_path: Path) -> None:
    other = trained(tmp_path / "other", assumptions=KNOWN)
    assert (
        pia("verify", evidence.certificate, "--ledger", other, "--checkpoint", evidence.checkpoint).code == 1
    )


def test_an_edited_value_fails(pia: Pia, evidence: Evidence) -> None:
    content = json.loads(evidence.certificate.read_text())
    content["predicate"]["claim"]["value"] = math.nextafter(content["predicate"]["claim"]["value"], 0)
    evidence.certificate.write_text(json.dumps(content))
    assert pia(*verify_args(evidence)).code in (1, 3)


@pytest.mark.parametrize("content", ["", "{}", "[]", "not json", '{"_type": 1}'])
def test_an_unreadable_certificate_exits_with_3(pia: Pia, evidence: Evidence, content: str) -> None:
    evidence.certificate.write_text(content)
    done = pia(*verify_args(evidence))
    assert (done.code, done.out) == (3, "")
    assert "PIA051" in done.err
