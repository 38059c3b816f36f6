"""Every option of the planner on the command line; requests that arrive again; everybody at once."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from per_instance_accountant.ledger import Ledger, LedgerWriter, Thresholds
from per_instance_accountant.unlearning import (
    UnlearningPlan,
    geometric_grid,
    issue,
    plan,
    plan_everyone,
    verify,
)
from tests.cli.conftest import Outcome, Pia
from tests.cli.test_plan_and_verify import KNOWN, NOBODY, NUM_INSTANCES, PHASE, trained

TARGET = ("--target-epsilon", 0.1, "--order", 8, "--format", "json")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return trained(tmp_path / "runs", assumptions=KNOWN)


def carry_out(runs: Path, made: UnlearningPlan, steps: int | None = None) -> None:
    thresholds = np.full(NUM_INSTANCES, PHASE.max_grad_norm, np.float32)
    thresholds[Ledger.open(runs).positions_of(list(made.ids))] = 0
    with LedgerWriter.resume(runs) as writer:
        writer.append(dataclasses.replace(PHASE, kind="unlearn", plan_digest=made.digest))
        writer.append(Thresholds(values=thresholds, source="forget"))
        for _ in range((made.steps or 0) if steps is None else steps):
            writer.append(NOBODY)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (("--step-grid", "0,50,400"), {"step_grid": (0, 50, 400)}),
        (("--step-grid", "geometric:2"), {"step_grid": geometric_grid(10_000_000, 2.0)}),
        (
            ("--step-grid", "geometric", "--max-steps", 700),
            {"step_grid": geometric_grid(700), "max_steps": 700},
        ),
        (("--direction", "remove"), {"direction": "remove"}),
        (("--max-steps", 3), {"max_steps": 3}),
        (("--projection-radius", 0.5), {"projection_radius": 0.5}),
        (
            ("--learning-rate", 0.05, "--noise-multiplier", 6.5),
            {"learning_rate": 0.05, "noise_multiplier": 6.5},
        ),
    ],
)
def test_every_option_is_that_of_the_planner(
    pia: Pia, runs: Path, given: tuple[object, ...], meant: dict[str, Any]
) -> None:
    document = json.loads(pia("plan", runs, "--ids", "1017", *TARGET, *given).out)
    expected = plan(runs, [1017], 0.1, order=8, **meant)
    for name in ("steps", "direction", "max_steps", "reachable"):
        assert document[name] == getattr(expected, name), name
    assert document["step_grid"] == (None if expected.step_grid is None else list(expected.step_grid))
    assert document["mechanism"] == dataclasses.asdict(expected.mechanism)


@pytest.mark.parametrize(
    "given",
    [
        ("--step-grid", "0,x"),
        ("--step-grid", "9,3"),
        ("--step-grid", "geometric:0.5"),
        ("--step-grid", "geometric:x"),
        ("--everyone",),
        ("--request-id", "r-1"),
        ("--request-id", "", "--output", "x.json"),
        ("--direction", "sideways"),
    ],
)
def test_bad_options_exit_with_2(pia: Pia, runs: Path, given: tuple[object, ...]) -> None:
    done = pia("plan", runs, "--ids", "1017", *TARGET, *given)
    assert (done.code, done.out) == (2, "")
    assert pia("plan", runs, *TARGET).code == 2


def once(pia: Pia, runs: Path, ids: str = "1017,1003", *more: object, request: str = "r-1") -> Outcome:
    path = runs.parent / "plan.json"
    return pia("plan", runs, "--ids", ids, *TARGET, "--request-id", request, "--output", path, *more)


def test_a_request_that_arrives_again_has_the_same_plan_through_its_life(pia: Pia, runs: Path) -> None:
    first = once(pia, runs)
    path = runs.parent / "plan.json"
    written, made = path.read_bytes(), UnlearningPlan.load(path)
    assert first.code == 0 and json.loads(first.out)["status"] == "planned" and made.request_id == "r-1"
    for ids in ("1003,1017", "1017,1003"):
        again = once(pia, runs, ids)
        assert again.code == 0 and json.loads(again.out)["steps"] == made.steps and "unchanged" in again.err
    carry_out(runs, made, steps=1)
    assert json.loads(once(pia, runs).out)["status"] == "started"
    with LedgerWriter.resume(runs) as writer:
        for _ in range(made.steps - 1):
            writer.append(NOBODY)
    assert json.loads(once(pia, runs).out)["status"] == "carried out"
    assert path.read_bytes() == written


@pytest.mark.parametrize(
    ("ids", "more", "request_id"),
    [
        ("1017", (), "r-1"),
        ("1017,1004", (), "r-1"),
        ("1017,1003", ("--target-epsilon", 0.2), "r-1"),
        ("1017,1003", ("--step-grid", "geometric"), "r-1"),
        ("1017,1003", ("--direction", "remove"), "r-1"),
        ("1017,1003", ("--max-steps", 9999), "r-1"),
        ("1017,1003", ("--charging", "worst-case"), "r-1"),
        ("1017,1003", ("--projection-radius", 0.5), "r-1"),
        ("1017,1003", ("--learning-rate", 0.05), "r-1"),
        ("1017,1003", ("--noise-multiplier", 9), "r-1"),
        ("1017,1003", (), "r-2"),
    ],
)
def test_one_request_id_has_one_content(
    pia: Pia, runs: Path, ids: str, more: tuple[object, ...], request_id: str
) -> None:
    once(pia, runs)
    path = runs.parent / "plan.json"
    written = path.read_bytes()
    done = once(pia, runs, ids, *more, request=request_id)
    assert (done.code, done.out) == (2, "") and "PIA085" in done.err and "1017" not in done.err
    assert path.read_bytes() == written


def test_a_request_that_needs_no_step_is_carried_out_when_it_is_recorded(pia: Pia, runs: Path) -> None:
    """The runner states whom the model forgot and no mechanism, because there is none."""
    more = ("--target-epsilon", 1000)
    assert json.loads(once(pia, runs, "1017,1003", *more).out)["steps"] == 0
    ledger = Ledger.open(runs)
    thresholds = np.full(ledger.num_instances, PHASE.max_grad_norm, np.float32)
    thresholds[ledger.positions_of([1017, 1003])] = 0
    with LedgerWriter.resume(runs) as writer:
        writer.append(Thresholds(values=thresholds, source="forget"))
    assert json.loads(once(pia, runs, "1017,1003", *more).out)["status"] == "carried out"


def test_a_request_planned_before_more_training_is_stale(pia: Pia, runs: Path) -> None:
    once(pia, runs)
    with LedgerWriter.resume(runs) as writer:
        writer.append(PHASE)
        writer.append(NOBODY)
    done = once(pia, runs)
    assert done.code == 2 and "PIA033" in done.err


def test_a_queue_under_one_request_id(pia: Pia, runs: Path) -> None:
    (runs.parent / "queue.csv").write_text("request_id,id\na,1017\nb,1003\na,1017\n", encoding="utf-8")
    queue = f"@{runs.parent / 'queue.csv'}"
    first = once(pia, runs, queue)
    made = UnlearningPlan.load(runs.parent / "plan.json")
    assert first.code == 0 and set(made.ids) == {1017, 1003}
    carry_out(runs, made)
    again = json.loads(once(pia, runs, queue).out)
    assert again["status"] == "carried out" and set(again["requests"].values()) == {"recorded"}
    (runs.parent / "queue.csv").write_text("request_id,id\na,1017\nb,1003\nc,1009\n", encoding="utf-8")
    assert "PIA085" in once(pia, runs, queue).err


def test_the_request_stands_in_the_certificate_and_cannot_be_exchanged(pia: Pia, runs: Path) -> None:
    once(pia, runs)
    made = UnlearningPlan.load(runs.parent / "plan.json")
    carry_out(runs, made)
    before, after, path = (runs.parent / name for name in ("before.pt", "after.pt", "certificate.json"))
    before.write_bytes(b"before")
    after.write_bytes(b"after")
    certificate = issue(made, runs, before, after)
    certificate.save(path)
    assert certificate.predicate.request_id == "r-1"
    evidence = ("verify", path, "--ledger", runs, "--checkpoint", after)
    assert pia(*evidence, "--request-id", "r-1", "--plan", runs.parent / "plan.json").code == 0
    assert pia(*evidence, "--request-id", "r-2").code == 1
    other = dataclasses.replace(made, request_id="r-2")
    assert other.digest != made.digest and other.content_digest == made.content_digest
    other.save(runs.parent / "other.json")
    assert pia(*evidence, "--plan", runs.parent / "other.json").code == 1
    failed = verify(issue(made, runs, before, after), runs, after, plan=other).failures
    assert [check.name for check in failed] == ["given plan"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_everybody_at_once(pia: Pia, runs: Path, suffix: str) -> None:
    path = runs.parent / f"everyone{suffix}"
    done = pia("plan", runs, "--everyone", *TARGET, "--output", path)
    table = plan_everyone(runs, 0.1, order=8)
    document = json.loads(done.out)
    assert done.code == 0 and document["instances"] == NUM_INSTANCES
    assert document["quantiles"]["p100"] == table.steps.max()
    if suffix == ".csv":
        steps = [int(row["steps"]) for row in csv.DictReader(io.StringIO(path.read_text()))]
    else:
        steps = pq.read_table(path)["steps"].to_pylist()
    assert steps == table.steps.astype(int).tolist()
    listed = pia("plan", runs, "--everyone", *TARGET[:4], "--format", "csv")
    assert len(listed.out.splitlines()) == NUM_INSTANCES + 1
    shown = pia("plan", runs, "--everyone", *TARGET[:4])
    assert "Never add up" in shown.out and "1017" not in shown.out
    assert pia("plan", runs, "--everyone", *TARGET, "--output", runs.parent / "x.txt").code == 2
