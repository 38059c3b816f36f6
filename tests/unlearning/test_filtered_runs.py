"""Unlearning bounds rest on steps that depend on the parameters only: runs that dropped somebody are
refused."""

from __future__ import annotations

import numpy as np
import pytest

from per_instance_accountant.errors import GuaranteeError
from per_instance_accountant.ledger import Drop, Filter, LedgerWriter, Phase, Run, Step
from per_instance_accountant.unlearning.chain import training_chain

PHASE = Phase(
    kind="train",
    sampling="poisson",
    sample_rate=1.0,
    noise_std=1.0,
    max_grad_norm=1.0,
    charging="worst_case",
    denominator=1.0,
    learning_rate=0.1,
)


def test_a_run_that_dropped_somebody_is_refused_and_one_that_did_not_is_read():
    writer = LedgerWriter.create(None, Run(num_instances=2))
    writer.append(Filter(family="renyi", orders=np.full(2, 2.0), budgets=np.array([1.5, 9.0])))
    writer.append(PHASE)
    step = Step(positions=np.arange(2), contributions=np.ones(2, np.float32))
    writer.append(step)
    assert training_chain(writer.ledger(), np.array([1])).counts.tolist() == [1]
    writer.append(Drop(positions=np.array([0])))
    writer.append(Step(positions=np.array([1]), contributions=np.ones(1, np.float32)))
    with pytest.raises(GuaranteeError, match="PIA011"):
        training_chain(writer.ledger(), np.array([1]))
