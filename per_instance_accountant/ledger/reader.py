"""Reading a ledger: every pass verifies every byte it uses."""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NoReturn, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from per_instance_accountant.errors import GuaranteeError, PlanError, UsageError
from per_instance_accountant.ledger.frames import damaged
from per_instance_accountant.ledger.promises import WithPromises, promised_bytes, read_all
from per_instance_accountant.ledger.records import Disclosure, Event, Phase, Run, is_hex
from per_instance_accountant.ledger.sealing import Seal, walk_by_seal, write_seal
from per_instance_accountant.ledger.storage import Source, directory_source
from per_instance_accountant.ledger.walk import DIGEST_PREFIX, RunningDigest, Walk


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """A moment of a ledger, kept in checkpoints and certificates to detect a ledger that was rolled back or
    replaced.

    sequence: number of the last frame. steps: steps recorded up to it. digest: ``"sha256:<hex>"`` over all
    bytes up to its end. run_id: 32 hex digits.

    >>> anchor = Anchor(sequence=7, steps=3, digest="sha256:" + 64 * "0", run_id=32 * "a")
    >>> Anchor.from_dict(anchor.to_dict()).steps
    3
    """

    sequence: int
    steps: int
    digest: str
    run_id: str

    def __post_init__(self) -> None:
        numbers = all(type(value) is int and value >= 0 for value in (self.sequence, self.steps))
        texts = all(isinstance(value, str) for value in (self.digest, self.run_id))
        if not (numbers and texts and self.steps <= self.sequence):
            _refuse_anchor()
        if not self.digest.startswith(DIGEST_PREFIX) or not is_hex(
            self.digest.removeprefix(DIGEST_PREFIX), 64
        ):
            _refuse_anchor()
        if not is_hex(self.run_id, 32):
            _refuse_anchor()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Anchor:
        """Inverse of :meth:`to_dict`. Raises UsageError PIA071 for anything else."""
        if not isinstance(content, Mapping) or set(content) != {"sequence", "steps", "digest", "run_id"}:
            _refuse_anchor()
        return cls(**content)


def _refuse_anchor() -> NoReturn:
    raise UsageError(
        "PIA071",
        "this is not the anchor of a ledger",
        "Without it nobody can tell whether ledger and model belong together",
        "Anchor.from_dict(writer.anchor.to_dict())",
    )


