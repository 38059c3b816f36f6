"""Loaders whose batches carry the dataset positions they are made of.

The positions travel WITH the batch, through worker queues, and are stripped when the batch is handed to the
user. A queue filled by the sampler and emptied by the optimizer would be wrong after the first ``break``,
``continue`` or prefetched batch, because samplers run ahead of the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.data_loader import DPDataLoader
from opacus.optimizers import DPOptimizer
from opacus.utils import batch_memory_manager
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch.utils._pytree import tree_map
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset
from torch.utils.data._utils.pin_memory import pin_memory

from per_instance_accountant.errors import AlignmentError, BudgetExceeded, UnsupportedError
from per_instance_accountant.opacus_adapter.ranks import RankSampler


class Part(NamedTuple):
    """Which part of which logical batch a physical batch is: ``logical`` counts the batches of one loop."""

    logical: int
    first: bool
    last: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Delivery:
    """One physical batch at the moment the user receives it.

    rows: (B,) rows of the loader's dataset. loop: number of the pass over the loader. limit: largest
    physical batch.
    """

    rows: NDArray[np.int64]
    part: Part
    content: Any
    loop: int
    limit: int | None


class Consumer(Protocol):
    """What a loader tells about its batches, in the order in which the user's loop sees them."""

    def check_optimizer(self, optimizer: DPOptimizer) -> None: ...
    def open_loop(self) -> int: ...
    def begin(self, batch: Delivery) -> None: ...
    def check_boundary(self) -> None: ...
    @property
    def ends_quietly(self) -> bool: ...


class Draw(list[int]):
    """The rows of one physical batch on their way to a worker, with the part they are."""

    def __init__(self, rows: Iterable[int], part: Part) -> None:
        super().__init__(rows)
        self.part = part

    def __reduce__(self) -> Any:
        return _drawn, (list(self), *self.part)


def _drawn(rows: list[int], *part: Any) -> Draw:
    return Draw(rows, Part(*part))


@dataclass(frozen=True, slots=True)
class IndexedItems:
    """Samples fetched by a worker, with the rows they were fetched from."""

    rows: list[int]
    items: list[Any]
    source: Any = None


def _rewrapped(*_: Any, **__: Any) -> Any:
    raise AlignmentError(
        "PIA007",
        "a batch of the tracked loader came out of another loader that was built around it",
        "Nobody knows any more which instances a step uses, so no loss could be recorded",
        "for batch in loader, or BatchMemoryManager(data_loader=loader, ...), with the returned loader",
    )


@dataclass(frozen=True, slots=True, eq=False)
class IndexedBatch:
    """A collated batch with the rows it was made of; any use as a batch is an error (PIA007)."""

    rows: NDArray[np.int64]
    part: Part | None
    batch: Any

    def __reduce__(self) -> Any:
        return _unpacked, (self.rows.tobytes(), self.part and tuple(self.part), self.batch)

    def pin_memory(self, device: Any = None) -> IndexedBatch:
        return IndexedBatch(self.rows, self.part, pin_memory(self.batch, device))

    def to(self, device: Any, **options: Any) -> IndexedBatch:
        """On ``device``: some frameworks move a batch before the loop receives it."""
        moved = tree_map(lambda x: x.to(device, **options) if isinstance(x, torch.Tensor) else x, self.batch)
        return IndexedBatch(self.rows, self.part, moved)

    __iter__ = __getitem__ = __len__ = _rewrapped


def _unpacked(rows: bytes, part: tuple[Any, ...] | None, batch: Any) -> IndexedBatch:
    return IndexedBatch(np.frombuffer(rows, dtype=np.int64), Part(*part) if part else None, batch)


class IndexedDataset(Dataset[Any]):
    """The user's dataset; ``dataset[i]`` and all attributes are the user's, only batched reads carry their
    rows."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, row: Any) -> Any:
        return self.inner[row]

    def __getattr__(self, name: str) -> Any:
        # Unpickling asks for attributes before `inner` exists.
        if name == "inner" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __getitems__(self, rows: list[int]) -> IndexedItems:
        fetch = getattr(self.inner, "__getitems__", None)
        items = fetch(rows) if fetch and rows else [self.inner[row] for row in rows]
        return IndexedItems(rows, items, self.inner)


class IndexedCollate:
    """The user's collate function, keeping the rows of what it collates."""

    def __init__(self, inner: Callable[[Any], Any]) -> None:
        self.inner = inner

    def __call__(self, fetched: Any) -> Any:
        if not isinstance(fetched, IndexedItems):
            return self.inner(fetched)
        if not fetched.rows and getattr(self.inner, "first_batch", ...) is None:
            # Opacus learns the structure of an empty batch from the first one that has rows, in each worker
            # anew; an empty first batch would come as something else.
            with torch.random.fork_rng(devices=[]):
                self.inner([fetched.source[0]])
        rows = np.array(fetched.rows, dtype=np.int64)
        return IndexedBatch(rows, getattr(fetched.rows, "part", None), self.inner(fetched.items))


