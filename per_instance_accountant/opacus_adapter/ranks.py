"""Several processes that train one model: they agree before every release, and each knows its own draws.

Every process (rank) keeps the data set whole, draws from its own share of it, and writes its part of the
ledger. Rank 0 adds the noise. Nothing is released until all ranks have recorded the step and agree on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel as DPDDP
from opacus.utils.uniform_sampler import DistributedUniformWithReplacementSampler
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Sampler, Subset

from per_instance_accountant.errors import AlignmentError, GuaranteeError, LedgerError
from per_instance_accountant.ledger import Run, new_run_id
from per_instance_accountant.opacus_adapter.drawing import draw

SHARDED: tuple[type[Any], ...] = (FSDPModule,)
"""Models whose parameters are spread over the processes."""

FACTS = 8
"""How many facts fit into one agreement; all agreements have one size, so that any two of them can meet."""


class Ranks:
    """The processes of one run. timeout: seconds that one waits for the others before it gives up.
    linked: whether they meet in every forward or backward pass, so that batches cannot be split.

    After a failed agreement no step can follow: the ranks may not be at the same place any more.
    """

    def __init__(self, timeout: float, *, linked: bool = False) -> None:
        self.rank, self.world_size, self.linked = dist.get_rank(), dist.get_world_size(), linked
        self.timeout, self.broken = timeout, False
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def agree(self, moment: str, same: Mapping[str, Any], different: Mapping[str, Any] | None = None) -> None:
        """Wait for all ranks at ``moment`` and compare facts by their hashes.

        Raises AlignmentError PIA102 when a rank failed, is elsewhere, does not come, or has another value of
        a fact in ``same``; GuaranteeError PIA103 when two ranks have one value of a fact in ``different``.
        """
        if self.broken:
            _stop("an earlier step of this run failed on some process")
        facts = {**same, **(different or {})}
        row = np.zeros(2 + FACTS, dtype=np.int64)
        row[1], row[2 : 2 + len(facts)] = _hash(moment), [_hash(value) for value in facts.values()]
        rows = self._gather(row)
        failed = np.flatnonzero(rows[:, 0])
        if failed.size:
            self._break(f"{failed.size} of {self.world_size} processes failed, the first is rank {failed[0]}")
        if len(np.unique(rows[:, 1])) > 1:
            self._break(f"this process is at {moment}, another one is somewhere else")
        for number, name in enumerate(facts):
            distinct = len(np.unique(rows[:, 2 + number]))
            if name in same and distinct > 1:
                self._break(f"the processes disagree about the {name} at {moment}")
            if name not in same and distinct < self.world_size:
                self.broken = True
                _refuse_equal(name, moment)

    def fail(self) -> None:
        """Tell the others, who may be waiting for this rank, that it takes no further step."""
        if not self.broken:
            self.broken = True
            row = np.zeros(2 + FACTS, dtype=np.int64)
            row[0] = 1
            try:
                self._gather(row)
            except AlignmentError:
                return

    def run_id(self) -> str:
        """One fresh identity, made by rank 0."""
        own = new_run_id()
        words = np.frombuffer(bytes.fromhex(own), dtype=np.int64)
        row = np.zeros(2 + FACTS, dtype=np.int64)
        row[2 : 2 + len(words)] = words
        return self._gather(row)[0, 2 : 2 + len(words)].tobytes().hex()

    def share(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        """The rows that this rank measures in a sweep: every ``world_size``-th, from ``rank`` on.

        As many on every rank, because ranks may meet in every pass: the last row fills up."""
        total = len(loader.dataset)  # type: ignore[arg-type]
        longest = -(-total // self.world_size)
        rows = [min(self.rank + i * self.world_size, total - 1) for i in range(longest)]
        return DataLoader(Subset(loader.dataset, rows), collate_fn=loader.collate_fn)

    def sweeping(
        self, sweep: Callable[[int], NDArray[np.float32]], total: int
    ) -> Callable[[int], NDArray[np.float32]]:
        """A sweep of each rank's share whose results all ranks get: the same bits, one pass in all."""

        def together(limit: int) -> NDArray[np.float32]:
            try:
                own = sweep(limit)
            except BaseException:
                self.fail()
                raise
            self.agree("a sweep", {"size of the data set": total})
            return self._gather(own).T.reshape(-1)[:total].copy()

        return together

    def _gather(self, row: NDArray[Any]) -> NDArray[Any]:
        """(world_size, ...) the rows of all ranks."""
        own = torch.from_numpy(row)
        rows = [torch.empty_like(own) for _ in range(self.world_size)]
        try:
            dist.all_gather(rows, own, group=self._group)
        except RuntimeError:
            self._break(f"a process ended, or did not come within {self.timeout:g} seconds")
        return torch.stack(rows).numpy()

    def _break(self, happened: str) -> NoReturn:
        self.broken = True
        _stop(happened)


