"""Budgets are enforced while training: before the step, in every mode, for others invisibly, across
resumes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

from per_instance_accountant import (
    FixedThresholds,
    LastSeen,
    PrivacyFilter,
    Sweep,
    Unamplified,
    WorstCase,
    account,
    audit,
)
from per_instance_accountant.accounting import certified_budget
from per_instance_accountant.divergence import sampled_gaussian_rdp
from per_instance_accountant.errors import BudgetExceeded, GuaranteeError, LedgerError, UsageError
from per_instance_accountant.ledger import Drop, Filter, Phase, Step, Thresholds
from per_instance_accountant.opacus_adapter import PrivacyEngine

N = 97
ORDER = 4.0


def engine(charging=None, *, budget=0.5, order=ORDER, on_spent="drop", ledger=None, **arguments):
    limits = PrivacyFilter(budget=budget, order=order, on_spent=on_spent)
    return PrivacyEngine(accountant="rdp", charging=charging, filter=limits, ledger=ledger, **arguments)


def rules():
    bounds = np.linspace(1.2, 0.05, N)
    return {
        "worst_case": WorstCase(),
        "fixed": FixedThresholds(thresholds=bounds),
        "sweep": Sweep(every=3, slack=1.1),
        "unamplified": Unamplified(),
    }


def naive(ledger):
    """(N,) sums of exact one-step losses at ORDER, and for every step who contributed, without
    Spending."""
    sums, limits, phase, dropped = np.zeros(N), np.full(N, np.inf), None, np.zeros(N, dtype=bool)
    history = []
    for event in ledger.events():
        if isinstance(event, Phase):
            phase = event
        elif isinstance(event, Thresholds):
            limits = event.values.astype(np.float64)
        elif isinstance(event, Drop):
            dropped[event.positions] = True
        elif isinstance(event, Step):
            norms = np.where(dropped, 0.0, np.minimum(limits, phase.max_grad_norm))
            rate = phase.amplification_rate
            if phase.charging == "unamplified":
                norms, rate = np.zeros(N), 1.0
                norms[event.positions] = event.contributions
            sums += sampled_gaussian_rdp(rate, norms / phase.noise_std, [ORDER])[:, 0]
            history.append((event, dropped.copy(), sums.copy()))
    return history


@pytest.mark.parametrize("limit", [None, 4])
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("rule", ["worst_case", "fixed", "sweep", "unamplified"])
def test_nobody_exceeds_the_budget(start, rule, mode, limit):
    budget = np.linspace(0.02, 0.6, N) * (6.0 if rule == "unamplified" else 1.0)
    training = start(engine(rules()[rule], budget=budget), mode=mode, noise_multiplier=2.0).train(4, limit)
    history = naive(training.engine.ledger)
    assert len(history) == 4 * len(training.loader)
    dropped_in_the_middle = history[-1][1] & ~history[0][1]
    assert dropped_in_the_middle.any() and not history[-1][1].all()
    for step, dropped, sums in history:
        assert (sums <= budget).all()
        assert not step.contributions[dropped[step.positions]].any()
    # The others contribute whenever they are drawn: nobody is dropped but by the filter.
    step, dropped, sums = history[-1]
    assert (step.contributions[~dropped[step.positions]] > 0).all()
    assert np.array_equal(training.engine.dropped, dropped)
    assert (training.engine.spent >= sums * (1 - 1e-9)).all() and (training.engine.spent <= budget).all()
    assert np.allclose(training.engine.remaining + training.engine.spent, budget, rtol=1e-9, atol=0)
    # Everybody who left was near the budget: one step at the bound would have exceeded it.
    bound = 0.8 if rule in ("worst_case", "unamplified") else None
    if bound is not None:
        rate = 1.0 if rule == "unamplified" else training.loader.sample_rate
        cost = sampled_gaussian_rdp(rate, [bound / 1.6], [ORDER])[0, 0]
        assert (sums + cost * 1.001 > budget)[dropped].all()
    loss = account(training.engine.ledger, orders=[2.0, ORDER])
    promise = loss.certified_budget
    assert np.array_equal(promise.budgets, budget * (1 - 1e-12)) and (promise.orders == ORDER).all()
    assert (loss.rdp[:, 1] <= budget * (1 + 1e-6)).all()


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
def test_a_dropped_instance_is_out_of_the_sum_exactly(start, mode):
    """Budgets too small for one step: weights equal those of a run whose thresholds were 0 from the
    start."""
    gone = np.arange(N) % 3 == 0
    budget = np.where(gone, 1e-6, 1e6)
    filtered = start(engine(WorstCase(), budget=budget), mode=mode).train(2)
    zeros = FixedThresholds(thresholds=np.where(gone, 0.0, 5.0))
    plain = start(PrivacyEngine(accountant="rdp", charging=zeros), mode=mode).train(2)
    assert torch.equal(filtered.weights, plain.weights)
    assert np.array_equal(filtered.engine.dropped, gone)
    for ours, theirs in zip(filtered.steps, plain.steps, strict=True):
        assert np.array_equal(ours.positions, theirs.positions)
        assert np.array_equal(ours.contributions, theirs.contributions)


def test_the_others_are_accounted_for_as_without_the_filter(start):
    """Bit-identical losses, same mechanism: rate, noise, normaliser."""
    bounds = FixedThresholds(thresholds=np.linspace(0.1, 1.0, N))
    budget = np.full(N, 1e6)
    budget[::10] = 0.03
    filtered = start(engine(bounds, budget=budget)).train(2)
    plain = start(PrivacyEngine(accountant="rdp", charging=bounds)).train(2)
    dropped = filtered.engine.dropped
    assert dropped.any() and set(np.flatnonzero(dropped)) <= set(range(0, N, 10))
    ours, theirs = account(filtered.engine.ledger), account(plain.engine.ledger)
    assert np.array_equal(ours.rdp[~dropped], theirs.rdp[~dropped])
    assert (ours.rdp[dropped] < theirs.rdp[dropped]).all()
    assert filtered.engine.ledger.phases == plain.engine.ledger.phases
    for one, other in zip(filtered.steps, plain.steps, strict=True):
        assert np.array_equal(one.positions, other.positions)


@pytest.mark.parametrize("limit", [None, 4])
def test_stop_and_raise(start, limit):
    stopping = start(engine(WorstCase(), budget=0.2, on_spent="stop"), noise_multiplier=2.0).train(6, limit)
    taken = stopping.engine.ledger.num_steps
    assert 0 < taken < 6 * len(stopping.loader) and stopping.engine.would_exceed.any()
    assert (stopping.engine.spent <= 0.2).all() and not stopping.engine.dropped.any()
    with stopping.physical(limit) as loader:
        assert list(loader) == []
    raising = start(engine(WorstCase(), budget=0.2, on_spent="raise"), noise_multiplier=2.0)
    with pytest.raises(BudgetExceeded, match="PIA020"):
        raising.train(6, limit)
    assert raising.engine.ledger.num_steps == taken
    assert torch.equal(raising.weights, stopping.weights)


@pytest.mark.parametrize("on_spent", ["stop", "raise"])
def test_the_number_of_steps_must_not_depend_on_one_instance(start, on_spent):
    """It is released: without the instance that ends the run, the run goes on."""
    for charging in (rules()["fixed"], rules()["sweep"]):
        with pytest.raises(GuaranteeError, match="PIA012"):
            start(engine(charging, on_spent=on_spent))
    with pytest.raises(GuaranteeError, match="PIA012"):
        start(engine(WorstCase(), budget=np.linspace(1, 2, N), on_spent=on_spent))


def test_would_exceed_is_who_leaves_before_the_next_step(start):
    training = start(engine(rules()["fixed"], budget=0.1))
    for batch in training.loader:
        before = training.engine.would_exceed
        assert np.array_equal(before, training.engine.dropped)
        training.step(batch)
        announced = training.engine.would_exceed
        assert (announced >= training.engine.dropped).all()
    next(iter(training.loader))
    assert np.array_equal(training.engine.dropped, announced) and announced.any()


def test_louder_mechanism_between_batch_and_step(start):
    """The noise falls after the batch was handed out: the budget is compared with the step as it is."""
    training = start(engine(WorstCase(), budget=0.1), noise_multiplier=2.0)
    batches = iter(training.loader)
    training.step(next(batches))
    batch = next(batches)
    assert not training.engine.dropped.any()
    training.optimizer.noise_multiplier = 0.2
    training.step(batch)
    assert training.engine.dropped.all() and (training.engine.spent <= 0.1).all()
    assert not training.steps[-1].contributions.any()


@pytest.mark.parametrize("rule", ["worst_case", "fixed", "sweep", "unamplified"])
def test_a_resume_goes_on_with_what_was_spent(start, rule, tmp_path):
    budget = np.linspace(0.02, 0.4, N) * (6.0 if rule == "unamplified" else 1.0)

    def made(path):
        own = engine(rules()[rule], budget=budget, ledger=path)
        return start(own, noise_multiplier=2.0)

    first = made(tmp_path / "run")
    first.train(1)
    first.engine.save_checkpoint(path=tmp_path / "model.pt", module=first.model, optimizer=first.optimizer)
    first.train(1)
    spent, dropped = first.engine.spent, first.engine.dropped
    first.engine.close()
    assert dropped.any()

    second = made(tmp_path / "run")
    second.engine.load_checkpoint(path=tmp_path / "model.pt", module=second.model, optimizer=second.optimizer)
    assert np.array_equal(second.engine.spent, spent) and np.array_equal(second.engine.dropped, dropped)
    torch.manual_seed(2)
    second.train(3)
    assert (second.engine.dropped >= dropped).all() and (second.engine.dropped > dropped).any()
    for step, gone, sums in naive(second.engine.ledger):
        assert (sums <= budget).all()
        assert not step.contributions[gone[step.positions]].any()
    assert certified_budget(second.engine.ledger) is not None
    second.engine.close()
    third = start(engine(rules()[rule], budget=1.0, ledger=tmp_path / "run"), seed=2)
    with pytest.raises(LedgerError, match="PIA045"):
        third.engine.load_checkpoint(
            path=tmp_path / "model.pt", module=third.model, optimizer=third.optimizer
        )


def test_whoever_continues_the_ledger_enforces_its_filter(start, tmp_path):
    first = start(engine(WorstCase(), budget=0.1, ledger=tmp_path / "run")).train(1)
    first.engine.save_checkpoint(path=tmp_path / "model.pt", module=first.model, optimizer=first.optimizer)
    first.engine.close()
    second = start(PrivacyEngine(accountant="rdp", ledger=tmp_path / "run"), seed=2)
    second.engine.load_checkpoint(path=tmp_path / "model.pt", module=second.model, optimizer=second.optimizer)
    second.train(3)
    assert second.engine.dropped.all() and (second.engine.spent <= 0.1).all()


def test_instances_that_a_loader_repeats(start):
    """A sampler with replacement: a repeated instance enters a release once, so its bound is the
    clip norm."""
    sampler = RandomSampler(
        range(N), replacement=True, num_samples=N, generator=torch.Generator().manual_seed(3)
    )
    budget = 12.0
    training = start(
        engine(Unamplified(), budget=budget),
        loader={"sampler": sampler},
        batch_size=40,
        poisson_sampling=False,
    ).train(8, 15)
    history = naive(training.engine.ledger)
    assert all((sums <= budget).all() for _, _, sums in history) and history[-1][1].any()
    assert max(step.contributions.max() for step, _, _ in history) <= np.float32(0.8)


def test_gaussian_filter_on_full_batches(start):
    budgets = PrivacyFilter(budget=2.0, delta=1e-5, family="gaussian")
    training = start(
        PrivacyEngine(accountant="rdp", charging=Sweep(every=1, slack=1.0), filter=budgets),
        batch_size=N,
        noise_multiplier=8.0,
        max_grad_norm=4.0,
    ).train(20)
    dropped = training.engine.dropped
    assert dropped.any() and not dropped.all()
    promise = certified_budget(training.engine.ledger)
    assert (promise.epsilon(1e-5) <= 2.0).all() and (promise.epsilon(1e-5) > 1.999).all()
    with pytest.raises(GuaranteeError, match="PIA010"):
        start(PrivacyEngine(accountant="rdp", filter=budgets))


def test_budgets_in_epsilon_and_by_group(start):
    labels = np.where(np.arange(N) < 40, "minor", "adult")
    budgets = PrivacyFilter(budget={"minor": 3.0, "adult": 9.0}, group="age", delta=1e-5)
    groups = {"age": labels}
    training = start(
        PrivacyEngine(accountant="rdp", charging=Sweep(every=5), filter=budgets, groups=groups),
        noise_multiplier=1.2,
    ).train(6)
    assert training.engine.dropped[:40].any() and not training.engine.dropped[40:].any()
    epsilon = account(training.engine.ledger).certified_epsilon(1e-5)
    assert (epsilon[:40] <= 3.0).all() and (epsilon[:40] > 2.99).all() and (epsilon[40:] <= 9.0).all()
    found = audit(training.engine.ledger, delta=1e-5)
    assert np.array_equal(found.certified_budget, epsilon) and str(found.basis) == "OUTPUT_SPECIFIC"
    assert "A privacy filter let every instance leave" in found.statement()
    assert found.to_dict()["epsilon_certified_max"] == epsilon.max()
    assert found.to_arrow()["epsilon_certified"].to_pylist() == epsilon.tolist()
    stated = next(event for event in training.engine.ledger.events() if isinstance(event, Filter))
    assert len(np.unique(stated.orders)) == 2


def test_filters_that_cannot_be(start):
    with pytest.raises(UsageError, match="PIA071"):
        start(engine(budget=[1.0, 2.0]))
    with pytest.raises(GuaranteeError, match="PIA012"):
        start(engine(LastSeen()))
    with pytest.raises(UsageError, match="privacy filter"):
        start(PrivacyEngine(accountant="rdp")).engine.spent  # noqa: B018


def test_a_shuffled_loader(start):
    loader = DataLoader(range(N), batch_size=12, shuffle=True)
    assert loader.batch_size == 12
    training = start(engine(budget=3.0), loader={"shuffle": True}, poisson_sampling=False).train(10, 5)
    assert training.engine.dropped.any() and (training.engine.spent <= 3.0).all()


@pytest.mark.parametrize("rule", ["worst_case", "fixed", "sweep", "unamplified"])
def test_metrics_follow_the_run(start, rule):
    """Asked for in the middle or only at the end: the same numbers, upper bounds of the audit's."""
    budget = np.linspace(0.02, 0.6, N) * (6.0 if rule == "unamplified" else 1.0)
    training = start(engine(rules()[rule], budget=budget), noise_multiplier=2.0)
    early = training.train(1).engine.metrics(1e-5)
    late = training.train(2).engine.metrics(1e-5)
    training.engine.tracker.recorder._running = None
    assert training.engine.metrics(1e-5) == late
    assert early["privacy/steps"] < late["privacy/steps"] == training.engine.ledger.num_steps
    assert late["privacy/dropped"] == training.engine.dropped.sum() > 0
    found = audit(training.engine.ledger, delta=1e-5)
    assert found.epsilon.max() <= late["privacy/epsilon_max"]
    assert found.worst_case <= late["privacy/epsilon_worst"]
    assert "privacy/dropped" not in start(PrivacyEngine(accountant="rdp")).train().engine.metrics(1e-5)
