"""The deletion queue: read any number of times, never planning twice what the ledger records; signatures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from per_instance_accountant.ledger import LedgerWriter, Thresholds
from per_instance_accountant.unlearning import generate_keys, issue, plan
from tests.cli.conftest import Pia
from tests.cli.test_plan_and_verify import KNOWN, NUM_INSTANCES, trained


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return trained(tmp_path / "runs", assumptions=KNOWN)


def asked(pia: Pia, runs: Path, text: str, *more: object) -> Any:
    file = runs.parent / "requests.csv"
    file.write_text(text, encoding="utf-8")
    return pia(
        *("plan", runs, "--ids", f"@{file}", "--target-epsilon", 0.1, "--order", 8, "--format", "json", *more)
    )


def forget(runs: Path, positions: list[int]) -> None:
    values = np.full(NUM_INSTANCES, 1.5, np.float32)
    values[positions] = 0
    with LedgerWriter.resume(runs) as writer:
        writer.append(Thresholds(values=values, source="forget"))


def test_a_queue_is_planned_as_one_batch_and_lines_are_idempotent(pia: Pia, runs: Path) -> None:
    text = "request_id,id\nr-1,1017\nr-2,1003\nr-1,1017\nr-3,1003\n\n"
    done = asked(pia, runs, text)
    document = json.loads(done.out)
    expected = plan(runs, ids=[1017, 1003], target_epsilon=0.1, order=8)
    assert done.code == 0 and document["ids"] == [1017, 1003] and document["steps"] == expected.steps
    assert document["requests"] == dict.fromkeys(["r-1", "r-2", "r-3"], "planned")
    assert any("do not depend on a released model" in line for line in document["conditions"])


def test_recorded_requests_are_left_out_until_nothing_is_left(pia: Pia, runs: Path) -> None:
    text = "request_id,id\nr-1,1017\nr-2,1003\n"
    forget(runs, [17])
    document = json.loads(asked(pia, runs, text).out)
    assert document["ids"] == [1003] and document["requests"] == {"r-1": "recorded", "r-2": "planned"}
    forget(runs, [17, 3])
    again = asked(pia, runs, text)
    document = json.loads(again.out)
    assert (
        again.code == 0 and document["steps"] is None and set(document["requests"].values()) == {"recorded"}
    )


def test_a_dry_run_writes_nothing(pia: Pia, runs: Path) -> None:
    path = runs.parent / "plan.json"
    text = "request_id,id\nr-1,1017\n"
    assert asked(pia, runs, text, "--output", path, "--dry-run").code == 0 and not path.exists()
    assert asked(pia, runs, text, "--output", path).code == 0 and path.exists()
    first = path.read_bytes()
    asked(pia, runs, text, "--output", path)
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    "text", ["", "r-1\n", "r-1,1017,extra\n", ",1017\n", "r-1,\n", "r-1,bobby\n", "r-1,1_017\n"]
)
def test_malformed_queues_are_refused_without_an_id(pia: Pia, runs: Path, text: str) -> None:
    done = asked(pia, runs, "request_id,id\n" + text)
    assert done.code == 2 and "PIA071" in done.err and "1017" not in done.err and "bobby" not in done.err
    unknown = asked(pia, runs, "request_id,id\nr-1,5\n")
    assert unknown.code == 2 and "PIA032" in unknown.err


def test_a_plan_may_project(pia: Pia, runs: Path) -> None:
    document = json.loads(asked(pia, runs, "request_id,id\nr-1,1017\n", "--projection-radius", 0.5).out)
    assert document["mechanism"]["projection_radius"] == 0.5


def test_signing_and_requiring_a_signature(pia: Pia, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    runs = trained(tmp_path / "all", assumptions=KNOWN)
    made = plan(runs, ids=[1017], target_epsilon=50.0, order=8)
    assert made.steps == 0
    forget(runs, [17])
    model, certificate = tmp_path / "model.pt", tmp_path / "certificate.json"
    model.write_bytes(b"weights")
    issue(made, runs, model, model).save(certificate)
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    generate_keys(private, public)
    evidence = ("verify", certificate, "--ledger", runs, "--checkpoint", model)
    assert pia(*evidence).code == 0
    assert pia(*evidence, "--require-signature").code == 1
    signed = pia("sign", certificate, "--key", private, "--format", "json")
    signature = json.loads(signed.out)["signature"]
    good = (*evidence, "--require-signature", "--signature", signature, "--public-key", public)
    assert pia(*good).code == 0
    Path(signature).write_bytes(Path(signature).read_bytes().replace(b'"sig":"', b'"sig":"AA'))
    assert pia(*good).code == 1
    assert pia("sign", certificate, "--key", public).code == 2
