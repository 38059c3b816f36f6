"""What the ledger says about the carrying out of one plan."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.ledger import Ledger
from per_instance_accountant.ledger.records import Disclosure, Phase, PublicStep, Resume, Step, Thresholds


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Execution:
    """Facts from step ``first`` on, for the plan with digest ``plan_digest``.

    requests: forgotten positions of every "forget" event stated after ``first`` steps and before the next
    one. phases: the phase in force at each of the following ``steps`` steps, without repetition. drawn:
    whether a forgotten position was drawn in them. recorded: all steps in the ledger. strays: steps of this
    plan outside. went_back: whether a resume fell behind the steps recorded, from ``first`` on.
    """

    requests: tuple[NDArray[np.int64], ...]
    phases: tuple[Phase, ...]
    drawn: bool
    recorded: int
    strays: int
    went_back: bool


@dataclass(slots=True)
class _Walk:
    phase: Phase | None = None
    values: NDArray[np.float32] | None = None
    steps: int = 0
    requests: list[NDArray[np.int64]] = field(default_factory=list)
    forgotten: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    phases: dict[Phase, None] = field(default_factory=dict)
    strays: int = 0
    drawn: bool = False
    went_back: bool = False


def read_execution(ledger: Ledger, *, first: int, steps: int, plan_digest: str) -> Execution:
    """One pass over ``ledger``. Raises LedgerError for damage."""
    walk = _Walk()
    for event in ledger.events():
        if isinstance(event, Phase):
            walk.phase = event
        elif isinstance(event, Thresholds):
            _thresholds(walk, event, first)
        elif isinstance(event, Resume):
            _resume(walk, event, first)
        elif isinstance(event, Step):
            _step(walk, event, first, steps, plan_digest)
    return Execution(
        requests=tuple(walk.requests),
        phases=tuple(walk.phases),
        drawn=walk.drawn,
        recorded=walk.steps,
        strays=walk.strays,
        went_back=walk.went_back,
    )


def unplanned_since(ledger: Ledger, sequence: int, last: int | None = None) -> int:
    """Published statistics and updates from public data after frame ``sequence``, up to frame ``last``: no
    plan that was made at ``sequence`` counts them. Raises LedgerError for damage."""
    found = (
        isinstance(event, Disclosure | PublicStep)
        and sequence < walk.sequence
        and (last is None or walk.sequence <= last)
        for walk, event in ledger.passing()
    )
    return sum(found)


def _resume(walk: _Walk, event: Resume, first: int) -> None:
    walk.went_back |= walk.steps >= first and event.at_step < walk.steps
    if event.at_step <= first:
        # A request stated after the checkpoint was stated for the branch that is left behind.
        walk.requests.clear()
        walk.forgotten = np.empty(0, np.int64)


def _thresholds(walk: _Walk, event: Thresholds, first: int) -> None:
    if event.source == "forget" and walk.steps == first:
        before = np.ones(len(event.values), dtype=np.bool_) if walk.values is None else walk.values > 0
        walk.requests.append(np.flatnonzero((event.values == 0) & before))
        walk.forgotten = np.concatenate(walk.requests)
    walk.values = event.values


def _step(walk: _Walk, step: Step, first: int, steps: int, plan_digest: str) -> None:
    inside = first <= walk.steps < first + steps
    walk.steps += 1
    if walk.phase is None:
        return
    if not inside:
        walk.strays += walk.phase.plan_digest == plan_digest
        return
    walk.phases[walk.phase] = None
    walk.drawn |= bool(np.isin(step.positions, walk.forgotten).any())
