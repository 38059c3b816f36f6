"""From the parts that the ranks of a run wrote to the one ledger of the run."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.errors import LedgerError
from per_instance_accountant.ledger.encoding import StoredRun, encode, encode_run
from per_instance_accountant.ledger.merged import MOMENT, Merge
from per_instance_accountant.ledger.parts import Part, Start
from per_instance_accountant.ledger.reader import Ledger
from per_instance_accountant.ledger.records import Drop, Event, Phase, Resume, Step, Thresholds
from per_instance_accountant.ledger.storage import KEY_NAME, LOG_NAME, sync_directory, unreadable
from per_instance_accountant.ledger.writer import LedgerWriter

_ENFORCED: Final = ("fixed_thresholds", "sweep")
_AS_WRITTEN: Final = (
    "merge_parts(the parts as the ranks of this run wrote them, from backups if one was edited)"
)


def merge_parts(
    parts: Iterable[str | os.PathLike[str] | Ledger],
    destination: str | os.PathLike[str] | None,
    *,
    allow_missing: bool = False,
) -> Ledger:
    """The ledger of a run on several ranks: what one process would have written for the same steps.

    Every rank creates its part with ``Run(run_id=..., rank=r, world_size=w)``, where ``run_id`` is one
    ``new_run_id()`` sent to all; it states the global facts (Phase, Thresholds of all N instances, Filter) as
    they hold for all ranks, and in each Step the instances it drew itself. A part always records a Resume
    when it is continued, so ranks continue together, each at the anchor that its checkpoint holds.

    parts: directories or ledgers, in any order. destination: a new or empty directory, or None for memory; it
    appears complete or not at all. A step of the result holds the instances that any rank drew, rising.

    Ranks may have been killed at any moment, also while they continued: sessions are put side by side by what
    their Resumes say. Uncertain means counted. A step that only some ranks recorded is a step, although it
    was not released. Where a charge depends on who was drawn (``unamplified``, and loaders that are not
    Poisson), everybody who may have been drawn by the ranks that did not record it is charged at the bound in
    force, once per rank. ``Ledger.merge`` says which steps and ranks these are. allow_missing: merge although
    whole parts are lost, in the same way.

    Raises LedgerError PIA115 (other runs, a part twice, no part, ranks that contradict each other; steps are
    named), PIA116 (parts missing), PIA041 to PIA045 as ``Ledger.open`` and ``LedgerWriter.create``.

    >>> from per_instance_accountant.ledger import Run, new_run_id
    >>> phase = Phase(kind="train", sampling="poisson", sample_rate=0.5, noise_std=1.0, denominator=2.0,
    ...               max_grad_norm=1.0, charging="worst_case", learning_rate=0.1)
    >>> identity, parts = new_run_id(), []
    >>> for rank, drawn in enumerate(([3], [0, 2])):
    ...     run = Run(num_instances=4, run_id=identity, rank=rank, world_size=2)
    ...     with LedgerWriter.create(None, run) as part:
    ...         part.append(phase)
    ...         part.append(Step(positions=np.array(drawn), contributions=np.ones(len(drawn), np.float32)))
    ...     parts.append(part.ledger())
    >>> merged = merge_parts(parts, None)
    >>> merged.num_steps, merged.to_arrow("observations")["position"].to_pylist()
    (1, [0, 2, 3])
    """
    opened = sorted((Ledger.open(part) for part in parts), key=lambda ledger: ledger.run.rank)
    _check_together(opened, allow_missing)
    stored = StoredRun(
        run=replace(opened[0].run, rank=0, world_size=1), created=min(ledger.created for ledger in opened)
    )
    if destination is None:
        writer = LedgerWriter.create_stored(None, stored)
        with writer:
            _Merging(opened, writer).run()
        return writer.ledger()
    return _into_directory(opened, stored, Path(destination).absolute())


def _into_directory(opened: list[Ledger], stored: StoredRun, destination: Path) -> Ledger:
    """Written beside the destination and moved there when it is complete."""
    try:
        if os.path.lexists(destination) and (destination.is_symlink() or any(destination.iterdir())):
            _refuse_destination()
        draft = destination.with_name(f".{destination.name}.{secrets.token_hex(8)}")
        destination.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unreadable(error) from None
    try:
        with LedgerWriter.create_stored(draft, stored) as writer:
            _Merging(opened, writer).run()
        os.rename(draft, destination)
        sync_directory(destination.parent)
    except BaseException as error:
        for name in (LOG_NAME, KEY_NAME):
            (draft / name).unlink(missing_ok=True)
        with suppress(OSError):
            draft.rmdir()
        if isinstance(error, OSError):
            raise unreadable(error) from None
        raise
    return Ledger.open(destination)


def _check_together(opened: list[Ledger], allow_missing: bool) -> None:
    if not opened:
        _refuse("no part was given")
    first = opened[0].run
    if first.world_size == 1:
        _refuse("the first of them is a whole ledger, not the part of a rank")
    facts = [encode_run(StoredRun(run=replace(ledger.run, rank=0), created="")) for ledger in opened]
    if any(ledger.run.run_id != first.run_id for ledger in opened):
        _refuse("they are of different runs")
    if any(other != facts[0] for other in facts):
        _refuse("their Run facts differ (instances, ids, groups, assumptions, software or world_size)")
    ranks = [ledger.run.rank for ledger in opened]
    if len(set(ranks)) != len(ranks):
        _refuse(f"{len(ranks) - len(set(ranks))} of them are a second part of the same rank")
    missing = sorted(set(range(first.world_size)) - set(ranks))
    if missing and not allow_missing:
        raise LedgerError(
            "PIA116",
            f"{len(missing)} of {first.world_size} parts are missing, the first that of rank {missing[0]}",
            "Nobody knows who took part in the steps of those ranks; nothing was written",
            "merge_parts(parts, destination, allow_missing=True), which charges for everybody who may have",
        )


def _refuse(
    happened: str, fix: str = "merge_parts([one part of every rank of one run], destination)"
) -> NoReturn:
    raise LedgerError(
        "PIA115",
        f"the parts do not make up one run: {happened}",
        "Steps of one of them would be charged to the wrong run or twice; nothing was written",
        fix,
    )


def _refuse_destination() -> NoReturn:
    raise LedgerError(
        "PIA045",
        "the destination of the merge exists and is not an empty directory",
        "Nothing was written, and what is there is as it was",
        'merge_parts(parts, "runs/a_new_directory")',
    )


class _Disagreement(Exception):
    """Facts of ranks in one session that cannot all be true."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.fix = fix


