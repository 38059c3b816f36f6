"""Plans: least K from real ledgers, what is refused, which bounds apply, the record and its file."""

from __future__ import annotations

import dataclasses
import json
import math
import stat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from per_instance_accountant.accounting import FixedThresholds, LastSeen, WorstCase, account
from per_instance_accountant.errors import CertificateError, GuaranteeError, PlanError, UsageError
from per_instance_accountant.ledger.records import Resume, Step
from per_instance_accountant.unlearning import Assumptions, UnlearningPlan, bounds, plan
from per_instance_accountant.unlearning.applicable import ROWS, Facts
from per_instance_accountant.unlearning.chain import training_chain

LAW = settings(max_examples=10, deadline=None, derandomize=True)


ALL_HIDDEN = {row.name for row in ROWS} - {"R0 data processing"}
CONTRACTING = ALL_HIDDEN - {"R0 filter budget", "R5 bounded domain", "R6 clipped gradients"}


def reasons(found, word):
    """Bounds that were refused for a reason with this word."""
    return {row.bound for row in found.not_applicable if word in row.reason}


def recomputed(found, ledger, steps, charging=None):
    """The deciding bound's value at ``steps``, from the ledger."""
    chain = training_chain(ledger, ledger.positions_of(list(found.ids)), charging)
    known = Assumptions.from_dict(found.assumptions)
    facts = Facts(chain=chain, assumptions=known, measure=found.measure, mechanism=found.mechanism)
    return min(
        row.build(facts).value(steps)
        for row in ROWS
        if not any(need(facts) for need in row.requirements) and row.build(facts).direction == "both"
    )


@pytest.mark.parametrize("measure", [{"order": 8}, {"order": 1.5}, {"target_delta": 1e-5}])
@pytest.mark.parametrize("ids", [[3], [3, 17]])
@pytest.mark.parametrize("sampling", [{"sample_rate": 0.1}, {"sample_rate": 1.0}, {"sampling": "shuffled"}])
def test_steps_are_the_least(course, measure, ids, sampling):
    run = course().train(60, **sampling)
    found = plan(run.ledger, ids=ids, target_epsilon=0.03, **measure, assumptions=run.known)
    assert found.reachable and found.steps > 0 and found.value <= 0.03
    assert recomputed(found, run.ledger, found.steps) == found.value
    assert recomputed(found, run.ledger, found.steps - 1) > 0.03
    assert found.training_steps == 60 and found.cost_ratio == found.steps / 60 and found.direction == "both"


def test_full_batch_plan_is_the_closed_form(course):
    """One instance in every step: mu_K = delta c^K geom(c, T) / (s sqrt(geom(c^2, T + K)))."""
    run = course().train(60, sample_rate=1.0)
    known = {"smoothness": 2.0, "clipping_never_binds": True}
    found = plan(run.ledger, ids=[5], target_epsilon=0.05, order=4, assumptions=known)
    derived = plan(run.ledger, ids=[5], target_epsilon=0.05, order=4, assumptions=run.known)
    assert derived.steps == found.steps and derived.value == pytest.approx(found.value, rel=1e-3)
    delta, s = 0.2 * 1.5 / 10, 0.2 * 4 / 10
    c = 1 - 0.2 * 0.2  # L = 40 / 2 / 10 = 2, so |1 - 0.2 (0.2 + 2)| is smaller

    def value(k):
        mu = (
            delta
            * c**k
            * sum(c**j for j in range(60))
            / (s * math.sqrt(sum(c ** (2 * j) for j in range(60 + k))))
        )
        return 4 * mu**2 / 2

    assert found.contraction == pytest.approx(c, rel=1e-14) and found.bound == "R3 contractive"
    assert found.value == pytest.approx(value(found.steps), rel=1e-9)
    assert value(found.steps) <= 0.05 < value(found.steps - 1)


