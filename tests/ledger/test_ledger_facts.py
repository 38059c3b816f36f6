"""Facts that contradict each other, requests by id, resumes, tables; and what no message may hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from per_instance_accountant.errors import LedgerError, PiaError, PlanError
from per_instance_accountant.ledger import Anchor, Ledger, LedgerWriter, Resume, Run, Step
from per_instance_accountant.ledger.progress import Progress

CANARY = "Zyzzyva-4711"


def arrays(positions: Any, contributions: Any) -> Step:
    return Step(positions=positions, contributions=contributions)


def refusal(writer: LedgerWriter, event: Any) -> str:
    """Code of the refusal; the ledger must not change by it."""
    before = writer.ledger().anchor
    with pytest.raises(PiaError) as caught:
        writer.append(event)
    assert writer.ledger().anchor == before
    return caught.value.code


@pytest.fixture
def writer(make: SimpleNamespace) -> LedgerWriter:
    writer = LedgerWriter.create(None, Run(num_instances=10))
    writer.append(make.phase())
    return writer


@pytest.mark.parametrize(
    ("positions", "contributions", "code"),
    [
        ([3, 10], [1, 1], "PIA045"),
        ([-1], [1], "PIA045"),
        ([1, 1], [1, 1], "PIA045"),
        ([5, 2, 5], [1, 1, 1], "PIA045"),
        ([1, 2], [1, np.nan], "PIA070"),
        ([2, 1], [np.nan, 1], "PIA070"),
        ([1], [np.inf], "PIA070"),
        ([1], [-1e-45], "PIA070"),
        ([1, 2], [1], "PIA071"),
    ],
)
def test_impossible_steps(writer: LedgerWriter, positions: Any, contributions: Any, code: str) -> None:
    event = arrays(np.array(positions, np.int64), np.array(contributions, np.float32))
    assert refusal(writer, event) == code


def test_steps_of_another_type(writer: LedgerWriter) -> None:
    int64, float32 = np.array([1], np.int64), np.ones(1, np.float32)
    for event in (
        arrays(int64.astype(np.int32), float32),
        arrays(int64, float32.astype(np.float64)),
        arrays([1], float32),
        arrays(int64, [1.0]),
        arrays(int64[:, None], float32[:, None]),
        arrays(int64.astype(float), float32),
    ):
        assert refusal(writer, event) == "PIA071"


def test_only_events_are_appended(writer: LedgerWriter) -> None:
    for other in ("step", None, Run(num_instances=3), Step):
        assert refusal(writer, other) == "PIA071"


def test_a_step_needs_a_phase(make: SimpleNamespace) -> None:
    assert refusal(LedgerWriter.create(None, Run(num_instances=3)), make.step(1)) == "PIA045"


def test_thresholds_need_one_value_per_instance(writer: LedgerWriter, make: SimpleNamespace) -> None:
    assert refusal(writer, make.thresholds(np.ones(9))) == "PIA045"
    assert refusal(writer, make.thresholds(np.ones(11))) == "PIA045"


def test_thresholds_are_fixed_before_the_first_step_or_never(
    writer: LedgerWriter, make: SimpleNamespace
) -> None:
    early = LedgerWriter.create(None, Run(num_instances=10))
    early.append(make.phase())
    early.append(make.thresholds(np.ones(10), "fixed"))
    assert refusal(early, make.thresholds(np.full(10, 0.5), "fixed")) == "PIA045"
    writer.append(make.step(1))
    assert refusal(writer, make.thresholds(np.ones(10), "fixed")) == "PIA045"
    writer.append(make.thresholds(np.ones(10), "sweep"))


def test_a_forgotten_instance_is_never_drawn_again(writer: LedgerWriter, make: SimpleNamespace) -> None:
    writer.append(make.step(3))
    writer.append(make.thresholds([0, 1, 1, 0, 1, 1, 1, 1, 1, 1], "forget"))
    writer.append(make.step(1, 2))
    assert refusal(writer, make.step(1, 3)) == "PIA045"
    assert refusal(writer, make.step(0, contribution=0.0)) == "PIA045"
    writer.append(make.thresholds([1, 1, 1, 1, 1, 1, 1, 1, 1, 0], "forget"))
    writer.append(make.thresholds(np.ones(10), "sweep"))
    assert refusal(writer, make.step(9)) == "PIA045"
    assert refusal(writer, make.step(3)) == "PIA045"
    writer.append(Resume(at_step=0))
    writer.append(make.phase())
    assert refusal(writer, make.step(3)) == "PIA045"
    writer.append(make.step(5))


def test_a_zero_threshold_of_a_sweep_does_not_forget(writer: LedgerWriter, make: SimpleNamespace) -> None:
    writer.append(make.thresholds([0, *[1] * 9], "sweep"))
    writer.append(make.step(0, contribution=0.0))


def check_restatement(make: SimpleNamespace) -> None:
    """After going back behind a statement about the mechanism, that statement must be made again."""
    writer = LedgerWriter.create(None, Run(num_instances=10))
    writer.append(make.phase(charging="sweep"))
    writer.append(make.thresholds(np.ones(10)))
    writer.append(make.step(1))
    writer.append(make.step(2))
    writer.append(make.thresholds(np.full(10, 0.1)))
    writer.append(make.phase(charging="sweep", noise_std=9.0))
    writer.append(make.step(3))
    writer.append(Resume(at_step=1))
    assert refusal(writer, make.step(1)) == "PIA045"
    writer.append(make.phase(charging="sweep"))
    assert refusal(writer, make.step(1)) == "PIA045"
    writer.append(make.thresholds(np.ones(10)))
    writer.append(make.step(1))
    writer.append(Resume(at_step=4))
    writer.append(make.step(1))


def test_a_resume_does_not_inherit_the_mechanism_of_the_branch_left_behind(make: SimpleNamespace) -> None:
    check_restatement(make)


def test_what_was_stated_right_after_the_checkpoint_is_left_behind_too(make: SimpleNamespace) -> None:
    writer = LedgerWriter.create(None, Run(num_instances=10))
    writer.append(make.phase(charging="sweep"))
    writer.append(make.thresholds(np.ones(10)))
    writer.append(make.step(1))
    writer.append(make.thresholds(np.full(10, 0.1)))
    writer.append(Resume(at_step=1))
    assert refusal(writer, make.step(1)) == "PIA045"
    writer.append(make.thresholds(np.ones(10)))
    writer.append(make.step(1))
    writer.append(make.phase(noise_std=9.0))
    writer.append(Resume(at_step=2))
    assert refusal(writer, make.step(1)) == "PIA045"
    writer.append(make.phase())
    writer.append(make.step(1))


def test_seeded_bug_a_resume_that_inherits_it(make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Progress._check_state

    def forgetful(self: Progress) -> None:
        self._phase_stale = self._thresholds_stale = False
        right(self)

    monkeypatch.setattr(Progress, "_check_state", forgetful)
    with pytest.raises(pytest.fail.Exception):
        check_restatement(make)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 8), st.floats(0, 1)), max_size=8))
def test_abandoned_steps_are_the_union_of_what_was_left_behind(course: list[tuple[int, float]]) -> None:
    progress, left = Progress(num_instances=4), set[int]()
    for steps, back in course:
        progress.num_steps += steps
        at_step = int(back * progress.num_steps)
        progress.apply(Resume(at_step=at_step))
        left |= set(range(at_step, progress.num_steps))
    assert progress.num_abandoned_steps == len(left)
    assert left == {step for first, end in progress.abandoned for step in range(first, end)}


@pytest.mark.parametrize("at_step", [-1, 2, True, 0.0])
def test_impossible_resumes(writer: LedgerWriter, make: SimpleNamespace, at_step: Any) -> None:
    writer.append(make.step(1))
    assert refusal(writer, Resume(at_step=at_step)) == "PIA045"


def test_resume_forks_charge_every_branch(tmp_path: Path, make: SimpleNamespace) -> None:
    path = tmp_path / "a"
    with LedgerWriter.create(path, Run(num_instances=10)) as writer:
        writer.append(make.phase())
        writer.append(make.step(1))
        anchor = writer.anchor
        writer.append(make.step(2))
    for branch in range(3):
        with LedgerWriter.resume(path, Anchor.from_dict(json.loads(json.dumps(anchor.to_dict())))) as writer:
            writer.append(make.step(4 + branch))
    ledger = Ledger.open(path)
    assert (ledger.num_steps, ledger.num_abandoned_steps) == (5, 3)
    assert ledger.holds(anchor)
    with LedgerWriter.resume(path, ledger.anchor) as writer:
        assert writer.ledger().anchor == ledger.anchor


def test_a_statement_after_the_checkpoint_makes_a_resume_even_without_steps(
    tmp_path: Path, make: SimpleNamespace
) -> None:
    with LedgerWriter.create(tmp_path / "a", Run(num_instances=10)) as writer:
        writer.append(make.phase())
        anchor = writer.anchor
        writer.append(make.phase(noise_std=9.0))
    with LedgerWriter.resume(tmp_path / "a", anchor) as writer:
        assert refusal(writer, make.step(1)) == "PIA045"
        assert writer.ledger().num_abandoned_steps == 0


def test_large_floats_survive(tmp_path: Path, make: SimpleNamespace) -> None:
    run = Run(num_instances=10, assumptions={"a": 1e17, "b": [1e300, 2.0**53, 2**53 - 1, -1e16, 5e-324]})
    with LedgerWriter.create(tmp_path / "a", run) as writer:
        writer.append(make.phase(noise_std=1e17, learning_rate=2.0**53, weight_decay=-0.0))
    ledger = Ledger.open(tmp_path / "a")
    assert ledger.run.assumptions == run.assumptions
    assert (ledger.phases[0].noise_std, ledger.phases[0].learning_rate) == (1e17, 2.0**53)


def test_a_checkpoint_that_is_ahead_or_of_another_run_is_refused(
    tmp_path: Path, make: SimpleNamespace
) -> None:
    writer = LedgerWriter.create(tmp_path / "a", Run(num_instances=10))
    writer.append(make.phase())
    old = writer.anchor
    log = (tmp_path / "a" / "events.log").read_bytes()
    writer.append(make.step(1))
    writer.append(make.step(2))
    newer = writer.anchor
    writer.close()
    whole = (tmp_path / "a" / "events.log").read_bytes()
    (tmp_path / "a" / "events.log").write_bytes(log)
    with pytest.raises(LedgerError, match="after 2 steps and the ledger holds 0") as caught:
        LedgerWriter.resume(tmp_path / "a", newer)
    assert caught.value.code == "PIA040"
    assert (tmp_path / "a" / "events.log").read_bytes() == log
    (tmp_path / "a" / "events.log").write_bytes(whole + b"torn")
    foreign = Anchor.from_dict(old.to_dict() | {"run_id": "0" * 32})
    edited = Anchor.from_dict(newer.to_dict() | {"digest": "sha256:" + "0" * 64})
    for anchor in (foreign, edited):
        with pytest.raises(LedgerError) as caught:
            LedgerWriter.resume(tmp_path / "a", anchor)
        assert caught.value.code == "PIA040"
    assert (tmp_path / "a" / "events.log").read_bytes() == whole + b"torn"
    LedgerWriter.resume(tmp_path / "a", newer).close()
    assert (tmp_path / "a" / "events.log").read_bytes() == whole


@pytest.mark.parametrize(
    "edit",
    [
        {"steps": -1},
        {"steps": True},
        {"steps": 1.0},
        {"steps": float("nan")},
        {"steps": 8},
        {"sequence": "1"},
        {"digest": "sha256:"},
        {"digest": "sha512:" + "0" * 64},
        {"digest": "sha256:" + "G" * 64},
        {"run_id": None},
        {"run_id": "0" * 31},
        {"extra": 1},
    ],
)
def test_malformed_anchors(edit: dict[str, Any]) -> None:
    sound = {"sequence": 7, "steps": 3, "digest": "sha256:" + "0" * 64, "run_id": "a" * 32}
    assert Anchor.from_dict(sound).to_dict() == sound
    with pytest.raises(PiaError) as caught:
        Anchor.from_dict(sound | edit)
    assert caught.value.code == "PIA071"
    for content in (None, [], {}, {name: sound[name] for name in list(sound)[1:]}):
        with pytest.raises(PiaError):
            Anchor.from_dict(content)  # type: ignore[arg-type]


def with_ids(ids: Any) -> Ledger:
    return LedgerWriter.create(None, Run(num_instances=len(ids), ids=ids)).ledger()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.one_of(
        st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, min_size=1, max_size=30),
        st.lists(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=9),
            unique=True,
            min_size=1,
            max_size=30,
        ),
    ),
    st.randoms(use_true_random=False),
)
def test_positions_invert_ids(ids: list[Any], chance: Any) -> None:
    ledger = with_ids(np.array(ids))
    places = chance.sample(range(len(ids)), chance.randint(0, len(ids)))
    found = ledger.positions_of([ids[place] for place in places])
    assert found.dtype == np.int64
    assert found.tolist() == places
    assert ledger.ids.tolist() == ids


def test_ids_default_to_positions() -> None:
    ledger = LedgerWriter.create(None, Run(num_instances=5)).ledger()
    assert ledger.ids.tolist() == [0, 1, 2, 3, 4]
    assert ledger.positions_of((4, 0)).tolist() == [4, 0]
    assert ledger.positions_of(np.array([3], np.uint8)).tolist() == [3]
    assert ledger.groups == {}


@pytest.mark.parametrize(
    ("ids", "request_", "message"),
    [
        (np.arange(5), [0, 5, 7], "2 of 3 requested ids are unknown to this ledger, the first at index 1"),
        (np.arange(5), [1, 2, 1, 2], "2 of 4 requested ids are repeated, the first at index 2"),
        (np.arange(5), np.array([2**64 - 1, 1], np.uint64), "1 of 2 requested ids are unknown"),
        (np.arange(-5, 0), np.array([2**64 - 1], np.uint64), "1 of 1 requested ids are unknown"),
        (np.arange(5), [1.0], "dtype float64"),
        (np.arange(5), [True], "dtype bool"),
        (np.arange(5), ["1"], "dtype <U1"),
        (np.arange(5), 3, r"shape \(\)"),
        (np.arange(5), [[1, 2]], r"shape \(1, 2\)"),
        (np.arange(5), [2**70], "dtype object"),
        (np.array(["1", "2"]), ["1", 2], "dtype"),
        (np.array(["1", "2"]), [1], "dtype int64"),
        (np.array(["1", "2"]), ["12"], "1 of 1 requested ids are unknown"),
    ],
)
def test_requests_that_name_nobody(ids: Any, request_: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        with_ids(ids).positions_of(request_)
    assert caught.value.code == "PIA032"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"ids": np.array([1, 2, 1])}, "PIA070"),
        ({"ids": np.array([CANARY, CANARY, "b"])}, "PIA070"),
        ({"ids": np.arange(2)}, "PIA071"),
        ({"ids": np.arange(3.0)}, "PIA071"),
        ({"ids": np.array([CANARY, None, 3], object)}, "PIA071"),
        ({"ids": np.array([2**64 - 1, 1, 2], np.uint64)}, "PIA070"),
        ({"ids": np.array([CANARY * 30, "a", "b"])}, "PIA070"),
        ({"ids": np.array([CANARY + "\ud800", "a", "b"])}, "PIA070"),
        ({"groups": {"": np.arange(3)}}, "PIA071"),
        ({"groups": {CANARY: np.arange(4)}}, "PIA071"),
        ({"assumptions": {CANARY: float("nan")}}, "PIA071"),
        ({"assumptions": {CANARY: object()}}, "PIA071"),
        ({"assumptions": {CANARY: 2**60}}, "PIA071"),
        ({"assumptions": {CANARY: "x" * 2**21}}, "PIA071"),
        ({"num_instances": 2**27 + 1}, "PIA070"),
        ({"num_instances": 3.0}, "PIA070"),
    ],
)
def test_runs_that_cannot_be_stored(tmp_path: Path, changes: dict[str, Any], code: str) -> None:
    with pytest.raises(PiaError) as caught:
        LedgerWriter.create(tmp_path / "a", Run(**({"num_instances": 3} | changes)))
    assert caught.value.code == code
    assert CANARY not in str(caught.value)
    assert not (tmp_path / "a").exists()


def test_text_ids_of_any_array_kind_are_kept() -> None:
    for ids in (["a", "bb", "é\U0001f600"], np.array(["a", "bb", "é\U0001f600"], object)):
        ledger = with_ids(ids)
        assert ledger.ids.tolist() == ["a", "bb", "é\U0001f600"]
        with pytest.raises(ValueError, match="read-only"):
            ledger.ids[0] = "b"


def test_pseudonyms_depend_on_the_key_the_kind_and_the_id() -> None:
    first, second = with_ids(np.arange(3)), with_ids(np.arange(3))
    names = [first.pseudonym(1), first.pseudonym(2), first.pseudonym("1"), second.pseudonym(1)]
    assert len(set(names)) == 4
    assert all(re.fullmatch("hmac-sha256:[0-9a-f]{64}", name) for name in names)
    assert first.pseudonym(np.int64(1)) == first.pseudonym(1) == names[0]
    assert first.pseudonym(np.str_("1")) == first.pseudonym("1")
    for other in (1.0, None, True, b"1"):
        with pytest.raises(PiaError) as caught:
            first.pseudonym(other)  # type: ignore[arg-type]
        assert caught.value.code == "PIA071"


def test_no_id_in_any_error_or_repr(tmp_path: Path, make: SimpleNamespace) -> None:
    path, ids = tmp_path / "a", np.array([CANARY, "b"])
    messages: list[str] = []

    def note(call: Any, *args: Any) -> None:
        with pytest.raises(PiaError) as caught:
            call(*args)
        messages.extend([str(caught.value), repr(caught.value.__cause__)])

    writer = LedgerWriter.create(path, Run(num_instances=2, ids=ids))
    ledger = writer.ledger()
    note(ledger.positions_of, [CANARY, CANARY])
    note(ledger.positions_of, [CANARY + "x"])
    note(LedgerWriter.create, path, Run(num_instances=2, ids=ids))
    note(writer.append, make.step(0))
    writer.append(make.phase())
    writer.append(make.thresholds([0, 1], "forget"))
    note(writer.append, make.step(0))
    messages += [repr(ledger), repr(writer), repr(writer.source)]
    writer.close()
    log = (path / "events.log").read_bytes()
    (path / "events.log").write_bytes(log.replace(CANARY.encode(), b"x" * len(CANARY)))
    note(Ledger.open, path)
    assert CANARY not in "".join(messages)
    assert (path / "key").read_bytes().hex() not in "".join(messages)


def sample_for_tables(make: SimpleNamespace) -> Ledger:
    writer = LedgerWriter.create(None, Run(num_instances=3, ids=np.array(["a", "b", "c"])))
    writer.append(make.phase())
    writer.append(make.thresholds([1, 0.5, 0.25]))
    writer.append(make.step(0, 2))
    writer.append(make.step())
    writer.append(make.phase(kind="unlearn", noise_std=3.0, plan_digest="sha256:00"))
    writer.append(make.step(1, contribution=0.125))
    writer.append(Resume(at_step=2))
    writer.append(make.phase())
    writer.append(make.step(0))
    return writer.ledger()


def test_tables(make: SimpleNamespace) -> None:
    ledger = sample_for_tables(make)
    steps = ledger.to_arrow("steps").to_pydict()
    assert steps["step"] == [0, 1, 2, 3]
    assert steps["phase"] == [0, 0, 1, 2]
    assert steps["drawn"] == [2, 0, 1, 1]
    assert steps["abandoned"] == [False, False, True, False]
    assert steps["noise_std"] == [1.5, 1.5, 3.0, 1.5]
    assert steps["plan_digest"] == [None, None, "sha256:00", None]
    assert ledger.to_arrow("observations").to_pydict() == {
        "step": [0, 0, 2, 3],
        "position": [0, 2, 1, 0],
        "id": ["a", "c", "b", "a"],
        "contribution": [0.5, 0.5, 0.125, 0.5],
    }
    assert ledger.to_arrow("thresholds").to_pydict() == {
        "step": [0, 0, 0],
        "position": [0, 1, 2],
        "id": ["a", "b", "c"],
        "threshold": [1.0, 0.5, 0.25],
    }
    with pytest.raises(PiaError) as caught:
        ledger.to_arrow("losses")
    assert caught.value.code == "PIA070"


def test_tables_of_an_empty_ledger() -> None:
    ledger = LedgerWriter.create(None, Run(num_instances=3)).ledger()
    assert [ledger.to_arrow(name).num_rows for name in ("steps", "observations", "thresholds")] == [0, 0, 0]


def test_batches_join_up(make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from per_instance_accountant.ledger import tables

    ledger = sample_for_tables(make)
    whole = {name: ledger.to_arrow(name) for name in tables.TABLES}
    monkeypatch.setattr(tables, "_ROWS", 1)
    for name, table in whole.items():
        assert ledger.to_arrow(name).combine_chunks() == table.combine_chunks()
    assert ledger.to_arrow("steps").column("step").num_chunks == 4


def test_export(tmp_path: Path, make: SimpleNamespace) -> None:
    ledger, place = sample_for_tables(make), tmp_path / "tables"
    ledger.export(place)
    for name in ("steps", "observations", "thresholds"):
        assert pq.read_table(place / f"{name}.parquet") == ledger.to_arrow(name).combine_chunks()
    summary = json.loads((place / "run.json").read_text())
    assert summary["anchor"] == ledger.anchor.to_dict()
    assert (summary["num_steps"], summary["num_abandoned_steps"]) == (4, 1)
    before = {entry.name: entry.read_bytes() for entry in place.iterdir()}
    assert len(before) == 4
    with pytest.raises(PiaError, match="4 of the 4 files to write exist"):
        ledger.export(place)
    with_ids(np.arange(2)).export(place, overwrite=True)
    after = {entry.name: entry.read_bytes() for entry in place.iterdir()}
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before)


def test_opening_twice_is_opening_once(tmp_path: Path) -> None:
    LedgerWriter.create(tmp_path / "a", Run(num_instances=3)).close()
    ledger = Ledger.open(str(tmp_path / "a"))
    assert Ledger.open(ledger) is ledger
    assert ledger.path == tmp_path / "a"
    assert repr(ledger) == "<Ledger: 0 steps, 3 instances>"


def test_a_view_survives_a_change_of_the_working_directory(
    tmp_path: Path, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with LedgerWriter.create("a", Run(num_instances=3)) as writer:
        writer.append(make.phase())
    ledger = Ledger.open("a")
    monkeypatch.chdir("/")
    assert len(list(ledger.events())) == 1
    assert writer.ledger().digest == ledger.digest


def test_a_view_does_not_grow(tmp_path: Path, make: SimpleNamespace) -> None:
    writer = LedgerWriter.create(tmp_path / "a", Run(num_instances=3))
    writer.append(make.phase())
    views = writer.ledger(), Ledger.open(tmp_path / "a")
    writer.append(make.step(1))
    for view in views:
        assert view.num_steps == 0
        assert len(list(view.events())) == 1
        assert writer.ledger().holds(view.anchor)
        assert not view.holds(writer.ledger().anchor)
