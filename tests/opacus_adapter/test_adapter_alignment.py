"""Every recorded step names the instances that were in it, with the norms with which they entered the sum."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from opacus.data_loader import DPDataLoader
from opacus.optimizers import DPOptimizer
from torch.utils.data import Subset, TensorDataset, WeightedRandomSampler

from per_instance_accountant import FixedThresholds
from per_instance_accountant.ledger import Phase, Thresholds
from per_instance_accountant.opacus_adapter import PrivacyEngine, attach, capture
from per_instance_accountant.opacus_adapter.capture import Tracker
from per_instance_accountant.opacus_adapter.clipping import clip_factors

CASES = [
    pytest.param({"mode": mode, "limit": limit, "workers": workers}, id=f"{mode}-{limit}-{workers}")
    for mode in ("hooks", "functorch", "ghost")
    for limit in (None, 5)
    for workers in (0, 2)
]
CASES += [
    pytest.param({"mode": mode, "limit": 5, **extra}, id=f"{mode}-{name}")
    for mode in ("hooks", "ghost")
    for name, extra in {
        "convolutional": {"model": "convolutional"},
        "tokens": {"model": "tokens"},
        "sum": {"reduction": "sum", "lr": 0.005},
        "shuffled": {"poisson_sampling": False},
        "unwrapped": {"wrap_model": False},
        "thresholds": {"charging": True},
    }.items()
]


def check_steps(start, models, by_hand, *, limit, workers=0, model="perceptron", charging=False, **arguments):
    """Train, and compare every recorded step with brute force at the parameters that it was taken at."""
    module, dataset = models[model]()
    twin, count = copy.deepcopy(module), len(dataset)
    thresholds = np.linspace(0.0, 1.2, count)[np.random.default_rng(0).permutation(count)]
    rule = FixedThresholds(thresholds=thresholds) if charging else None
    limits = np.minimum(thresholds.astype(np.float32) if charging else np.full(count, 0.8, np.float32), 0.8)
    training = start(
        PrivacyEngine(accountant="rdp", charging=rule),
        module=module,
        dataset=dataset,
        loader={"num_workers": workers, "shuffle": True},
        **arguments,
    )
    x, y = dataset.tensors
    expected = []
    for _ in range(2):
        parameters, logical = training.parameters(), []
        with training.physical(limit) as loader:
            for batch in loader:
                before = training.engine.tracker.recorder.writer.num_steps
                logical.append(batch[0])
                training.step(batch)
                if training.engine.tracker.recorder.writer.num_steps > before:
                    expected.append((torch.cat(logical), parameters))
                    parameters, logical = training.parameters(), []
    steps = training.steps
    assert len(steps) == len(expected) == sum(n for _, _, n in training.engine.accountant.history)
    for step, (inputs, parameters) in zip(steps, expected, strict=True):
        if model == "tokens":
            assert sorted(map(tuple, inputs.tolist())) == sorted(
                map(tuple, x[step.positions.tolist()].tolist())
            )
        else:
            assert sorted(training.rows_of(inputs)) == sorted(step.positions.tolist())
        if len(step.positions):
            norms = by_hand(twin, parameters, x[step.positions.tolist()], y[step.positions.tolist()])
            entered = np.minimum(norms, limits[step.positions])
            assert (step.contributions <= limits[step.positions]).all()
            slack = 1e-5 if arguments["mode"] != "ghost" else 2e-5
            assert (step.contributions <= entered * (1 + slack)).all()
            # The gradients themselves are float32: their own rounding is the lower tolerance.
            assert (step.contributions >= entered * (1 - 3e-6) - 1e-6 * limits[step.positions]).all()
    return training


@pytest.mark.parametrize("case", CASES)
def test_positions_and_contributions_equal_brute_force(start, models, by_hand, case):
    check_steps(start, models, by_hand, **case)


def test_recording_norms_before_clipping_is_caught(start, models, by_hand, monkeypatch):
    clip = Tracker.clip

    def unclipped(self, norms):
        factors = clip(self, norms)
        self._measured = self._measured._replace(contributions=norms.astype(np.float32))
        return factors

    monkeypatch.setattr(Tracker, "clip", unclipped)
    with pytest.raises(AssertionError):
        check_steps(start, models, by_hand, mode="hooks", limit=None)


def test_positions_from_a_queue_that_the_sampler_fills_are_caught(start, models, by_hand, monkeypatch):
    queue, begin = [], Tracker.begin

    def late(self, batch):
        queue.append(batch.rows)
        begin(self, batch)
        if len(queue) > 1 and len(queue[-2]) == len(batch.rows):
            object.__setattr__(batch, "rows", queue[-2])

    monkeypatch.setattr(Tracker, "begin", late)
    with pytest.raises(AssertionError):
        check_steps(start, models, by_hand, mode="hooks", limit=None, poisson_sampling=False)


THRESHOLDS = np.linspace(0.01, 1.5, 97)


def released(start, models, mode, position, threshold):
    """The noiseless release of a full batch in float64, when one instance has this threshold."""
    own = THRESHOLDS.copy()
    own[position] = threshold
    torch.manual_seed(0)
    module, dataset = models["perceptron"]()
    x, y = dataset.tensors
    start(
        PrivacyEngine(accountant="rdp", charging=FixedThresholds(thresholds=own)),
        module=module.double(),
        dataset=TensorDataset(x.double(), y),
        mode=mode,
        noise_multiplier=0.0,
        batch_size=97,
    ).train()
    return torch.cat([p.grad.flatten() for p in module.parameters()]) * 97


def check_moves(start, models, mode):
    for position in (0, 13, 40, 96):
        own = released(start, models, mode, position, THRESHOLDS[position])
        moved = float((own - released(start, models, mode, position, 0.0)).norm())
        assert 0 < moved <= min(float(np.float32(THRESHOLDS[position])), 0.8)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_one_instance_moves_the_release_by_at_most_its_threshold(start, models, mode):
    """Zero-out neighbours: the noiseless releases differ by at most the threshold in Euclidean norm."""
    check_moves(start, models, mode)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_recording_thresholds_without_clipping_at_them_is_caught(start, models, mode, monkeypatch):
    def unclipped(norms, limits):
        return clip_factors(norms, np.where(limits == 0, 0.0, 0.8))[0], clip_factors(norms, limits)[1]

    monkeypatch.setattr(capture, "clip_factors", unclipped)
    with pytest.raises(AssertionError):
        check_moves(start, models, mode)


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
@pytest.mark.parametrize("limit", [None, 5])
def test_training_equals_stock_opacus(start, stock, mode, limit):
    ours, theirs = start(mode=mode).train(2, limit), start(stock(), mode=mode).train(2, limit)
    difference = (ours.weights - theirs.weights).abs().max() / theirs.weights.abs().max()
    assert difference < 2e-5
    assert ours.engine.accountant.history == theirs.engine.accountant.history
    assert [type(p) for p in (ours.model, ours.criterion)] == [
        type(p) for p in (theirs.model, theirs.criterion)
    ]
    assert isinstance(ours.loader, DPDataLoader) and len(ours.loader) == len(theirs.loader)


def test_an_instance_drawn_twice_adds_up(start):
    weights = torch.ones(97)
    weights[3] = 500
    sampler = WeightedRandomSampler(weights, 40, generator=torch.Generator().manual_seed(0))
    training = start(poisson_sampling=False, loader={"sampler": sampler}, max_grad_norm=0.1)
    drawn = []
    for batch in training.loader:
        training.step(batch)
        drawn.append(training.rows_of(batch[0]))
    for rows, step in zip(drawn, training.steps, strict=True):
        unique, counts = np.unique(rows, return_counts=True)
        assert counts.max() > 1
        assert step.positions.tolist() == unique.tolist()
        np.testing.assert_allclose(step.contributions, 0.1 * counts, rtol=1e-4)


def test_mechanism_is_described_and_stated_again_when_it_changes(start):
    training = start(lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(training.optimizer, step_size=3, gamma=0.5)
    for batch in training.loader:
        training.step(batch)
        scheduler.step()
    phases = [event for event in training.engine.ledger.events() if isinstance(event, Phase)]
    assert [phase.learning_rate for phase in phases] == [0.05, 0.025, 0.0125]
    first = phases[0]
    assert (first.kind, first.sampling, first.charging) == ("train", "poisson", "worst_case")
    assert first.noise_std == pytest.approx(0.7 * 0.8) and first.max_grad_norm == 0.8
    assert 0 <= first.sample_rate - training.loader.batch_sampler.sample_rate < 2**-24
    assert first.denominator == training.optimizer.expected_batch_size
    assert (first.optimizer, first.grad_sample_mode) == ("SGD", "hooks")


def test_sample_rate_is_the_samplers_own(start):
    """Opacus accounts at 1/len(loader), which differs from the sampler's rate when int(1/q) loses a step."""
    training = start(dataset=examples_of(99), batch_size=1)
    training.step(next(iter(training.loader)))
    phase = training.engine.ledger.phases[0]
    assert phase.sample_rate == 1 / 99
    assert training.engine.accountant.history == [(0.7, 1 / 98, 1)]