@LAW
@given(
    noise=st.floats(1.0, 10.0),
    steps=st.integers(1, 80),
    rate=st.sampled_from([0.05, 0.3, 1.0]),
    target=st.floats(0.01, 2.0),
    scale=st.sampled_from([0.5, 2.0]),
)
def test_laws_of_plans(course, noise, steps, rate, target, scale):
    def least(*, noise=noise, steps=steps, rate=rate, target=target, clip=1.5, ids=(3,), known=None):
        run = course().train(steps, noise_std=noise, sample_rate=rate, max_grad_norm=clip)
        made = plan(run.ledger, ids=list(ids), target_epsilon=target, order=4, assumptions=known or run.known)
        return made.steps

    here = least()
    assert least(target=2 * target) <= here <= least(steps=steps + 10)
    assert least(clip=2.0) >= here and least(noise=2 * noise) <= here
    assert least(ids=(3, 4)) >= here
    flat = dataclasses.replace(course().known, clipping_never_binds=True, gradient_norm=None, sources={})
    assert least(known=flat, clip=1.5 * scale, noise=noise * scale) == here
    start = account(course().train(steps, noise_std=noise, sample_rate=rate).ledger, orders=[4.0]).rdp[3, 0]
    assert start > target * (1 - 1e-9) or here == 0


def test_steps_zero_when_training_alone_is_within_the_target(course):
    run = course().train(3)
    found = plan(run.ledger, ids=[0], target_epsilon=50.0, order=8)
    assert (found.steps, found.bound, found.cost_ratio) == (0, "R0 data processing", 0)
    spent = account(run.ledger, orders=[8.0]).rdp[0, 0]
    assert found.value == pytest.approx(spent, rel=1e-9)


def test_unreachable_is_a_value_with_the_best_that_can_be_reached(course, tmp_path):
    run = course().train(60)
    found = plan(run.ledger, ids=[3], target_epsilon=1e-4, order=8)
    assert (found.steps, found.reachable, found.cost_ratio) == (None, False, None)
    assert found.value == pytest.approx(account(run.ledger, orders=[8.0]).rdp[3, 0], rel=1e-9)
    assert {row.bound for row in found.not_applicable} == {r.name for r in ROWS} - {"R0 data processing"}
    assert reasons(found, "smoothness") == CONTRACTING
    limited = plan(run.ledger, ids=[3], target_epsilon=1e-4, order=8, assumptions=run.known, max_steps=5)
    assert not limited.reachable and limited.value <= found.value
    noiseless = course().train(5, noise_std=0.0)
    none = plan(noiseless.ledger, ids=[3], target_epsilon=1.0, order=8, assumptions=run.known)
    assert none.value == math.inf and not none.reachable
    none.save(tmp_path / "plan.json")
    assert UnlearningPlan.load(tmp_path / "plan.json") == none


def test_a_group_is_charged_as_a_group(course):
    run = course().train(60)
    group = plan(run.ledger, ids=[1, 2, 3, 4], target_epsilon=0.1, order=8, assumptions=run.known)
    alone = [row.steps for row in group.per_instance]
    assert len(set(alone)) == 1 and group.steps > alone[0]
    # What summing or reusing single values would plan is caught by the recomputed group value.
    assert recomputed(group, run.ledger, alone[0]) > 0.1


def test_individual_thresholds_decide_who_needs_most(course):
    values = np.linspace(0.1, 1.5, 40)
    run = course()
    run.thresholds(values).train(60, charging="fixed_thresholds")
    known = dataclasses.replace(run.known, individual_thresholds=True, gradient_norm=None, sources={})
    found = plan(run.ledger, ids=[2, 30, 7], target_epsilon=1e-3, order=8, assumptions=known)
    steps = {row.id: row.steps for row in found.per_instance}
    assert found.deciding_id == 30 and steps[2] < steps[7] < steps[30] <= found.steps
    worst = plan(run.ledger, ids=[2], target_epsilon=1e-3, order=8, assumptions=known, charging=WorstCase())
    assert worst.steps > steps[2] and worst.charging == "worst_case"
    # Ties in K: the larger threshold.
    tie = plan(run.ledger, ids=[2, 3], target_epsilon=50, order=8, assumptions=known)
    assert tie.deciding_id == 3


def test_business_ids_are_used_throughout(course):
    names = np.array([f"person {k}" for k in range(40)])
    run = course(ids=names).train(10)
    found = plan(run.ledger, ids=["person 7", "person 3"], target_epsilon=0.1, order=8, assumptions=run.known)
    assert found.ids == ("person 7", "person 3") and "person" not in repr(found)


