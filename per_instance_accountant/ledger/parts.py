"""One part of a run on several ranks, read fact by fact, session by session."""

from __future__ import annotations

from collections.abc import Iterator

from per_instance_accountant.ledger.reader import Ledger
from per_instance_accountant.ledger.records import Event, Phase, Resume, Step, Thresholds
from per_instance_accountant.ledger.walk import DIGEST_PREFIX, RunningDigest, Walk


class Part:
    """One part on its way through the merge. ``head``: its next fact, None at its end."""

    def __init__(self, ledger: Ledger) -> None:
        self.rank, self.confirmed = ledger.run.rank, ledger.confirmed
        self.own_steps = 0
        """Steps of this part before ``head``."""
        self.head: Event | None = None
        self.resumes_left = ledger.num_resumes
        """How many Resumes follow, ``head`` included."""
        self._idle = False
        """Whether ``head`` is a Resume whose session stated no more than what the next one, from the same
        moment, stated again."""
        self._skipped = 0
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

    def advance(self) -> None:
        """Go on to the next fact."""
        self.own_steps += isinstance(self.head, Step)
        self.head, self._idle = next(self._facts, (None, False))

    def begin_session(self, merged_steps: int) -> None:
        """The Resume that is ``head`` begins a session at that step of the merged ledger."""
        self._sessions += [(self.own_steps, merged_steps)] * (1 + self._skipped)
        self._skipped = 0
        self.resumes_left -= 1
        self.advance()

    def skip_idle(self, resumes_left: int) -> None:
        """Count idle sessions as begins of those after them, until so many Resumes are left."""
        while self._idle and self.resumes_left > resumes_left:
            self._skipped += 1
            self.resumes_left -= 1
            self.advance()
            while not isinstance(self.head, Resume):
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

    def _read(self, ledger: Ledger) -> Iterator[tuple[Event, bool]]:
        """All facts, and of each Resume whether its session is idle."""
        held: list[Event] = []
        session, last = 0, None
        for last, event in ledger.passing():
            resumes = isinstance(event, Resume)
            session += resumes
            if not isinstance(event, Step):
                self._keep(last, session)
            if event is None:
                continue
            if held and not resumes and _can_be_restated(event):
                held.append(event)
                continue
            for fact in held:
                yield fact, resumes and fact == event
            held = [event] if resumes else []
            if not resumes:
                yield event, False
        for fact in held:
            yield fact, False
        if last is not None:
            self._keep(last, session)

    def _keep(self, walk: Walk, session: int) -> None:
        digest = self._digest.upto(walk.end).removeprefix(DIGEST_PREFIX)
        self._anchorable.append((session, walk.sequence, walk.progress.num_steps, bytes.fromhex(digest)))


def _can_be_restated(event: Event) -> bool:
    return isinstance(event, Phase) or (isinstance(event, Thresholds) and event.source != "forget")
