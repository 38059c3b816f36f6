"""Output-specific statements hold on the courses they speak about, and on these only."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from per_instance_accountant.accounting.statements import output_budgets, output_specific
from per_instance_accountant.divergence import rdp_to_epsilon
from per_instance_accountant.errors import GuaranteeError, PlanError, UsageError
from per_instance_accountant.ledger import LedgerWriter, Phase, Run, Step, Thresholds

GRID = np.linspace(-12.0, 18.0, 3001)


def recorded(assumptions, charging="sweep", threshold=0.5, steps=4):
    run = Run(num_instances=2, ids=np.array(["a", "b"]), assumptions=assumptions)
    writer = LedgerWriter.create(None, run)
    writer.append(
        Phase(
            kind="train",
            sampling="poisson",
            sample_rate=1.0,
            noise_std=1.0,
            max_grad_norm=5.0,
            charging=charging,
            denominator=1.0,
            learning_rate=0.1,
        )
    )
    writer.append(Thresholds(values=np.array([threshold, 0.0], np.float32), source="sweep"))
    for _ in range(steps):
        writer.append(Step(positions=np.array([0]), contributions=np.full(1, threshold, np.float32)))
    return writer.ledger()


def hockey_stick(epsilon, first, second, cut, *, below_only):
    """Both directions of sup_S P(S) - e^epsilon Q(S) for y1 = first + N, y2 = c(y1) + N, c = second
    above cut."""
    dx = GRID[1] - GRID[0]
    p1, q1 = norm.pdf(GRID - first), norm.pdf(GRID)
    c = np.where(cut < GRID, second, 0.0)
    inside = cut >= GRID if below_only else np.ones(len(GRID), dtype=bool)
    totals = []
    for sign in (1, -1):
        total = 0.0
        for here, high, low, shift in zip(inside, *((p1, q1) if sign > 0 else (q1, p1)), c, strict=True):
            if not here:
                continue
            log_ratio = epsilon + np.log(low) - np.log(high)
            if shift == 0:
                total += max(0.0, high - np.exp(epsilon) * low)
                continue
            # Second release: N(shift, 1) against N(0, 1), or the reverse, beyond the likelihood threshold.
            edge = log_ratio / shift + sign * shift / 2 if sign > 0 else -log_ratio / shift + shift / 2
            above = norm.sf(edge - shift) if sign > 0 else norm.cdf(edge)
            other = norm.sf(edge) if sign > 0 else norm.cdf(edge - shift)
            total += high * above - np.exp(epsilon) * low * other
        totals.append(total * dx)
    return totals


def test_the_statement_holds_where_the_loss_is_small_and_not_elsewhere():
    """Loss 0.010 at order 2 unless the first release exceeds 3, when the second adds 25."""
    delta, budget = 1e-4, 0.0101
    epsilon = rdp_to_epsilon([2.0], [budget], delta)
    assert max(hockey_stick(epsilon, 0.1, 5.0, 3.0, below_only=True)) <= delta
    assert max(hockey_stick(0.05, 0.1, 0.0, 3.0, below_only=True)) > delta
    # Seeded bug: the same numbers claimed for all courses of training.
    large = max(hockey_stick(epsilon, 0.1, 5.0, 3.0, below_only=False))
    assert large > delta


def test_the_smallest_budget_that_was_kept():
    grid = output_budgets(order=4.0, budgets=[1.0, 2.5, 9.0], delta=3e-5)
    statement = output_specific(recorded(grid), "a")
    assert (statement.budget, statement.num_budgets) == (2.5, 3)
    assert statement.delta_share <= 1e-5 and statement.delta_total == 3e-5
    assert statement.epsilon == rdp_to_epsilon([4.0], [2.5], statement.delta_share)
    assert output_specific(recorded(grid), "b").budget == 1.0
    words = statement.text()
    assert "OUTPUT_SPECIFIC" in words and "1e-05" in words and "3e-05" in words and '"a"' not in words


def test_what_supports_no_statement():
    grid = output_budgets(order=4.0, budgets=[1.0], delta=1e-5)
    for ledger in (recorded(None), recorded({"other": 1}), recorded(grid)):
        with pytest.raises(GuaranteeError, match="PIA011"):
            output_specific(ledger, "a")
    with pytest.raises(GuaranteeError, match="PIA012"):
        output_specific(recorded(grid, charging="last_seen"), "a")
    with pytest.raises(PlanError, match="PIA032"):
        output_specific(recorded(grid), "c")


@pytest.mark.parametrize(
    "fields", [{"budgets": []}, {"budgets": [1.0, 1.0]}, {"budgets": [0.0]}, {"order": 1.0}, {"delta": 0.0}]
)
def test_impossible_grids(fields):
    with pytest.raises(UsageError, match="PIA070"):
        output_budgets(**({"order": 4.0, "budgets": [1.0], "delta": 1e-5} | fields))