@pytest.mark.parametrize("ids", [[], [3, 3], [400], [-1], list(range(40)), ["3"]])
def test_bad_requests_are_refused_without_naming_anybody(course, ids):
    with pytest.raises(PlanError, match="PIA032") as caught:
        plan(course().train(5).ledger, ids=ids, target_epsilon=1.0, order=8)
    assert "400" not in str(caught.value)


def test_untrained_and_forgotten_instances_are_refused(course):
    with pytest.raises(PlanError, match="PIA032"):
        plan(course().ledger, ids=[3], target_epsilon=1.0, order=8)
    run = course().train(5).forget([3]).step(5)
    with pytest.raises(PlanError, match="PIA032"):
        plan(run.ledger, ids=[3, 4], target_epsilon=1.0, order=8)
    assert plan(run.ledger, ids=[4], target_epsilon=50.0, order=8).reachable


@pytest.mark.parametrize(
    "arguments",
    [
        {"target_epsilon": 0.0, "order": 8},
        {"target_epsilon": -1.0, "order": 8},
        {"target_epsilon": math.nan, "order": 8},
        {"target_epsilon": math.inf, "order": 8},
        {"target_epsilon": 1.0},
        {"target_epsilon": 1.0, "order": 8, "target_delta": 1e-5},
        {"target_epsilon": 1.0, "order": 1.0},
        {"target_epsilon": 1.0, "order": math.nan},
        {"target_epsilon": 1.0, "target_delta": 0.0},
        {"target_epsilon": 1.0, "order": 8, "direction": "add"},
        {"target_epsilon": 1.0, "order": 8, "max_steps": -1},
    ],
)
def test_bad_arguments_are_refused(course, arguments):
    with pytest.raises(UsageError, match="PIA070"):
        plan(course().train(5).ledger, ids=[3], **arguments)


@pytest.mark.parametrize("rule", ["sweep", "unamplified", "last_seen"])
def test_realised_losses_never_plan(course, rule):
    run = course().thresholds(np.full(40, 0.2), "sweep").train(20, charging=rule)
    with pytest.raises(GuaranteeError, match=r"PIA012.*charging=WorstCase\(\)"):
        plan(run.ledger, ids=[3], target_epsilon=1.0, order=8, assumptions=run.known)
    found = plan(
        run.ledger, ids=[3], target_epsilon=50.0, order=8, assumptions=run.known, charging=WorstCase()
    )
    reference = course().train(20)
    assert found.value == plan(reference.ledger, ids=[3], target_epsilon=50.0, order=8).value
    assert any("measured" in row.reason for row in found.not_applicable)
    for wrong in (FixedThresholds(), LastSeen()):
        with pytest.raises(GuaranteeError):
            plan(run.ledger, ids=[3], target_epsilon=1.0, order=8, charging=wrong)


def test_a_run_that_was_certified_only_at_times_is_refused(course):
    run = course().train(5).thresholds(np.full(40, 0.2), "sweep").train(5, charging="sweep")
    with pytest.raises(GuaranteeError, match="PIA012"):
        plan(run.ledger, ids=[3], target_epsilon=1.0, order=8)


@pytest.mark.parametrize(
    ("changes", "known", "word"),
    [
        ({"momentum": 0.9}, {}, "state"),
        ({"optimizer": "Adam"}, {}, "state"),
        ({}, {"smoothness": None}, "smoothness"),
        ({}, {"clipping_never_binds": False}, "clipping"),
        ({"max_grad_norm": 1.0}, {}, "clip norm"),
        ({}, {"num_instances": 39}, "instances"),
    ],
)
def test_bounds_whose_assumptions_fail_are_not_used(course, changes, known, word):
    run = course().train(60, **changes)
    assumptions = dataclasses.replace(run.known, **known, sources={})
    found = plan(run.ledger, ids=[3], target_epsilon=1e-3, order=8, assumptions=assumptions)
    assert not found.reachable and found.bound == "R0 data processing"
    assert reasons(found, word) >= CONTRACTING
    good = plan(course().train(60).ledger, ids=[3], target_epsilon=1e-3, order=8, assumptions=run.known)
    assert good.reachable


