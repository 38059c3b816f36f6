"""Runs with a privacy filter: public drops are part of the schedule, hidden ones leave budgets only."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from per_instance_accountant.accounting import WorstCase, account, compact
from per_instance_accountant.accounting.spending import Spending
from per_instance_accountant.divergence import gaussian_delta, group_gaussian_rdp
from per_instance_accountant.errors import GuaranteeError
from per_instance_accountant.ledger import (
    Disclosure,
    Drop,
    Filter,
    LedgerWriter,
    Phase,
    PublicStep,
    Run,
    Step,
    Thresholds,
)
from per_instance_accountant.unlearning import bounds, issue, plan, plan_everyone, verify
from per_instance_accountant.unlearning.bounds.filter_budget import group_epsilon
from per_instance_accountant.unlearning.chain import training_chain

N, STEPS = 6, 40
NOBODY = Step(positions=np.empty(0, np.int64), contributions=np.empty(0, np.float32))
KNOWN = {"smoothness": 1.0, "clipping_never_binds": True, "individual_thresholds": True}
CONTRACTIVE = ("R1 fixed-order LSI", "R2 shifted LSI", "R3 contractive", "R4 subsampled")


def phase(charging="worst_case", **changes):
    return Phase(
        **{
            "kind": "train",
            "sampling": "poisson",
            "sample_rate": 1.0,
            "noise_std": 4.0,
            "max_grad_norm": 1.0,
            "charging": charging,
            "denominator": 4.0,
            "learning_rate": 0.2,
            "weight_decay": 0.5,
        }
        | changes
    )


def filtered(charging="worst_case", *, affords=(10, 25, 99, 99, 99, 99), path=None, drops=None, **changes):
    """A run whose member i can afford ``affords[i]`` steps at the clip norm, filtered as the engine does it.

    drops: other drops than those, as {step: positions}.
    """
    stated = phase(charging, **changes)
    one = 8 / 2 * (stated.max_grad_norm / stated.noise_std) ** 2
    budgets = Filter(family="renyi", orders=np.full(N, 8.0), budgets=one * (np.array(affords) + 0.5))
    writer, spending = LedgerWriter.create(path, Run(num_instances=N, assumptions=KNOWN)), Spending(budgets)

    def append(event):
        writer.append(event)
        spending.take(event)

    writer.append(budgets)
    if charging != "worst_case":
        source = "sweep" if charging == "sweep" else "fixed"
        append(Thresholds(values=np.linspace(0.5, 1, N).astype(np.float32), source=source))
    append(stated)
    for step in range(STEPS):
        due = spending.exceeding() if drops is None else np.array(drops.get(step, []), dtype=np.int64)
        if due.size:
            append(Drop(positions=due))
        append(NOBODY)
    return writer


def exact_gaussian(last, steps, shift=1.0):
    """mu of the last iterate for losses of Hessian 0: a shift in the first ``last`` of STEPS + ``steps``."""
    c, s, d = 1 - 0.2 * 0.5, 0.2 * 4.0 / 4.0, 0.2 * shift / 4.0
    age = np.arange(STEPS + steps)[::-1]
    gap = d * (c ** age[:last]).sum()
    return gap / np.sqrt(s**2 * (c ** (2 * age)).sum())


@pytest.mark.parametrize(("charging", "last"), [("worst_case", 2), ("fixed_thresholds", 10)])
def test_public_drops_are_part_of_the_schedule(charging, last):
    """Whoever left early is forgotten by the noise that came after; exact for losses without curvature."""
    ledger = filtered(charging, affords=(2.2, 25, 99, 99, 99, 99)).ledger()
    chain = training_chain(ledger, np.array([0]))
    threshold = chain.thresholds[0, 0]
    assert chain.counts[chain.thresholds[:, 0] > 0].sum() == last and not chain.hidden_state
    flat = KNOWN | {"smoothness": 1e-9}
    for steps in (0, 3, 20):
        made = plan(ledger, [0], 1e-9, order=8, assumptions=flat, max_steps=steps)
        exact = 8 * exact_gaussian(last, steps, threshold) ** 2 / 2
        always = 8 * exact_gaussian(STEPS, steps, threshold) ** 2 / 2
        assert exact * (1 - 1e-9) <= made.value <= exact * 1.3 < always
    early, late = (plan(ledger, [i], 0.01, order=8) for i in (0, 5))
    assert early.steps < late.steps and {early.bound, late.bound} <= set(CONTRACTIVE)


@pytest.mark.parametrize(
    "drops",
    [
        {},
        {9: [0], 25: [1]},
        {11: [0], 25: [1]},
        {10: [2], 25: [1]},
        {10: [0]},
        {10: [0, 1]},
        {10: [0], 24: [1]},
    ],
)
def test_drops_that_do_not_follow_from_the_budgets_are_refused(drops):
    assert training_chain(filtered(drops={10: [0], 25: [1]}).ledger(), np.array([3])).num_steps == STEPS
    with pytest.raises(GuaranteeError, match="PIA011"):
        training_chain(filtered(drops=drops).ledger(), np.array([3]))


@pytest.mark.parametrize("charging", ["sweep", "unamplified"])
@pytest.mark.parametrize("affords", [(10, 25, 99, 99, 99, 99), (9999,) * N])
def test_hidden_decisions_leave_budgets_only(charging, affords):
    """Also when nobody left: the law of the run holds the courses on which somebody would have."""
    writer = filtered(charging, affords=affords)
    ledger, radius = writer.ledger(), {"projection_radius": 0.5}
    ask = {"order": 8, "assumptions": KNOWN | {"smoothness": 1e-9}}
    made = plan(ledger, [0], 1e-9, **ask, **radius, max_steps=50)
    refused = {row.bound: row.reason for row in made.not_applicable}
    assert set(refused) == {*CONTRACTIVE, "R5 bounded domain"}
    assert all("filter" in reason for reason in refused.values())
    # With no budget stated the same events would have allowed R5, which is wrong for them.
    budget = 8 / 2 * (1 / 4) ** 2 * (affords[0] + 0.5)
    enough = plan(ledger, [0], budget * (1 + 1e-9), **ask)
    worst = 8 / 2 * (1 / 4) ** 2 * STEPS
    assert enough.steps == 0 and enough.value <= min(budget * (1 + 1e-9), worst * (1 + 1e-9))
    assert enough.bound == ("R0 filter budget" if budget < worst else "R0 data processing")
    assert plan(ledger, [0], 0.9 * min(budget, worst), **ask).steps is None


@pytest.mark.parametrize("order", [2, 32])
@pytest.mark.parametrize("charging", [None, WorstCase()])
def test_who_left_by_a_hidden_decision_is_charged_for_the_courses_on_which_it_stays(order, charging):
    """On this course member 0 has norm 1 and leaves after one step. With norms of sqrt(1/2) the same filter
    lets it take three steps, and the run is the same mechanism: its exact divergence is a lower bound."""
    budgets = Filter(family="renyi", orders=np.full(N, 2.0), budgets=np.full(N, 1.5 / 4**2))
    writer = LedgerWriter.create(None, Run(num_instances=N))
    writer.append(budgets)
    writer.append(phase("unamplified", sampling="shuffled"))
    writer.append(Step(positions=np.arange(1), contributions=np.ones(1, np.float32)))
    writer.append(Drop(positions=np.arange(1)))
    for _ in range(20):
        writer.append(NOBODY)
    other_course = order / 2 * 3 * 0.5 / 4**2
    realised = order / 2 * 1 / 4**2
    made = plan(writer.ledger(), [0], 1e-9, order=order, charging=charging)
    everyone = plan_everyone(writer.ledger(), 1e-9, order=order, charging=charging)
    assert realised < other_course <= made.value * (1 + 1e-12)
    assert everyone.value[0] >= made.value * (1 - 1e-12)
    assert plan(writer.ledger(), [0], realised * 1.2, order=order, charging=charging).steps is None


def test_a_budget_that_was_exceeded_promises_nothing():
    writer = filtered("unamplified", affords=(3,) * N)
    for _ in range(10):
        writer.append(Step(positions=np.arange(N), contributions=np.ones(N, np.float32)))
    with pytest.raises(GuaranteeError, match="PIA011"):
        plan(writer.ledger(), [0], 0.1, order=8)


def test_realised_losses_without_a_filter_still_plan_nothing():
    writer = LedgerWriter.create(None, Run(num_instances=N))
    writer.append(Thresholds(values=np.ones(N, np.float32), source="sweep"))
    writer.append(phase("sweep"))
    writer.append(NOBODY)
    with pytest.raises(GuaranteeError, match="PIA012"):
        plan(writer.ledger(), [0], 0.1, order=8)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    moved=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4),
    order=st.floats(8, 64),
    log_delta=st.floats(-25, -2),
)
def test_groups_of_budgets_are_never_below_exact_gaussians(moved, order, log_delta):
    """Members that shift a Gaussian by m_i each: budget a m_i^2 / 2 alone, sum m_i together."""
    shifts, delta = np.array(moved), np.exp(log_delta)
    orders = np.full(len(shifts), order)
    renyi = group_epsilon(orders, order * shifts**2 / 2, delta)
    gaussian = bounds.filter_budget(budget=shifts**2, delta=delta).value(0)
    for epsilon in (renyi, gaussian):
        assert gaussian_delta(shifts.sum(), epsilon) <= delta * (1 + 1e-9)
    assert gaussian <= renyi * (1 + 1e-9)


def test_adding_up_epsilons_of_members_would_be_caught():
    """Seeded bug: the sum of what each member costs alone at the same delta."""
    for shifts in (np.full(6, 0.05), np.full(8, 0.02)):
        alone = sum(bounds.filter_budget(budget=shift**2, delta=1e-2).value(0) for shift in shifts)
        assert gaussian_delta(shifts.sum(), alone) > 1e-2


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.floats(1.1, 1e6), st.floats(1, 1e3), st.floats(0.01, 5), st.floats(-15, -0.1))
def test_watching_a_higher_order_promises_no_less(order, times, budget, log_delta):
    """Everybody is planned along rising orders; above 1 / delta the plain conversion would rise again."""
    delta = float(np.exp(log_delta))
    low, high = (group_epsilon(np.array([a]), np.array([budget]), delta) for a in (order, order * times))
    assert 0 <= high <= low * (1 + 1e-9)


def test_members_of_several_orders_and_nobody():
    assert group_epsilon(np.array([2.0, 2.0]), np.array([0.1, 0.1]), 1e-5) == np.inf
    assert group_epsilon(np.array([8.0, 9.0]), np.zeros(2), 1e-5) == 0
    both = bounds.filter_budget(budget=[0.1, 0.2], watched_order=[8, 8], order=4)
    one = bounds.filter_budget(budget=[0.1, 0.0], watched_order=[8, 8], order=4)
    assert (
        both.value(3) == np.inf and one.value(3) == 0.1 and one.steps(0.1) == 0 and one.steps(0.05) == np.inf
    )
    assert bounds.filter_budget(budget=0.1, watched_order=8, order=8.5).value(0) == np.inf


@pytest.mark.parametrize("charging", ["worst_case", "fixed_thresholds", "sweep"])
def test_a_filtered_run_is_certified_and_verifies(charging, tmp_path):
    path, model, before = tmp_path / "run", tmp_path / "after.pt", tmp_path / "before.pt"
    with filtered(charging, path=path) as writer:
        target = {"worst_case": 0.01, "fixed_thresholds": 0.01, "sweep": 3.0}[charging]
        made = plan(writer.ledger(), [0, 5] if charging != "sweep" else [0], target, order=8)
        assert (made.steps == 0) == (charging == "sweep")
        values = np.ones(N, np.float32) if charging != "fixed_thresholds" else np.linspace(0.5, 1, N)
        values = values.astype(np.float32)
        values[list(made.ids)] = 0
        mechanism = dataclasses.asdict(made.mechanism)
        rule = charging if charging != "sweep" else "worst_case"
        writer.append(Thresholds(values=values, source="forget"))
        writer.append(Phase(kind="unlearn", charging=rule, plan_digest=made.digest, **mechanism))
        for _ in range(made.steps):
            writer.append(NOBODY)
    before.write_bytes(b"before")
    model.write_bytes(b"after")
    certificate = issue(made, path, before, model)
    assert verify(certificate, ledger=path, checkpoint=model).valid
    content = certificate.to_dict()
    assert content["predicate"]["claim"]["basis"] == "CERTIFIED"


@pytest.mark.parametrize("charging", ["fixed_thresholds", "sweep"])
def test_everybody_is_planned_as_alone(charging):
    writer = filtered(charging)
    for target in (1.5, 5.0) if charging == "sweep" else (0.01, 0.3):
        table = plan_everyone(writer.ledger(), target, order=8, levels=64)
        alone = [plan(writer.ledger(), [i], target, order=8).steps for i in range(N)]
        alone = np.array([np.inf if k is None else k for k in alone])
        assert (table.steps >= alone).all() and (table.steps <= 1.1 * alone + 1).all()
    assert len(set(table.steps.tolist())) > 1


def test_public_updates_leave_what_needs_no_map():
    writer = LedgerWriter.create(None, Run(num_instances=N, assumptions=KNOWN))
    writer.append(phase())
    writer.append(NOBODY)
    before = plan(writer.ledger(), [0], 1e-9, order=8, max_steps=9)
    writer.append(PublicStep(count=3))
    after = plan(writer.ledger(), [0], 1e-9, order=8, max_steps=9)
    assert "R3 contractive" not in {row.bound for row in before.not_applicable}
    reasons = {row.bound: row.reason for row in after.not_applicable}
    assert all("public data" in reasons[name] for name in CONTRACTIVE)
    assert after.value > before.value


def test_the_part_of_one_rank_plans_nothing():
    run = Run(num_instances=N, assumptions=KNOWN, run_id="a" * 32, rank=1, world_size=2)
    writer = LedgerWriter.create(None, run)
    writer.append(phase())
    writer.append(NOBODY)
    for attempt in (plan, plan_everyone):
        with pytest.raises(GuaranteeError, match="PIA117"):
            attempt(
                writer.ledger(),
                **{"target_epsilon": 0.1, "order": 8} | ({"ids": [0]} if attempt is plan else {}),
            )


def test_published_statistics_are_paid_for_and_end_what_hides():
    """What individual values reveal beside the model is charged to every member, and nothing contracts it."""
    for events in (
        [Disclosure(kind="histogram", epsilon=0.3)],
        [Disclosure(kind="quantiles", epsilon=0.1)] * 2,
    ):
        writer = LedgerWriter.create(None, Run(num_instances=N, assumptions=KNOWN))
        writer.append(phase())
        for _ in range(5):
            writer.append(NOBODY)
        ask = {"order": 8, "max_steps": 50, "projection_radius": 0.1}
        before = [plan(writer.ledger(), ids, 1e-9, **ask) for ids in ([0], [0, 1])]
        own = [account(writer.ledger(), orders=[8.0]).rdp[0, 0]]
        for event in events:
            writer.append(event)
        after = [plan(writer.ledger(), ids, 1e-9, **ask) for ids in ([0], [0, 1])]
        own.append(account(writer.ledger(), orders=[8.0]).rdp[0, 0])
        assert after[0].value == pytest.approx(own[1], rel=1e-9) and own[1] > own[0]
        group = group_gaussian_rdp(1.0, np.full(2, 0.25), np.array([8.0]))[0] * 5
        paid = sum(min(2 * e.epsilon, 4 * (2 * e.epsilon) ** 2) for e in events)
        assert after[1].value == pytest.approx(group + paid, rel=1e-9)
        assert before[0].value < own[0] and {after[0].bound, after[1].bound} == {"R0 data processing"}
        reasons = {row.bound: row.reason for row in after[0].not_applicable}
        assert all(
            "published" in reasons[n] for n in (*CONTRACTIVE, "R5 bounded domain", "R6 clipped gradients")
        )
        everyone = plan_everyone(writer.ledger(), 1e-9, **ask)
        assert (everyone.value >= after[0].value * (1 - 1e-12)).all()


def test_a_compacted_ledger_plans_nothing():
    small = compact(filtered().ledger(), None)
    with pytest.raises(GuaranteeError, match="PIA011"):
        plan(small, [0], 0.1, order=8, assumptions=KNOWN)


def test_curvature_of_those_who_may_all_have_left_is_not_counted():
    """Strong convexity of a full batch says nothing of an empty one."""
    stated = KNOWN | {"convexity": 0.9}
    whole = LedgerWriter.create(None, Run(num_instances=N))
    whole.append(phase())
    for _ in range(STEPS):
        whole.append(NOBODY)
    free = plan(whole.ledger(), [5], 1e-4, order=8, assumptions=stated)
    left = plan(filtered(affords=(10,) * N).ledger(), [5], 1e-4, order=8, assumptions=stated)
    everyone = plan_everyone(filtered(affords=(10,) * N).ledger(), 1e-4, order=8, assumptions=stated)
    assert everyone.steps[5] >= left.steps > 0
    assert free.contraction < left.contraction == pytest.approx(1 - 0.2 * 0.5, rel=1e-9)
