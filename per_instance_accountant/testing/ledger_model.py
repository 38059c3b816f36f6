"""A stateful model of a ledger: what a list of steps knows, the ledger must know after crashes, resumes,
rollbacks and merges.

:func:`ledger_machine` makes a Hypothesis state machine for any store; :class:`PackageStore` is this
package's.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from per_instance_accountant.accounting import account
from per_instance_accountant.ledger import (
    Ledger,
    LedgerWriter,
    Phase,
    Run,
    Step,
    merge_parts,
    new_run_id,
)
from per_instance_accountant.testing.laws import require

Floats = NDArray[np.float64]

_SIZE: Final = 6
_SLACK: Final = 1 + 1e-5
"""Contributions are stored as float32, rounded up."""


_some_ranks: Final = st.one_of(st.just(0), st.integers(0, 7))


class Store(Protocol):
    """One ledger per rank in its directory. A writer that was crashed is never used again."""

    def create(self, paths: Sequence[Path], instances: int) -> list[Any]:
        """Writers of a new run, one per rank."""

    def step(self, writer: Any, positions: NDArray[np.int64], contributions: Floats) -> None:
        """Record a step of one rank; it counts when this returns."""

    def checkpoint(self, writer: Any) -> Any:
        """What a model checkpoint keeps of the ledger."""

    def crash(self, writer: Any) -> None:
        """End without any farewell, as a killed process does."""

    def resume(self, path: Path, checkpoint: Any, session: str) -> Any:
        """A writer that goes on from the checkpoint; raises if the ledger is behind it. session: a text that
        all ranks that start together are given, and no start before."""

    def spent(self, paths: Sequence[Path]) -> tuple[int, Floats]:
        """Steps of the run, and (N,) squared contributions added up, from the files of all ranks."""


class PackageStore:
    """``LedgerWriter``, ``merge_parts`` and ``account`` of this package, without amplification."""

    def create(self, paths: Sequence[Path], instances: int) -> list[LedgerWriter]:
        """One part per rank."""
        identity, writers = new_run_id(), []
        for rank, path in enumerate(paths):
            run = Run(num_instances=instances, run_id=identity, rank=rank, world_size=len(paths))
            writers.append(LedgerWriter.create(path, run))
            writers[-1].append(self._phase())
        return writers

    def _phase(self) -> Phase:
        return Phase(
            kind="train",
            sampling="shuffled",
            sample_rate=1.0,
            noise_std=1.0,
            max_grad_norm=1.0,
            charging="unamplified",
            denominator=1.0,
            learning_rate=0.1,
        )

    def step(self, writer: LedgerWriter, positions: NDArray[np.int64], contributions: Floats) -> None:
        """One Step event."""
        writer.append(Step(positions=positions, contributions=contributions.astype(np.float32)))

    def checkpoint(self, writer: LedgerWriter) -> Any:
        """The anchor."""
        return writer.anchor

    def crash(self, writer: LedgerWriter) -> None:
        """Give the lock free without a flush, which is what the system does for a killed process."""
        writer._end()

    def resume(self, path: Path, checkpoint: Any, session: str) -> LedgerWriter:
        """The mechanism is stated again, as the engine does."""
        writer = LedgerWriter.resume(path, checkpoint, session=session)
        writer.append(self._phase())
        return writer

    def spent(self, paths: Sequence[Path]) -> tuple[int, Floats]:
        """The divergence at order 2, which is that sum, of the merged parts."""
        ledger = merge_parts(paths, None) if len(paths) > 1 else Ledger.open(paths[0])
        return ledger.num_steps, account(ledger, orders=[2.0]).rdp[:, 0]


class _Machine(RuleBasedStateMachine):
    """Ranks that record, crash together, resume from some checkpoint, are rolled back, and are merged."""

    store: ClassVar[Store]

    @initialize(ranks=st.integers(1, 3))
    def begin(self, ranks: int) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="pia-model-")
        self.paths = [Path(self.folder.name) / f"rank{rank}" for rank in range(ranks)]
        self.writers = self.store.create(self.paths, _SIZE)
        self.steps, self.spent = 0, np.zeros(_SIZE)
        self.partial = 0
        """Steps that some ranks recorded only."""
        self.saved: list[tuple[int, list[Any]]] = []

    def _record(self, rank: int, sizes: list[int]) -> None:
        """Rank r holds the positions r, r + ranks, ... and draws those with a size above 0."""
        chosen = np.array([i for i in range(rank, _SIZE, len(self.paths)) if sizes[i]], dtype=np.int64)
        contributions = np.array([sizes[i] for i in chosen], dtype=np.float64) / 8
        self.store.step(self.writers[rank], chosen, contributions)
        self.spent[chosen] += contributions**2

    @rule(sizes=st.lists(st.integers(0, 8), min_size=_SIZE, max_size=_SIZE))
    def step(self, sizes: list[int]) -> None:
        for rank in range(len(self.paths)):
            self._record(rank, sizes)
        self.steps += 1

    @rule()
    def save(self) -> None:
        self.saved.append((self.steps, [self.store.checkpoint(writer) for writer in self.writers]))

    @precondition(lambda self: self.saved)
    @rule(choice=st.integers(0, 9), recorded=_some_ranks, began=_some_ranks, sizes=st.lists(
        st.integers(0, 8), min_size=_SIZE, max_size=_SIZE))  # fmt: skip
    def crash_and_resume(self, choice: int, recorded: int, began: int, sizes: list[int]) -> None:
        """Some ranks have recorded one more step when all are killed, and some of them are killed once more
        when they have resumed, before the others have. Bits of ``recorded`` and ``began``: these ranks."""
        ranks = range(len(self.paths))
        ahead = [rank for rank in ranks if recorded >> rank & 1]
        for rank in ahead:
            self._record(rank, sizes)
        self.partial += 0 < len(ahead) < len(ranks)
        self.steps += bool(ahead)
        again = [rank for rank in ranks if began >> rank & 1]
        _, checkpoints = self.saved[choice % len(self.saved)]
        for writer in self.writers:
            self.store.crash(writer)
        first, second = new_run_id(), new_run_id()
        for rank in again:
            self.store.crash(self.store.resume(self.paths[rank], checkpoints[rank], first))
        self.writers = [
            self.store.resume(path, checkpoint, second)
            for path, checkpoint in zip(self.paths, checkpoints, strict=True)
        ]

    @precondition(lambda self: self.saved)
    @rule()
    def roll_back(self) -> None:
        """A ledger that is older than the model's checkpoint must not be continued."""
        place = Path(self.folder.name) / "older"
        shutil.copytree(self.paths[0], place)
        self._record(0, [8] * _SIZE)
        for rank in range(1, len(self.paths)):
            self._record(rank, [8] * _SIZE)
        self.steps += 1
        newer = self.store.checkpoint(self.writers[0])
        try:
            self.store.resume(place, newer, new_run_id())
        except Exception:
            refused = True
        else:
            refused = False
        shutil.rmtree(place)
        require(refused, "a ledger that was rolled back behind the checkpoint was continued")

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "paths"):
            return
        steps, spent = self.store.spent(self.paths)
        require(bool((spent * _SLACK >= self.spent).all()), "less is charged than was spent")
        require(steps == self.steps, f"{steps} steps are known of {self.steps}")
        if not self.partial:
            require(bool((spent <= self.spent * _SLACK).all()), "more is charged than was spent")

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            for writer in self.writers:
                self.store.crash(writer)
            self.folder.cleanup()


def ledger_machine(store: Store) -> type[RuleBasedStateMachine]:
    """State machine of a store: ``TestLedger = ledger_machine(MyStore()).TestCase`` in a test file.

    Laws: every step that was recorded is charged, also on branches that a resume left behind and on ranks
    that had recorded a step when others had not, or had begun to resume when others had not; a complete
    history is charged exactly; a ledger behind its checkpoint is refused. Failing: somebody's loss is
    understated after a crash.

    >>> from hypothesis import settings
    >>> from hypothesis.stateful import run_state_machine_as_test
    >>> few = settings(max_examples=3, stateful_step_count=6, deadline=None, derandomize=True, database=None)
    >>> run_state_machine_as_test(ledger_machine(PackageStore()), settings=few)
    """
    return type("LedgerMachine", (_Machine,), {"store": store})
