"""Every way to an individual number against one naive loop over events, steps and instances."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from per_instance_accountant import audit
from per_instance_accountant.accounting import (
    Basis,
    RunningLoss,
    WorstCase,
    account,
    account_groups,
    compact,
    compaction,
    join,
)
from per_instance_accountant.accounting import running as running_module
from per_instance_accountant.divergence import rdp_to_epsilon, sampled_gaussian_rdp
from per_instance_accountant.errors import GuaranteeError, PiaError
from per_instance_accountant.ledger import Ledger, LedgerWriter, merge_parts, new_run_id
from per_instance_accountant.ledger.records import (
    Disclosure,
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

N, DELTA = 5, 1e-5
ORDERS = np.array([1.5, 2.0, 8.0, 32.0])
RULES = ("worst_case", "fixed_thresholds", "sweep", "unamplified", "last_seen")
EXACT = 1e-9


def make_phase(charging: str, sampling: str, **changes: object) -> Phase:
    facts = {"sample_rate": 0.3, "noise_std": 1.5, "max_grad_norm": 1.0} | changes
    return Phase(
        kind=str(facts.pop("kind", "train")),
        sampling=sampling,
        charging=charging,
        denominator=1.0,
        learning_rate=0.1,
        **facts,  # type: ignore[arg-type]
    )


def some_step(drawn: Sequence[int], contributions: Sequence[float]) -> Step:
    return Step(positions=np.array(drawn, np.int64), contributions=np.array(contributions, np.float32))


class _History:
    """A random course of all kinds of facts that a sound run can record."""

    def __init__(self, rng: np.random.Generator, charging: str, sampling: str, filtered: bool) -> None:
        self.rng, self.charging, self.sampling, self.filtered = rng, charging, sampling, filtered
        self.events: list[Event] = []
        self.bounds, self.steps = np.ones(N), 0
        self.out, self.dropped = np.zeros(N, bool), np.zeros(N, bool)
        self.fixed = (rng.random(N) * rng.choice([0.0, 1.0], N, p=[0.2, 0.8])).astype(np.float32)
        if filtered:
            self.events.append(Filter(family="renyi", orders=np.full(N, 8.0), budgets=np.full(N, 1e3)))
        self.phase()

    def phase(self) -> None:
        self.clip = float(self.rng.choice([0.5, 1.0, 2.0]))
        noise, rate = float(self.rng.choice([0.8, 3.0])), float(self.rng.choice([0.02, 0.3, 1.0]))
        changes = {"max_grad_norm": self.clip, "noise_std": noise * self.clip, "sample_rate": rate}
        self.events.append(make_phase(self.charging, self.sampling, **changes))
        self.thresholds()

    def thresholds(self) -> None:
        if self.charging == "fixed_thresholds" and (self.steps or self.out.any()):
            return
        if self.charging in ("fixed_thresholds", "sweep"):
            swept = self.rng.random(N).astype(np.float32)
            fixed = self.charging == "fixed_thresholds"
            self.bounds = (self.fixed if fixed else swept).astype(float)
            values = self.bounds.astype(np.float32)
            self.events.append(Thresholds(values=values, source="fixed" if fixed else "sweep"))

    def step(self) -> None:
        allowed = np.flatnonzero((self.rng.random(N) < 0.5) & ~self.out)
        limits = np.minimum(self.bounds, self.clip)[allowed] * ~self.dropped[allowed]
        if self.sampling == "shuffled" and self.rng.random() < 0.4:
            limits = np.where(self.rng.random(limits.size) < 0.4, limits, 3 * self.clip) * (limits > 0)
        self.events.append(some_step(allowed.tolist(), np.asarray(limits, np.float32).tolist()))
        self.steps += 1

    def forget(self) -> None:
        gone = np.flatnonzero(~self.out)[:1]
        self.out[gone] = True
        values = np.where(self.out, 0, np.maximum(np.minimum(self.bounds, 4), 1e-30)).astype(np.float32)
        self.bounds = values.astype(float)
        self.events.append(Thresholds(values=values, source="forget"))

    def drop(self) -> None:
        left = np.flatnonzero(~self.dropped)
        if self.filtered and left.size:
            self.events.append(Drop(positions=left[-1:]))
            self.dropped[left[-1]] = True

    def public(self) -> None:
        self.events.append(PublicStep(count=3))

    def disclosure(self) -> None:
        self.events.append(Disclosure(kind="histogram", epsilon=float(self.rng.choice([0.05, 2.0]))))

    def resume(self) -> None:
        self.events.append(Resume(at_step=int(self.rng.integers(0, self.steps + 1))))
        self.phase()
        if self.charging == "fixed_thresholds":
            # Stated for the branch left behind, so stated again.
            source = "forget" if self.out.any() else "fixed"
            values = np.where(self.out, 0, self.bounds).astype(np.float32)
            self.events.append(Thresholds(values=values, source=source))


def history(seed: int, charging: str, sampling: str, filtered: bool) -> list[Event]:
    rng = np.random.default_rng(seed)
    course = _History(rng, charging, sampling, filtered)
    names = ["step"] * 6 + ["phase", "thresholds", "forget", "drop", "public", "disclosure", "resume"]
    for name in rng.choice(names, int(rng.integers(1, 25))).tolist():
        getattr(course, name)()
    return course.events


def recorded(events: Sequence[Event], path: Path | None = None, **run: object) -> Ledger:
    writer = LedgerWriter.create(path, Run(num_instances=N, groups={"self": np.arange(N)}, **run))  # type: ignore[arg-type]
    for event in events:
        writer.append(event)
    if path is not None:
        writer.close()
    return writer.ledger()


def naive(events: Sequence[Event]) -> tuple[np.ndarray, np.ndarray]:
    """(N, orders) and (orders,): no sharing, no chords, no spans; at least what each step can have cost."""
    total, worst = np.zeros((N, ORDERS.size)), np.zeros(ORDERS.size)
    enforced, seen, gone = [np.inf] * N, [np.inf] * N, [False] * N
    phase = make_phase("worst_case", "poisson")

    def cost(norm: float) -> np.ndarray:
        return np.asarray(sampled_gaussian_rdp(phase.amplification_rate, [norm / phase.noise_std], ORDERS)[0])

    for event in events:
        if isinstance(event, Phase):
            phase = event
        elif isinstance(event, Thresholds):
            enforced = [float(value) for value in event.values]
            forgotten = [event.source == "forget" and value == 0 for value in enforced]
            gone = [a or b for a, b in zip(gone, forgotten, strict=True)]
        elif isinstance(event, Drop):
            gone = [left or i in event.positions for i, left in enumerate(gone)]
        elif isinstance(event, Disclosure):
            extra = np.minimum(event.epsilon, ORDERS * event.epsilon**2 / 2)
            total, worst = total + extra, worst + extra
        elif isinstance(event, Step):
            drawn = dict(zip(event.positions.tolist(), event.contributions.tolist(), strict=True))
            worst = worst + cost(max([phase.max_grad_norm, *drawn.values()]))
            for i in range(N):
                seen[i] = drawn.get(i, seen[i])
                if phase.charging == "unamplified":
                    total[i] += ORDERS / 2 * (drawn.get(i, 0.0) / phase.noise_std) ** 2
                    continue
                source = {"worst_case": np.inf, "last_seen": seen[i]}.get(phase.charging, enforced[i])
                bound = 0.0 if gone[i] else min(source, phase.max_grad_norm)
                total[i] += cost(max(bound, drawn.get(i, 0.0)))
    return total, worst


def not_below(found: np.ndarray, truth: np.ndarray) -> None:
    assert not np.isnan(found).any()
    assert (found >= truth * (1 - EXACT)).all()


def same_bits(one: object, other: object) -> None:
    for name in ("rdp", "worst_case_rdp"):
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes()


def unless_refused(make: Callable[[], Any], *codes: str) -> Any:
    """What ``make`` returns; None if it refuses with one of these codes."""
    try:
        return make()
    except PiaError as error:
        if error.code not in codes:
            raise
        return None


def check_all_ways(events: Sequence[Event]) -> None:
    """The law: no way to a number is below the naive truth, and those that promise equality are equal."""
    ledger, (truth, worst) = recorded(events), naive(events)
    # The worst case is CERTIFIED for everybody, and allowed to cap the sums.
    truth = np.minimum(truth, worst)
    loss = account(ledger, orders=ORDERS)
    not_below(loss.rdp, truth)
    not_below(loss.worst_case_rdp, worst)
    if "unamplified" not in loss.charging:
        # Sums with and without amplification are both bounds, either may be the smaller one.
        not_below(account(ledger, WorstCase(), orders=ORDERS).rdp, truth)
    parts = [account(ledger, orders=ORDERS, partition=part) for part in ((0, 2), (2, 3), (3, N))]
    same_bits(join(parts), loss)
    apart = account(ledger, orders=ORDERS, apart=True)
    not_below(apart.rdp, truth)
    running = RunningLoss(N, ORDERS.tolist())
    for event in events:
        running.take(event)
    not_below(running._curves(), truth)
    exact = np.asarray(rdp_to_epsilon(ORDERS, truth, DELTA))
    if loss.mu is None:
        not_below(running.epsilons(DELTA), exact)
        not_below(loss.epsilon(DELTA), exact)
    assert (loss.tight_epsilon(DELTA) <= loss.epsilon(DELTA)).all()
    alone = unless_refused(lambda: account_groups(ledger, "self", orders=ORDERS), "PIA060", "PIA011")
    if alone is not None:
        not_below(alone.rdp, truth)
    small = unless_refused(lambda: compact(ledger, None), "PIA060", "PIA011")
    if small is not None:
        for copy in (small, compact(small, None)):
            same_bits(account(copy, orders=ORDERS), loss)
            assert copy.num_steps == ledger.num_steps and copy.abandoned == ledger.abandoned
            assert copy.num_public_steps == ledger.num_public_steps and copy.confirmed == ledger.confirmed
            assert copy.disclosures == ledger.disclosures


CASES = {
    "seed": st.integers(0, 2**31),
    "charging": st.sampled_from(RULES),
    "sampling": st.sampled_from(["poisson", "shuffled"]),
    "filtered": st.booleans(),
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**CASES)
def test_no_way_to_a_number_is_below_the_naive_truth(
    seed: int, charging: str, sampling: str, filtered: bool
) -> None:
    check_all_ways(history(seed, charging, sampling, filtered))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(**CASES)
def test_parts_of_two_ranks_merge_to_the_same_bits(
    seed: int, charging: str, sampling: str, filtered: bool
) -> None:
    kept = [e for e in history(seed, charging, sampling, filtered) if not isinstance(e, Resume)]
    events = [e for e in kept if not isinstance(e, Disclosure)]
    identity, parts = new_run_id(), []
    for rank in (0, 1):
        mine = [
            some_step(e.positions[e.positions % 2 == rank].tolist(),
                      e.contributions[e.positions % 2 == rank].tolist())
            if isinstance(e, Step) else e
            for e in events
        ]  # fmt: skip
        parts.append(recorded(mine, run_id=identity, rank=rank, world_size=2))
    together = merge_parts(parts[::-1], None)
    whole = account(recorded(events), orders=ORDERS)
    same_bits(account(together, orders=ORDERS), whole)
    lost = unless_refused(lambda: merge_parts(parts[:1], None, allow_missing=True), "PIA116")
    if lost is not None:
        alone = account(lost, orders=ORDERS)
        not_below(alone.rdp, np.minimum(whole.rdp, alone.worst_case_rdp))


def test_a_lost_rank_of_a_loader_that_repeats_is_charged_for_the_repeats() -> None:
    """The lost rank may have drawn instance 0 once more: 0.6 in the sum, below the clip norm."""
    identity = new_run_id()
    events = [
        make_phase("sweep", "shuffled"),
        Thresholds(values=np.full(N, 0.3, np.float32), source="sweep"),
        some_step([0], [0.3]),
    ]
    part = recorded(events, run_id=identity, rank=0, world_size=2)
    found = account(merge_parts([part], None, allow_missing=True), orders=[2.0]).rdp[0, 0]
    assert found >= (0.6 / 1.5) ** 2


@pytest.mark.parametrize("bug", ["repeats", "disclosure", "drop"])
def test_the_law_catches_running_totals_that_lose_a_fact(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    events: list[Event] = [make_phase("worst_case", "shuffled"), some_step([0], [3.0])]
    if bug == "repeats":
        check_all_ways(events)
        monkeypatch.setattr(RunningLoss, "_charge_repeats", nothing)
    elif bug == "disclosure":
        events.append(Disclosure(kind="quantiles", epsilon=1.0))
        check_all_ways(events)
        monkeypatch.setitem(running_module._TAKE, Disclosure, nothing)
    else:
        budget = Filter(family="renyi", orders=np.full(N, 8.0), budgets=np.full(N, 1e3))
        events = [budget, *events, Drop(positions=np.array([1])), some_step([0], [1.0])]
        check_all_ways(events)
        # Leaves everybody, not only those whom it names.
        monkeypatch.setitem(
            running_module._TAKE,
            Drop,
            lambda self, event: RunningLoss._take_drop(self, Drop(positions=np.arange(N))),
        )
    with pytest.raises(AssertionError):
        check_all_ways(events)


def test_groups_count_who_was_in_one_release_several_times() -> None:
    ledger = recorded([make_phase("unamplified", "shuffled"), some_step([0, 1], [3.0, 1.0])])
    for groups, norm in (({"a": [0]}, 3.0), ({"a": [0, 1]}, 4.0)):
        assert account_groups(ledger, groups, orders=[2.0]).rdp[0, 0] >= (norm / 1.5) ** 2
    drawn_twice = recorded([make_phase("unamplified", "poisson"), some_step([0], [3.0])])
    with pytest.raises(GuaranteeError, match="PIA011"):
        account_groups(drawn_twice, {"a": [0]}, orders=[2.0])


@pytest.mark.parametrize("sampling", ["poisson", "shuffled"])
@pytest.mark.parametrize("charging", ["fixed_thresholds", "sweep"])
def test_thresholds_that_were_not_kept_to_bound_nothing(charging: str, sampling: str) -> None:
    source = "fixed" if charging == "fixed_thresholds" else "sweep"
    thresholds = Thresholds(values=np.full(N, 0.3, np.float32), source=source)
    ledger = recorded([make_phase(charging, sampling), thresholds, some_step([0], [0.9])])
    for number in (account, lambda one: account_groups(one, "self"), lambda one: compact(one, None)):
        with pytest.raises(GuaranteeError, match="PIA011"):
            number(ledger)
    truth = sampled_gaussian_rdp(0.3 if sampling == "poisson" else 1.0, [0.9 / 1.5], ORDERS)[0]
    running = RunningLoss(N, ORDERS.tolist())
    for event in ledger.events():
        running.take(event)
    not_below(running._curves()[:1], truth)
    assert account(ledger, WorstCase()).basis is Basis.CERTIFIED


def test_thresholds_of_a_sweep_are_not_certified_by_another_name() -> None:
    """What is released may have shaped them, so their sum is what this run realised."""
    late = Thresholds(values=np.full(N, 0.1, np.float32), source="sweep")
    steps = [some_step([], [])] * 3
    before = recorded([make_phase("fixed_thresholds", "poisson"), *steps])
    assert account(before).basis is Basis.CERTIFIED and account(before).spans is not None
    ledger = recorded([make_phase("fixed_thresholds", "poisson"), *steps, late, *steps])
    for loss in (account(ledger), account_groups(ledger, "self"), audit(ledger, DELTA)):
        assert loss.basis is Basis.OUTPUT_SPECIFIC
    assert account(ledger).spans is None


def test_losses_beyond_all_numbers_are_infinite_not_undefined() -> None:
    events = [
        make_phase("sweep", "poisson", noise_std=1e-200),
        Thresholds(values=np.linspace(0, 1, N).astype(np.float32), source="sweep"),
        some_step([1], [0.1]),
    ]
    ledger = recorded(events)
    for found in (RunningLoss.of(ledger).epsilons(DELTA), account(ledger).epsilon(DELTA)):
        assert found[0] == 0 and np.isinf(found[1:]).all()


def test_an_interrupted_compaction_leaves_no_shorter_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large"
    recorded([make_phase("worst_case", "poisson"), *[some_step([0], [1.0])] * 4], path)
    kept, calls = compaction._needed, []

    def interrupted(step: Step, clip: float) -> Step:
        calls.append(step)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return kept(step, clip)

    monkeypatch.setattr(compaction, "_needed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compact(path, tmp_path / "small")
    assert os.listdir(tmp_path) == ["large"]


@pytest.mark.parametrize("missing", [False, True])
def test_compaction_keeps_what_a_merge_said_and_whether_the_end_is_known(
    tmp_path: Path, missing: bool
) -> None:
    identity, parts = new_run_id(), []
    for rank in (0, 1):
        events = [make_phase("worst_case", "poisson"), some_step([rank], [1.0])]
        parts.append(recorded(events, tmp_path / str(rank), run_id=identity, rank=rank, world_size=2))
    merged = merge_parts(parts[: 2 - missing], tmp_path / "whole", allow_missing=missing)
    small = compact(merged, tmp_path / "small")
    assert merged.merge is not None and small.merge is not None
    assert small.merge.statement() == merged.merge.statement()
    assert small.confirmed == merged.confirmed == (not missing)
    assert compact(small, None).merge is not None


def test_everything_written_is_for_the_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        events = [make_phase("worst_case", "poisson"), some_step([0], [1.0])]
        ledger = recorded(events, tmp_path / "run")
        compact(ledger, tmp_path / "small").export(tmp_path / "tables")
        identity = new_run_id()
        parts = [
            recorded(
                [events[0], some_step([r], [1.0])],
                tmp_path / f"part{r}",
                run_id=identity,
                rank=r,
                world_size=2,
            )
            for r in (0, 1)
        ]
        merge_parts(parts, tmp_path / "whole")
        audit(ledger, DELTA).report(tmp_path / "page.html")
    finally:
        os.umask(before)
    loose = [p for p in tmp_path.rglob("*") if p.stat().st_mode & 0o077]
    assert not [p.relative_to(tmp_path) for p in loose]
