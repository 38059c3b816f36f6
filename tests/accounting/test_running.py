"""Running totals are upper bounds of what the fold computes, close to it, whatever the course of events."""

from __future__ import annotations

import numpy as np
import pytest

from per_instance_accountant import account
from per_instance_accountant.accounting import RunningLoss
from per_instance_accountant.accounting import running as running_module
from per_instance_accountant.accounting.running import ORDERS
from per_instance_accountant.divergence import rdp_to_epsilon
from per_instance_accountant.ledger import Drop, Filter, LedgerWriter, Phase, Resume, Run, Step, Thresholds

N = 40


def course(rule, seed=0, schedule=False, steps=60):
    """A run with sweeps, drops, a resume, and optionally a new mechanism every twenty steps."""
    draw = np.random.default_rng(seed)
    writer = LedgerWriter.create(None, Run(num_instances=N))
    writer.append(Filter(family="renyi", orders=np.full(N, 4.0), budgets=np.full(N, 50.0)))
    events, dropped = [], np.zeros(N, dtype=bool)
    for number in range(steps):
        if number % 20 == 0:
            factor = 1 + (number // 20) * schedule
            phase = Phase(
                kind="train",
                sampling="poisson",
                sample_rate=0.1 / factor,
                noise_std=1.3 * factor,
                max_grad_norm=1.0 + 0.5 * (factor - 1),
                charging=rule,
                denominator=1.0,
                learning_rate=0.1,
            )
            events.append(phase)
        if number % 15 == 0 and rule in ("fixed_thresholds", "sweep") and (number == 0 or rule == "sweep"):
            values = np.minimum(draw.gamma(1.0, 0.4, N), 1.0).astype(np.float32)
            limits = np.where(dropped, np.float32(0), values)
            events.append(Thresholds(values=limits, source="sweep"))
        if number == 30:
            events.append(Drop(positions=np.array([3, 17])))
            dropped[[3, 17]] = True
        drawn = np.flatnonzero(draw.random(N) < 0.2)
        norms = (draw.random(len(drawn)) * ~dropped[drawn]).astype(np.float32)
        if rule in ("fixed_thresholds", "sweep"):
            norms = np.minimum(norms, limits[drawn])
        events.append(Step(positions=drawn, contributions=norms))
    for event in events:
        writer.append(event)
    return writer


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("rule", ["worst_case", "fixed_thresholds", "sweep", "unamplified", "last_seen"])
def test_upper_bounds_close_to_the_fold(rule, schedule):
    ledger = course(rule, schedule=schedule).ledger()
    running, loss = RunningLoss.of(ledger), account(ledger, orders=np.array(ORDERS))
    found, exact = running.epsilons(1e-5), loss.epsilon(1e-5)
    assert (found >= exact * (1 - 1e-12)).all()
    # The fold may use the exact Gaussian conversion where no step was amplified.
    reference = exact if rule != "unamplified" else account_rdp(loss)
    assert (found <= reference * 1.05 + 1e-12).all()
    metrics = running.metrics(1e-5)
    assert metrics["privacy/epsilon_max"] == found.max() and metrics["privacy/steps"] == 60
    assert metrics["privacy/epsilon_p50"] >= np.median(found)
    assert metrics["privacy/epsilon_p50"] <= metrics["privacy/epsilon_p99"] <= metrics["privacy/epsilon_max"]
    worst = loss.worst_case_epsilon(1e-5)
    assert worst <= metrics["privacy/epsilon_worst"] <= worst * 1.001


def account_rdp(loss):
    return rdp_to_epsilon(loss.orders, loss.rdp, 1e-5)


def test_the_comparison_catches_totals_of_the_drawn_only(monkeypatch):
    def drawn_only(self, step):
        before = self._odometer.rdp(self.orders)
        running_module.RunningLoss._take_step(self, step)
        rest = np.setdiff1d(np.arange(N), step.positions)
        self._settled = (0.0 if self._settled is None else self._settled) + 0.0 * before
        self._settled[rest] -= (self._odometer.rdp(self.orders) - before)[rest]

    ledger = course("sweep").ledger()
    monkeypatch.setitem(running_module._TAKE, Step, drawn_only)
    running, loss = RunningLoss.of(ledger), account(ledger, orders=np.array(ORDERS))
    assert not (np.maximum(running._curves(), 0) >= loss.rdp * (1 - 1e-12)).all()


def test_a_resume_and_no_noise():
    writer = course("worst_case")
    ledger = writer.ledger()
    running = RunningLoss.of(ledger)
    before = running.epsilons(1e-5)
    running.take(Resume(at_step=10))
    assert np.array_equal(running.epsilons(1e-5), before)
    phase = Phase(
        kind="train",
        sampling="poisson",
        sample_rate=0.1,
        noise_std=0.0,
        max_grad_norm=1.0,
        charging="worst_case",
        denominator=1.0,
        learning_rate=0.1,
    )
    running.take(phase)
    running.take(Step(positions=np.arange(2), contributions=np.ones(2, np.float32)))
    assert np.isinf(list(running.metrics(1e-5).values())[:5]).all()
