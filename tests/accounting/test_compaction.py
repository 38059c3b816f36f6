"""Compacted ledgers: bit-identical losses, and no rule that could charge too little on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from per_instance_accountant import account, audit
from per_instance_accountant.accounting import LastSeen, Unamplified, WorstCase, compact, compaction
from per_instance_accountant.errors import GuaranteeError, LedgerError, PiaError, UnsupportedError
from per_instance_accountant.ledger import Ledger, LedgerWriter
from per_instance_accountant.ledger.records import (
    Drop,
    Event,
    Filter,
    Phase,
    PublicStep,
    Resume,
    Run,
    Step,
    Thresholds,
)

N = 12


def phase(charging: str, sampling: str = "poisson", noise: float = 1.0) -> Phase:
    return Phase(
        kind="train",
        sampling=sampling,
        sample_rate=0.2,
        noise_std=noise,
        max_grad_norm=1.0,
        charging=charging,
        denominator=1.0,
        learning_rate=0.1,
    )


def recorded(events: Sequence[Event]) -> Ledger:
    ids = np.array([f"id {i}" for i in range(N)])
    writer = LedgerWriter.create(None, Run(num_instances=N, ids=ids, assumptions={"known": 1}))
    for event in events:
        writer.append(event)
    return writer.ledger()


def step(rng: np.random.Generator, values: np.ndarray, most: float = 1.0) -> Step:
    drawn = np.flatnonzero(rng.random(N) < 0.4)
    return Step(positions=drawn, contributions=(values[drawn] * most).astype(np.float32))


def history(seed: int, charging: str, sampling: str) -> list[Event]:
    rng = np.random.default_rng(seed)
    values = np.ones(N, np.float32)
    events: list[Event] = []
    for noise in rng.uniform(0.8, 2, 3):
        events.append(phase(charging, sampling, float(noise)))
        if charging == "sweep" or (charging == "fixed_thresholds" and not events[1:]):
            values = rng.random(N).astype(np.float32)
            events.append(Thresholds(values=values, source="sweep" if charging == "sweep" else "fixed"))
        for _ in range(int(rng.integers(1, 6))):
            often = 3.0 if sampling == "shuffled" and rng.random() < 0.3 else 1.0
            events.append(step(rng, values, often))
        if rng.random() < 0.5:
            events.append(PublicStep(count=2))
    return events


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    charging=st.sampled_from(["worst_case", "fixed_thresholds", "sweep"]),
    sampling=st.sampled_from(["poisson", "shuffled"]),
)
def test_losses_are_the_same_to_the_last_bit(seed: int, charging: str, sampling: str) -> None:
    ledger = recorded(history(seed, charging, sampling))
    small = compact(ledger, None)
    for rule in (None, WorstCase()):
        before, after = account(ledger, rule), account(small, rule)
        np.testing.assert_array_equal(before.rdp, after.rdp)
        np.testing.assert_array_equal(before.worst_case_rdp, after.worst_case_rdp)
        np.testing.assert_array_equal(before.ids, after.ids)
        assert (before.basis, before.charging, before.num_steps) == (
            after.basis,
            after.charging,
            after.num_steps,
        )
        assert (before.mu is None) == (after.mu is None)
    assert small.run.assumptions == {"known": 1, "compacted_from": ledger.digest}


def test_law_catches_a_compaction_that_forgets_repeated_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [phase("worst_case", "shuffled"), step(np.random.default_rng(0), np.full(N, 3.0))]
    ledger = recorded(events)
    np.testing.assert_array_equal(account(compact(ledger, None)).rdp, account(ledger).rdp)
    monkeypatch.setattr(compaction, "_needed", lambda step, clip: compaction._NOBODY)
    assert (account(compact(ledger, None)).rdp < account(ledger).rdp).all()


def test_public_steps_cost_nothing_and_resumes_and_drops_are_kept() -> None:
    rng, ones = np.random.default_rng(1), np.ones(N, np.float32)
    budgets = Filter(family="renyi", orders=np.full(N, 4.0), budgets=np.full(N, 0.9))
    events: list[Event] = [budgets, phase("worst_case"), step(rng, ones), step(rng, ones)]
    events += [Drop(positions=np.array([3])), step(rng, ones * (np.arange(N) != 3)), Resume(at_step=2)]
    events += [phase("worst_case"), PublicStep(count=5)]
    ledger = recorded(events)
    small = compact(ledger, None)
    np.testing.assert_array_equal(account(small).rdp, account(ledger).rdp)
    assert small.abandoned == ledger.abandoned and small.num_steps == ledger.num_steps == 3
    kept, same = account(ledger).certified_budget, account(small).certified_budget
    assert kept is not None and same is not None
    np.testing.assert_array_equal(kept.budgets, same.budgets)
    without = recorded([event for event in events if not isinstance(event, PublicStep)])
    np.testing.assert_array_equal(account(without).rdp, account(ledger).rdp)


def test_rules_that_need_draws_are_refused_on_both_sides() -> None:
    values = np.ones(N, np.float32)
    for charging in ("unamplified", "last_seen"):
        with pytest.raises(UnsupportedError, match="PIA060"):
            compact(recorded([phase(charging), step(np.random.default_rng(0), values)]), None)
    small = compact(recorded([phase("worst_case"), step(np.random.default_rng(0), values)]), None)
    for rule in (Unamplified(), LastSeen()):
        with pytest.raises(GuaranteeError, match="PIA011"):
            account(small, rule)


def test_evidence_against_a_filter_is_not_thrown_away() -> None:
    budgets = Filter(family="renyi", orders=np.full(N, 4.0), budgets=np.full(N, 1e-3))
    over = [budgets, phase("worst_case"), *(step(np.random.default_rng(i), np.ones(N)) for i in range(9))]
    with pytest.raises(PiaError, match="PIA011"):
        compact(recorded(over), None)


def test_on_disk_it_is_smaller_and_never_overwrites(tmp_path: Path) -> None:
    events: list[Event] = [phase("worst_case")]
    events += [step(np.random.default_rng(i), np.ones(N)) for i in range(200)]
    with LedgerWriter.create(tmp_path / "large", Run(num_instances=N)) as writer:
        for event in events:
            writer.append(event)
    small = compact(tmp_path / "large", tmp_path / "small")
    assert audit(tmp_path / "small").epsilon.tolist() == audit(tmp_path / "large").epsilon.tolist()
    assert Ledger.open(tmp_path / "small").digest == small.digest
    bytes_of = [sum(f.stat().st_size for f in (tmp_path / d).iterdir()) for d in ("small", "large")]
    assert bytes_of[0] < bytes_of[1]
    with pytest.raises(LedgerError, match="PIA045"):
        compact(tmp_path / "large", tmp_path / "small")
