"""Facts of training as arrays: what each recorded step did to the forget set, read from a ledger."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.accounting import Basis, ChargingRule, FixedThresholds, WorstCase
from per_instance_accountant.accounting.compaction import KEY as COMPACTED
from per_instance_accountant.errors import GuaranteeError
from per_instance_accountant.ledger import Ledger
from per_instance_accountant.ledger.records import (
    Disclosure,
    Drop,
    Event,
    Filter,
    Phase,
    PublicStep,
    Resume,
    Step,
    Thresholds,
)
from per_instance_accountant.unlearning.filtering import FilterReplay, MemberBudgets
from per_instance_accountant.unlearning.mechanism import Mechanism

Array = NDArray[np.float64]

CERTIFIED_RULES: Final = tuple(r.name for r in (WorstCase, FixedThresholds) if r.basis is Basis.CERTIFIED)
_FLOAT32: Final = 1 + 2.0**-23
_REACHED: Final = 1 - 1e-5
_NOTHING: Final = float(np.finfo(np.float32).tiny)
_SLACK: Final = 1 + 1e-6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingChain:
    """Spans of equal steps (S of them), with the thresholds of the f members of a forget set.

    counts (S,): steps in each span. mechanisms: one per span. thresholds (S, f): bound on each member's
    contribution to the noisy sum, 0 once it was forgotten. forgotten (f,): excluded at the end.
    smallest_threshold (S,): least positive threshold at which anybody was clipped. thresholds_from_sweep
    (S,): whether those came from measured norms. abandoned_steps: steps of branches that a resume left
    behind. at_threshold, above_clip: recorded contributions of anybody that reached the threshold they were
    clipped at (within 1e-5), and that lie above the clip norm. largest_contribution: of anybody, recorded.
    filtered: whether a filter was in force; hidden_state: whether its decisions followed from the course of
    training, so that the parameters are not the whole state; budgets: what it promises to the members.
    public_steps: updates from public data, without noise. disclosed: epsilons of published statistics of
    individual values.
    """

    counts: NDArray[np.int64]
    mechanisms: tuple[Mechanism, ...]
    thresholds: Array
    forgotten: NDArray[np.bool_]
    smallest_threshold: Array
    thresholds_from_sweep: NDArray[np.bool_]
    abandoned_steps: int
    at_threshold: int
    above_clip: int
    largest_contribution: float
    num_instances: int
    last_training: Mechanism | None
    filtered: bool = False
    hidden_state: bool = False
    budgets: MemberBudgets | None = None
    public_steps: int = 0
    disclosed: tuple[float, ...] = ()

    @property
    def num_steps(self) -> int:
        """Recorded steps, all of which are charged."""
        return int(self.counts.sum())

    def per_span(self, name: str) -> Array:
        """(S,) values of one field of the mechanisms."""
        return np.array([getattr(m, name) for m in self.mechanisms], dtype=np.float64)

    @property
    def amplification_rates(self) -> Array:
        """(S,) rates that accounting may use: the sample rate under Poisson sampling, else 1."""
        return np.array(
            [m.sample_rate if m.sampling == "poisson" else 1.0 for m in self.mechanisms], dtype=np.float64
        )

    @property
    def ratios(self) -> Array:
        """(S, f) threshold over noise std, infinite without noise, rounded up."""
        noise = self.per_span("noise_std")[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.nextafter(self.thresholds / noise, np.inf)
        return np.where(self.thresholds > 0, ratio, 0.0)

    def only(self, members: NDArray[np.int64]) -> TrainingChain:
        """The same steps for some members of the forget set."""
        return replace(
            self,
            thresholds=self.thresholds[:, members],
            forgotten=self.forgotten[members],
            budgets=None if self.budgets is None else self.budgets.only(members),
        )


def training_chain(
    ledger: Ledger,
    positions: NDArray[np.int64],
    charging: ChargingRule | None = None,
    *,
    first: int = 0,
    stop: int | None = None,
) -> TrainingChain:
    """Read steps ``first`` to ``stop`` (all when None) of ``ledger`` for the instances at ``positions`` (f,).

    charging: None for the rule of the run, or WorstCase() for the clip norm. Raises GuaranteeError PIA012
    when the thresholds are not certified, PIA011 when a recorded contribution or a drop contradicts them,
    or the ledger was compacted, PIA117 for the part of one rank, LedgerError for damage.
    """
    return _read(ledger, positions, charging, first, stop).chain()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Everybody:
    """The chain of all instances that were not forgotten, each alone, without a (S, N) array.

    positions (n,): who they are. chain: the spans, with no member. limits: the v different threshold vectors,
    each (n,). which (S,): the vector in force in each span. budgets: what a filter promises to each (n,).
    """

    positions: NDArray[np.int64]
    chain: TrainingChain
    limits: tuple[Array, ...]
    which: NDArray[np.int64]
    budgets: MemberBudgets | None

    def alone(self, thresholds: Array, budgets: MemberBudgets | None) -> TrainingChain:
        """The chain of one instance with ``thresholds`` (v,), one per vector, and ``budgets`` (1,)."""
        return replace(
            self.chain,
            thresholds=thresholds[self.which][:, None],
            forgotten=np.zeros(1, dtype=np.bool_),
            budgets=budgets,
        )


def everybody(ledger: Ledger, charging: ChargingRule | None = None) -> Everybody:
    """Read all steps of ``ledger`` for every instance; arguments and errors as in :func:`training_chain`."""
    reading = _read(ledger, np.arange(ledger.num_instances), charging, 0, None)
    kept = np.flatnonzero(~reading.forgotten)
    limits: list[Array] = []
    which = []
    for _, limit, _, _ in reading.rows:
        known = (k for k, other in enumerate(limits) if other is limit or np.array_equal(other, limit))
        index = next(known, len(limits))
        limits += [limit] if index == len(limits) else []
        which.append(index)
    budgets = reading.filter.promise(kept)
    reading.rows = [(row[0], row[1][:0], row[2], row[3]) for row in reading.rows]
    reading.positions = reading.positions[:0]
    return Everybody(
        positions=kept,
        chain=reading.chain(),
        limits=tuple(limit[kept] for limit in limits),
        which=np.array(which, dtype=np.int64),
        budgets=budgets if reading.filter.hidden else None,
    )


def _read(
    ledger: Ledger,
    positions: NDArray[np.int64],
    charging: ChargingRule | None,
    first: int,
    stop: int | None,
) -> _Reading:
    ledger.require_whole()
    _refuse_compacted(ledger)
    reading = _Reading(ledger.num_instances, np.asarray(positions, dtype=np.int64), charging)
    end = ledger.num_steps if stop is None else stop
    for event in _until(ledger.events(), end, to_the_end=stop is None):
        reading.take(event, count=reading.steps >= first)
    return reading


def _refuse_compacted(ledger: Ledger) -> None:
    if COMPACTED in (ledger.run.assumptions or {}):
        raise GuaranteeError(
            "PIA011",
            "the ledger was compacted: it does not say who was drawn and what was clipped",
            "Nothing recorded could contradict what the bounds assume",
            "plan with the ledger that it was made from",
        )


def _until(events: Iterator[Event], steps: int, *, to_the_end: bool) -> Iterator[Event]:
    """Events up to and including step number ``steps``; ``to_the_end``: and what the model and the public saw
    after it."""
    seen = 0
    for event in events:
        if seen < steps or (to_the_end and isinstance(event, PublicStep | Disclosure)):
            yield event
        elif not to_the_end:
            return
        seen += isinstance(event, Step)


class _Reading:
    """State while the events go by."""

    def __init__(
        self, num_instances: int, positions: NDArray[np.int64], charging: ChargingRule | None
    ) -> None:
        self.num_instances, self.positions, self.charging = num_instances, positions, charging
        self.phase: Phase | None = None
        self.last_training: Phase | None = None
        self.values: Array | None = None
        self.from_sweep = False
        self.forgotten = np.zeros(num_instances, dtype=np.bool_)
        self.requests: list[tuple[int, NDArray[np.bool_]]] = []
        self.steps = self.abandoned = self.public = 0
        self.disclosed: list[float] = []
        self.filter = FilterReplay()
        self.open_span = False
        self.counts: list[int] = []
        self.rows: list[tuple[Mechanism, Array, float, bool]] = []
        self.limit: Array = np.zeros(0)
        self.at_threshold = self.above_clip = 0
        self.largest_contribution = 0.0
        self.member = np.full(num_instances, -1, dtype=np.int64)
        self.member[positions] = np.arange(len(positions))

    def take(self, event: Event, *, count: bool) -> None:
        """Dispatch one event; a step is only added to a span if ``count``."""
        self.open_span &= not self.filter.take(event)
        if isinstance(event, Step):
            self._step(event, count)
            return
        self.open_span = False
        if isinstance(event, Phase):
            self.phase = event
        elif isinstance(event, Thresholds):
            self._thresholds(event)
        elif isinstance(event, Resume):
            self._resume(event)
        elif isinstance(event, PublicStep):
            self.public += event.count
        elif isinstance(event, Disclosure):
            self.disclosed.append(event.epsilon)
        elif not isinstance(event, Filter | Drop):
            raise GuaranteeError(
                "PIA011",
                f"the ledger holds a {type(event).__name__}, which the bounds know nothing of",
                "Whatever it reveals would be missing from the plan",
                "plan with the version of the package that wrote the ledger",
            )

    def _thresholds(self, event: Thresholds) -> None:
        values = event.values.astype(np.float64)
        if event.source == "forget":
            before = values >= 0 if self.values is None else self.values > 0
            newly = (values == 0) & before & ~self.forgotten
            self.requests.append((self.steps, newly))
            self.forgotten |= newly
        else:
            self.from_sweep = event.source == "sweep"
        self.values = values

    def _resume(self, event: Resume) -> None:
        self.abandoned += self.steps - event.at_step
        # A request stated after the checkpoint was stated for the branch that is left behind.
        while self.requests and self.requests[-1][0] >= event.at_step:
            self.forgotten &= ~self.requests.pop()[1]

    def _step(self, step: Step, count: bool) -> None:
        self.steps += 1
        if not count:
            return
        if not self.open_span:
            self._open()
        self.counts[-1] += 1
        self._check_contributions(step)

    def _open(self) -> None:
        phase = self.phase
        if phase is None:
            raise GuaranteeError(
                "PIA011",
                "the ledger holds a step before any mechanism",
                "Its noise is unknown, so nothing can be promised",
                "record the Phase before the first Step",
            )
        if phase.kind == "train":
            self.last_training = phase
        charged = self._charged(phase)
        # The same array again for the same thresholds: a schedule has many phases.
        self.limit = self.limit if np.array_equal(charged, self.limit) else charged
        positive = (
            np.inf if self.values is None else np.min(self.values, where=self.values > 0, initial=np.inf)
        )
        smallest = min(float(positive) * _FLOAT32, phase.max_grad_norm)
        self.rows.append(
            (Mechanism.of(phase), self.limit, smallest, self.from_sweep and self.values is not None)
        )
        self.counts.append(0)
        self.open_span = True

    def _charged(self, phase: Phase) -> Array:
        """(f,) certified bounds on the contributions."""
        rule = self.charging.name if self.charging is not None else phase.charging
        if rule not in CERTIFIED_RULES and self.charging is None and self.filter.active:
            # The filter bounds the sum, the clip norm every single step; nothing else is certified.
            rule = WorstCase.name
        if rule not in CERTIFIED_RULES:
            raise GuaranteeError(
                "PIA012",
                f"the run charges instances by {rule!r}, whose sums are not certified",
                "A number of steps computed from a realised loss promises nothing, and itself leaks it",
                "plan(ledger, ids=ids, ..., charging=WorstCase())",
            )
        bound = np.full(len(self.positions), phase.max_grad_norm)
        if rule == FixedThresholds.name:
            bound = np.minimum(bound, self._enforced(phase)[self.positions])
        out = self.forgotten[self.positions] | self.filter.dropped(self.positions)
        return np.where(out, 0.0, bound)

    def _enforced(self, phase: Phase) -> Array:
        if phase.charging != FixedThresholds.name or self.values is None or self.from_sweep:
            raise GuaranteeError(
                "PIA013",
                f"fixed thresholds were asked for, but a step was trained with {phase.charging!r}",
                "Nobody was clipped at thresholds fixed before training, so they bound nothing",
                "plan(ledger, ids=ids, ..., charging=WorstCase())",
            )
        return self.values

    def _check_contributions(self, step: Step) -> None:
        clip = self.rows[-1][0].max_grad_norm
        clipped_at = clip if self.values is None else np.minimum(self.values[step.positions], clip)
        # The smallest float stands for a threshold of zero: such an instance takes no part in the map.
        reached = (step.contributions >= clipped_at * _REACHED) & (step.contributions > _NOTHING)
        self.at_threshold += int(np.count_nonzero(reached))
        self.above_clip += int(np.count_nonzero(step.contributions > clip * _SLACK))
        largest = float(step.contributions.max(initial=0.0))
        self.largest_contribution = max(self.largest_contribution, largest)
        member = self.member[step.positions]
        drawn = member >= 0
        over = step.contributions[drawn] > self.limit[member[drawn]] * _SLACK
        if over.any():
            raise GuaranteeError(
                "PIA011",
                f"step {self.steps - 1} records {int(over.sum())} contributions above their threshold",
                "Clipping failed or an instance entered one release twice, so no bound of this run holds",
                "train again with the loader and the optimizer returned by make_private",
            )

    def chain(self) -> TrainingChain:
        """The record of what was read."""
        members = len(self.positions)
        mechanisms, limits, smallest, sweep = zip(*self.rows, strict=True) if self.rows else ((), (), (), ())
        return TrainingChain(
            counts=np.array(self.counts, dtype=np.int64),
            mechanisms=tuple(mechanisms),
            thresholds=np.array(limits, dtype=np.float64).reshape(len(self.rows), members),
            forgotten=self.forgotten[self.positions],
            smallest_threshold=np.array(smallest, dtype=np.float64),
            thresholds_from_sweep=np.array(sweep, dtype=np.bool_),
            abandoned_steps=self.abandoned,
            at_threshold=self.at_threshold,
            above_clip=self.above_clip,
            largest_contribution=self.largest_contribution,
            num_instances=self.num_instances,
            last_training=None if self.last_training is None else Mechanism.of(self.last_training),
            filtered=self.filter.active,
            hidden_state=self.filter.hidden,
            budgets=self.filter.promise(self.positions),
            public_steps=self.public,
            disclosed=tuple(self.disclosed),
        )