def _stop(happened: str) -> NoReturn:
    raise AlignmentError(
        "PIA102",
        happened,
        "The step was not released; what the parts of the ledger hold of it stays charged",
        "end all processes and continue them together: engine.load_checkpoint(...) on every rank",
    ) from None


def _refuse_equal(name: str, moment: str) -> NoReturn:
    raise GuaranteeError(
        "PIA103",
        f"two processes have the same {name} at {moment}",
        "They would draw the same coins, so one instance's part would tell about another's: no amplification",
        "torch.manual_seed(seed + torch.distributed.get_rank()) after the model was built",
    )


def _hash(value: Any) -> int:
    """63 bits of SHA-256."""
    plain = value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
    return int.from_bytes(hashlib.sha256(plain).digest()[:8], "big") >> 1


def random_state(generator: torch.Generator | None) -> NDArray[np.uint8] | None:
    """State of the generator that draws; None where it does not show it, as secure generators do."""
    try:
        state = torch.get_rng_state() if generator is None else generator.get_state()
    except RuntimeError:
        return None
    return np.asarray(state)


def parameter_digest(parameters: list[torch.Tensor]) -> str:
    """SHA-256 of the values of all parameters."""
    digest = hashlib.sha256()
    for p in parameters:
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class RankSampler(Sampler[list[int]]):
    """Poisson sampling from this rank's share of the data set, which is drawn anew for each epoch number.

    As Opacus' ``DistributedUniformWithReplacementSampler``, with two differences. An empty draw is an empty
    batch: Opacus leaves it out, so ranks would take different numbers of steps, uncounted. And ranks compare
    their random states and epoch numbers at the beginning of every pass (PIA102, PIA103).
    """

    def __init__(self, inner: DistributedUniformWithReplacementSampler, ranks: Ranks) -> None:
        self.num_samples, self.sample_rate = inner.total_size, inner.sample_rate
        self.steps, self.generator = inner.num_batches, inner.generator
        self.shuffle, self.shuffle_seed, self.epoch = inner.shuffle, inner.shuffle_seed, inner.epoch
        self.whole = ranks.linked
        """Whether batches must not be split."""
        self._ranks = ranks

    def __len__(self) -> int:
        return self.steps

    def set_epoch(self, epoch: int) -> None:
        """Draw the shares of this epoch; the same number on every rank."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        state = random_state(self.generator)
        different = {} if state is None else {"random state": state}
        partition = (self.shuffle, self.shuffle_seed, self.epoch)
        draws = (self.num_samples, self.sample_rate, self.steps)
        self._ranks.agree("a new epoch", {"epoch or shuffle seed": partition, "sampling": draws}, different)
        if self.shuffle:
            order = torch.Generator().manual_seed(self.shuffle_seed + self.epoch)
            indices = torch.randperm(self.num_samples, generator=order)
        else:
            indices = torch.arange(self.num_samples)
        own = indices[self._ranks.rank :: self._ranks.world_size]
        for _ in range(self.steps):
            yield own[draw(len(own), self.sample_rate, self.generator)].tolist()


def refuse_part(run: Run, rank: int, world_size: int) -> NoReturn:
    """Raise LedgerError PIA040 for the part of another rank, or of another number of ranks."""
    raise LedgerError(
        "PIA040",
        f"the ledger is the part of rank {run.rank} of {run.world_size}, this process is rank {rank} of"
        f" {world_size}",
        "Steps would be recorded in the wrong part, and parts of one run could not be merged",
        "continue with as many processes as before, or begin a new ledger",
    )


def inner_module(core: torch.nn.Module) -> torch.nn.Module:
    """The user's module inside the wrapper for several processes."""
    inner: torch.nn.Module = core.module if isinstance(core, (DPDDP, DDP)) else core
    return inner