def examples_of(count):
    return TensorDataset(torch.randn(count, 10), torch.zeros(count, dtype=torch.int64))


def test_attach_to_part_of_the_data_maps_rows_to_positions(start):
    training = start().train()
    retained, writer = np.setdiff1d(np.arange(97), [4, 50]), training.engine.tracker.recorder.writer
    values = np.full(97, 0.8, np.float32)
    values[[4, 50]] = 0
    writer.append(Thresholds(values=values, source="forget"))
    before = writer.num_steps
    module = GradSampleModule(torch.nn.Linear(10, 3))
    optimizer = DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=0.8,
        expected_batch_size=10,
    )
    loader = DPDataLoader(Subset(training.dataset, retained.tolist()), sample_rate=0.2)
    digest = "sha256:" + "0" * 64
    tracker, tracked = attach(
        optimizer, loader, ledger=writer, positions=retained, kind="unlearn", plan_digest=digest
    )
    seen = []
    for x, y in tracked:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
        seen.append(training.rows_of(x))
    steps = training.steps[before:]
    assert [step.positions.tolist() for step in steps] == seen
    assert not {4, 50} & {i for rows in seen for i in rows}
    phase = tracker.ledger.phases[-1]
    assert (phase.kind, phase.plan_digest, phase.sample_rate) == ("unlearn", digest, 0.2)
    assert all((step.contributions <= 0.8).all() for step in steps)
