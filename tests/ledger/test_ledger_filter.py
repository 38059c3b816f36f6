"""Filter and Drop facts: stated before training, read back as they are, never contradicted by a step."""

from __future__ import annotations

import numpy as np
import pytest

from per_instance_accountant.errors import LedgerError, UsageError
from per_instance_accountant.ledger import Drop, Filter, Ledger, LedgerWriter, Phase, Run, Step

PHASE = Phase(
    kind="train",
    sampling="poisson",
    sample_rate=0.5,
    noise_std=1.0,
    max_grad_norm=1.0,
    charging="worst_case",
    denominator=1.0,
    learning_rate=0.1,
)


def stated(count=4, family="renyi"):
    return Filter(family=family, orders=np.full(count, 2.0), budgets=np.linspace(0.1, 1.0, count))


def step(*positions, value=1.0):
    return Step(positions=np.array(positions), contributions=np.full(len(positions), value, np.float32))


def drop(*positions):
    return Drop(positions=np.array(positions, dtype=np.int64))


def test_round_trip(tmp_path):
    for family in ("renyi", "gaussian"):
        with LedgerWriter.create(tmp_path / family, Run(num_instances=4)) as writer:
            for event in (stated(family=family), PHASE, step(0, 3), drop(3, 1), step(3, value=0.0), step(0)):
                writer.append(event)
        events = list(Ledger.open(tmp_path / family).events())
        assert [type(event) for event in events] == [Filter, Phase, Step, Drop, Step, Step]
        assert events[0].family == family
        assert np.array_equal(events[0].budgets, stated().budgets) and events[0].budgets.dtype == np.float64
        assert np.array_equal(events[0].orders, stated().orders)
        assert events[3].positions.tolist() == [3, 1]


@pytest.mark.parametrize(
    ("before", "event"),
    [
        ([], stated(3)),
        ([stated()], stated()),
        ([PHASE, step(0)], stated()),
        ([PHASE], drop(0)),
        ([stated()], drop()),
        ([stated()], drop(4)),
        ([stated()], drop(1, 1)),
        ([stated(), drop(1)], drop(2, 1)),
        ([stated(), PHASE, drop(1)], step(0, 1)),
    ],
)
def test_contradictions_leave_the_ledger_as_it_was(before, event):
    writer = LedgerWriter.create(None, Run(num_instances=4))
    for earlier in before:
        writer.append(earlier)
    anchor = writer.anchor
    with pytest.raises(LedgerError, match="PIA045"):
        writer.append(event)
    assert writer.anchor == anchor


def test_dropped_for_good_also_across_a_resume(tmp_path):
    with LedgerWriter.create(tmp_path / "run", Run(num_instances=4)) as writer:
        writer.append(stated())
        writer.append(PHASE)
        anchor = writer.anchor
        writer.append(drop(2))
    again = LedgerWriter.resume(tmp_path / "run", anchor)
    again.append(PHASE)
    with pytest.raises(LedgerError, match="PIA045"):
        again.append(step(2))
    again.append(step(2, value=0.0))


@pytest.mark.parametrize(
    "fields",
    [
        {"family": "laplace"},
        {"orders": np.full(4, 1.0)},
        {"orders": np.full(3, 2.0)},
        {"budgets": np.zeros(4)},
        {"budgets": np.array([1.0, np.nan, 1.0, 1.0])},
        {"budgets": np.full(4, np.inf)},
        {"budgets": np.ones(4, np.float32)},
        {"family": "gaussian", "orders": np.full(4, 3.0)},
    ],
)
def test_impossible_filters(fields):
    values = {"family": "renyi", "orders": np.full(4, 2.0), "budgets": np.ones(4)}
    with pytest.raises(UsageError, match="PIA070"):
        Filter(**(values | fields))