class SplittingSampler:
    """Physical batches of at most ``limit`` rows, split as ``opacus.utils.batch_memory_manager`` splits
    them."""

    def __init__(self, inner: Any, limit: int) -> None:
        self.inner, self.limit = inner, limit

    def __iter__(self) -> Iterator[Draw]:
        for logical, rows in enumerate(self.inner):
            pieces = max(1, math.ceil(len(rows) / self.limit))
            for number, piece in enumerate(np.array_split(np.asarray(rows, dtype=np.int64), pieces)):
                part = Part(logical=logical, first=number == 0, last=number == pieces - 1)
                yield Draw(piece.tolist(), part)

    def __len__(self) -> int:
        if isinstance(self.inner, UniformWithReplacementSampler):
            expected: float = self.inner.sample_rate * self.inner.num_samples
        elif isinstance(self.inner, BatchSampler):
            expected = self.inner.batch_size
        else:
            expected = self.limit
        return math.ceil(len(self.inner) * expected / self.limit)


class EvenSampler:
    """Every logical batch in exactly ``parts`` physical ones, some maybe empty, for loops that count them."""

    def __init__(self, inner: Any, parts: int) -> None:
        self.inner, self.parts = inner, parts

    def __iter__(self) -> Iterator[Draw]:
        for logical, rows in enumerate(self.inner):
            pieces = np.array_split(np.asarray(rows, dtype=np.int64), self.parts)
            for number, piece in enumerate(pieces):
                part = Part(logical=logical, first=number == 0, last=number == self.parts - 1)
                yield Draw(piece.tolist(), part)

    def __len__(self) -> int:
        return len(self.inner) * self.parts


class _Iteration:
    """One pass of the user's loop: announces each batch at the moment the user receives it."""

    def __init__(self, inner: Any, consumer: Consumer, limit: int | None) -> None:
        self.inner, self.consumer, self.limit = inner, consumer, limit
        self.loop, self.count = consumer.open_loop(), 0

    def __iter__(self) -> _Iteration:
        return self

    def __len__(self) -> int:
        return len(self.inner)

    def __next__(self) -> Any:
        try:
            batch = next(self.inner)
        except StopIteration:
            self.consumer.check_boundary()
            raise
        part = batch.part or Part(logical=self.count, first=True, last=True)
        self.count += 1
        try:
            self.consumer.begin(
                Delivery(rows=batch.rows, part=part, content=batch.batch, loop=self.loop, limit=self.limit)
            )
        except BudgetExceeded:
            if self.consumer.ends_quietly:
                raise StopIteration from None
            raise
        return batch.batch


class TrackedLoader(DataLoader[Any]):
    """A loader that reports its batches. Built by :func:`track_loader` and :func:`split_loader` only."""

    consumer: Consumer
    limit: int | None = None

    def __iter__(self) -> Any:
        self.consumer.check_boundary()
        # The inner iterator is made now, not at the first batch: it draws from the random state as stock
        # does.
        return _Iteration(super().__iter__(), self.consumer, self.limit)


class TrackedPoissonLoader(TrackedLoader, DPDataLoader):
    """A tracked ``DPDataLoader``."""


def _settings(loader: DataLoader[Any]) -> dict[str, Any]:
    names = (
        *("num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator"),
        *("prefetch_factor", "persistent_workers", "in_order"),
    )
    return {name: getattr(loader, name) for name in names}


def check_loader(loader: DataLoader[Any]) -> None:
    """Raise UnsupportedError PIA060 for a loader whose batches cannot be attributed to dataset positions."""
    collate: Any = loader.collate_fn
    reason = None
    if isinstance(loader, TrackedLoader):
        reason = "the loader is tracked already"
    elif isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        reason = "the loader has no positions: it is over an IterableDataset or has batch_size=None"
    elif getattr(loader, "distributed", False) and type(loader.batch_sampler) is not RankSampler:
        reason = "the loader samples for several processes, and leaves out empty draws"
    elif getattr(collate, "rand_on_empty", False):
        reason = "rand_on_empty=True puts an invented instance into an empty batch"
    if reason:
        raise UnsupportedError(
            "PIA060",
            reason,
            "The instances of a step would be unknown or counted twice",
            "pass one plain map-style DataLoader(dataset, batch_size=...) and rand_on_empty=False",
        )


