"""Which fact may follow which: the same checks when facts are offered and when they are read back."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.errors import LedgerError, UsageError
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

_ENFORCED: Final = ("fixed_thresholds", "sweep")


def _contradiction(happened: str, fix: str) -> LedgerError:
    meaning = "The fact was not recorded and its step must not be released"
    return LedgerError("PIA045", happened, meaning, fix)


class Progress:
    """State of a course of events: ``check`` raises and changes nothing, ``apply`` follows it.

    >>> import numpy as np
    >>> progress = Progress(num_instances=4)
    >>> try:
    ...     progress.check(Step(positions=np.array([1]), contributions=np.ones(1, np.float32)))
    ... except LedgerError as error:
    ...     print(error.code, progress.num_steps)
    PIA045 0
    """

    def __init__(self, num_instances: int, *, part: bool = False) -> None:
        self.num_instances, self._part = num_instances, part
        self.num_steps = 0
        self.num_public_steps = 0
        self.sessions: list[tuple[str | None, int]] = []
        """Of each Resume: what it says about its session, and how many steps were recorded before it."""
        self.phases: list[Phase] = []
        self.disclosures: list[Disclosure] = []
        self.abandoned: list[tuple[int, int]] = []
        """Disjoint rising half-open intervals of step numbers that some Resume left behind."""
        self.pending = False
        """Whether the last step is a mere intent so far: nothing of the same session follows it."""
        self._phase_at = self._thresholds_at = -1
        self._phase_stale = self._thresholds_stale = False
        self._fixed: NDArray[np.float32] | None = None
        """Thresholds chosen before training; nothing else may be called fixed."""
        self._forgotten: NDArray[np.bool_] | None = None
        self._dropped: NDArray[np.bool_] | None = None
        """Who was dropped by the filter; None without a filter."""

    @property
    def num_abandoned_steps(self) -> int:
        """Steps that at least one Resume left behind."""
        return sum(end - start for start, end in self.abandoned)

    @property
    def forgotten(self) -> NDArray[np.bool_]:
        """(N,) who a deletion request excluded, for good."""
        return np.zeros(self.num_instances, np.bool_) if self._forgotten is None else self._forgotten.copy()

    @property
    def needs_phase(self) -> bool:
        """Whether the last phase was left behind by a resume, so that no step may follow it."""
        return self._phase_stale

    @property
    def needs_thresholds(self) -> bool:
        """The same for thresholds."""
        return self._thresholds_stale

    def check(self, event: Event) -> None:
        """Raise LedgerError PIA045, UsageError PIA070 or PIA071 if ``event`` cannot be the next fact."""
        if type(event) not in _RULES:
            raise UsageError(
                "PIA071",
                f"a {type(event).__name__} is no event",
                "Nothing was recorded",
                "writer.append(Phase(...)), Thresholds, Step or Resume",
            )
        _RULES[type(event)][0](self, event)

    def apply(self, event: Event) -> None:
        """Move on by one event that passed ``check``."""
        _RULES[type(event)][1](self, event)

    def apply_mark(self) -> None:
        """The last step has been released."""
        self.pending = False

    def _accept_any(self, event: Phase | Disclosure) -> None:
        """A mechanism may change, and a statistic be published, at any time."""

    def _apply_phase(self, phase: Phase) -> None:
        self.phases.append(phase)
        self._phase_at, self._phase_stale, self.pending = self.num_steps, False, False

    def _apply_disclosure(self, event: Disclosure) -> None:
        self.disclosures.append(event)
        self.pending = False

    def _check_thresholds(self, event: Thresholds) -> None:
        if event.values.size != self.num_instances:
            raise _contradiction(
                f"{event.values.size} thresholds for {self.num_instances} instances",
                "Thresholds(values=np.zeros(run.num_instances, np.float32), source=...)",
            )
        late = self._fixed is None and self.num_steps > 0
        if event.source == "fixed" and (late or self._differs_from_fixed(event)):
            raise _contradiction(
                "thresholds were stated as fixed after the first step, or changed",
                'state them before training, or as source="sweep": what is released may have shaped them',
            )

    def _differs_from_fixed(self, event: Thresholds) -> bool:
        return self._fixed is not None and not np.array_equal(self._fixed, event.values)

    def _apply_thresholds(self, event: Thresholds) -> None:
        self._thresholds_at, self._thresholds_stale, self.pending = self.num_steps, False, False
        if event.source == "fixed":
            self._fixed = event.values
        if event.source == "forget":
            # For good, also across a Resume: whoever reads the ledger charges a forgotten instance nothing.
            removed = event.values == 0
            self._forgotten = removed if self._forgotten is None else self._forgotten | removed

    def _check_filter(self, event: Filter) -> None:
        if event.budgets.size != self.num_instances:
            raise _contradiction(
                f"{event.budgets.size} budgets for {self.num_instances} instances",
                "Filter(budgets=...) with one budget per instance",
            )
        if self.num_steps or self._dropped is not None:
            raise _contradiction(
                "a filter after the first step, or a second one",
                "state the filter once, before training: a later one may depend on what was released",
            )

    def _apply_filter(self, event: Filter) -> None:
        self._dropped, self.pending = np.zeros(self.num_instances, dtype=np.bool_), False

    def _check_drop(self, event: Drop) -> None:
        positions = event.positions
        _check_arrays(positions, np.zeros(np.shape(positions), np.float32))
        if self._dropped is None or not positions.size:
            raise _contradiction("a drop of nobody, or without a filter", "writer.append(Filter(...)) before")
        self._check_positions(positions)
        if self._dropped[positions].any():
            raise _contradiction("an instance was dropped twice", "drop those only that still take part")

    def _apply_drop(self, event: Drop) -> None:
        if self._dropped is not None:
            self._dropped[event.positions] = True
        self.pending = False

    def _check_resume(self, event: Resume) -> None:
        if type(event.at_step) is not int or not 0 <= event.at_step <= self.num_steps:
            raise _contradiction(
                f"a resume at step {event.at_step!r} of a ledger with {self.num_steps} steps",
                "LedgerWriter.resume(path, anchor=anchor_of_the_checkpoint)",
            )
        if self._part and event.session is None:
            raise UsageError(
                "PIA070",
                "the part of one of several ranks is continued without a session",
                "Nobody could say which sessions of the ranks belong together, if one of them is killed",
                "start all ranks: LedgerWriter.resume(path, anchor, session=one new_run_id() sent to all)",
            )

    def _apply_resume(self, event: Resume) -> None:
        self.sessions.append((event.session, self.num_steps))
        start = event.at_step
        # What was stated after the checkpoint was stated for the branch that is left behind.
        self._phase_stale |= self._phase_at >= start
        self._thresholds_stale |= self._thresholds_at >= start
        if start == self.num_steps:
            return
        while self.abandoned and self.abandoned[-1][1] >= start:
            start = min(start, self.abandoned.pop()[0])
        self.abandoned.append((start, self.num_steps))

    def _check_step(self, event: Step) -> None:
        self._check_state()
        positions, contributions = event.positions, event.contributions
        _check_arrays(positions, contributions)
        if not positions.size:
            return
        self._check_positions(positions)
        # Written as what must hold, so that NaN fails it.
        if not (np.minimum.reduce(contributions) >= 0 and np.maximum.reduce(contributions) < math.inf):
            raise UsageError(
                "PIA070",
                "a contribution is negative, NaN or infinite",
                "The step was not recorded, because no loss could be computed from it",
                "record the norms after clipping, rounded up",
            )
        if self._forgotten is not None and bool(self._forgotten[positions].any()):
            raise _contradiction(
                f"{int(self._forgotten[positions].sum())} forgotten instances were drawn",
                "sample from the retained instances only",
            )
        if self._dropped is not None and bool((self._dropped[positions] & (contributions > 0)).any()):
            raise _contradiction(
                "an instance contributed after the filter had dropped it",
                "clip dropped instances at 0",
            )

    def _check_public(self, event: PublicStep) -> None:
        if not self.phases or self.phases[-1].kind != "train" or self._phase_stale:
            raise _contradiction(
                "a public step without a training phase in force",
                'writer.append(Phase(kind="train", ...)) before; unlearning needs noise in each step',
            )

    def _apply_public(self, event: PublicStep) -> None:
        self.num_public_steps += event.count
        self.pending = False

    def _check_positions(self, positions: NDArray[np.int64]) -> None:
        rising = bool(np.logical_and.reduce(positions[1:] > positions[:-1]))  # As most samplers deliver them.
        low, high = (positions[0], positions[-1]) if rising else (positions.min(), positions.max())
        if low < 0 or high >= self.num_instances:
            raise _contradiction(
                f"an event names positions outside [0, {self.num_instances})",
                "record positions in the data set that Run(num_instances=...) describes",
            )
        if not rising and not _are_distinct(positions):
            raise _contradiction(
                "an event names an instance more than once",
                "add up the contributions of an instance that was drawn twice",
            )

    def _check_state(self) -> None:
        if not self.phases:
            raise _contradiction(
                "a step before the first phase", "writer.append(Phase(...)) before the first step"
            )
        if self._phase_stale:
            raise _contradiction(
                "a step after a resume that went back behind the last phase",
                "writer.append(Phase(...)) again after LedgerWriter.resume",
            )
        if self._thresholds_stale and self.phases[-1].charging in _ENFORCED:
            raise _contradiction(
                "a step after a resume that went back behind the last thresholds",
                "writer.append(Thresholds(...)) again after LedgerWriter.resume",
            )

    def _apply_step(self, event: Step) -> None:
        self.count_step()

    def count_step(self) -> None:
        """Move on by one step that passed ``check`` in an earlier pass."""
        self.num_steps += 1
        self.pending = True


def _are_distinct(positions: NDArray[np.int64]) -> bool:
    """Whether positions below 2**31 are distinct."""
    ordered = np.sort(positions.astype(np.int32))
    return bool((ordered[1:] > ordered[:-1]).all())


def _check_arrays(positions: NDArray[np.int64], contributions: NDArray[np.float32]) -> None:
    ok = (
        isinstance(positions, np.ndarray)
        and isinstance(contributions, np.ndarray)
        and positions.dtype == np.int64
        and contributions.dtype == np.float32
        and positions.ndim == 1
        and positions.shape == contributions.shape
    )
    if not ok:
        raise UsageError(
            "PIA071",
            "positions and contributions are not an int64 and a float32 vector of one length",
            "The step was not recorded",
            "Step(positions=np.asarray(positions, np.int64), contributions=np.asarray(norms, np.float32))",
        )


_RULES: Final[dict[type, tuple[Any, Any]]] = {
    Phase: (Progress._accept_any, Progress._apply_phase),
    Thresholds: (Progress._check_thresholds, Progress._apply_thresholds),
    Step: (Progress._check_step, Progress._apply_step),
    Disclosure: (Progress._accept_any, Progress._apply_disclosure),
    PublicStep: (Progress._check_public, Progress._apply_public),
    Resume: (Progress._check_resume, Progress._apply_resume),
    Filter: (Progress._check_filter, Progress._apply_filter),
    Drop: (Progress._check_drop, Progress._apply_drop),
}
