"""Everybody's steps at once: what plan() gives, never less; clipping that binds; projection; public grids."""

from __future__ import annotations

import dataclasses
import math
import time

import numpy as np
import pytest

from per_instance_accountant.accounting import WorstCase
from per_instance_accountant.errors import PlanError, UsageError
from per_instance_accountant.ledger import LedgerWriter
from per_instance_accountant.ledger.records import Phase, Run, Step, Thresholds
from per_instance_accountant.unlearning import geometric_grid, plan, plan_everyone

ASK = {"target_epsilon": 0.05, "order": 8}


def individual(course, steps=60, **changes):
    run = course()
    values = np.geomspace(0.02, 1.5, 40)
    values[0] = 0
    run.thresholds(values).train(steps, charging="fixed_thresholds", **changes)
    return run, dataclasses.replace(run.known, individual_thresholds=True)


@pytest.mark.parametrize("measure", [{"order": 8}, {"target_delta": 1e-5}])
def test_nobody_gets_fewer_steps_than_alone_and_exact_levels_get_the_same(course, measure):
    run, known = individual(course)
    ask = {"target_epsilon": 0.03, "assumptions": known, **measure}
    coarse, fine = (plan_everyone(run.ledger, **ask, levels=n) for n in (2, 16))
    assert coarse.steps[0] == 0 and coarse.value[0] == 0
    assert np.all(np.diff(coarse.steps) >= 0) and len(set(coarse.steps)) > 5
    assert np.all(fine.steps <= coarse.steps) and np.all(coarse.value <= 0.03)
    for k in (1, 20, 39):
        alone = plan(run.ledger, [k], **ask)
        assert alone.steps <= fine.steps[k] <= alone.steps + 4 and fine.steps[k] <= coarse.steps[k]
    assert fine.steps[39] == plan(run.ledger, [39], **ask).steps
    assert coarse.bound[39] == plan(run.ledger, [39], **ask).bound and coarse.training_steps == 60
    assert coarse.quantile([0.0, 1.0]).tolist() == [0.0, coarse.steps.max()]
    worst = plan_everyone(run.ledger, **ask, charging=WorstCase())
    assert set(worst.steps) == {plan(run.ledger, [3], **ask, charging=WorstCase()).steps}


def test_rounding_thresholds_down_would_be_caught(course, monkeypatch):
    """The seeded mistake: the grid point below gives someone fewer steps than they need."""
    from per_instance_accountant.unlearning import everyone

    run, known = individual(course)
    monkeypatch.setattr(
        everyone, "_rounded_up", lambda t, levels: np.where(t > 0, np.exp2(np.floor(np.log2(t + 1e-300))), 0)
    )
    wrong = plan_everyone(run.ledger, **ASK, assumptions=known)
    assert wrong.steps[38] < plan(run.ledger, [38], **ASK, assumptions=known).steps


def test_changing_thresholds_and_forgotten_instances(course):
    run, known = individual(course)
    run.train(20, learning_rate=0.1)
    run.forget([5], base=0.5).train(10, charging="fixed_thresholds")
    table = plan_everyone(run.ledger, **ASK, assumptions=known, levels=64)
    assert 5 not in table.ids.tolist() and len(table.ids) == 39
    for k in (0, 1, 20, 38):
        alone = plan(run.ledger, [int(table.ids[k])], **ASK, assumptions=known)
        assert alone.steps <= table.steps[k] <= alone.steps + 2


def test_unreachable_is_infinite_for_those_whom_it_concerns(course):
    run, _ = individual(course)
    table = plan_everyone(run.ledger, **ASK)
    assert np.isinf(table.steps).any() and (table.steps[np.isfinite(table.steps)] == 0).all()
    assert np.all(table.value[np.isinf(table.steps)] > 0.05) and table.quantile([1.0])[0] == math.inf


