"""The fold per range of instances, here, in two processes, on a Dask cluster: bit-identical to the whole."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from per_instance_accountant import account
from per_instance_accountant.accounting import account_in_parts, dask_mapper, join, partitions
from per_instance_accountant.errors import GuaranteeError, MissingDependencyError, UsageError
from per_instance_accountant.ledger import Drop, Filter, LedgerWriter, Phase, Run, Step, Thresholds

N = 103


def recorded(path, rule="sweep", seed=0, filtered=True):
    draw = np.random.default_rng(seed)
    with LedgerWriter.create(path, Run(num_instances=N, ids=np.arange(N) * 7)) as writer:
        if filtered:
            writer.append(Filter(family="renyi", orders=np.full(N, 4.0), budgets=draw.uniform(90, 99, N)))
        for block in range(3):
            writer.append(
                Phase(
                    kind="train",
                    sampling="poisson",
                    sample_rate=0.1,
                    noise_std=1.0 + block,
                    max_grad_norm=1.0,
                    charging=rule,
                    denominator=1.0,
                    learning_rate=0.1,
                )
            )
            limits = draw.uniform(0.01, 1.0, N).astype(np.float32)
            writer.append(Thresholds(values=limits, source="sweep"))
            for _ in range(5):
                drawn = np.flatnonzero((draw.random(N) < 0.1) & (np.arange(N) % 50 > 0))
                writer.append(Step(positions=drawn, contributions=limits[drawn] / 2))
            if filtered and block == 1:
                writer.append(Drop(positions=np.array([0, 50, 100])))
    return path


def assert_identical(one, other):
    for name in ("rdp", "worst_case_rdp", "orders", "ids"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
    assert (one.mu is None) == (other.mu is None) and one.basis == other.basis and one.digest == other.digest
    if one.mu is not None:
        assert np.array_equal(one.mu, other.mu)
    if one.certified_budget is not None:
        assert np.array_equal(one.certified_budget.budgets, other.certified_budget.budgets)
    assert np.array_equal(one.tight_epsilon(1e-5), other.tight_epsilon(1e-5))


@pytest.mark.parametrize("parts", [1, 2, 7, 1000])
@pytest.mark.parametrize("rule", ["sweep", "worst_case", "unamplified", "last_seen"])
def test_parts_joined_equal_the_whole(tmp_path, rule, parts):
    path = recorded(tmp_path / "run", rule, filtered=rule == "sweep")
    orders = [2.0, 8.0, 32.0]
    assert_identical(account_in_parts(path, parts, orders=orders), account(path, orders=orders))


def test_in_two_processes(tmp_path):
    path = recorded(tmp_path / "run")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = account_in_parts(path, 4, mapper=pool.map, orders=[2.0, 8.0])
    assert_identical(found, account(path, orders=[2.0, 8.0]))


def test_on_a_dask_cluster_of_two_processes(tmp_path):
    distributed = pytest.importorskip("distributed", reason="optional extra [dask]")
    path = recorded(tmp_path / "run")
    cluster = distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        host="127.0.0.1",
        dashboard_address=None,
        local_directory=str(tmp_path),
    )
    with cluster, distributed.Client(cluster) as client:
        found = account_in_parts(path, 5, mapper=dask_mapper(client), orders=[2.0, 8.0])
    assert_identical(found, account(path, orders=[2.0, 8.0]))
    with pytest.raises(UsageError, match="PIA071"):
        dask_mapper("tcp://127.0.0.1:8786")


def test_without_dask(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingDependencyError, match="PIA061"):
        dask_mapper(None)


def test_dask_is_not_imported_with_the_package():
    code = "import sys, per_instance_accountant.accounting as a; sys.exit('distributed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_does_not_belong_together_is_not_joined(tmp_path):
    one, other = recorded(tmp_path / "one"), recorded(tmp_path / "other", seed=1)
    left, right = (account(one, orders=[2.0], partition=part) for part in partitions(N, 2))
    foreign = account(other, orders=[2.0], partition=(N // 2, N))
    with pytest.raises(GuaranteeError, match="PIA011"):
        join([left, foreign])
    with pytest.raises(GuaranteeError, match="PIA011"):
        join([left, account(one, orders=[3.0], partition=(N // 2, N))])
    with pytest.raises(UsageError, match="two parts"):
        join([left, right, left])
    with pytest.raises(UsageError, match="PIA070"):
        join([])
    for parts in (0, -1):
        with pytest.raises(UsageError, match="PIA070"):
            account_in_parts(one, parts)
