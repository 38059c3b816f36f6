"""Audits: what is printed is what the ledger says, on its basis, and never on a stronger one."""

from __future__ import annotations

import csv
import math
import stat
from pathlib import Path

import numpy as np
import pytest

from per_instance_accountant import LastSeen, WorstCase, account, audit
from per_instance_accountant.accounting import Basis
from per_instance_accountant.audit.budget import BudgetAudit
from per_instance_accountant.errors import UsageError
from per_instance_accountant.ledger import Ledger, LedgerWriter
from per_instance_accountant.ledger.records import Phase, Run, Step, Thresholds

N = 40
RNG = np.random.default_rng(0)
VALUES = np.sort(RNG.uniform(0.05, 1.0, N)).astype(np.float32)
LABELS = np.array(["=cat", "dog"] * (N // 2))
IDS = np.array([f"row-{i:03d}" for i in range(N)])


def run(charging: str = "fixed_thresholds") -> Ledger:
    writer = LedgerWriter.create(None, Run(num_instances=N, ids=IDS, groups={"label": LABELS}))
    writer.append(
        Phase(
            kind="train",
            sampling="poisson",
            sample_rate=0.1,
            noise_std=1.5,
            max_grad_norm=1.0,
            charging=charging,
            denominator=4.0,
            learning_rate=0.1,
        )
    )
    writer.append(Thresholds(values=VALUES, source="fixed"))
    for t in range(25):
        drawn = np.arange(t % 5, N, 10)
        writer.append(Step(positions=drawn, contributions=VALUES[drawn]))
    return writer.ledger()


@pytest.fixture(scope="module")
def result() -> BudgetAudit:
    return audit(run(), delta=1e-5)


@pytest.mark.parametrize("tight", [True, False])
def test_a_run_without_steps_has_cost_nobody_anything(tight: bool) -> None:
    writer = LedgerWriter.create(None, Run(num_instances=3))
    nothing = audit(writer.ledger(), tight=tight)
    assert nothing.epsilon.tolist() == [0, 0, 0] and nothing.worst_case == nothing.worst_case_tight == 0


def test_epsilons_are_those_of_the_account(result: BudgetAudit) -> None:
    np.testing.assert_array_equal(audit(run(), tight=False).epsilon, account(run()).epsilon(1e-5))
    np.testing.assert_array_equal(result.epsilon, account(run()).tight_epsilon(1e-5))
    assert (result.epsilon <= 0.95 * account(run()).epsilon(1e-5)).all()
    assert result.worst_case == account(run()).worst_case_epsilon(1e-5)
    assert (result.epsilon <= result.worst_case).all()
    assert result.basis is Basis.CERTIFIED


def test_top_is_sorted_and_carries_the_basis(result: BudgetAudit) -> None:
    top = result.top(3)
    assert [row["id"] for row in top] == ["row-039", "row-038", "row-037"]
    assert {row["basis"] for row in top} == {"CERTIFIED"}
    assert len(result.top(N + 5)) == N and result.top(0) == []


def test_groups_partition_the_instances(result: BudgetAudit) -> None:
    rows = result.by_group("label")
    assert sum(row["instances"] for row in rows) == N
    assert max(row["max"] for row in rows) == result.epsilon.max()
    for row in rows:
        members = result.epsilon[row["group"] == LABELS]
        assert row["median"] in members and np.mean(members <= row["median"]) >= 0.5
    with pytest.raises(UsageError, match="PIA071"):
        result.by_group("nothing")


def test_quantiles_round_up(result: BudgetAudit) -> None:
    levels = np.linspace(0, 1, 23)
    values = result.quantiles(levels)
    for level, value in zip(levels, values, strict=True):
        assert np.mean(result.epsilon <= value) >= level
    with pytest.raises(UsageError, match="PIA070"):
        result.quantiles([1.5])


def test_num_over_counts_what_a_budget_forbids(result: BudgetAudit) -> None:
    budget = float(np.median(result.epsilon))
    assert result.num_over(budget) == int((result.epsilon > budget).sum())
    assert result.num_over(math.inf) == 0
    with pytest.raises(UsageError, match="PIA070"):
        result.num_over(math.nan)


def test_an_estimate_says_so_everywhere() -> None:
    estimate = audit(run(), charging=LastSeen())
    assert estimate.basis is Basis.ESTIMATE
    assert "ESTIMATE" in repr(estimate) and "bounds nothing" in estimate.statement()
    assert {row["basis"] for row in estimate.top(2) + estimate.by_group("label")} == {"ESTIMATE"}
    assert estimate.to_dict()["basis"] == "ESTIMATE"
    assert set(estimate.to_arrow()["basis"].to_pylist()) == {"ESTIMATE"}
    assert estimate.worst_case == audit(run(), charging=WorstCase()).worst_case


def test_statement_names_unit_sampling_and_what_is_not_covered(result: BudgetAudit) -> None:
    text = result.statement()
    for needed in (
        "one training row",
        "Poisson, rate 0.1",
        "Not covered",
        "CERTIFIED",
        "like the training data",
    ):
        assert needed in text


def test_csv_is_owner_only_and_inert(result: BudgetAudit, tmp_path: Path) -> None:
    path = tmp_path / "epsilon.csv"
    result.to_csv(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    rows = list(csv.DictReader(path.open()))
    assert [float(row["epsilon"]) for row in rows] == result.epsilon.tolist()
    assert {row["group_label"] for row in rows} == {"'=cat", "dog"}


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan])
def test_delta_outside_its_range_is_refused(delta: float) -> None:
    with pytest.raises(UsageError, match="PIA070"):
        audit(run(), delta=delta)


def test_metrics_are_flat_numbers(result: BudgetAudit) -> None:
    metrics = result.metrics()
    assert metrics["privacy/epsilon_worst"] == result.worst_case
    assert all(isinstance(value, float) for value in metrics.values())
