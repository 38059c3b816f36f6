"""One part of a run on several ranks, read fact by fact, session by session."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from per_instance_accountant.ledger.reader import Ledger
from per_instance_accountant.ledger.records import Drop, Event, Phase, Resume, Step, Thresholds
from per_instance_accountant.ledger.walk import DIGEST_PREFIX, RunningDigest, Walk

Start = tuple[str | None, int]
"""A Resume: its session, and how often the part began this session before."""


class Part:
    """One part on its way through the merge. ``head``: its next fact, None at its end."""

    def __init__(self, ledger: Ledger) -> None:
        self.rank, self.confirmed = ledger.run.rank, ledger.confirmed
        self.own_steps = 0
        """Steps of this part before ``head``."""
        self.head: Event | None = None
        self.starts = _starts([session for session, _ in ledger.sessions])
        """The Resumes that follow, ``head`` included."""
        self._ends = [steps for _, steps in ledger.sessions]
        self.phase: Phase | None = None
        self.thresholds: Thresholds | None = None
        """What this part stated last before ``head``."""
        self.dropped = np.zeros(ledger.num_instances, dtype=np.bool_)
        """Who left by a Drop of this part."""
        self._sessions = [(0, 0)]
        """Number of the first step of each session, in this part and in the merged ledger."""
        self._anchorable: list[tuple[int, int, int, bytes]] = []
        """Session, frame, steps and digest wherever the part may have been anchored."""
        self._digest = RunningDigest(ledger.source)
        self._facts = self._read(ledger)
        self.advance()

    @property
    def merged_steps(self) -> int:
        """``own_steps`` in the count of the merged ledger."""
        own, merged = self._sessions[-1]
        return merged + self.own_steps - own

    @property
    def is_retried(self) -> bool:
        """Whether at most one step follows before the part begins another session, so that nothing was
        released after a disagreement at ``head``: ranks record a step and compare before they release it."""
        return bool(self.starts) and self._ends[-len(self.starts)] - self.own_steps <= 1

    def advance(self) -> None:
        """Go on to the next fact."""
        if isinstance(self.head, Step):
            self.own_steps += 1
        elif isinstance(self.head, Phase):
            self.phase = self.head
        elif isinstance(self.head, Thresholds):
            self.thresholds = self.head
        self.head = next(self._facts, None)

    def drop(self) -> None:
        """The instances of the Drop that is ``head`` take no further part on this rank."""
        if isinstance(self.head, Drop):
            self.dropped[self.head.positions] = True

    def begin_session(self, merged_steps: int) -> None:
        """The Resume that is ``head`` begins a session at that step of the merged ledger."""
        self._sessions.append((self.own_steps, merged_steps))
        del self.starts[0]
        self.advance()

    def candidates(self) -> set[int]:
        """Merged counts that the ``at_step`` of the Resume that is ``head`` may mean.

        Two at the seam of sessions: if this rank lacks the last steps of a session, its end and the begin of
        the next are one count here and two in the merged ledger.
        """
        at = self.head.at_step if isinstance(self.head, Resume) else 0
        ends = [own for own, _ in self._sessions[1:]] + [self.own_steps]
        pairs = zip(self._sessions, ends, strict=True)
        return {merged + at - own for (own, merged), end in pairs if own <= at <= end}

    def moments(self) -> list[tuple[int, int, int, int, bytes]]:
        """Rows of dtype ``MOMENT``; for a part that was read to its end."""
        rows = []
        for session, sequence, own, digest in self._anchorable:
            start, merged = self._sessions[session]
            rows.append((self.rank, sequence, own, merged + own - start, digest))
        return rows

    def _read(self, ledger: Ledger) -> Iterator[Event]:
        session, last = 0, None
        for last, event in ledger.passing():
            session += isinstance(event, Resume)
            if not isinstance(event, Step):
                self._keep(last, session)
            if event is not None:
                yield event
        if last is not None:
            self._keep(last, session)

    def _keep(self, walk: Walk, session: int) -> None:
        digest = self._digest.upto(walk.end).removeprefix(DIGEST_PREFIX)
        self._anchorable.append((session, walk.sequence, walk.progress.num_steps, bytes.fromhex(digest)))


def _starts(sessions: list[str | None]) -> list[Start]:
    before: Counter[str | None] = Counter()
    starts = []
    for session in sessions:
        starts.append((session, before[session]))
        before[session] += 1
    return starts
