"""Splitting a run over ranks and merging the parts changes nothing; what was lost is counted."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from per_instance_accountant.accounting import Unamplified, account
from per_instance_accountant.errors import GuaranteeError, LedgerError, UsageError
from per_instance_accountant.ledger import (
    Drop,
    Event,
    Filter,
    Ledger,
    LedgerWriter,
    Phase,
    PublicStep,
    Resume,
    Run,
    Step,
    Thresholds,
    merge_parts,
    merging,
    new_run_id,
    parts,
    storage,
)

N = 12
TABLES = ("steps", "observations", "thresholds")
ORDERS = [1.5, 4.0, 32.0]
NORMS = st.floats(min_value=0, max_value=1, width=32)
SOME = st.lists(st.integers(0, N - 1), unique=True).map(sorted)


def make_phase(charging: str, sampling: str = "poisson", **changes: Any) -> Phase:
    settings = {
        "kind": "train",
        "sampling": sampling,
        "sample_rate": 0.25,
        "noise_std": 1.5,
        "max_grad_norm": 1.0,
        "charging": charging,
        "denominator": 3.0,
        "learning_rate": 0.1,
    }
    return Phase(**(settings | changes))


@st.composite
def steps(draw: Any, allowed: Sequence[int], limits: Any) -> Step:
    positions = draw(st.lists(st.sampled_from(list(allowed)), unique=True)) if allowed else []
    norms = draw(st.lists(NORMS, min_size=len(positions), max_size=len(positions)))
    drawn = np.array(sorted(positions), np.int64)
    return Step(positions=drawn, contributions=np.minimum(np.array(norms, np.float32), limits[drawn]))


@st.composite
def courses(draw: Any) -> list[Event]:
    """Events of a run on one process, with resumes, forgotten instances, filters and public steps."""
    charging = draw(st.sampled_from(["worst_case", "sweep", "unamplified", "last_seen"]))
    events: list[Event] = []
    filtered = draw(st.booleans()) and charging != "last_seen"
    if filtered:
        events.append(Filter(family="gaussian", orders=np.full(N, 2.0), budgets=np.full(N, 50.0)))
    allowed, recorded, limits = list(range(N)), 0, np.ones(N, np.float32)
    for _ in range(draw(st.integers(1, 3))):
        events.append(make_phase(charging, noise_std=draw(st.sampled_from([1.0, 2.0]))))
        events.append(Thresholds(values=draw_thresholds(draw), source="sweep"))
        # After a resume earlier thresholds may be in force again; under all of them nobody is above his own.
        limits = np.minimum(limits, events[-1].values)
        count = draw(st.integers(0, 4))
        events += [draw(steps(allowed, limits)) for _ in range(count)]
        recorded += count
        if filtered and draw(st.booleans()) and (leaving := draw(SOME)):
            leaving = [position for position in leaving if position in allowed]
            allowed = [position for position in allowed if position not in leaving]
            events += [Drop(positions=np.array(leaving, np.int64))] if leaving else []
        if draw(st.booleans()):
            events.append(PublicStep(count=draw(st.integers(1, 5))))
        if draw(st.booleans()):
            events.append(Resume(at_step=draw(st.integers(0, recorded))))
    return events


def draw_thresholds(draw: Any) -> Any:
    return np.array(draw(st.lists(NORMS, min_size=N, max_size=N)), np.float32)


def written(run: Run, events: Sequence[Event], path: Path | None = None) -> Ledger:
    writer = LedgerWriter.create(path, run)
    for event in events:
        writer.append(event)
    writer.close()
    return writer.ledger()


def split(events: Sequence[Event], owner: Callable[[int, int], int], world: int) -> list[list[Event]]:
    """What each of ``world`` ranks records; owner(step, position) is the rank that draws it."""
    parts: list[list[Event]] = [[] for _ in range(world)]
    number = 0
    for event in events:
        if not isinstance(event, Step):
            fact = replace(event, session=new_run_id()) if isinstance(event, Resume) else event
            for part in parts:
                part.append(fact)
            continue
        ranks = np.array([owner(number, int(position)) for position in event.positions], np.int64)
        for rank, part in enumerate(parts):
            mine = ranks == rank
            part.append(Step(positions=event.positions[mine], contributions=event.contributions[mine]))
        number += 1
    return parts


def ranked(parts: Sequence[Sequence[Event]], run: Run | None = None) -> list[Ledger]:
    run, identity = run or Run(num_instances=N), new_run_id()
    runs = (replace(run, run_id=identity, rank=rank, world_size=len(parts)) for rank in range(len(parts)))
    return [written(part_run, part) for part_run, part in zip(runs, parts, strict=True)]


def losses(ledger: Ledger) -> list[bytes]:
    loss = account(ledger, orders=ORDERS)
    return [loss.rdp.tobytes(), loss.worst_case_rdp.tobytes()]


def assert_same(merged: Ledger, single: Ledger) -> None:
    for name in TABLES:
        assert merged.to_arrow(name).equals(single.to_arrow(name))
    assert losses(merged) == losses(single)
    assert merged.phases == single.phases
    assert merged.abandoned == single.abandoned
    assert merged.num_public_steps == single.num_public_steps
    assert merged.confirmed == single.confirmed
    assert np.array_equal(merged.forgotten, single.forgotten)
    assert [type(event) for event in merged.events()] == [type(event) for event in single.events()]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(events=courses(), world=st.integers(2, 5), seed=st.integers(0, 99))
def test_merging_the_parts_of_a_run_is_the_run(events: list[Event], world: int, seed: int) -> None:
    single = written(Run(num_instances=N), events)
    chance = np.random.default_rng(seed)
    table = chance.integers(world, size=(100, N))
    parts = ranked(split(events, lambda step, position: int(table[step, position]), world))
    shuffled = [parts[place] for place in chance.permutation(world)]
    for order in (parts, shuffled):
        merged = merge_parts(order, None)
        assert_same(merged, single)
        assert merged.merge is not None and not merged.merge.incomplete and not merged.merge.missing_ranks
        assert all(merged.holds(part.anchor) for part in parts)


def test_a_merge_that_forgets_a_part_fails_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [make_phase("unamplified"), step_of([0, 5, 7], 1.0)]
    single = written(Run(num_instances=N), events)
    parts = ranked(split(events, lambda step, position: position % 2, 2))
    assert_same(merge_parts(parts, None), single)
    monkeypatch.setattr(merging._Merging, "_together", lambda self, steps, phase: steps[0])
    with pytest.raises(AssertionError):
        assert_same(merge_parts(parts, None), single)


def step_of(positions: Sequence[int], norm: float = 0.5) -> Step:
    return Step(
        positions=np.array(positions, np.int64), contributions=np.full(len(positions), norm, np.float32)
    )


def test_ids_groups_and_assumptions_survive_on_disk(tmp_path: Path) -> None:
    run = Run(
        num_instances=3,
        ids=np.array(["x", "y", "z"]),
        groups={"class": np.array([1, 0, 1])},
        assumptions={"smoothness": 2},
        software={"torch": "2"},
    )
    parts = ranked([[make_phase("worst_case"), step_of([0])], [make_phase("worst_case"), step_of([2])]], run)
    merged = merge_parts(parts, tmp_path / "runs" / "whole")
    again = Ledger.open(tmp_path / "runs" / "whole")
    assert again.digest == merged.digest and again.run.run_id == parts[0].run.run_id
    assert (again.run.rank, again.run.world_size, again.created) == (0, 1, min(p.created for p in parts))
    assert again.ids.tolist() == ["x", "y", "z"] and again.groups["class"].tolist() == [1, 0, 1]
    assert dict(again.run.assumptions or {}) == {"smoothness": 2} and again.run.software == {"torch": "2"}
    assert os.listdir(tmp_path / "runs") == ["whole"]
    modes = {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "runs" / "whole").iterdir()}
    assert modes == {"0o600"} and (tmp_path / "runs" / "whole").stat().st_mode & 0o777 == 0o700


def sessions(*names: str, at: int = 1) -> list[Event]:
    return [Resume(at_step=at, session=name * 32) for name in names]


def damaged_sets() -> dict[str, tuple[Callable[[SimpleNamespace], list[Ledger]], str, str]]:
    worst, other = make_phase("worst_case"), make_phase("worst_case", noise_std=9.0)
    two = [worst, step_of([0])]
    return {
        "nothing": (lambda s: [], "PIA115", "no part"),
        "another run": (lambda s: [s.a[0], s.b[1]], "PIA115", "different runs"),
        "a part twice": (lambda s: [s.a[0], s.a[1], s.a[1]], "PIA115", "second part"),
        "one missing": (lambda s: [s.a[0]], "PIA116", "1 of 2 parts are missing, the first that of rank 1"),
        "a whole ledger": (lambda s: [written(Run(num_instances=N), two)], "PIA115", "whole ledger"),
        "another N": (lambda s: [s.a[0], s.changed(num_instances=N + 1)], "PIA115", "Run facts differ"),
        "other ids": (lambda s: [s.a[0], s.changed(ids=np.arange(N) + 1)], "PIA115", "Run facts differ"),
        "three ranks": (lambda s: [s.a[0], s.changed(world_size=3)], "PIA115", "Run facts differ"),
        "another phase": (lambda s: ranked([two, [other, step_of([1])]]), "PIA115", "after step 0"),
        "another order": (
            lambda s: ranked([[*two, other, step_of([0])], [worst, step_of([1]), step_of([1]), other]]),
            "PIA115",
            "after step 1",
        ),
        "one instance on two ranks": (lambda s: ranked([two, two]), "PIA115", "same instance"),
        "sessions in another order": (
            lambda s: ranked([[*two, *sessions("a", "b")], [worst, step_of([1]), *sessions("b", "a")]]),
            "PIA115",
            "began the same sessions in another order",
        ),
        "another phase in force": (
            lambda s: ranked(
                [
                    [*two, *sessions("a"), other, step_of([0]), *sessions("b", at=2), step_of([0])],
                    [worst, step_of([1]), *sessions("a", "c", "b"), step_of([1])],
                ]
            ),
            "PIA115",
            "have a different Phase in force",
        ),
    }


@pytest.mark.parametrize("name", damaged_sets())
def test_parts_that_do_not_belong_together_are_refused(name: str, tmp_path: Path) -> None:
    choose, code, words = damaged_sets()[name]
    content = [[make_phase("worst_case"), step_of([0])], [make_phase("worst_case"), step_of([1])]]
    a, b = ranked(content), ranked(content)
    run = a[1].run
    known = {"changed": lambda **changes: written(replace(run, **changes), content[1][:1])}
    with pytest.raises(LedgerError) as caught:
        merge_parts(choose(SimpleNamespace(a=a, b=b, **known)), tmp_path / "merged")
    assert caught.value.code == code and words in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_destination_is_never_overwritten(tmp_path: Path) -> None:
    parts = ranked([[make_phase("worst_case")], [make_phase("worst_case")]])
    merge_parts(parts, tmp_path / "a")
    before = (tmp_path / "a" / "events.log").read_bytes()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for taken in ("a", "link"):
        with pytest.raises(LedgerError, match="PIA045"):
            merge_parts(parts, tmp_path / taken)
    (tmp_path / "file").write_text("x")
    with pytest.raises(LedgerError, match="PIA041"):
        merge_parts(parts, tmp_path / "file")
    assert (tmp_path / "a" / "events.log").read_bytes() == before
    (tmp_path / "empty").mkdir()
    merge_parts(parts, tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "elsewhere", "empty", "file", "link"]


@pytest.mark.parametrize("charging", ["worst_case", "unamplified", "sweep"])
def test_a_step_that_one_rank_did_not_record_is_charged(charging: str) -> None:
    shared = [make_phase(charging), Thresholds(values=np.full(N, 0.5, np.float32), source="sweep")]
    ahead = [*shared, step_of([0, 1], 0.25), step_of([2], 0.25)]
    behind = [*shared, step_of([5], 0.25)]
    merged = merge_parts(ranked([ahead, behind]), None)
    assert merged.num_steps == 2 and not merged.confirmed
    assert merged.merge is not None and merged.merge.incomplete == ((1, 2),)
    assert "1 steps are not in all the others" in merged.merge.statement()
    most = {"unamplified": [step_of([0, 1, 5], 0.25), everybody(but={2: 0.25})]}
    expected = written(
        Run(num_instances=N), [*shared, *most.get(charging, [step_of([0, 1, 5], 0.25), step_of([2], 0.25)])]
    )
    assert losses(merged) == losses(expected)


def everybody(but: dict[int, float]) -> Step:
    norms = np.ones(N, np.float32)
    for position, norm in but.items():
        norms[position] = norm
    return Step(positions=np.arange(N), contributions=norms)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(events=courses(), world=st.integers(2, 4), seed=st.integers(0, 99), data=st.data())
def test_no_loss_is_smaller_after_a_part_was_lost(
    events: list[Event], world: int, seed: int, data: Any
) -> None:
    events = [event for event in events if not isinstance(event, Resume)]
    single = written(Run(num_instances=N), events)
    owners = np.random.default_rng(seed).integers(world, size=N)
    parts = split(events, lambda step, position: int(owners[position]), world)
    lost = data.draw(st.integers(0, world - 1))
    cut = data.draw(st.integers(0, len(events)))
    parts[lost] = parts[lost][:cut]
    merged = merge_parts(ranked(parts), None)
    assert merged.num_steps == single.num_steps
    true, charged = account(single, orders=ORDERS), account(merged, orders=ORDERS)
    if single.phases[0].charging != "last_seen":
        assert (charged.rdp >= true.rdp).all()
    without = [part for rank, part in enumerate(ranked(parts)) if rank != lost]
    with pytest.raises(LedgerError, match="PIA116"):
        merge_parts(without, None)
    partly = merge_parts(without, None, allow_missing=True)
    assert partly.merge is not None and partly.merge.missing_ranks == (lost,) and not partly.merge.confirmed
    if single.phases[0].charging != "last_seen":
        assert (account(partly, orders=ORDERS).rdp >= true.rdp).all()


def test_forgetting_the_lost_rank_is_what_the_fill_prevents(monkeypatch: pytest.MonkeyPatch) -> None:
    phase = make_phase("unamplified")
    single = written(Run(num_instances=N), [phase, step_of([0, 7])])
    parts = ranked([[phase, step_of([0])], [phase]])
    true = account(single, orders=ORDERS).rdp
    assert (account(merge_parts(parts, None), orders=ORDERS).rdp >= true).all()
    monkeypatch.setattr(merging._Merging, "_everybody", lambda self, step, phase, absent: step)
    assert (account(merge_parts(parts, None), orders=ORDERS).rdp < true).any()


def test_loaders_with_replacement_add_up_over_ranks_and_are_not_guessed() -> None:
    phase = make_phase("unamplified", sampling="shuffled")
    parts = [[phase, step_of([1, 2], 0.25)], [phase, step_of([2, 3], 2.0)]]
    merged = merge_parts(ranked(parts), None)
    step = next(event for event in merged.events() if isinstance(event, Step))
    assert step.positions.tolist() == [1, 2, 3] and step.contributions.tolist() == [0.25, 3.0, 2.0]
    parts[0].append(step_of([4]))
    with pytest.raises(LedgerError, match="more than once"):
        merge_parts(ranked(parts), None)
    quiet = [[phase, step_of([1], 0.25)], [phase]]
    filled = [e for e in merge_parts(ranked([*quiet, [phase]]), None).events() if isinstance(e, Step)]
    assert filled[0].contributions.tolist() == [2.0, 2.25, *([2.0] * (N - 2))]


def test_a_rank_that_drops_its_own_instances_agrees_with_one_process() -> None:
    start = [
        Filter(family="gaussian", orders=np.full(N, 2.0), budgets=np.full(N, 1.0)),
        make_phase("unamplified"),
    ]
    drop = [Drop(positions=np.array([positions], np.int64)) for positions in (0, 7)]
    parts = [[*start, step_of([0]), drop[0], step_of([1])], [*start, step_of([7]), drop[1], step_of([8])]]
    single = [*start, step_of([0, 7]), Drop(positions=np.array([0, 7])), step_of([1, 8])]
    assert_same(merge_parts(ranked(parts), None), written(Run(num_instances=N), single))
    amplified = [[*start[:1], make_phase("worst_case"), *part[2:]] for part in parts]
    with pytest.raises(LedgerError, match="state a different Drop"):
        merge_parts(ranked(amplified), None)


def test_sessions_of_ranks_that_stopped_at_different_steps_are_aligned(tmp_path: Path) -> None:
    phase, identity = make_phase("worst_case"), new_run_id()
    paths = [tmp_path / f"rank-{rank}" for rank in range(2)]
    anchors = []
    for rank, path in enumerate(paths):
        run = Run(num_instances=N, run_id=identity, rank=rank, world_size=2)
        with LedgerWriter.create(path, run) as writer:
            for event in (phase, step_of([rank])):
                writer.append(event)
            anchors.append(writer.anchor)
            for _ in range(2 - rank):
                writer.append(step_of([2 + rank]))
    for _ in range(2):
        # Two starts in which nobody went on, on rank 0 only.
        LedgerWriter.resume(paths[0], anchors[0], session=new_run_id()).close()
    later = []
    third, fourth = new_run_id(), new_run_id()
    for rank, path in enumerate(paths):
        with LedgerWriter.resume(path, anchors[rank], session=third) as writer:
            writer.append(phase)
            writer.append(step_of([4 + rank]))
            later.append(writer.anchor)
            writer.append(step_of([6 + rank]))
    assert [anchor.steps for anchor in later] == [4, 3]
    for rank, path in enumerate(paths):
        with LedgerWriter.resume(path, later[rank], session=fourth) as writer:
            writer.append(phase)
            writer.append(step_of([8 + rank]))
    merged = merge_parts(reversed(paths), tmp_path / "merged")
    assert merged.num_steps == 6
    assert merged.abandoned == ((1, 3), (4, 5))
    drawn = [event.positions.tolist() for event in merged.events() if isinstance(event, Step)]
    assert drawn == [[0, 1], [2, 3], [2], [4, 5], [6, 7], [8, 9]]
    assert merged.merge is not None and merged.merge.incomplete == ((2, 3),)
    for anchor in (*anchors, *later):
        assert merged.holds(anchor)
    assert [merged.steps_of_part(anchor) for anchor in (*anchors, *later)] == [1, 1, 4, 4]


class Ranks:
    """Ranks in lock step that are killed at any moment and start again together, and one ledger of what any
    of them recorded. A step is recorded by a rank when all have recorded the step before it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.chance = chance = np.random.default_rng(seed)
        self.world = int(chance.integers(2, 4))
        charging, sampling = chance.choice(["worst_case", "sweep", "unamplified"]), ["poisson", "shuffled"]
        self.facts: list[Event] = [make_phase(str(charging), str(chance.choice(sampling)))]
        self.filtered = bool(chance.integers(2)) and charging != "unamplified"
        if charging == "sweep":
            self.facts.append(Thresholds(values=np.full(N, 0.75, np.float32), source="sweep"))
        run = Run(num_instances=N, run_id=new_run_id(), world_size=self.world)
        self.paths = [folder / f"rank-{rank}" for rank in range(self.world)]
        self.writers = [LedgerWriter.create(path, replace(run, rank=r)) for r, path in enumerate(self.paths)]
        self.single = LedgerWriter.create(None, Run(num_instances=N))
        self.saved: list[list[Any]] = [[] for _ in self.paths]
        self.dropped: set[int] = set()
        """Ranks that have dropped instance 0, which never contributes."""
        budget = Filter(family="gaussian", orders=np.full(N, 2.0), budgets=np.full(N, 9.0))
        for writer in (*self.writers, self.single):
            for fact in [*([budget] if self.filtered else []), *self.facts]:
                writer.append(fact)
        self.save(list(range(self.world)))

    def save(self, ranks: list[int]) -> None:
        for rank in ranks:
            self.saved[rank].append(self.writers[rank].anchor)

    def start_again(self, last: bool) -> list[int]:
        """Ranks that came so far that they take steps; the others were killed before."""
        session, ready = new_run_id(), []
        common = int(self.chance.integers(min(map(len, self.saved))))
        for rank, path in enumerate(self.paths):
            self.writers[rank]._end()
            writes = 9 if last else int(self.chance.integers(5))
            if not writes:
                continue
            # Some load another checkpoint than the rest, which is noticed at the first step.
            other = int(self.chance.integers(len(self.saved[rank])))
            place = common if last or self.chance.integers(4) else other
            self.writers[rank] = LedgerWriter.resume(path, self.saved[rank][place], session=session)
            for fact in self.facts[: writes - 1]:
                self.writers[rank].append(fact)
            if writes > len(self.facts):
                ready.append(rank)
        return ready

    def train(self, ready: list[int], last: bool) -> None:
        dropping = self.filtered and not self.chance.integers(3)
        for _ in range(int(self.chance.integers(1, 4))):
            if self.dropped or dropping:
                self.drop(ready, last)
            owner, drawn = self.chance.integers(self.world, size=N), self.chance.permutation(N)[:5]
            going = [rank for rank in ready if last or self.chance.integers(5)]
            taken = [i for i in drawn.tolist() if i]
            for rank in going:
                self.writers[rank].append(step_of([i for i in taken if owner[i] == rank], 0.75))
            if going:
                self.single.append(step_of([i for i in taken if owner[i] in going], 0.75))
            if len(going) < self.world:
                return
            self.save([rank for rank in going if last or self.chance.integers(3)])

    def drop(self, ready: list[int], last: bool) -> None:
        """Every rank drops before its next step, unless it is killed between the two: no step that is
        recorded after the first Drop holds the instance."""
        for rank in [rank for rank in ready if rank not in self.dropped]:
            if not self.dropped:
                self.single.append(Drop(positions=np.array([0])))
            self.writers[rank].append(Drop(positions=np.array([0])))
            self.dropped.add(rank)
            if not last and not self.chance.integers(4):
                ready.remove(rank)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that was written, so the device need not be waited for."""
    monkeypatch.setattr(storage, "_sync_file", lambda descriptor: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("seed", range(80))
def test_ranks_that_were_killed_at_any_moment_are_merged(seed: int, tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, seed)
    ranks.train(list(range(ranks.world)), last=False)
    starts = int(ranks.chance.integers(1, 5))
    for number in range(starts):
        last = number == starts - 1
        ranks.train(ranks.start_again(last), last)
    merged, true = merge_parts(ranks.paths, None), ranks.single.ledger()
    assert merged.num_steps >= true.num_steps
    charged, least = account(merged, orders=ORDERS), account(true, orders=ORDERS)
    assert (charged.rdp * (1 + 1e-12) >= least.rdp).all()
    assert (charged.worst_case_rdp * (1 + 1e-12) >= least.worst_case_rdp).all()
    assert all(merged.holds(anchor) for saved in ranks.saved for anchor in saved)


def test_sessions_that_are_told_apart_by_their_number_only_fail_the_law(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test_ranks_that_were_killed_at_any_moment_are_merged(43, tmp_path / "right")
    monkeypatch.setattr(parts, "_starts", lambda sessions: [("", number) for number in range(len(sessions))])
    with pytest.raises(LedgerError, match="same instance"):
        test_ranks_that_were_killed_at_any_moment_are_merged(43, tmp_path / "wrong")


@pytest.mark.parametrize("what", ["phase", "drop", "draw", "kind"])
def test_ranks_that_disagreed_released_nothing_and_began_again_are_counted_apart(what: str) -> None:
    start = [Filter(family="gaussian", orders=np.full(N, 2.0), budgets=np.full(N, 9.0))]
    start.append(phase := make_phase("worst_case"))
    other, drop = make_phase("worst_case", noise_std=0.5), Drop(positions=np.array([0]))
    disagreed: dict[str, tuple[list[Event], list[Event]]] = {
        "phase": ([step_of([1])], [other, step_of([2])]),
        "drop": ([drop, step_of([1])], [step_of([2])]),
        "draw": ([step_of([1, 2])], [step_of([2, 3])]),
        "kind": ([PublicStep(), step_of([1])], [step_of([2])]),
    }
    missing = [drop if what == "drop" else PublicStep()] if what in ("drop", "kind") else []
    ends = [step_of([4])], [step_of([5])]
    parts = [[*start, step_of([6 + rank]), *disagreed[what][rank]] for rank in range(2)]
    with pytest.raises(LedgerError, match="PIA115"):
        merge_parts(ranked(parts), None)
    again = [[*parts[rank], *sessions("a"), phase, *ends[rank]] for rank in range(2)]
    if missing:
        again[1].insert(-1, missing[0])
    if what == "kind":
        again[0].insert(-1, missing[0])
    merged = merge_parts(ranked(again), None)
    assert merged.num_steps == 4 and merged.merge is not None
    assert merged.merge.incomplete == ((1, 3),) and merged.confirmed
    recorded = [*start, step_of([]), step_of([1]), *([other] if what == "phase" else []), step_of([2])]
    recorded += [*([phase] if what == "phase" else []), *([drop] if what == "drop" else []), step_of([])]
    least = account(written(Run(num_instances=N), recorded), orders=ORDERS)
    assert (account(merged, orders=ORDERS).rdp * (1 + 1e-12) >= least.rdp).all()
    further = [[*parts[rank], step_of([3 + rank]), *sessions("a"), phase] for rank in range(2)]
    with pytest.raises(LedgerError, match="PIA115"):
        merge_parts(ranked(further), None)


def test_a_merged_ledger_continues_from_the_checkpoint_of_a_rank(tmp_path: Path) -> None:
    phase = make_phase("worst_case")
    parts = ranked([[phase, step_of([0])], [phase, step_of([1])]])
    merge_parts(parts, tmp_path / "merged")
    with LedgerWriter.resume(tmp_path / "merged", parts[1].anchor) as writer:
        writer.append(phase)
        writer.append(step_of([3]))
    again = Ledger.open(tmp_path / "merged")
    assert again.num_steps == 2 and again.num_abandoned_steps == 0 and again.merge is not None
    foreign = ranked([[phase, step_of([0])], [phase, step_of([1])]])[0].anchor
    for anchor in (foreign, replace(parts[0].anchor, digest="sha256:" + "0" * 64)):
        assert not again.holds(anchor)
        with pytest.raises(LedgerError, match="PIA040"):
            LedgerWriter.resume(tmp_path / "merged", anchor)


def test_a_part_is_never_taken_for_the_run() -> None:
    parts = ranked([[make_phase("unamplified"), step_of([0])], [make_phase("unamplified"), step_of([1])]])
    for charging in (None, Unamplified()):
        with pytest.raises(GuaranteeError, match="PIA117"):
            account(parts[0], charging)
    with pytest.raises(LedgerError, match="PIA115"):
        merge_parts([merge_parts(parts, None)], None)


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 2, "world_size": 2},
        {"rank": -1, "world_size": 2},
        {"rank": True, "world_size": 2},
        {"rank": 0, "world_size": 2, "run_id": None},
        {"world_size": 0},
        {"world_size": 2**40},
        {"run_id": "A" * 32},
        {"run_id": "a" * 31},
    ],
)
def test_impossible_ranks_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="PIA070"):
        Run(**({"num_instances": 2, "run_id": "a" * 32} | changes))


def test_public_steps_are_recorded_and_cost_nobody_anything() -> None:
    phase = make_phase("worst_case")
    plain = written(Run(num_instances=N), [phase, step_of([0]), step_of([1])])
    public = [phase, PublicStep(), step_of([0]), PublicStep(count=7), step_of([1])]
    ledger = written(Run(num_instances=N), public)
    assert (ledger.num_steps, ledger.num_public_steps) == (2, 8)
    assert losses(ledger) == losses(plain)
    for events in ([PublicStep()], [replace(phase, kind="unlearn"), PublicStep()]):
        with pytest.raises(LedgerError, match="PIA045"):
            written(Run(num_instances=N), events)
    with pytest.raises(UsageError, match="PIA070"):
        PublicStep(count=0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(events=courses(), seed=st.integers(0, 99))
def test_losses_follow_their_instances_bit_by_bit(events: list[Event], seed: int) -> None:
    """Instances in another order, and the instances of a step in another order: the same bits."""
    place = np.random.default_rng(seed).permutation(N)
    moved = [relabelled(event, place) for event in events]
    here, there = (written(Run(num_instances=N), course) for course in (events, moved))
    first, second = account(here, orders=ORDERS), account(there, orders=ORDERS)
    assert second.rdp[place].tobytes() == first.rdp.tobytes()


def relabelled(event: Event, place: Any) -> Event:
    """The event after instance i has become instance ``place[i]``."""
    if isinstance(event, Step):
        return Step(positions=place[event.positions], contributions=event.contributions)
    if isinstance(event, Drop):
        return Drop(positions=place[event.positions])
    if isinstance(event, Thresholds):
        return replace(event, values=event.values[np.argsort(place)])
    return event


def test_the_law_of_relabelling_catches_losses_left_behind() -> None:
    place = np.roll(np.arange(N), 1)
    events = [make_phase("unamplified"), step_of([0], 1.0)]
    moved = [relabelled(event, place) for event in events]
    first, second = (account(written(Run(num_instances=N), e), orders=ORDERS).rdp for e in (events, moved))
    assert second[place].tobytes() == first.tobytes() != second.tobytes()


def test_assumptions_may_use_the_words_of_the_format() -> None:
    words = {"world_size": 2, "rank": 0, "projection_radius": 1}
    ledger = written(Run(num_instances=1, assumptions=words), [make_phase("worst_case", optimizer='"rank":')])
    assert ledger.run.assumptions == words and ledger.run.world_size == 1
    identity = new_run_id()
    part = written(Run(num_instances=1, assumptions=words, run_id=identity, world_size=2), [])
    assert list(part.events()) == [] and part.run.world_size == 2


def test_anchors_beyond_every_number_are_not_held() -> None:
    phase = make_phase("worst_case")
    merged = merge_parts(ranked([[phase, step_of([0])], [phase, step_of([1])]]), None)
    assert not merged.holds(replace(merged.anchor, sequence=2**70, steps=2**65))
    assert not merged.holds(replace(merged.anchor, sequence=2**64, steps=1))