class _Merging:
    """Passes over all parts side by side and writes what they say together."""

    def __init__(self, opened: Sequence[Ledger], writer: LedgerWriter) -> None:
        self._run, self._writer = writer.run, writer
        self._world_size = opened[0].run.world_size
        self._parts = [Part(ledger) for ledger in opened]
        self._phase: Phase | None = None
        self._thresholds: NDArray[np.float32] = np.full(self._run.num_instances, np.inf, dtype=np.float32)
        self._out = np.zeros(self._run.num_instances, dtype=np.bool_)
        """Who was forgotten or dropped."""
        self._resumed = self._compare_drops = self._apart = False
        self._repeats = self._filled = False
        self._incomplete: list[tuple[int, int]] = []

    def run(self) -> None:
        while any(part.head is not None for part in self._parts):
            active = [part for part in self._parts if not isinstance(part.head, Resume | None)]
            if not active:
                self._apart = False
                self._resume([part for part in self._parts if part.head is not None])
                continue
            try:
                self._take(active[:1] if self._apart else active)
            except _Disagreement as found:
                # Ranks that disagreed recorded it, released nothing, and began again: each is counted alone.
                if self._apart or not all(part.is_retried for part in active):
                    _refuse(str(found), found.fix)
                self._apart = self._resumed = True
        if self._repeats and self._filled:
            self._refuse_repeats()
        self._finish()

    def _finish(self) -> None:
        parts, steps = self._parts, self._writer.num_steps
        whole = len(parts) == self._world_size and all(part.merged_steps == steps for part in parts)
        confirmed = whole and all(part.confirmed for part in parts)
        merge = Merge(
            world_size=self._world_size,
            ranks=tuple(part.rank for part in parts),
            incomplete=tuple(self._incomplete),
            confirmed=confirmed,
            moments=np.array([moment for part in parts for moment in part.moments()], dtype=MOMENT),
        )
        self._writer.append_merge(merge)
        self._writer.close(confirmed=confirmed)

    def _take(self, active: list[Part]) -> None:
        heads = [part.head for part in active]
        if any(isinstance(head, Drop) for head in heads):
            active = [part for part in active if isinstance(part.head, Drop)]
            for part in active:
                part.drop()
            self._drop()
        elif all(isinstance(head, Step) for head in heads):
            self._step([head for head in heads if isinstance(head, Step)], active)
        else:
            self._global([head for head in heads if head is not None])
        for part in active:
            part.advance()

    def _drop(self) -> None:
        """Instances leave when every rank that goes on has dropped them; where a rank knows only of those it
        draws when their budget is spent, when any rank has."""
        apart = self._phase is not None and self._phase.charging == "unamplified"
        dropped = [part.dropped for part in self._parts if part.head is not None]
        leaving = (np.logical_or if apart else np.logical_and).reduce(dropped)
        positions = np.flatnonzero(leaving & ~self._out)
        if positions.size:
            self._append(Drop(positions=positions))
        self._compare_drops = not apart

    def _global(self, heads: list[Event]) -> None:
        if any(type(head) is not type(heads[0]) for head in heads):
            self._contradiction("have different kinds of facts next")
        payloads = {encode(head, self._run.num_instances)[1] for head in heads}
        if len(payloads) > 1:
            self._contradiction(f"state a different {type(heads[0]).__name__}")
        self._append(heads[0])

    def _contradiction(self, what: str, fix: str = _AS_WRITTEN) -> NoReturn:
        raise _Disagreement(f"after step {self._writer.num_steps} of the run its ranks {what}", fix)

    def _append(self, event: Event) -> None:
        self._writer.append(event)
        if isinstance(event, Phase):
            self._phase = event
        elif isinstance(event, Thresholds):
            self._thresholds = event.values
            if event.source == "forget":
                self._out |= event.values == 0
        elif isinstance(event, Drop):
            self._out[event.positions] = True

    def _resume(self, waiting: list[Part]) -> None:
        """Begin the next session, with the ranks that began it from one moment; ranks that began it from
        others did not train with them, and follow."""
        moments: set[int] = set()
        group: list[Part] = []
        start = self._next_start(waiting)
        for part in waiting:
            if part.starts[0] == start and (not group or moments & part.candidates()):
                moments = moments & part.candidates() if group else part.candidates()
                group.append(part)
        self._append(Resume(at_step=min(moments)))
        for part in group:
            part.begin_session(self._writer.num_steps)
        self._resumed = True

    def _next_start(self, waiting: list[Part]) -> Start:
        """A session before which no rank has another one in common with those that wait for it."""
        later = {start for part in waiting for start in part.starts[1:]}
        ready = [part.starts[0] for part in waiting if part.starts[0] not in later]
        if not ready:
            _refuse("the ranks began the same sessions in another order", _AS_WRITTEN)
        return ready[0]

    def _state_again(self, active: list[Part]) -> None:
        """After a Resume: what is in force for these ranks, where a session of others came between."""
        phase, thresholds = active[0].phase, active[0].thresholds
        if any(part.phase != phase for part in active):
            self._contradiction("have a different Phase in force")
        progress, self._resumed = self._writer.progress, False
        if phase is None:
            return
        if progress.needs_phase or phase != self._phase:
            self._append(phase)
        if thresholds is None or phase.charging not in _ENFORCED:
            return
        if progress.needs_thresholds or thresholds.values.tobytes() != self._thresholds.tobytes():
            self._append(thresholds)

    def _step(self, steps: list[Step], active: list[Part]) -> None:
        if self._resumed:
            self._state_again(active)
        if self._compare_drops and any((part.dropped != active[0].dropped).any() for part in active):
            self._contradiction("state a different Drop")
        self._compare_drops = False
        absent = self._world_size - len(active)
        phase = self._phase
        if phase is None:
            self._contradiction("have a step before any phase next")
        step = self._together(steps, phase)
        if len(active) < len(self._parts):
            self._mark_incomplete(self._writer.num_steps)
        if absent and (phase.charging == "unamplified" or phase.sampling != "poisson"):
            step = self._everybody(step, phase, absent)
        self._append(step)
        self._resumed = self._apart

    def _mark_incomplete(self, step: int) -> None:
        if self._incomplete and self._incomplete[-1][1] == step:
            self._incomplete[-1] = (self._incomplete[-1][0], step + 1)
        else:
            self._incomplete.append((step, step + 1))

    def _together(self, steps: list[Step], phase: Phase) -> Step:
        positions = np.concatenate([step.positions for step in steps])
        contributions = np.concatenate([step.contributions for step in steps])
        self._repeats |= bool((contributions > phase.max_grad_norm * (1 + 1e-6)).any())
        order = np.argsort(positions, kind="stable")
        positions, contributions = positions[order], contributions[order]
        if (positions[1:] > positions[:-1]).all():
            return Step(positions=positions, contributions=contributions)
        if phase.sampling == "poisson":
            self._contradiction(
                "drew the same instance in one Poisson step", "train again with the loaders of make_private"
            )
        distinct, place, drawn = np.unique(positions, return_inverse=True, return_counts=True)
        # Clipping allows an instance one clip norm for each time that it was drawn.
        alone = drawn[place] == 1
        entered = np.where(alone, contributions, np.maximum(contributions, phase.max_grad_norm))
        return Step(positions=distinct, contributions=_round_up(np.bincount(place, entered, len(distinct))))

    def _everybody(self, step: Step, phase: Phase, absent: int) -> Step:
        """The step with everybody whom the ``absent`` ranks may have drawn, at the bound in force."""
        bounds = np.full(self._run.num_instances, phase.max_grad_norm)
        if phase.charging in _ENFORCED:
            bounds = np.minimum(bounds, self._thresholds.astype(np.float64))
        bounds[self._out] = 0.0
        times = 1
        if phase.sampling == "poisson":
            # Whom one rank drew no other rank drew.
            bounds[step.positions] = 0.0
        else:
            self._filled, times = True, absent
            # Whoever may have been there more than once is recorded in clip norms, as loaders record it.
            often = np.full(bounds.size, absent > 1)
            often[step.positions] = True
            bounds[often & (bounds > 0)] = phase.max_grad_norm
        bounds *= times
        bounds[step.positions] += step.contributions.astype(np.float64)
        taking = bounds > 0
        taking[step.positions] = True
        return Step(positions=np.flatnonzero(taking), contributions=_round_up(bounds[taking]))

    def _refuse_repeats(self) -> NoReturn:
        raise LedgerError(
            "PIA116",
            "instances were more than once in one step, and some ranks did not record all steps",
            "Nobody knows how often an instance was in those steps, so no charge for them is safe",
            "merge the parts of all ranks, or train again",
        )


def _round_up(values: NDArray[Any]) -> NDArray[np.float32]:
    narrow: NDArray[np.float32] = values.astype(np.float32)
    return np.where(narrow < values, np.nextafter(narrow, np.float32(np.inf)), narrow).astype(np.float32)
