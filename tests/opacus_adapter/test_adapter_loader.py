"""The rows travel with the batch, whatever workers prefetch and loops skip."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.data_loader import DPDataLoader
from opacus.utils.batch_memory_manager import BatchSplittingSampler
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, TensorDataset

from per_instance_accountant.opacus_adapter.loader import SplittingSampler, split_loader, track_loader


class Listener:
    """Keeps what the loader announced."""

    def __init__(self):
        self.batches, self.loops = [], 0

    def check_optimizer(self, optimizer):
        pass

    def check_boundary(self):
        pass

    def open_loop(self):
        self.loops += 1
        return self.loops

    def begin(self, batch):
        self.batches.append(batch)


def numbered(count=60):
    return TensorDataset(torch.arange(count, dtype=torch.float32)[:, None], torch.arange(count))


def announced_rows_are_right(loader, listener, loop):
    """Run a loop; every batch handed out must be made of the rows announced at that moment."""
    for number, batch in enumerate(loader):
        assert batch[1].tolist() == listener.batches[-1].rows.tolist()
        if loop == "break" and number == 3:
            break
        if loop == "continue" and number % 3 == 0:
            continue


SETTINGS = [
    {},
    {"num_workers": 2},
    {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 4},
    {"num_workers": 2, "in_order": False},
]


@pytest.mark.parametrize("options", SETTINGS, ids=["plain", "workers", "persistent", "unordered"])
@pytest.mark.parametrize("limit", [None, 3])
def test_rows_belong_to_the_batch(options, limit):
    torch.manual_seed(0)
    listener = Listener()
    loader = track_loader(DPDataLoader(numbered(), sample_rate=0.1, **options), listener)
    loader = loader if limit is None else split_loader(loader, limit, None)
    for loop in ("plain", "break", "continue", "plain"):
        announced_rows_are_right(loader, listener, loop)
    assert listener.loops == 4


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_and_random_draws_equal_the_untracked_loader(poisson, workers):
    def batches(track):
        torch.manual_seed(3)
        loader = DataLoader(numbered(), batch_size=7, shuffle=True, num_workers=workers)
        loader = DPDataLoader.from_data_loader(loader) if poisson else loader
        loader = track_loader(loader, Listener()) if track else loader
        found = [batch[1].tolist() for _ in range(2) for batch in loader]
        return found, torch.rand(3).tolist(), len(loader), loader.batch_size

    assert batches(True) == batches(False)


def test_the_users_dataset_is_still_the_users():
    dataset = numbered()
    loader = track_loader(DPDataLoader(dataset, sample_rate=0.1), Listener())
    assert isinstance(loader, DPDataLoader) and loader.sample_rate == 0.1
    assert loader.dataset.tensors is dataset.tensors and len(loader.dataset) == 60
    assert loader.dataset[7][1] == 7
    assert loader.collate_fn([dataset[3], dataset[4]])[1].tolist() == [3, 4]
    for copied in (pickle.loads(pickle.dumps(loader.dataset)), copy.deepcopy(loader.dataset)):
        assert copied[7][1] == 7


class Named(Dataset):
    """A mapping per instance, fetched in bulk, as Hugging Face data sets are."""

    def __len__(self):
        return 40

    def __getitem__(self, row):
        return {"x": torch.full((2,), float(row)), "row": row}

    def __getitems__(self, rows):
        return [self[row] for row in rows]


def test_mappings_and_bulk_reads():
    listener = Listener()
    loader = track_loader(DataLoader(Named(), batch_size=6, shuffle=True), listener)
    for batch in loader:
        assert batch["row"].tolist() == listener.batches[-1].rows.tolist()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 25), min_size=1, max_size=6), st.integers(1, 9))
def test_parts_are_opacus_parts_and_end_where_the_logical_batch_ends(sizes, limit):
    draws = [list(range(size)) for size in sizes]

    class Flags:
        def __init__(self):
            self.skip = []

        def signal_skip_step(self, do_skip):
            self.skip.append(do_skip)

    flags = Flags()
    theirs = list(BatchSplittingSampler(sampler=draws, max_batch_size=limit, optimizer=flags))
    ours = list(SplittingSampler(draws, limit))
    assert [list(draw) for draw in ours] == theirs
    assert [not draw.part.last for draw in ours] == flags.skip
    starts = [draw for draw in ours if draw.part.first]
    assert [draw.part.logical for draw in starts] == list(range(len(sizes)))
    for number, draw in enumerate(draws):
        mine = [row for part in ours if part.part.logical == number for row in part]
        assert mine == draw


def test_length_of_a_split_loader_is_opacus_length():
    batches = BatchSampler(SequentialSampler(range(60)), 12, drop_last=False)
    theirs = BatchSplittingSampler(sampler=batches, max_batch_size=5, optimizer=None)
    assert len(SplittingSampler(batches, 5)) == len(theirs)
    poisson = DPDataLoader(numbered(), sample_rate=0.1).batch_sampler
    theirs = BatchSplittingSampler(sampler=poisson, max_batch_size=4, optimizer=None)
    assert len(SplittingSampler(poisson, 4)) == len(theirs)


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}])
def test_empty_draws_are_announced(options):
    torch.manual_seed(0)
    listener = Listener()
    loader = track_loader(DPDataLoader(numbered(8), sample_rate=0.05, **options), listener)
    sizes = [len(batch[1]) for batch in loader if len(batch)]
    assert 0 in sizes
    assert [len(batch.rows) for batch in listener.batches][: len(sizes)] == sizes
    assert all(batch.rows.dtype == np.int64 for batch in listener.batches)
