"""Langevin steps made of DP-SGD: the injected noise has variance 2 * step_size * temperature."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from per_instance_accountant.divergence import gaussian_rdp
from per_instance_accountant.errors import UsageError
from per_instance_accountant.opacus_adapter import PrivacyEngine, sgld_configuration

STEP, TEMPERATURE, CLIP, COUNT, BATCH = 1e-3, 0.5, 0.7, 200, 20


def configure(**options):
    arguments = {
        "step_size": STEP,
        "temperature": TEMPERATURE,
        "expected_batch_size": BATCH,
        "num_instances": COUNT,
        "max_grad_norm": CLIP,
    }
    return sgld_configuration(**{**arguments, **options})


def moves(potential, reduction, mode, noise_factor=1.0, gradient=0.0):
    """Moves of a linear model without bias; each instance has gradient ``gradient`` in every entry."""
    torch.manual_seed(0)
    width = 2000
    target = torch.full((COUNT, 1), -gradient / 2)
    dataset = TensorDataset(torch.ones(COUNT, width) if gradient else torch.zeros(COUNT, width), target)
    module = nn.Linear(width, 1, bias=False)
    nn.init.zeros_(module.weight)
    lr, noise = configure(
        potential=potential, loss_reduction=reduction, max_grad_norm=1e3 if gradient else CLIP
    )
    criterion = nn.MSELoss(reduction=reduction)
    made = PrivacyEngine(accountant="rdp").make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=lr),
        data_loader=DataLoader(dataset, batch_size=BATCH),
        criterion=criterion,
        noise_multiplier=noise * noise_factor,
        max_grad_norm=1e3 if gradient else CLIP,
        loss_reduction=reduction,
        grad_sample_mode=mode,
    )
    model, optimizer, loader = made[0], made[1], made[-1]
    criterion = made[2] if len(made) == 4 else criterion
    found = []
    for x, y in loader:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        found.append((len(x), module.weight.detach().flatten().clone()))
        module.weight.data.zero_()
    return found


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("potential", ["sum", "mean"])
def test_injected_variance(potential, reduction, mode):
    def p_value(noise_factor):
        noise = torch.cat([move for _, move in moves(potential, reduction, mode, noise_factor)]).double()
        statistic = float((noise**2).sum()) / (2 * STEP * TEMPERATURE)
        law = stats.chi2(len(noise))
        return 2 * min(law.cdf(statistic), law.sf(statistic))

    assert p_value(1.0) > 1e-4
    assert p_value(1.05) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("potential", ["sum", "mean"])
def test_drift_is_an_unbiased_step_along_the_potential(potential, reduction):
    """All gradients are g: a batch of n moves by -step_size * (N or 1) * g * n / B on average."""
    gradient = 0.4
    scale = COUNT if potential == "sum" else 1
    for size, move in moves(potential, reduction, "hooks", gradient=gradient):
        expected = -STEP * scale * gradient * size / BATCH
        error = np.sqrt(2 * STEP * TEMPERATURE / len(move))
        assert float(move.mean()) == pytest.approx(expected, abs=6 * error)
        assert potential == "mean" or abs(expected) > 20 * error


def test_divergence_does_not_depend_on_the_clip_norm():
    for clip in (0.5, 5.0):
        _, noise = configure(max_grad_norm=clip)
        rdp = gaussian_rdp(0.3 / (noise * clip), [8.0])[0, 0]
        assert rdp == pytest.approx(8 * STEP * COUNT**2 * 0.3**2 / (4 * TEMPERATURE * BATCH**2), rel=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"step_size": 0.0},
        {"temperature": float("nan")},
        {"num_instances": -1},
        {"potential": "other"},
        {"loss_reduction": "none"},
    ],
)
def test_refused(options):
    with pytest.raises(UsageError, match="PIA070"):
        configure(**options)
