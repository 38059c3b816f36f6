"""The fold against a naive twin: one instance, one step, one exact value at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant

from per_instance_accountant.accounting import (
    Basis,
    FixedThresholds,
    LastSeen,
    Sweep,
    Unamplified,
    WorstCase,
    account,
    fold,
)
from per_instance_accountant.divergence import SensitivityGrid, gaussian_epsilon, sampled_gaussian_rdp
from per_instance_accountant.errors import GuaranteeError, LedgerError, UsageError
from per_instance_accountant.ledger import Ledger, LedgerWriter
from per_instance_accountant.ledger.records import Phase, Run, Step, Thresholds

ORDERS = [1.5, 2.0, 8.0, 32.0]
N = 7


def phase(**changes: object) -> Phase:
    facts = {
        "kind": "train",
        "sampling": "poisson",
        "sample_rate": 0.1,
        "noise_std": 1.0,
        "max_grad_norm": 0.8,
        "charging": "sweep",
        "denominator": 10.0,
        "learning_rate": 0.1,
    }
    return Phase(**(facts | changes))  # type: ignore[arg-type]


def step(positions: list[int], contributions: list[float]) -> Step:
    return Step(
        positions=np.array(positions, dtype=np.int64), contributions=np.array(contributions, dtype=np.float32)
    )


def write(events: list[object], num_instances: int = N) -> Ledger:
    writer = LedgerWriter.create(None, Run(num_instances=num_instances))
    for event in events:
        writer.append(event)  # type: ignore[arg-type]
    return writer.ledger()


@st.composite
def histories(draw: st.DrawFn) -> list[object]:
    """Phases, thresholds and steps in any order that a training run can produce."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rate = draw(st.sampled_from([0.01, 0.3, 1.0]))
    events: list[object] = []
    for _ in range(draw(st.integers(1, 3))):
        clip = draw(st.sampled_from([0.3, 0.8, 2.5]))
        events.append(
            phase(sample_rate=rate, max_grad_norm=clip, noise_std=clip * draw(st.sampled_from([0.7, 2.0])))
        )
        for _ in range(draw(st.integers(0, 3))):
            values = (clip * np.exp(rng.uniform(-9, 0.2, N))).astype(np.float32)
            values[rng.random(N) < 0.2] = 0
            events.append(Thresholds(values=values, source="sweep"))
            for _ in range(draw(st.integers(0, 4))):
                drawn = np.flatnonzero(rng.random(N) < 0.4)
                norms = np.minimum(values[drawn], np.float32(clip)) * rng.random(len(drawn)).astype(
                    np.float32
                )
                events.append(step(drawn.tolist(), norms.tolist()))
    return events


def naive(events: list[object], rule: str) -> np.ndarray:
    """(N, orders): for every step, for every instance, the exact value at the bound that the rule gives."""
    total = np.zeros((N, len(ORDERS)))
    enforced, seen = np.full(N, np.inf), np.full(N, np.inf)
    mechanism = None
    for event in events:
        if isinstance(event, Phase):
            mechanism = event
        elif isinstance(event, Thresholds):
            enforced = event.values.astype(float)
        elif isinstance(event, Step):
            assert mechanism is not None
            seen[event.positions] = event.contributions
            drawn = dict(zip(event.positions.tolist(), event.contributions.tolist(), strict=True))
            for i in range(N):
                bounds = {"worst_case": np.inf, "sweep": enforced[i], "last_seen": seen[i]}
                if rule == "unamplified":
                    total[i] += np.array(ORDERS) / 2 * (drawn.get(i, 0.0) / mechanism.noise_std) ** 2
                    continue
                bound = min(bounds[rule], mechanism.max_grad_norm)
                total[i] += sampled_gaussian_rdp(
                    mechanism.amplification_rate, [bound / mechanism.noise_std], ORDERS
                )[0]
    return total


RULES = {"worst_case": WorstCase(), "sweep": None, "last_seen": LastSeen(), "unamplified": Unamplified()}


def assert_sound_and_tight(events: list[object], rule: str) -> None:
    truth = naive(events, rule)
    if rule == "unamplified":
        truth = np.minimum(truth, naive(events, "worst_case"))
    loss = account(write(events), charging=RULES[rule], orders=ORDERS)
    assert (loss.rdp >= truth * (1 - 1e-9)).all(), "an instance is charged less than it owes"
    assert (loss.rdp <= truth * 1.03).all(), "the chord is looser than 3 %"
    assert (loss.rdp <= loss.worst_case_rdp).all()


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(events=histories())
def test_the_fold_never_charges_less_than_the_naive_sum_and_at_most_three_percent_more(
    rule: str, events: list[object]
) -> None:
    assert_sound_and_tight(events, rule)


HISTORY = [
    phase(charging="fixed_thresholds"),
    Thresholds(values=np.linspace(0.05, 0.8, N).astype(np.float32), source="fixed"),
    *[step([t % N, (t + 3) % N], [0.04, 0.03]) for t in range(30)],
]


