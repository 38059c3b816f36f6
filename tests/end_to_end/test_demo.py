"""``pia demo`` as a user meets it: one command, real data, one JSON object, all of it checkable."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from per_instance_accountant import LastSeen, WorstCase, audit, verify
from per_instance_accountant.cli import demo
from per_instance_accountant.cli.printing import Format
from per_instance_accountant.errors import UsageError
from per_instance_accountant.report import Evidence
from per_instance_accountant.results.rounding import rounded_up
from per_instance_accountant.unlearning import UnlearningPlan


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The whole demonstration in a process of its own; standard output must be one JSON object."""
    output = tmp_path_factory.mktemp("demo") / "out"
    command = [
        sys.executable,
        "-m",
        "per_instance_accountant",
        "demo",
        "--format",
        "json",
        "--output",
        str(output),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True, umask=0)
    return dict(json.loads(done.stdout))


def test_only_the_owner_may_read_what_was_written(printed: dict[str, Any]) -> None:
    """The process ran with a umask that hides nothing."""
    output = Path(printed["artefacts"]["plan"]).parent
    written = [output, *output.rglob("*")]
    assert len(written) > 10 and not [path.name for path in written if path.stat().st_mode & 0o077]


def test_worst_case_is_opacus_own_number_and_nobody_pays_more(printed: dict[str, Any]) -> None:
    assert printed["instances"] == 1437
    for run in (printed["neural_network"] | {"epsilon_opacus": printed["epsilon_opacus"]}, printed["convex"]):
        assert run["epsilon_worst"] == pytest.approx(run["epsilon_opacus"], rel=1e-6)
        values = [run["epsilon_quantiles"][q] for q in sorted(run["epsilon_quantiles"], key=float)]
        assert values == sorted(values) and values[-1] <= run["epsilon_max"] <= run["epsilon_worst"]
        assert values[0] < 0.9 * run["epsilon_worst"], "individual losses differ from the worst case"


def test_every_number_has_the_basis_of_its_rule(printed: dict[str, Any]) -> None:
    assert printed["basis"] == printed["neural_network"]["basis"] == "OUTPUT_SPECIFIC"
    assert printed["convex"]["basis"] == printed["sgld"]["basis"] == "CERTIFIED"
    assert printed["last_seen"]["basis"] == "ESTIMATE"


def test_the_plan_saves_work_and_the_certificate_holds(printed: dict[str, Any]) -> None:
    plan, artefacts = printed["plan"], printed["artefacts"]
    assert 0 < plan["steps"] < plan["training_steps"] and plan["value"] <= plan["target_epsilon"]
    assert printed["certificate"]["valid"] is True
    made = UnlearningPlan.load(artefacts["plan"])
    assert made.steps == plan["steps"] and made.deciding_id == plan["deciding_id"]
    where = {"ledger": artefacts["ledger"], "checkpoint": artefacts["checkpoint"]}
    assert verify(artefacts["certificate"], **where).valid
    assert not verify(artefacts["certificate"], ledger=artefacts["network_ledger"]).valid


def test_the_page_shows_what_was_measured(printed: dict[str, Any]) -> None:
    (claim,) = printed["claims"]
    assert claim["claimed"] == printed["convex"]["epsilon_worst_tight"]
    assert 0 <= claim["measured_at_least"] <= claim["claimed"], "a refuted claim is a bug"
    evidence = Evidence.load(printed["artefacts"]["evidence"])
    assert [barrier.pairs for barrier in evidence.barriers] == [4, 4]
    page = Path(printed["artefacts"]["report"]).read_text(encoding="utf-8")
    assert page.count("Loss barrier between the original and the") >= 2
    assert "Claimed against measured" in page and "no evaluation was given" not in page
    worst = f"the worst case grew to {rounded_up(printed['convex']['epsilon_worst'])}."
    assert worst in page, "the number of the table"


def test_accuracy_is_that_of_retraining(printed: dict[str, Any]) -> None:
    accuracy = printed["accuracy"]
    assert abs(accuracy["unlearned"] - accuracy["retrained"]) <= 0.02
    assert min(accuracy[name] for name in ("original", "unlearned", "retrained")) > 0.75
    assert printed["neural_network"]["accuracy"] > 0.9


def test_the_ledger_can_be_audited_again(printed: dict[str, Any]) -> None:
    network = printed["artefacts"]["network_ledger"]
    again = audit(network)
    assert again.worst_case == printed["epsilon_worst"]
    everybody = audit(network, charging=WorstCase(), tight=False).epsilon
    assert everybody == pytest.approx(np.full(1437, again.worst_case))
    assert (audit(network, charging=LastSeen()).epsilon <= again.worst_case).all()


def test_two_runs_with_one_seed_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "STEPS", 40)
    monkeypatch.setattr(demo, "TARGET", 0.5)
    monkeypatch.setattr(demo, "ACCURACY_SEEDS", 1)
    documents = []
    for name in ("a", "b", "a"):
        assert demo.run(seed=7, output=tmp_path / name, output_format=Format.JSON)
        document = json.loads(capsys.readouterr().out)
        documents.append({k: v for k, v in document.items() if k not in ("artefacts", "ledger")})
    for document in documents:
        for part in ("neural_network", "last_seen", "convex", "sgld"):
            document[part].pop("ledger")
    assert documents[0] == documents[1] == documents[2]


def test_a_directory_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="PIA070"):
        demo.run(output=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