def test_a_million_instances_take_seconds():
    n = 1_000_000
    rng = np.random.default_rng(0)
    writer = LedgerWriter.create(None, Run(num_instances=n))
    values = rng.lognormal(-1, 0.7, n).clip(0, 1.5).astype(np.float32)
    writer.append(Thresholds(values=values, source="fixed"))
    phase = {"kind": "train", "sampling": "poisson", "sample_rate": 1e-3, "noise_std": 4.0}
    steps = {"charging": "fixed_thresholds", "denominator": 1e3, "learning_rate": 0.2, "weight_decay": 0.2}
    writer.append(Phase(max_grad_norm=1.5, **phase, **steps))
    for _ in range(300):
        drawn = np.sort(rng.choice(n, 1000, replace=False))
        writer.append(Step(positions=drawn, contributions=(values[drawn] * 0.9).astype(np.float32)))
    known = {"smoothness": 1.0, "clipping_never_binds": True, "individual_thresholds": True}
    started = time.process_time()
    table = plan_everyone(writer.ledger(), 1e-6, order=8, assumptions=known)
    assert time.process_time() - started < 15
    assert table.steps.shape == (n,) and len(np.unique(table.steps)) > 5
    order = np.argsort(values)
    assert np.all(np.diff(table.steps[order]) >= 0)


@pytest.mark.parametrize("who", [3, 30])
def test_clipping_that_binds_for_anybody_refuses_contraction(course, who):
    def recorded(contribution):
        step = Step(positions=np.array([who]), contributions=np.array([contribution], np.float32))
        run = course().train(59).step(1, step)
        return plan(run.ledger, [3], target_epsilon=1e-3, order=8, assumptions=run.known)

    bound, free = recorded(1.5 * (1 - 5e-6)), recorded(1.41)
    assert free.reachable and not bound.reachable
    reasons = [row.reason for row in bound.not_applicable if "contradicts clipping_never_binds" in row.reason]
    assert len(reasons) == 4 and not any(str(who) in reason for reason in reasons)


def test_the_threshold_that_counts_is_the_own_one(course):
    run, known = individual(course, steps=10)
    own = np.geomspace(0.02, 1.5, 40)[20]
    at = Step(positions=np.array([20]), contributions=np.array([own], np.float32))
    below = Step(positions=np.array([20]), contributions=np.array([own * 0.99], np.float32))
    assert plan(run.step(1, below).ledger, [39], **ASK, assumptions=known).reachable
    assert not plan(run.step(1, at).ledger, [39], **ASK, assumptions=known).reachable


def test_a_public_grid_rounds_up_and_ends(course):
    run = course().train(60)
    ask = {**ASK, "assumptions": run.known}
    least = plan(run.ledger, [3], **ask).steps
    grid = geometric_grid(1000, 1.5)
    on_grid = plan(run.ledger, [3], **ask, step_grid=grid)
    assert on_grid.steps == min(k for k in grid if k >= least) > least
    assert on_grid.value <= plan(run.ledger, [3], **ask).value and on_grid.step_grid == grid
    beyond = plan(run.ledger, [3], **ask, step_grid=(0, least - 1))
    assert not beyond.reachable and beyond.value > 0.05
    rows = plan_everyone(run.ledger, **ask, step_grid=grid).steps
    assert set(rows) == {on_grid.steps}
    for wrong in ((), (3, 2), (-1, 4), (2, 2)):
        with pytest.raises(UsageError, match="PIA070"):
            plan(run.ledger, [3], **ask, step_grid=wrong)


def test_projection_needs_no_assumption_and_is_part_of_the_mechanism(course):
    run = course().train(60, noise_std=40.0, momentum=0.0)
    ask = {"target_epsilon": 0.02, "target_delta": 1e-3}
    plain = plan(run.ledger, [3], **ask)
    ball = plan(run.ledger, [3], **ask, projection_radius=0.1)
    assert not plain.reachable and ball.reachable and ball.bound == "R5 bounded domain"
    assert ball.mechanism.projection_radius == 0.1 and plain.mechanism.projection_radius is None
    wider = plan(run.ledger, [3], **ask, projection_radius=1.0)
    assert wider.steps > ball.steps
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="PIA070"):
            plan(run.ledger, [3], **ask, projection_radius=wrong)
    stale = course().train(60, noise_std=40.0, momentum=0.9)
    assert not plan(stale.ledger, [3], **ask, projection_radius=0.1).reachable


def test_the_planner_refuses_everybody_before_training(course):
    with pytest.raises(PlanError, match="PIA032"):
        plan_everyone(course().ledger, **ASK)
