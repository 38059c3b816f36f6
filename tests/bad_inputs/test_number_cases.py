"""Numbers that are none, out of range, of the wrong type, or at the edge of what float64 can hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from per_instance_accountant import FixedThresholds, PrivacyFilter, account, audit
from per_instance_accountant.accounting import Unamplified
from per_instance_accountant.divergence import (
    gaussian_epsilon,
    rdp_to_epsilon,
    sampled_gaussian_epsilon,
    sampled_gaussian_rdp,
)
from per_instance_accountant.ledger import Step, Thresholds
from tests.bad_inputs.cases import N, ledger_of, make_phase, refused, step_of, unchanged_after, writer_of

NAN, INF, TINY = math.nan, math.inf, 5e-324


def steps_refused(values: Any, code: str, *, positions: Any = (0,), dtype: Any = np.float32) -> None:
    step = Step(positions=np.asarray(positions), contributions=np.asarray(values, dtype=dtype))
    unchanged_after(writer_of(make_phase()), step, code)


def rdp(rate: Any = 0.1, ratios: Any = 1.0, orders: Any = 2.0) -> Any:
    return sampled_gaussian_rdp(rate, ratios, orders)


def epsilon_of_counts(counts: Any) -> Any:
    return sampled_gaussian_epsilon(0.01, [0.5], np.array([[counts]]), 1e-5)


def minus_zero_is_zero() -> None:
    ledger = ledger_of(make_phase(charging="unamplified"), step_of(1, norm=-0.0))
    assert account(ledger, orders=[2.0]).rdp.tolist() == [[0.0]] * N
    assert rdp(ratios=-0.0).tolist() == [[0.0]]


def subnormals_are_charged() -> None:
    assert rdp(ratios=TINY)[0, 0] > 0 and rdp(ratios=1e-200)[0, 0] > 0
    norms = np.array([1e-45, 0, 1, 1, 1, 1], np.float32)
    thresholds = Thresholds(values=norms, source="sweep")
    losses = account(ledger_of(make_phase(charging="sweep"), thresholds, step_of(2)), orders=[2.0]).rdp[:, 0]
    assert losses[0] > 0 and losses[1] == 0
    drawn = ledger_of(make_phase(charging="unamplified"), step_of(3, norm=1e-45))
    assert account(drawn, orders=[2.0]).rdp[3, 0] > 0


def overflow_is_infinite() -> None:
    assert rdp(ratios=1e200).tolist() == [[INF]] and rdp(ratios=INF).tolist() == [[INF]]


def above_the_clip_norm() -> None:
    ledger = ledger_of(make_phase(charging="unamplified"), step_of(1, norm=1.5))
    refused(lambda: account(ledger), "PIA011")


def integers_and_narrow_floats() -> None:
    half = np.float16(0.1)
    assert rdp(ratios=np.array([half]))[0, 0] >= rdp(ratios=float(half))[0, 0]
    assert rdp(ratios=np.array([1]))[0, 0] == rdp(ratios=1.0)[0, 0]


def other_kinds_of_ratios() -> None:
    for kind in (bool, complex, object, str):
        refused(lambda kind=kind: rdp(ratios=np.array([1]).astype(kind)), "PIA071")


def other_kinds_of_norms() -> None:
    for dtype in (np.float16, np.float64, np.int32, np.complex64, bool, object):
        steps_refused([1], "PIA071", dtype=dtype)


def an_empty_draw() -> None:
    ledger = ledger_of(make_phase(), step_of())
    assert ledger.num_steps == 1 and (account(ledger, orders=[2.0]).rdp > 0).all()
    assert ledger.to_arrow("observations").num_rows == 0


def positions_of_other_types() -> None:
    for positions in ([0.0], [NAN], [True], np.array([0], np.int8), np.array([0], np.uint64)):
        steps_refused([0.5], "PIA071", positions=positions)
    for positions in ([-1], [N], [2**62]):
        steps_refused([0.5], "PIA045", positions=positions)


def ids_of_other_types() -> None:
    for ids in ([0.0, 1.0], [NAN, 1.0], [True, False], [b"a", b"b"], [None, 1]):
        refused(lambda ids=ids: writer_of(num_instances=2, ids=np.array(ids)), "PIA071")
    refused(lambda: writer_of(num_instances=2, ids=np.array([2**63, 1], np.uint64)), "PIA070")
    refused(lambda: writer_of(num_instances=2, ids=np.array([7, 7])), "PIA070")
    refused(lambda: writer_of(num_instances=2, ids=np.array([7])), "PIA071")
    large = ledger_of(num_instances=2, ids=np.array([2**63 - 1, -(2**63)]))
    assert large.positions_of([-(2**63)]).tolist() == [1]


def too_many_instances() -> None:
    for count in (0, -1, 2**31, 2**80, 2.0, True):
        refused(lambda count=count: writer_of(num_instances=count), "PIA070")


def no_noise_has_no_bound() -> None:
    ledger = ledger_of(make_phase(noise_std=0.0), step_of(1))
    assert np.isinf(account(ledger).rdp).all()
    result = audit(ledger)
    assert np.isinf(result.epsilon).all() and "epsilon inf" in result.statement()
    assert result.num_over(8.0) == N


def full_batch_is_the_gaussian() -> None:
    assert 1.0 <= rdp(rate=1.0, ratios=0.5, orders=8.0)[0, 0] <= 1 + 2e-15
    assert rdp(rate=0.0, ratios=0.5).tolist() == [[0.0]]


def rates(call: Callable[[Any], Any]) -> None:
    for rate in (NAN, -1e-300, 1 + 1e-15, INF, -INF):
        refused(lambda rate=rate: call(rate), "PIA070")


def rate_zero_with_participants() -> None:
    refused(lambda: make_phase(sample_rate=0.0), "PIA070")


def settings_of_a_phase() -> None:
    for name in ("noise_std", "max_grad_norm", "denominator", "learning_rate", "weight_decay", "momentum"):
        for value in (NAN, INF, -1.0):
            refused(lambda name=name, value=value: make_phase(**{name: value}), "PIA070")
    for name in ("max_grad_norm", "denominator"):
        refused(lambda name=name: make_phase(**{name: 0.0}), "PIA070")
    for name in ("kind", "sampling", "charging"):
        refused(lambda name=name: make_phase(**{name: "another"}), "PIA070")


def orders_at_most_one() -> None:
    for orders in (1.0, 0.5, -2.0, NAN, -INF, [2.0, 1.0]):
        refused(lambda orders=orders: rdp(orders=orders), "PIA070")
    refused(lambda: rdp(orders=[]), "PIA071")


def orders_in_any_form() -> None:
    assert rdp(orders=[3.0, 2.0, 2.0]).tolist() == [[rdp(orders=a)[0, 0] for a in (3, 2, 2)]]
    assert rdp(orders=INF).tolist() == [[INF]]


def orders_at_the_edges() -> None:
    for orders in (1 + 2**-26, 1e4, 58.5, 99.9):
        value = rdp(rate=0.33, ratios=1 / 9.4, orders=orders)[0, 0]
        assert 0 < value <= orders / 2 / 9.4**2 * (1 + 1e-9)


def deltas_outside() -> None:
    for delta in (-1e-9, NAN, 1.5, INF, -INF):
        refused(lambda delta=delta: rdp_to_epsilon([2.0], [0.1], delta), "PIA070")
        refused(lambda delta=delta: gaussian_epsilon(1.0, delta), "PIA070")
        refused(lambda delta=delta: epsilon_at(delta), "PIA070")
        refused(lambda delta=delta: audit(ledger_of(make_phase(), step_of(0)), delta=delta), "PIA070")


def epsilon_at(delta: float) -> Any:
    return sampled_gaussian_epsilon(0.1, [0.5], [[10]], delta)


def deltas_at_the_ends() -> None:
    assert rdp_to_epsilon([2.0], [0.1], 1.0) == 0 and gaussian_epsilon(1.0, 1.0) == 0
    assert epsilon_at(1.0).tolist() == [0.0]
    assert rdp_to_epsilon([2.0], [0.1], 0.0) == INF and epsilon_at(0.0).tolist() == [INF]
    assert math.isfinite(rdp_to_epsilon([2.0], [0.1], TINY))


def numbers_of_steps() -> None:
    assert epsilon_of_counts(0).tolist() == [0.0]
    assert epsilon_of_counts(np.float64(3.0)) == epsilon_of_counts(3)
    assert epsilon_of_counts(10**9)[0] > epsilon_of_counts(10**8)[0]
    for count in (-1, NAN, 2.5):
        refused(lambda count=count: epsilon_of_counts(count), "PIA070")


def curves_that_are_none() -> None:
    for curve in ([NAN, NAN], [NAN, 0.1], [-0.1, 0.1]):
        refused(lambda curve=curve: rdp_to_epsilon([2.0, 8.0], curve, 1e-5), "PIA070")
    assert rdp_to_epsilon([2.0, 8.0], [INF, INF], 1e-5) == INF
    assert rdp_to_epsilon([2.0, 8.0], [INF, 0.1], 1e-5) == rdp_to_epsilon([8.0], [0.1], 1e-5)


def budgets_that_are_none() -> None:
    for budget in (0.0, -1.0, NAN, INF):
        refused(lambda budget=budget: PrivacyFilter(budget=budget, delta=1e-5), "PIA070")
    assert PrivacyFilter(budget=1e-320, delta=1e-5).budget == 1e-320


def thresholds_that_are_none() -> None:
    for value in (NAN, INF, -1.0):
        refused(
            lambda value=value: Thresholds(values=np.full(N, value, np.float32), source="sweep"), "PIA070"
        )
        rule = FixedThresholds(thresholds=np.full(N, value))
        refused(rule.as_float32, "PIA070")
    refused(lambda: Thresholds(values=np.ones(N), source="sweep"), "PIA070")
    writer = writer_of(make_phase(charging="sweep"))
    unchanged_after(writer, Thresholds(values=np.ones(N + 1, np.float32), source="sweep"), "PIA045")


def norms_only_of_the_drawn() -> None:
    """Amplification needs a bound on everybody; norms of the drawn alone give a score."""
    ledger = ledger_of(make_phase(charging="last_seen"), step_of(1, norm=0.1))
    assert account(ledger).basis == "ESTIMATE"
    alone = account(ledger, Unamplified(), orders=[2.0])
    assert alone.basis == "OUTPUT_SPECIFIC" and alone.rdp[1, 0] == pytest.approx(0.1**2 / 1.5**2, rel=1e-6)


CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "a norm that is NaN": ("refused, nothing recorded", lambda: steps_refused([NAN], "PIA070")),
    "a norm that is infinite": ("refused, nothing recorded", lambda: steps_refused([INF], "PIA070")),
    "a negative norm": ("refused, nothing recorded", lambda: steps_refused([-1e-30], "PIA070")),
    "a norm of minus zero": ("accepted as zero, no loss", minus_zero_is_zero),
    "a subnormal norm or a square that underflows": ("a positive loss", subnormals_are_charged),
    "a ratio that overflows": ("an infinite loss, never NaN", overflow_is_infinite),
    "a recorded norm above the clip norm": ("no individual number", above_the_clip_norm),
    "norms in float16 and as integers": ("never below the exact value", integers_and_narrow_floats),
    "norms of other kinds, offered as ratios": ("refused", other_kinds_of_ratios),
    "norms of other kinds, offered to the ledger": ("refused, nothing recorded", other_kinds_of_norms),
    "more norms than positions": ("refused", lambda: steps_refused([0.5, 0.5], "PIA071")),
    "norms in two dimensions": ("refused", lambda: steps_refused([[0.5]], "PIA071", positions=[[0]])),
    "an empty batch": ("a step with nobody in it, charged", an_empty_draw),
    "one instance twice in a step": (
        "refused",
        lambda: steps_refused([0.5, 0.5], "PIA045", positions=[1, 1]),
    ),
    "positions beyond the data set or of another type": ("refused", positions_of_other_types),
    "ids of other types, repeated or beyond int64": ("refused, never wrapped", ids_of_other_types),
    "a number of instances that is none": ("refused", too_many_instances),
    "noise of zero": ("an infinite loss, and the report says so", no_noise_has_no_bound),
    "settings of a mechanism outside their range": ("refused", settings_of_a_phase),
    "a sample rate outside its range": ("refused", lambda: rates(lambda rate: rdp(rate=rate))),
    "a sample rate of a phase outside its range": (
        "refused",
        lambda: rates(lambda rate: make_phase(sample_rate=rate)),
    ),
    "a sample rate of zero with participants": ("refused", rate_zero_with_participants),
    "a sample rate of exactly 0 or 1": ("no loss, or the Gaussian", full_batch_is_the_gaussian),
    "orders of at most 1, NaN or none": ("refused", orders_at_most_one),
    "orders unsorted, repeated, one number, or infinite": ("accepted", orders_in_any_form),
    "orders close to 1, large and fractional": ("finite, positive, below no sampling", orders_at_the_edges),
    "a delta outside 0 to 1": ("refused", deltas_outside),
    "a delta of exactly 0 or 1": ("infinite, or exactly 0", deltas_at_the_ends),
    "numbers of steps: none, many, negative, broken": ("exact, or refused", numbers_of_steps),
    "curves that are NaN, negative or infinite": ("refused, or infinite", curves_that_are_none),
    "a budget that is not positive and finite": ("refused", budgets_that_are_none),
    "thresholds that are none": ("refused", thresholds_that_are_none),
    "norms of the drawn only, amplification wanted": ("a score only", norms_only_of_the_drawn),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers(name: str) -> None:
    CASES[name][1]()