def track_loader(loader: DataLoader[Any], consumer: Consumer) -> TrackedLoader:
    """A loader with the same batches, settings and random draws that reports the rows of each batch to
    ``consumer``.

    A ``DPDataLoader`` stays one. Raises UnsupportedError PIA060 as :func:`check_loader` does.
    """
    check_loader(loader)
    poisson = isinstance(loader, DPDataLoader)
    if loader.batch_size is None:
        batches: dict[str, Any] = {"batch_sampler": loader.batch_sampler}
    else:
        batches = {"batch_size": loader.batch_size, "sampler": loader.sampler, "drop_last": loader.drop_last}
    tracked = object.__new__(TrackedPoissonLoader if poisson else TrackedLoader)
    DataLoader.__init__(
        tracked,
        IndexedDataset(loader.dataset),
        collate_fn=IndexedCollate(loader.collate_fn),
        **batches,
        **_settings(loader),
    )
    if isinstance(loader, DPDataLoader) and isinstance(tracked, TrackedPoissonLoader):
        tracked.sample_rate, tracked.distributed = loader.sample_rate, loader.distributed
    tracked.consumer = consumer
    return tracked


def with_sampler(loader: DPDataLoader, sampler: Any) -> DPDataLoader:
    """The same loader with another batch sampler."""
    made = object.__new__(DPDataLoader)
    DataLoader.__init__(
        made, loader.dataset, batch_sampler=sampler, collate_fn=loader.collate_fn, **_settings(loader)
    )
    made.sample_rate, made.distributed = loader.sample_rate, loader.distributed
    return made


def split_loader(loader: TrackedLoader, limit: int, optimizer: DPOptimizer) -> TrackedLoader:
    """A tracked loader over physical batches of at most ``limit`` rows of the same logical batches.

    Whether a physical batch ends its logical batch is decided when the user receives it, not when a worker
    fetches it. Raises UnsupportedError PIA060 when ``loader`` is split already.
    """
    loader.consumer.check_optimizer(optimizer)
    return _split(loader, SplittingSampler(loader.batch_sampler, limit), limit)


def split_evenly(loader: TrackedLoader, parts: int) -> TrackedLoader:
    """A tracked loader over the same logical batches, each in exactly ``parts`` physical batches: what loops
    that step after every ``parts`` batches need. Raises UnsupportedError PIA060 when it is split already."""
    return loader if parts == 1 else _split(loader, EvenSampler(loader.batch_sampler, parts), 256)


def _split(loader: TrackedLoader, sampler: Any, limit: int) -> TrackedLoader:
    if loader.limit is not None:
        raise UnsupportedError(
            "PIA060",
            "the loader is split into physical batches already",
            "Two splits would hide where a logical batch ends",
            "one BatchMemoryManager(data_loader=loader, ...) around the returned loader",
        )
    if getattr(loader.batch_sampler, "whole", False):
        raise UnsupportedError(
            "PIA060",
            "split batches with torch's DistributedDataParallel, which communicates in every backward pass",
            "Ranks split their draws into different numbers of batches, so they would wait for ever",
            "make_private(module=DPDDP(model), ...), Opacus' wrapper without that communication",
        )
    # Parts of one logical batch must arrive together.
    settings = {**_settings(loader), "in_order": True}
    split = TrackedLoader(loader.dataset, batch_sampler=sampler, collate_fn=loader.collate_fn, **settings)
    split.consumer, split.limit = loader.consumer, limit
    return split


def relay(batches: Iterator[Any], loader: TrackedLoader) -> Iterator[Any]:
    """Batches of ``loader`` that came through another loader built around it: announced to its consumer when
    the user's loop receives them, however far the other one reads ahead."""
    loader.consumer.check_boundary()
    return _Iteration(batches, loader.consumer, loader.limit)


_opacus_wrap = batch_memory_manager.wrap_data_loader


def _wrap_data_loader(*, data_loader: DataLoader[Any], max_batch_size: int, optimizer: DPOptimizer) -> Any:
    if isinstance(data_loader, TrackedLoader):
        return split_loader(data_loader, max_batch_size, optimizer)
    return _opacus_wrap(data_loader=data_loader, max_batch_size=max_batch_size, optimizer=optimizer)


# BatchMemoryManager looks this name up on entry. Loaders that are not ours go to the original.
batch_memory_manager.wrap_data_loader = _wrap_data_loader
