"""What optimizers really release: stock and tracked, with seeded faults."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from opacus import PrivacyEngine as StockEngine
from opacus.accountants import RDPAccountant
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from per_instance_accountant import PrivacyEngine
from per_instance_accountant.testing.components import (
    ComponentFault,
    check_clipping,
    check_loading_runs_no_code,
    check_neighbours_release_alike,
    check_noise,
    check_noise_is_fresh,
    check_norms_agree,
)
from per_instance_accountant.testing.releases import (
    check_noise_in_training,
    check_noise_of,
    noise_of,
    norms_of_gradients,
    watch_releases,
)

torch.set_num_threads(1)
ENGINES = {"stock": StockEngine, "tracked": PrivacyEngine}


def architecture(width=30):
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 3))


def training(engine, size=60, mode="hooks", batch_size=12, width=30):
    torch.manual_seed(0)
    module = architecture(width)
    data = TensorDataset(5 * torch.randn(size, 8), torch.randint(0, 3, (size,)))
    made = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.05),
        data_loader=DataLoader(data, batch_size=batch_size),
        criterion=nn.CrossEntropyLoss(),
        noise_multiplier=0.8,
        max_grad_norm=0.5,
        grad_sample_mode=mode,
    )
    criterion = made[2] if len(made) == 4 else nn.CrossEntropyLoss()
    return module, made[0], made[1], criterion, made[-1]


def steps(model, optimizer, criterion, loader):
    for x, y in loader:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("name", ENGINES)
def test_the_noise_of_an_optimizer_is_measured_before_training(name):
    _, model, optimizer, criterion, loader = training(ENGINES[name]())
    assert check_noise_of(optimizer, deficit=0.03) > 1e-6
    steps(model, optimizer, criterion, loader)
    optimizer.zero_grad()
    add_noise = optimizer.add_noise

    def less() -> None:
        optimizer.noise_multiplier = 0.8 * 0.97
        add_noise()
        optimizer.noise_multiplier = 0.8

    optimizer.add_noise = less
    with pytest.raises(ComponentFault, match="of the one claimed"):
        check_noise_of(optimizer, deficit=0.03)


def weights_after(engine, factor=1.0, measure=True):
    """Two steps of a model with 360,003 parameters, with ``factor`` times the noise that is claimed."""
    _, model, optimizer, criterion, loader = training(engine, size=12, batch_size=4, width=30_000)
    add_noise, stated = optimizer.add_noise, optimizer.noise_multiplier

    def seeded_mistake() -> None:
        optimizer.noise_multiplier = stated * factor
        add_noise()
        optimizer.noise_multiplier = stated

    if factor != 1:
        optimizer.add_noise = seeded_mistake
    if measure:
        check_noise_in_training(optimizer)
    torch.manual_seed(3)
    try:
        for number, (x, y) in enumerate(loader):
            if number == 2:
                break
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    finally:
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return weights, torch.random.get_rng_state()


@pytest.mark.parametrize("name", ENGINES)
def test_a_hundredth_less_noise_stops_the_first_step_and_measuring_draws_nothing(name):
    measured, plain = weights_after(ENGINES[name]()), weights_after(ENGINES[name](), measure=False)
    assert all(torch.equal(a, b) for a, b in zip(measured, plain, strict=True))
    with pytest.raises(ComponentFault, match=r"0\.9[89]\d\d of the one claimed"):
        weights_after(ENGINES[name](), factor=0.99)


def test_the_noise_of_several_small_steps_is_judged_together():
    _, model, optimizer, criterion, loader = training(StockEngine(), size=40, batch_size=4)
    add_noise = optimizer.add_noise

    def less() -> None:
        optimizer.noise_multiplier = 0.8 * 0.8
        add_noise()
        optimizer.noise_multiplier = 0.8

    optimizer.add_noise = less
    check_noise_in_training(optimizer, deficit=0.2)
    with pytest.raises(ComponentFault, match="of the one claimed"):
        steps(model, optimizer, criterion, loader)
    assert optimizer.add_noise is less


def test_noise_from_one_seed_for_every_step_is_found():
    _, _, optimizer, _, _ = training(StockEngine())
    add_noise = optimizer.add_noise

    def again() -> None:
        torch.manual_seed(1)
        add_noise()

    optimizer.add_noise = again
    with pytest.raises(ComponentFault, match="correlation"):
        check_noise_is_fresh(noise_of(optimizer, 2000))


def test_noise_is_not_measured_inside_a_batch():
    _, _, optimizer, _, _ = training(StockEngine())
    optimizer.params[0].summed_grad = torch.zeros_like(optimizer.params[0])
    with pytest.raises(ValueError, match="accumulated"):
        noise_of(optimizer, 10)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("name", ENGINES)
def test_releases_of_a_training(name, mode):
    _, model, optimizer, criterion, loader = training(ENGINES[name](), mode=mode, width=200)
    with watch_releases(optimizer) as releases:
        steps(model, optimizer, criterion, loader)
    steps(model, optimizer, criterion, loader)
    assert len(releases) == len(loader)
    noise = np.stack([r.noise for r in releases])
    assert check_noise(noise[:, :2000], releases[0].claimed_std) > 1e-6 and check_noise_is_fresh(noise) > 1e-6
    assert {round(r.denominator, 4) for r in releases} == {12.0}
    # The noise is the difference of float32 numbers, and the sum of a batch is at most B clip norms.
    assert check_clipping([r.clipped_sum for r in releases], 0.5 * 60) < 1


@pytest.mark.parametrize("name", ENGINES)
def test_one_instance_moves_the_sum_by_the_clip_norm_at_most(name):
    _, model, optimizer, criterion, loader = training(ENGINES[name](), size=1, batch_size=1)
    with watch_releases(optimizer) as releases:
        for _ in range(3):
            steps(model, optimizer, criterion, loader)
    sums = [r.clipped_sum for r in releases]
    assert 0.9 < check_clipping(sums, 0.5) <= 1 + 1e-6
    with pytest.raises(ComponentFault):
        check_clipping(2 * np.stack(sums), 0.5)


def scales_of(engine):
    def scales(size):
        _, _, optimizer, _, loader = training(engine(), size=size, batch_size=10)
        return {
            "denominator": float(optimizer.expected_batch_size),
            "noise": float(optimizer.noise_multiplier * optimizer.max_grad_norm),
            "sample rate": float(loader.sample_rate),
        }

    return scales


def test_opacus_scales_its_updates_by_a_number_that_counts_the_data():
    """A known property of Opacus (issues 571 and 819), which our engine inherits on purpose: it stays equal
    to Opacus step by step, and its ledger records the denominator as public."""
    for engine in (StockEngine, PrivacyEngine):
        with pytest.raises(
            ComponentFault, match=r"denominator is 9\.0 for 99 instances and 9\.0|denominator"
        ):
            check_neighbours_release_alike(scales_of(engine), 99)


def test_ghost_norms_are_those_of_the_gradients():
    module, model, _, criterion, loader = training(PrivacyEngine(), mode="ghost")
    x, y = next(iter(loader))
    plain = architecture()
    plain.load_state_dict(module.state_dict())
    exact = norms_of_gradients(plain, nn.functional.cross_entropy, x, y)
    criterion(model(x), y).backward()
    measured = model.per_sample_gradient_norms.numpy()
    assert check_norms_agree(measured, exact) < 1e-4
    with pytest.raises(ComponentFault):
        check_norms_agree(measured * (1 - 2e-4), exact)


def test_the_checkpoint_of_opacus_runs_code_and_ours_does_not():
    def load_with(engine):
        def load(path):
            module, _, optimizer, _, _ = training(engine)
            engine.load_checkpoint(path=path, module=module, optimizer=optimizer)

        return load

    with pytest.raises(ComponentFault, match="code of the file was run"):
        check_loading_runs_no_code(load_with(StockEngine()))
    check_loading_runs_no_code(load_with(PrivacyEngine()))


def test_an_accountant_of_opacus_is_not_copied_by_reference():
    """The premise of the laws about state: a deep copy shares nothing."""
    accountant = RDPAccountant()
    accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    other = copy.deepcopy(accountant)
    other.step(noise_multiplier=1.0, sample_rate=0.1)
    assert accountant.history[0][2] == 1 and other.history[0][2] == 2