def test_individual_clipping_below_the_gradient_bound_needs_a_statement(course):
    run = course()
    run.thresholds(np.full(40, 0.5)).train(60, charging="fixed_thresholds")
    without = plan(run.ledger, ids=[3], target_epsilon=1e-3, order=8, assumptions=run.known)
    assert not without.reachable and reasons(without, "individual_thresholds") == CONTRACTING
    stated = dataclasses.replace(run.known, individual_thresholds=True)
    assert plan(run.ledger, ids=[3], target_epsilon=1e-3, order=8, assumptions=stated).reachable


def test_abandoned_branches_leave_only_data_processing(course):
    run = course().train(30)
    run.writer.append(Resume(at_step=20))
    run.train(10)
    found = plan(run.ledger, ids=[3], target_epsilon=1e-3, order=8, assumptions=run.known)
    assert not found.reachable and reasons(found, "abandoned") == ALL_HIDDEN - {"R0 filter budget"}
    assert found.value == pytest.approx(account(run.ledger, orders=[8.0]).rdp[3, 0], rel=1e-9)
    whole = course().train(30)
    whole.writer.append(Resume(at_step=30))
    whole.train(10)
    assert plan(whole.ledger, ids=[3], target_epsilon=1e-3, order=8, assumptions=run.known).reachable


def test_an_instance_that_was_clipped_wrongly_is_refused(course):
    over = Step(positions=np.array([3]), contributions=np.array([1.6], np.float32))
    run = course().train(5).step(1, over)
    with pytest.raises(GuaranteeError, match="PIA011"):
        plan(run.ledger, ids=[3], target_epsilon=1.0, order=8)
    assert plan(run.ledger, ids=[4], target_epsilon=50.0, order=8).reachable


def test_the_chain_reads_phases_thresholds_and_exclusion(course):
    run = course().thresholds(np.full(40, 0.7)).train(4)
    run.train(3, charging="fixed_thresholds", learning_rate=0.1, sampling="shuffled")
    run.forget([3], base=0.7).step(2)
    run.train(5, kind="unlearn", charging="fixed_thresholds", plan_digest="sha256:x")
    chain = training_chain(run.ledger, np.array([3, 9]))
    assert chain.counts.tolist() == [4, 3, 2, 5] and chain.num_steps == 14
    expected = [[1.5, 1.5], [0.7, 0.7], [0, 0.7], [0, 0.7]]
    np.testing.assert_allclose(chain.thresholds, expected, rtol=1e-7)
    assert chain.amplification_rates.tolist() == [0.1, 1, 1, 0.1]
    assert chain.forgotten.tolist() == [True, False] and chain.last_training.learning_rate == 0.1
    np.testing.assert_allclose(chain.ratios[1], [0.7 / 4] * 2, rtol=1e-7)
    part = training_chain(run.ledger, np.array([3, 9]), stop=6)
    assert part.counts.tolist() == [4, 2] and not part.forgotten.any()
    assert training_chain(run.ledger, np.array([9]), first=5, stop=8).counts.tolist() == [2, 1]


def test_sequential_requests_see_earlier_unlearning_as_further_steps(course):
    run = course().train(60)
    first = plan(run.ledger, ids=[3], target_epsilon=0.1, order=8, assumptions=run.known)
    run.unlearn(first)
    second = plan(run.ledger, ids=[4], target_epsilon=0.1, order=8, assumptions=run.known)
    assert second.training_steps == 60 + first.steps and second.mechanism == first.mechanism
    longer = course().train(60 + first.steps)
    reference = plan(longer.ledger, ids=[4], target_epsilon=0.1, order=8, assumptions=run.known)
    assert (second.steps, second.value) == (reference.steps, reference.value)


def test_learning_rate_schedules_follow_the_taut_string(course):
    run = course()
    for lr in (0.2, 0.1, 0.05):
        run.train(20, learning_rate=lr, sample_rate=1.0)
    known = {"smoothness": 2.0, "clipping_never_binds": True}
    found = plan(run.ledger, ids=[3], target_epsilon=0.05, order=4, assumptions=known)
    lrs = np.repeat([0.2, 0.1, 0.05], 20)
    direct = bounds.contractive(
        sensitivity=lrs * 0.15, noise_std=lrs * 0.4, contraction=1 - lrs * 0.2, order=4
    )
    assert direct.steps(0.05) == found.steps
    assert found.value == pytest.approx(direct.value(found.steps), rel=1e-9)


