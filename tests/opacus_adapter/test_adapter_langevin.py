"""The law of Langevin steps: the exact law of the discretised dynamics, with controls that must fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from per_instance_accountant import PrivacyEngine, account
from per_instance_accountant.errors import PiaError
from per_instance_accountant.opacus_adapter import SGLD
from per_instance_accountant.opacus_adapter.sgld import STEP_KEY

WIDTH, COUNT = 4000, 8
"""Independent coordinates of theta, each with potential ``sum_i (theta - x_i)^2 / 2``."""


def quadratic(
    sampler: SGLD,
    *,
    reduction: str = "mean",
    mode: str = "hooks",
    seed: int = 0,
    spoil: Callable[[Any], None] = lambda optimizer: None,
) -> tuple[Any, Any, Callable[[int], np.ndarray]]:
    """Engine, optimizer and a function that makes some full-batch steps and returns theta; x_i = 0."""
    torch.manual_seed(seed)
    module = nn.Linear(1, WIDTH, bias=False)
    nn.init.zeros_(module.weight)
    engine = PrivacyEngine(accountant="rdp")
    made = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(torch.ones(COUNT, 1)), batch_size=COUNT),
        criterion=lambda out, _: out,
        noise_multiplier=1.0,
        max_grad_norm=1e6,
        loss_reduction=reduction,
        grad_sample_mode=mode,
    )
    model, optimizer, loader = made
    sampler.drive(engine)
    spoil(optimizer)

    def run(steps: int) -> np.ndarray:
        for _ in range(steps):
            for (x,) in loader:
                optimizer.zero_grad()
                losses = model(x).square().sum(dim=1) / 2
                (losses.mean() if reduction == "mean" else losses.sum()).backward()
                optimizer.step()
        return module.weight.detach().double().flatten().numpy()

    return engine, optimizer, run


def p_value(theta: np.ndarray, variance: float) -> float:
    law, statistic = stats.chi2(theta.size), float((theta**2).sum()) / variance
    return float(2 * min(law.cdf(statistic), law.sf(statistic)))


def variance_after(sampler: SGLD, steps: int, variance: float = 0.0) -> float:
    """Exact: theta is a linear recursion with Gaussian noise."""
    curvature = (COUNT if sampler.potential == "sum" else 1) + sampler.prior_precision
    for step in range(steps):
        eta = sampler.step_size_at(step)
        variance = (1 - eta * curvature) ** 2 * variance + 2 * eta * sampler.temperature
    return variance


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "sampler",
    [
        SGLD(step_size=0.06, temperature=0.7),
        SGLD(step_size=0.5, temperature=0.7, potential="mean"),
        SGLD(step_size=0.05, temperature=2.0, prior_precision=3.0),
        SGLD(step_size=0.1, temperature=0.7, power=0.55, offset=5.0),
    ],
    ids=["sum", "mean", "prior", "schedule"],
)
def test_the_law_is_that_of_the_discretised_dynamics(sampler, reduction):
    _, _, run = quadratic(sampler, reduction=reduction)
    theta = run(30)
    exact = variance_after(sampler, 30)
    assert p_value(theta, exact) > 1e-4
    # Controls: 10 % more noise, and another temperature of the same size.
    assert p_value(theta, exact * 1.21) < 1e-6
    assert p_value(theta, exact / 1.21) < 1e-6


def test_the_stationary_law_is_not_the_posterior_of_continuous_time():
    sampler = SGLD(step_size=0.06, temperature=0.7)
    _, _, run = quadratic(sampler)
    theta = run(30)
    stationary = sampler.temperature / (COUNT * (1 - sampler.step_size * COUNT / 2))
    assert variance_after(sampler, 30) == pytest.approx(stationary, rel=1e-6)
    assert p_value(theta, stationary) > 1e-4
    assert p_value(theta, sampler.temperature / COUNT) < 1e-12


def test_noise_that_does_not_follow_the_schedule_has_another_law():
    """Seeded bug: the learning rate decays and the noise multiplier stays."""

    def constant_noise(optimizer: Any) -> None:
        first = optimizer.noise_multiplier
        optimizer.original_optimizer.register_step_post_hook(
            lambda *_: setattr(optimizer, "noise_multiplier", first)
        )

    sampler = SGLD(step_size=0.1, temperature=0.7, power=0.55, offset=5.0)
    _, _, run = quadratic(sampler, spoil=constant_noise)
    assert p_value(run(30), variance_after(sampler, 30)) < 1e-12


def test_a_step_costs_what_the_formula_says():
    """order * eta * c^2 / (4 T) for the full batch, whatever the clip norm is, when c is the bound."""
    sampler = SGLD(step_size=1e-3, temperature=0.7)
    engine, _, run = quadratic(sampler)
    run(5)
    loss = account(engine.ledger, orders=[3.0])
    expected = 5 * 3.0 * sampler.step_size * 1e6**2 / (4 * sampler.temperature)
    assert loss.worst_case_rdp[0] == pytest.approx(expected, rel=1e-5)
    phase = engine.ledger.phases[0]
    spread = phase.noise_std * phase.learning_rate / phase.denominator
    assert spread == pytest.approx(math.sqrt(2 * sampler.step_size * sampler.temperature), rel=1e-12)


@pytest.mark.parametrize("potential", ["sum", "mean"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("batch_size", [7, 20, 61])
def test_the_drift_is_unbiased_also_where_opacus_rounds_the_expected_batch(potential, reduction, batch_size):
    torch.manual_seed(0)
    module = nn.Linear(2, 1)
    engine = PrivacyEngine(accountant="rdp")
    engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(torch.ones(61, 2), torch.ones(61, 1)), batch_size=batch_size),
        noise_multiplier=1.0,
        max_grad_norm=0.3,
        loss_reduction=reduction,
    )
    sampler = SGLD(step_size=1e-3, potential=potential)
    sampler.drive(engine)
    phase = engine.tracker.recorder.mechanism()
    # A clipped sum has expectation rate * sum over all instances.
    drift = phase.learning_rate / phase.denominator * phase.sample_rate * 61
    assert drift == pytest.approx(sampler.step_size * (61 if potential == "sum" else 1), rel=1e-12)
    spread = phase.learning_rate / phase.denominator * phase.noise_std
    assert spread == pytest.approx(math.sqrt(2 * sampler.step_size), rel=1e-12)


def test_the_schedule_continues_after_a_checkpoint(tmp_path):
    sampler = SGLD(step_size=0.1, power=0.55, offset=5.0)

    def start() -> tuple[Any, Any, Any, Any]:
        module = nn.Linear(2, 1)
        engine = PrivacyEngine(accountant="rdp", ledger=tmp_path / "run")
        data = TensorDataset(torch.ones(20, 2), torch.ones(20, 1))
        made = engine.make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
            data_loader=DataLoader(data, batch_size=5),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        sampler.drive(engine)
        return engine, *made

    def epoch(model: Any, optimizer: Any, loader: Any) -> None:
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()

    engine, model, optimizer, loader = start()
    epoch(model, optimizer, loader)
    engine.save_checkpoint(path=tmp_path / "model.pt", module=model, optimizer=optimizer)
    engine.close()
    first = optimizer.noise_multiplier
    engine, model, optimizer, loader = start()
    assert optimizer.noise_multiplier < first
    engine.load_checkpoint(path=tmp_path / "model.pt", module=model, optimizer=optimizer)
    assert optimizer.noise_multiplier == first
    assert optimizer.original_optimizer.param_groups[0][STEP_KEY] == 4
    torch.seed()
    epoch(model, optimizer, loader)
    rates = [phase.learning_rate for phase in engine.ledger.phases]
    etas = [sampler.step_size_at(step) for step in range(8)]
    np.testing.assert_allclose(np.array(rates) / rates[0], np.array(etas) / etas[0], rtol=1e-12)
    noises = [phase.noise_std for phase in engine.ledger.phases]
    np.testing.assert_allclose(np.array(noises) / noises[0], np.sqrt(etas[0] / np.array(etas)), rtol=1e-12)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.Adam(p, lr=1.0),
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=1.0, maximize=True),
    ],
)
def test_other_optimizers_are_refused(optimizer):
    module = nn.Linear(2, 1)
    engine = PrivacyEngine(accountant="rdp")
    engine.make_private(
        module=module,
        optimizer=optimizer(module.parameters()),
        data_loader=DataLoader(TensorDataset(torch.ones(20, 2), torch.ones(20, 1)), batch_size=5),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    with pytest.raises(PiaError, match="PIA060"):
        SGLD(step_size=0.1).drive(engine)


def test_driven_twice_is_refused():
    engine, _, _ = quadratic(SGLD(step_size=0.1))
    with pytest.raises(PiaError, match=r"PIA060.*driven already"):
        SGLD(step_size=0.1).drive(engine)


@pytest.mark.parametrize(
    "options",
    [
        {"step_size": 0.0},
        {"step_size": math.nan},
        {"temperature": -1.0},
        {"potential": "other"},
        {"power": -0.1},
        {"offset": 0.0},
        {"prior_precision": math.inf},
    ],
)
def test_impossible_dynamics_are_refused(options):
    with pytest.raises(PiaError, match="PIA070"):
        SGLD(**{"step_size": 0.1, **options})
