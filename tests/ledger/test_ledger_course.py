"""Random courses of events against a plain list: nothing recorded is lost, altered or counted twice."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from per_instance_accountant.errors import LedgerError
from per_instance_accountant.ledger import (
    Anchor,
    Event,
    Ledger,
    LedgerWriter,
    Phase,
    Resume,
    Run,
    Step,
    Thresholds,
)

POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
NOT_NEGATIVE = st.floats(min_value=0, allow_infinity=False)
FLOAT32 = st.floats(min_value=0, width=32, allow_infinity=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PHASES = st.builds(
    Phase,
    kind=st.sampled_from(["train", "unlearn"]),
    sampling=st.sampled_from(["poisson", "shuffled"]),
    sample_rate=st.floats(min_value=0, max_value=1, exclude_min=True),
    noise_std=NOT_NEGATIVE,
    max_grad_norm=POSITIVE,
    charging=st.sampled_from(["worst_case", "sweep", "last_seen"]),
    denominator=POSITIVE,
    learning_rate=NOT_NEGATIVE,
    weight_decay=NOT_NEGATIVE,
    momentum=NOT_NEGATIVE,
    optimizer=TEXT,
    plan_digest=st.none() | TEXT,
)


def same(left: Event, right: Event) -> bool:
    if type(left) is not type(right):
        return False
    for name in left.__dataclass_fields__:
        a, b = getattr(left, name), getattr(right, name)
        if isinstance(a, np.ndarray):
            if a.dtype != b.dtype or not np.array_equal(a, b):
                return False
        elif a != b or type(a) is not type(b):
            return False
    return True


class Course(RuleBasedStateMachine):
    """Writes a ledger on disk and one in memory side by side, is killed and resumed at will."""

    @initialize(count=st.integers(1, 30), text=st.booleans())
    def start(self, count: int, text: bool) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "run"
        ids = np.array([f"é{i}" for i in range(count)]) if text else np.arange(count) * 7 - 50
        run = Run(num_instances=count, ids=ids, groups={"g": ids[::-1]}, assumptions={"smoothness": 1e17})
        self.count, self.ids = count, ids
        self.writer = LedgerWriter.create(self.path, run)
        self.memory = LedgerWriter.create(None, run)
        self.events: list[Event] = []
        self.anchors: list[Anchor] = []
        self.steps = 0
        self.left: set[int] = set()
        self.confirmed = True

    def offer(self, event: Event) -> None:
        self.writer.append(event)
        self.memory.append(event)
        self.events.append(event)
        self.confirmed = not isinstance(event, Step)

    @rule(phase=PHASES)
    def append_phase(self, phase: Phase) -> None:
        self.offer(phase)

    @rule(draw=st.data(), source=st.sampled_from(["fixed", "sweep"]))
    def append_thresholds(self, draw: Any, source: str) -> None:
        values = draw.draw(st.lists(FLOAT32, min_size=self.count, max_size=self.count))
        stated = Thresholds(values=np.array(values, np.float32), source=source)
        if source == "sweep" or self.may_be_fixed(stated):
            self.offer(stated)
        else:
            self.refuse(stated)

    def may_be_fixed(self, stated: Thresholds) -> bool:
        """Fixed thresholds are stated before the first step and never change."""
        earlier = [e for e in self.events if isinstance(e, Thresholds) and e.source == "fixed"]
        return np.array_equal(earlier[0].values, stated.values) if earlier else self.steps == 0

    def refuse(self, event: Event) -> None:
        for writer in (self.writer, self.memory):
            with pytest.raises(LedgerError) as caught:
                writer.append(event)
            assert caught.value.code == "PIA045"

    def ready(self) -> bool:
        """Whether a step may follow, worked out from the list of events alone."""
        phase = thresholds = enforced = None
        for event in self.events:
            if isinstance(event, Phase):
                phase, enforced = count_steps(self.events, event), event.charging == "sweep"
            elif isinstance(event, Thresholds):
                thresholds = count_steps(self.events, event)
            elif isinstance(event, Resume):
                phase = -1 if phase is None or phase >= event.at_step else phase
                if thresholds is not None and thresholds >= event.at_step:
                    thresholds = -1
        return phase not in (None, -1) and not (enforced and thresholds == -1)

    @rule(draw=st.data())
    def append_step(self, draw: Any) -> None:
        positions = draw.draw(st.lists(st.integers(0, self.count - 1), unique=True, max_size=self.count))
        contributions = draw.draw(st.lists(FLOAT32, min_size=len(positions), max_size=len(positions)))
        step = Step(
            positions=np.array(positions, np.int64), contributions=np.array(contributions, np.float32)
        )
        if self.ready():
            self.offer(step)
            self.steps += 1
        else:
            self.refuse(step)

    @rule()
    def take_anchor(self) -> None:
        self.anchors.append(self.writer.anchor)
        self.memory.flush()
        self.confirmed = True
        assert self.anchors[-1].steps == self.steps

    @precondition(lambda self: self.anchors)
    @rule(draw=st.data(), torn=st.binary(max_size=23), killed=st.booleans())
    def resume(self, draw: Any, torn: bytes, killed: bool) -> None:
        anchor = draw.draw(st.sampled_from(self.anchors))
        pending = not self.confirmed
        if killed:
            self.writer._end()
            with (self.path / "events.log").open("ab") as log:
                log.write(torn)
        else:
            self.writer.close()
        ahead = anchor.sequence < Ledger.open(self.path).anchor.sequence
        self.writer = LedgerWriter.resume(self.path, anchor)
        assert ahead or not pending
        if ahead:
            event = Resume(at_step=anchor.steps)
            self.memory.append(event)
            self.events.append(event)
            self.left |= set(range(anchor.steps, self.steps))
            self.confirmed = not (killed and pending)

    @invariant()
    def the_ledger_holds_exactly_the_list(self) -> None:
        if not hasattr(self, "writer"):
            return
        views = (self.writer.ledger(), Ledger.open(self.path), self.memory.ledger())
        for ledger in views:
            recorded = list(ledger.events())
            assert len(recorded) == len(self.events)
            assert all(map(same, recorded, self.events))
            assert ledger.num_steps == self.steps
            assert ledger.num_abandoned_steps == len(self.left)
            assert ledger.confirmed == self.confirmed or ledger is views[2]
            assert all(map(same, ledger.phases, [e for e in self.events if isinstance(e, Phase)]))
            assert np.array_equal(ledger.ids, self.ids)
            assert np.array_equal(ledger.groups["g"], self.ids[::-1])
            assert ledger.run.assumptions == {"smoothness": 1e17}
        assert views[0].anchor == views[1].anchor
        assert all(views[1].holds(anchor) for anchor in self.anchors[-3:])

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.writer.close()
            self.folder.cleanup()


def count_steps(events: list[Event], until: Event) -> int:
    count = 0
    for event in events:
        if event is until:
            break
        count += isinstance(event, Step)
    return count


Course.TestCase.settings = settings(max_examples=20, stateful_step_count=20, deadline=None, derandomize=True)
TestCourse = Course.TestCase