def test_law_catches_charging_only_the_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    original = fold._Fold._take_step

    def only_drawn(self: fold._Fold, event: Step) -> None:
        absent = np.setdiff1d(np.arange(N), event.positions)
        self._settle(absent)
        original(self, event)
        self.since[absent] = self.step

    monkeypatch.setitem(fold._TAKE, Step, only_drawn)
    with pytest.raises(AssertionError, match="less than it owes"):
        assert_sound_and_tight([phase(), *HISTORY[1:]], "sweep")


def test_law_catches_rounding_to_the_nearest_node(monkeypatch: pytest.MonkeyPatch) -> None:
    original = SensitivityGrid.locate

    def nearest(self: SensitivityGrid, squared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lower, weight = original(self, squared)
        return lower, np.round(weight)

    monkeypatch.setattr(SensitivityGrid, "locate", nearest)
    with pytest.raises(AssertionError, match="less than it owes"):
        assert_sound_and_tight([phase(), *HISTORY[1:]], "sweep")


def test_worst_case_equals_opacus() -> None:
    schedule = [(1.1, 0.02, 300), (0.9, 0.02, 50)]
    events: list[object] = []
    opacus = RDPAccountant()
    for sigma, rate, steps in schedule:
        events += [phase(charging="worst_case", sample_rate=rate, noise_std=sigma * 0.8)] + [
            step([], [])
        ] * steps
        for _ in range(steps):
            opacus.step(noise_multiplier=sigma, sample_rate=rate)
    loss = account(write(events), orders=RDPAccountant.DEFAULT_ALPHAS)
    expected = opacus.get_epsilon(1e-5)
    assert loss.worst_case_epsilon(1e-5) == pytest.approx(expected, rel=1e-8)
    assert loss.epsilon(1e-5) == pytest.approx(np.full(N, expected), rel=1e-8)
    assert account(write(events)).worst_case_epsilon(1e-5) <= expected * (1 + 1e-8)


def test_an_instance_at_the_clip_norm_pays_exactly_the_worst_case() -> None:
    loss = account(write(HISTORY))
    assert loss.basis is Basis.CERTIFIED
    clip = np.float32(0.8)
    events = [HISTORY[0], Thresholds(values=np.full(N, clip), source="fixed"), *HISTORY[2:]]
    same = account(write([phase(charging="fixed_thresholds", max_grad_norm=float(clip)), *events[1:]]))
    np.testing.assert_array_equal(same.rdp, np.broadcast_to(same.worst_case_rdp, same.rdp.shape))


def test_individual_losses_increase_with_the_threshold() -> None:
    epsilon = account(write(HISTORY)).epsilon(1e-5)
    assert (np.diff(epsilon) > 0).all()


def test_a_zero_threshold_owes_nothing() -> None:
    values = np.array([0, 0, 0.5, 0.5, 0.5, 0.5, 0.5], dtype=np.float32)
    loss = account(write([HISTORY[0], Thresholds(values=values, source="fixed"), *[step([], [])] * 5]))
    assert (loss.rdp[:2] == 0).all() and (loss.rdp[2:] > 0).all()


@pytest.mark.parametrize("rule", [None, WorstCase(), LastSeen()])
def test_a_forgotten_instance_owes_nothing_more_under_any_rule(rule: object) -> None:
    before = [HISTORY[0], HISTORY[1], *[step([0], [0.01])] * 3]
    values = np.linspace(0.05, 0.8, N).astype(np.float32)
    values[0] = 0
    after = [phase(kind="unlearn", charging="fixed_thresholds"), Thresholds(values=values, source="forget")]
    paid = account(write(before), charging=rule).rdp  # type: ignore[arg-type]
    now = account(write([*before, *after, *[step([], [])] * 4]), charging=rule).rdp  # type: ignore[arg-type]
    np.testing.assert_array_equal(now[0], paid[0])
    assert (now[1:] > paid[1:]).all()


def test_steps_of_an_abandoned_branch_stay_charged(tmp_path: Path) -> None:
    mechanism = phase(charging="worst_case")
    with LedgerWriter.create(tmp_path / "run", Run(num_instances=N)) as writer:
        writer.append(mechanism)
        writer.append(step([], []))
        anchor = writer.anchor
        writer.append(step([], []))
    once = account(tmp_path / "run", orders=[2]).rdp[0, 0] / 2
    with LedgerWriter.resume(tmp_path / "run", anchor) as writer:
        writer.append(step([0], [0.8]))
    assert account(tmp_path / "run", orders=[2]).rdp[:, 0] == pytest.approx(np.full(N, 3 * once))


def test_full_batch_epsilon_is_the_exact_gaussian_value() -> None:
    values = np.linspace(0.05, 0.8, N).astype(np.float32)
    events = [
        phase(sample_rate=1.0, charging="fixed_thresholds", noise_std=8.0),
        Thresholds(values=values, source="fixed"),
        *[step([], [])] * 20,
    ]
    loss = account(write(events))
    mu = np.sqrt(20) * np.minimum(values.astype(float), 0.8) / 8.0
    assert loss.mu is not None
    np.testing.assert_allclose(loss.mu, mu, rtol=1e-9)
    np.testing.assert_allclose(loss.epsilon(1e-5), gaussian_epsilon(mu, 1e-5), rtol=1e-6)


def test_a_shuffled_loader_is_never_amplified() -> None:
    events = [phase(sampling="shuffled", charging="worst_case"), step([0, 1], [0.8, 0.1])]
    loss = account(write(events), orders=[2])
    assert loss.worst_case_rdp[0] == pytest.approx(2 * 0.8**2 / 2, rel=1e-9)
    assert account(write(events), charging=Unamplified(), orders=[2]).rdp[:3, 0] == pytest.approx(
        [0.8**2, 0.1**2, 0.0], rel=1e-6
    )


def test_two_draws_into_one_release_are_charged_as_two_clip_norms() -> None:
    events = [phase(sampling="shuffled", charging="worst_case"), step([0], [1.6])]
    loss = account(write(events), orders=[2])
    assert loss.worst_case_rdp[0] == pytest.approx(1.6**2, rel=1e-9)
    assert loss.rdp[0, 0] == pytest.approx(1.6**2, rel=1e-9)
    with pytest.raises(GuaranteeError, match="PIA011"):
        account(write([phase(), step([0], [1.6])]))


def test_without_noise_the_loss_is_infinite_and_never_nan() -> None:
    values = np.array([0, 0.1, 0.8, 0.8, 0.8, 0.8, 0.8], dtype=np.float32)
    loss = account(write([phase(noise_std=0.0), Thresholds(values=values, source="sweep"), step([2], [0.5])]))
    assert (
        (loss.rdp[0] == 0).all() and np.isinf(loss.rdp[1:]).all() and np.isinf(loss.epsilon(1e-5)[1:]).all()
    )


def test_rules_that_were_not_enforced_are_refused() -> None:
    ledger = write([phase(charging="worst_case"), step([], [])])
    for rule in (FixedThresholds(), Sweep(every=3)):
        with pytest.raises(GuaranteeError, match="PIA013"):
            account(ledger, charging=rule)
    trained = write(HISTORY)
    with pytest.raises(GuaranteeError, match="PIA013"):
        account(trained, charging=FixedThresholds(thresholds=np.full(N, 0.01)))
    assert account(trained, charging=FixedThresholds(thresholds=np.full(N, 0.8))).basis is Basis.CERTIFIED


def test_each_rule_carries_its_basis() -> None:
    ledger = write(HISTORY)
    assert account(ledger).basis is Basis.CERTIFIED
    assert account(ledger, charging=WorstCase()).basis is Basis.CERTIFIED
    assert account(ledger, charging=Unamplified()).basis is Basis.OUTPUT_SPECIFIC
    assert account(ledger, charging=LastSeen()).basis is Basis.ESTIMATE
    mixed = [
        phase(charging="fixed_thresholds"),
        HISTORY[1],
        step([], []),
        phase(charging="sweep"),
        step([], []),
    ]
    assert account(write(mixed)).basis is Basis.OUTPUT_SPECIFIC


@pytest.mark.parametrize("orders", [[1.0], [float("nan")], [0.5, 2], []])
def test_orders_outside_their_range_are_refused(orders: list[float]) -> None:
    with pytest.raises(UsageError, match="PIA070"):
        account(write(HISTORY), orders=orders)


@pytest.mark.parametrize("bad", [[0.1, -0.1], [float("nan")], [float("inf")], [[0.1]]])
def test_bad_thresholds_are_refused(bad: list[float]) -> None:
    with pytest.raises(UsageError, match="PIA07"):
        FixedThresholds(thresholds=bad).as_float32()


def test_fixed_thresholds_cannot_be_chosen_from_what_was_released() -> None:
    """The adaptive counterexample of docs/math/individual_loss.md, written as two fixed events."""
    quiet, loud = (np.full(N, value, np.float32) for value in (0.01, 0.7))
    writer = LedgerWriter.create(None, Run(num_instances=N))
    for event in (phase(charging="fixed_thresholds"), Thresholds(values=quiet, source="fixed"), step([], [])):
        writer.append(event)
    with pytest.raises(LedgerError, match="PIA045"):
        writer.append(Thresholds(values=loud, source="fixed"))
    late = LedgerWriter.create(None, Run(num_instances=N))
    for event in (phase(charging="worst_case"), step([], [])):
        late.append(event)
    with pytest.raises(LedgerError, match="PIA045"):
        late.append(Thresholds(values=quiet, source="fixed"))