@final
class Ledger:
    """A verified view of what a ledger held when it was opened; later appends do not change it.

    Steps that are promised and not yet measured (``LedgerWriter.promise``) count as promised. Steps stay in
    the file: ``events()`` reads and verifies them one by one.

    >>> import numpy as np
    >>> from per_instance_accountant.ledger import LedgerWriter
    >>> from per_instance_accountant.ledger.records import Phase, Run, Step
    >>> writer = LedgerWriter.create(None, Run(num_instances=4, ids=np.array(["a", "b", "c", "d"])))
    >>> writer.append(Phase(kind="train", sampling="poisson", sample_rate=0.5, noise_std=1.0, denominator=2.0,
    ...                     max_grad_norm=1.0, charging="worst_case", learning_rate=0.1))
    >>> writer.append(Step(positions=np.array([0, 2]), contributions=np.array([1.0, 0.5], np.float32)))
    >>> ledger = writer.ledger()
    >>> ledger.num_steps, ledger.confirmed, ledger.positions_of(["c"]).tolist()
    (1, False, [2])
    """

    def __init__(self, source: Source, walk: Walk, digest: str | None = None) -> None:
        """Not for callers: use :meth:`open` or ``LedgerWriter.ledger()``."""
        progress = walk.progress
        self.source, self._stored = source, walk.stored
        self._sequence, self._end, self._chain = walk.sequence, walk.end, walk.chain
        self._digest = digest
        self._index: tuple[NDArray[Any], NDArray[np.int64]] | None = None
        self._ids: NDArray[Any] | None = None
        self.num_steps: Final = progress.num_steps
        """Steps recorded, each of which is charged."""
        self.num_abandoned_steps: Final = progress.num_abandoned_steps
        """Steps that some Resume left behind; they stay charged."""
        self.abandoned: Final = tuple(progress.abandoned)
        """Those steps as disjoint rising intervals ``(first, end)``."""
        self.forgotten: Final = progress.forgotten
        """(N,) bool, instances that a deletion request excluded."""
        self.phases: Final[tuple[Phase, ...]] = tuple(progress.phases)
        self.disclosures: Final[tuple[Disclosure, ...]] = tuple(progress.disclosures)
        """Statistics of the individual losses that were published and are charged to everybody."""
        self.num_public_steps: Final = progress.num_public_steps
        """Updates on public data, which cost nobody anything and are no steps."""
        self.sessions: Final = tuple(progress.sessions)
        """Of each Resume: its session, which the ranks of a run have in common, and the steps before it."""
        self.merge: Final = walk.merge
        """How this ledger was merged from the parts of several ranks; None if it was not."""
        self.confirmed: Final = not progress.pending
        """Whether the last step is known to have been released (it is charged either way)."""

    @classmethod
    def open(cls, path: str | os.PathLike[str] | Ledger) -> Ledger:
        """Verify a ledger directory from the first byte to the last; a Ledger is returned as it is.

        Raises LedgerError PIA041 (missing, unreadable, a symbolic link), PIA042 (damage), PIA043 (format
        version).
        """
        if isinstance(path, Ledger):
            return path
        return cls(*read_all(directory_source(Path(path))))

    @classmethod
    def open_sealed(cls, path: str | os.PathLike[str]) -> Ledger:
        """Open a large ledger by its seal: compare all bytes with what was sealed, and verify what was
        appended since. Without a seal it is verified as by :meth:`open`.

        ``events()`` verifies every frame in any case, so that whatever is computed from facts rests on the
        same checks. Raises as :meth:`open`, and LedgerError PIA042 for a log that is shorter than its seal or
        differs from it, or for a damaged seal.
        """
        source = directory_source(Path(path))
        if promised_bytes(source):
            # They count, and no seal knows them.
            return cls.open(path)
        return cls(source, *walk_by_seal(source))

    def seal(self) -> None:
        """Keep what this opening verified beside the log, for :meth:`open_sealed`. Raises LedgerError PIA041,
        UsageError PIA071 for a ledger in memory or with steps that are still promised."""
        if isinstance(self.source, WithPromises):
            raise UsageError(
                "PIA071",
                "steps of this ledger are promised and not yet in its log",
                "They count, but a seal holds for the log alone; nothing was written",
                "LedgerWriter.resume(path).close(), then Ledger.open(path).seal()",
            )
        digest = bytes.fromhex(self.digest.removeprefix(DIGEST_PREFIX))
        write_seal(self.source, Seal(self._sequence, self._end, digest, self._chain))

    def __repr__(self) -> str:
        return f"<Ledger: {self.num_steps} steps, {self.num_instances} instances>"

    @property
    def path(self) -> Path | None:
        """The directory; None for a ledger in memory."""
        return self.source.path

    @property
    def run(self) -> Run:
        """What is fixed for the whole run."""
        return self._stored.run

    @property
    def created(self) -> str:
        """ISO time at which the run began, a comment only."""
        return self._stored.created

    @property
    def num_instances(self) -> int:
        """N; instances are positions 0..N-1."""
        return self.run.num_instances

    @property
    def ids(self) -> NDArray[Any]:
        """(N,) business ids, or the positions themselves."""
        if self._ids is None:
            self._ids = np.arange(self.num_instances) if self.run.ids is None else self.run.ids
            self._ids.flags.writeable = False
        return self._ids

    @property
    def groups(self) -> Mapping[str, NDArray[Any]]:
        """Name -> (N,) labels."""
        return self.run.groups

    @property
    def digest(self) -> str:
        """``"sha256:<hex>"`` over the bytes up to the last whole frame."""
        if self._digest is None:
            self._digest = RunningDigest(self.source).upto(self._end)
        return self._digest

    @property
    def anchor(self) -> Anchor:
        """This moment of this ledger."""
        return Anchor(
            sequence=self._sequence, steps=self.num_steps, digest=self.digest, run_id=self._stored.run_id
        )

    def events(self) -> Iterator[Event]:
        """Phase, Thresholds, Step and Resume in the order in which they were recorded, one in memory at a
        time.

        Raises LedgerError PIA042 if the file no longer holds what it held when it was opened.
        """
        return (event for _, event in self.passing() if event is not None)

    def passing(self) -> Iterator[tuple[Walk, Event | None]]:
        """As :meth:`events`, each with the pass that has just verified it; None for what is no event."""
        with self.source.reading() as (read_at, size):
            walk = Walk(self.source.key, read_at, min(size, self._end))
            for event in walk.events():
                yield walk, event
        if walk.chain != self._chain:
            damaged(walk.sequence + 1, walk.end, "the log changed after it was opened")

    def holds(self, anchor: Anchor) -> bool:
        """Whether ``anchor`` is a moment of this very ledger: same run, same bytes, same number of steps.

        False for a ledger that was rolled back behind the anchor, rewritten, or that belongs to another run.
        A merged ledger holds the anchors of its parts as well.
        """
        if self.steps_of_part(anchor) is not None:
            return True
        if anchor.run_id != self._stored.run_id or anchor.sequence > self._sequence:
            return False
        if anchor.sequence == self._sequence:
            return anchor == self.anchor
        with self.source.reading() as (read_at, size):
            walk = Walk(self.source.key, read_at, min(size, self._end))
            for _ in walk.events():
                if walk.sequence == anchor.sequence:
                    break
        digest = RunningDigest(self.source).upto(walk.end)
        return (walk.progress.num_steps, digest) == (anchor.steps, anchor.digest)

    def steps_of_part(self, anchor: Anchor) -> int | None:
        """Steps of this merged ledger at the moment ``anchor`` of one of its parts; None if it is none."""
        if self.merge is None or anchor.run_id != self._stored.run_id:
            return None
        return self.merge.steps_at(anchor.sequence, anchor.steps, anchor.digest)

    def require_whole(self) -> None:
        """Raise GuaranteeError PIA117 for the part of one rank."""
        run = self.run
        if run.world_size > 1:
            raise GuaranteeError(
                "PIA117",
                f"this is the part that rank {run.rank} of {run.world_size} wrote",
                "It does not say whom the other ranks drew, so no loss of the run can be computed from it",
                "account(merge_parts([part_of_rank_0, part_of_rank_1], destination))",
            )

    def positions_of(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Positions of business ids, in the order of the request: (k,) int64.

        Raises PlanError PIA032 for unknown or repeated ids; the message holds counts and places in the
        request only.
        """
        wanted = _requested(ids, self.ids.dtype.kind)
        if self._index is None:
            order = np.argsort(self.ids, kind="stable")
            self._index = self.ids[order], order
        rising, order = self._index
        places = np.minimum(np.searchsorted(rising, wanted), rising.size - 1)
        unknown = rising[places] != wanted
        if unknown.any():
            _refuse_request("unknown to this ledger", unknown)
        repeated = np.ones(wanted.size, dtype=np.bool_)
        repeated[np.unique(wanted, return_index=True)[1]] = False
        if repeated.any():
            _refuse_request("repeated", repeated)
        return order[places].astype(np.int64)

    def pseudonym(self, id: int | str) -> str:
        """``"hmac-sha256:<hex>"`` of a business id, keyed by this ledger: equal here, unlinkable to other
        ledgers.

        Raises UsageError PIA071 for anything but an integer or a text.
        """
        if isinstance(id, bool) or not isinstance(id, int | np.integer | str):
            raise UsageError(
                "PIA071",
                f"a pseudonym was asked for a {type(id).__name__}",
                "Only ids of instances have pseudonyms",
                "ledger.pseudonym(ledger.ids[0])",
            )
        message = f"text:{id}" if isinstance(id, str) else f"integer:{int(id)}"
        return (
            "hmac-sha256:"
            + hmac.new(self.source.key, message.encode(errors="surrogatepass"), sha256).hexdigest()
        )

    def to_arrow(self, name: str) -> Any:
        """pyarrow.Table ``"steps"``, ``"observations"`` or ``"thresholds"``; all of it in memory."""
        from per_instance_accountant.ledger.tables import to_arrow

        return to_arrow(self, name)

    def export(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the three tables as Parquet and the run as run.json, owner-only. They are as private as the
        data set.

        Raises UsageError PIA070 if files of these names exist and ``overwrite`` is False, LedgerError PIA041
        if they cannot be written.
        """
        from per_instance_accountant.ledger.tables import export

        export(self, Path(directory), overwrite=overwrite)


def _requested(ids: ArrayLike, kind: str) -> NDArray[Any]:
    """The request as a vector of the kind of the ledger's ids: ``"i"`` or ``"U"``."""
    wanted: NDArray[Any] = np.asarray(ids)
    if wanted.shape == (0,):
        return np.empty(0, np.int64 if kind == "i" else np.str_)
    fits = wanted.ndim == 1 and wanted.dtype.kind in ("iu" if kind == "i" else "U")
    # numpy turns the integers of a mixed list into texts.
    if fits and kind == "U" and not isinstance(ids, np.ndarray):
        fits = {isinstance(value, str) for value in np.asarray(ids, object)} == {True}
    if not fits:
        raise PlanError(
            "PIA032",
            f"the request has dtype {wanted.dtype} and shape {wanted.shape}",
            "Ids of this kind name no instance of this ledger",
            "ledger.positions_of([...]) with " + ("integers" if kind == "i" else "texts"),
        )
    if wanted.dtype.kind == "u" and (beyond := wanted > np.iinfo(np.int64).max).any():
        _refuse_request("unknown to this ledger", beyond)
    return wanted.astype(np.int64) if kind == "i" else wanted


def _refuse_request(what: str, bad: NDArray[np.bool_]) -> NoReturn:
    raise PlanError(
        "PIA032",
        f"{int(bad.sum())} of {bad.size} requested ids are {what}, the first at index {int(bad.argmax())}",
        "Nothing can be promised for an instance that cannot be identified",
        "request each id once, as it stands in ledger.ids",
    )