def test_one_direction_may_be_asked_for_and_is_named(course):
    run = course().train(60, sample_rate=0.03, noise_std=10.0)
    same = {"ids": [3], "target_epsilon": 1e-3, "order": 2, "assumptions": run.known}
    both = plan(run.ledger, **same)
    one = plan(run.ledger, **same, direction="remove")
    assert one.steps < both.steps and one.bound == "R2 shifted LSI" and one.direction == "remove"
    assert any(row.bound == "R2 shifted LSI" and "one direction" in row.reason for row in both.not_applicable)


def test_assumptions_of_the_run_are_the_default_and_keep_their_source(course):
    run = course(assumptions=course().known.to_dict()).train(30)
    found = plan(run.ledger, ids=[3], target_epsilon=0.1, order=8)
    assert found.assumptions["smoothness"]["source"] == "derived" and found.reachable
    plain = course(assumptions={"smoothness": 2.0, "clipping_never_binds": True}).train(30)
    stated = plan(plain.ledger, ids=[3], target_epsilon=0.1, order=8)
    assert stated.assumptions["smoothness"] == {"value": 2.0, "source": "run"}
    given = plan(plain.ledger, ids=[3], target_epsilon=0.1, order=8, assumptions={"smoothness": 2.0})
    assert given.assumptions["smoothness"]["source"] == "user"
    with pytest.raises(PlanError, match="PIA031"):
        plan(plain.ledger, ids=[3], target_epsilon=0.1, order=8, assumptions={"smoothness": -2.0})


def test_plan_file_round_trip_is_strict_and_private(course, tmp_path):
    ids = np.arange(40) + 2**60
    run = course(ids=ids).train(30)
    found = plan(run.ledger, ids=ids[[3, 5]], target_epsilon=0.1, target_delta=1e-5, assumptions=run.known)
    path = tmp_path / "plan.json"
    found.save(path)
    loaded = UnlearningPlan.load(path)
    assert loaded == found and loaded.digest == found.digest and type(loaded.ids[0]) is int
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    stored = json.loads(path.read_bytes())
    for edit in (
        {"steps": found.steps - 1},
        {"value": 0.0},
        {"extra": 1},
        {"steps": "many"},
        {"measure": None},
    ):
        for digest in (stored["digest"], "sha256:" + "0" * 64):
            path.write_text(json.dumps(stored | {"plan": stored["plan"] | edit, "digest": digest}))
            with pytest.raises(CertificateError, match="PIA051"):
                UnlearningPlan.load(path)
    for text in ("", "[]", "{}", "null", '{"plan": 3}', "\ud800".encode("utf-8", "surrogatepass")):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(CertificateError, match="PIA051"):
            UnlearningPlan.load(path)
    with pytest.raises(CertificateError, match="PIA051"):
        UnlearningPlan.load(tmp_path / "nothing.json")


def test_path_and_ledger_give_the_same_plan(course, tmp_path):
    run = course(tmp_path / "run").train(10)
    here = plan(run.ledger, ids=[3], target_epsilon=1.0, order=8)
    assert plan(tmp_path / "run", ids=[3], target_epsilon=1.0, order=8) == here
    assert here.digest == plan(str(tmp_path / "run"), ids=[3], target_epsilon=1.0, order=8).digest


def test_recorded_contributions_can_refute_the_gradient_bound(course):
    loud = Step(positions=np.array([8]), contributions=np.array([1.45], np.float32))
    made = plan(course().train(59).step(1, loud).ledger, [3], 1e-3, order=8, assumptions=course().known)
    assert not made.reachable
    assert sum("above the bound" in row.reason for row in made.not_applicable) >= 3


def test_a_clip_norm_at_the_gradient_bound_is_not_above_it(course):
    known = {"smoothness": 1.0, "clipping_never_binds": True, "gradient_norm": 1.5}
    made = plan(course().train(60).ledger, [3], 1e-3, order=8, assumptions=known)
    assert not made.reachable and any("clipping begins" in row.reason for row in made.not_applicable)


def test_a_smoothness_without_denominator_does_not_cover_several(course):
    run = course().train(30)
    run.train(30, denominator=1.0)
    known = {"smoothness": 0.5, "clipping_never_binds": True}
    made = plan(run.ledger, [3], 1e-3, order=8, assumptions=known)
    assert any("denominator" in row.reason for row in made.not_applicable)
