"""``pia audit``: the numbers of the room, each with its basis; only certified ones establish a budget."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from per_instance_accountant.accounting import Basis, LastSeen, Unamplified, WorstCase
from per_instance_accountant.audit import audit
from per_instance_accountant.cli.pages import budget_verdict
from per_instance_accountant.cli.printing import SENSITIVE
from tests.cli.conftest import IDS, NUM_INSTANCES, Pia

TREAT = "Treat them like the training data"


def test_json_is_one_object_with_the_rooms_numbers(pia: Pia, ledger: Path) -> None:
    result = audit(ledger, 1e-6)
    done = pia("audit", ledger, "--delta", "1e-6", "--top", "3", "--by", "label", "--format", "json")
    document = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert document["epsilon_worst"] == result.worst_case
    assert document["top"] == result.top(3)
    assert document["groups"] == result.by_group("label")
    assert document["notice"] == SENSITIVE
    assert all(row["basis"] == "CERTIFIED" for row in document["top"] + document["groups"])


def test_csv_lists_every_instance_exactly_and_inertly(pia: Pia, ledger: Path) -> None:
    done = pia("audit", ledger, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(done.out, newline="")))
    result = audit(ledger)
    assert [float(row["epsilon"]) for row in rows] == [row["epsilon"] for row in result.top(NUM_INSTANCES)]
    assert sorted(row["id"].removeprefix("'") for row in rows) == sorted(IDS.tolist())
    assert not any(row["id"].startswith(("=", "+", "-", "@", "\t")) for row in rows)
    assert {row["basis"] for row in rows} == {"CERTIFIED"}
    assert TREAT in done.err


def test_csv_of_groups(pia: Pia, ledger: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(pia("audit", ledger, "--by", "label", "--format", "csv").out)))
    assert [row["group"] for row in rows] == ["1", "0"]
    assert sum(int(row["instances"]) for row in rows) == NUM_INSTANCES


def test_table_labels_every_number_and_says_it_is_sensitive(pia: Pia, ledger: Path) -> None:
    out = pia("audit", ledger, "--top", "4", "--charging", "last-seen").out
    assert TREAT in out
    assert sum(line.endswith("ESTIMATE") for line in out.splitlines()) == 4 + 7
    assert sum(line.endswith("CERTIFIED") for line in out.splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "rule"),
    [
        ("worst-case", WorstCase()),
        ("as-trained", None),
        ("last-seen", LastSeen()),
        ("unamplified", Unamplified()),
    ],
)
def test_charging_reaches_the_room(pia: Pia, ledger: Path, option: str, rule: Any) -> None:
    document = json.loads(pia("audit", ledger, "--charging", option, "--format", "json").out)
    expected = audit(ledger, charging=rule).to_dict()
    assert {key: document[key] for key in ("basis", "charging", "epsilon_max")} == {
        key: expected[key] for key in ("basis", "charging", "epsilon_max")
    }


def test_budget_decides_the_exit_code(pia: Pia, ledger: Path) -> None:
    largest = float(audit(ledger).epsilon.max())
    assert pia("audit", ledger, "--budget", largest).code == 0
    over = pia("audit", ledger, "--budget", math.nextafter(largest, 0), "--format", "json")
    assert over.code == 1
    assert json.loads(over.out)["budget"]["certified"] is False


Verdict = Callable[[Any, float], dict[str, Any]]


def only_certified_numbers_pass(verdict: Verdict) -> bool:
    """Individual values of 1 and a worst case of 5: a budget of 2 holds only if the values are certified."""
    passes = {}
    for basis in Basis:
        result = SimpleNamespace(
            basis=basis, worst_case=5.0, ids=np.arange(3), num_over=lambda budget: 3 * (budget < 1)
        )
        passes[basis] = [bool(verdict(result, budget)["certified"]) for budget in (0.5, 2.0, 5.0)]
    uncertified = [False, False, True]
    return passes == {
        Basis.CERTIFIED: [False, True, True],
        Basis.OUTPUT_SPECIFIC: uncertified,
        Basis.ESTIMATE: uncertified,
    }


def test_only_certified_numbers_pass_a_budget() -> None:
    assert only_certified_numbers_pass(budget_verdict)


def test_the_law_catches_a_verdict_that_ignores_the_basis() -> None:
    assert not only_certified_numbers_pass(lambda result, budget: {"certified": result.num_over(budget) == 0})


def test_an_estimate_below_the_budget_fails(pia: Pia, ledger: Path) -> None:
    result = audit(ledger, charging=LastSeen())
    budget = (float(result.epsilon.max()) + result.worst_case) / 2
    if result.epsilon.max() < result.worst_case:
        assert pia("audit", ledger, "--charging", "last-seen", "--budget", budget).code == 1
    assert pia("audit", ledger, "--charging", "last-seen", "--budget", result.worst_case).code == 0


def test_numbers_are_kept_and_shown_again(pia: Pia, ledger: Path) -> None:
    options = ("--top", "3", "--by", "label", "--format", "json")
    made = pia("audit", ledger, "--keep", *options)
    again = pia("audit", ledger, "--kept", *options)
    assert made.code == again.code == 0 and made.out == again.out
    for other in (("--delta", "1e-6"), ("--charging", "last-seen")):
        done = pia("audit", ledger, "--kept", *other)
        assert done.code == 2 and "PIA070" in done.err
