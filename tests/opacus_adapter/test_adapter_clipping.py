"""Norms are upper bounds, factors are lower bounds: what enters the sum never exceeds what is recorded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils.data import DataLoader, TensorDataset

from per_instance_accountant.ledger import Step
from per_instance_accountant.opacus_adapter import PrivacyEngine, clipping
from per_instance_accountant.opacus_adapter.clipping import clip_factors, instance_norms, round_up
from per_instance_accountant.opacus_adapter.ghost import linear_norms

FEW = settings(max_examples=60, deadline=None, derandomize=True)


def exact_norms(gradients):
    rows = [g.double().reshape(len(g), -1) for g in gradients]
    return torch.linalg.vector_norm(torch.cat(rows, dim=1), dim=1).numpy()


@FEW
@given(
    st.lists(st.integers(1, 700), min_size=1, max_size=4),
    st.integers(1, 6),
    st.floats(-44, 37),
    st.integers(0, 2**32 - 1),
)
def test_norms_are_tight_upper_bounds(sizes, rows, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0**exponent
    gradients = [torch.randn(rows, size, generator=generator) * scale for size in sizes]
    norms, exact = instance_norms(gradients), exact_norms(gradients)
    assert (norms >= exact).all()
    if exponent > -14:
        assert (norms <= exact * (1 + 1e-5)).all()


@pytest.mark.parametrize("shape", [(3, 1_000_003), (2, 401408)])
def test_norms_of_long_rows(shape):
    """Equal entries make float32 summation drift in one direction: the worst case for a long sum."""
    gradient = torch.full(shape, 0.1)
    norms, exact = instance_norms([gradient]), exact_norms([gradient])
    assert (norms >= exact).all() and (norms <= exact * (1 + 1e-5)).all()


def test_seeded_bug_norm_summed_in_one_go_is_caught():
    """The sequential float32 sum that blocks replace falls below the exact norm."""
    gradient = torch.full((1, 1_000_003), 0.1)
    naive = float(np.sqrt(np.add.accumulate((gradient.numpy()[0] ** 2).astype(np.float32))[-1]))
    assert naive * (1 + clipping.NORM_SLACK) < exact_norms([gradient])[0]


@FEW
@given(
    hnp.arrays(np.float64, st.integers(1, 20), elements=st.floats(0, 1e30)),
    st.floats(0, 100),
    st.booleans(),
)
def test_contributions_bound_what_enters_and_thresholds_bound_contributions(norms, limit, individual):
    limits = np.full(len(norms), limit) if individual else limit
    factors, contributions = clip_factors(norms, limits)
    assert factors.dtype == contributions.dtype == np.float32
    assert (factors.astype(np.float64) * norms <= contributions).all()
    assert (factors.astype(np.float64) * norms <= limit).all()
    assert (contributions <= round_up(np.array([limit]))).all()
    assert ((factors >= 0) & (factors <= 1)).all()
    small = norms <= limit - 1e-6 * (1 + limit)
    assert (factors[small] == 1).all()


def test_seeded_bug_rounding_to_nearest_is_caught():
    norms = np.random.default_rng(0).uniform(0.1, 10, 1000)
    nearest = np.minimum(1, 0.7 / norms).astype(np.float32)
    assert (nearest * norms > 0.7).any()
    factors, _ = clip_factors(norms, 0.7)
    assert (factors * norms <= 0.7).all()


@FEW
@given(hnp.arrays(np.float64, 5, elements=st.floats(0, 3e38)))
def test_round_up_is_the_next_float32(values):
    up = round_up(values)
    assert (up >= values).all()
    assert (np.nextafter(up, np.float32(-1)) < values)[values > 0].all()


def test_clipped_rows_have_at_most_the_threshold_in_float32():
    """Rows multiplied as the optimizer multiplies them, measured in float64."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(200, 5000, generator=generator) * torch.logspace(-3, 6, 200)[:, None]
    limits = np.random.default_rng(0).uniform(1e-3, 2, 200)
    factors, contributions = clip_factors(instance_norms([gradient]), limits)
    entered = exact_norms([gradient * torch.from_numpy(factors)[:, None]])
    assert (entered <= contributions).all() and (entered <= limits).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_visible(value):
    gradient = torch.ones(3, 300)
    gradient[1, 170] = value
    assert np.isfinite(instance_norms([torch.ones(3, 2), gradient])).tolist() == [True, False, True]


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_linear_norms_survive_cancellation(steps):
    """Signals that sum to almost nothing over positions: float32 inner products lose such norms."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 8)
    activations = 1 + 1e-3 * torch.randn(6, steps, 16)
    signals = torch.randn(6, steps, 8)
    if steps > 1:
        signals = signals - signals.mean(dim=1, keepdim=True)
    if steps == 1:
        activations, signals = activations[:, 0], signals[:, 0]
    expected = torch.einsum("n...i,n...j->nij", signals.double(), activations.double()).flatten(1).norm(dim=1)
    norms = linear_norms(layer, [activations], signals)
    torch.testing.assert_close(norms[layer.weight], expected, rtol=1e-6, atol=0)
    bias = signals.double().reshape(6, -1, 8).sum(dim=1).norm(dim=1)
    torch.testing.assert_close(norms[layer.bias], bias, rtol=1e-6, atol=1e-12)


def test_linear_norms_of_an_empty_batch():
    layer = torch.nn.Linear(4, 2)
    norms = linear_norms(layer, [torch.zeros(0, 4)], torch.zeros(0, 2))
    assert norms[layer.weight].shape == norms[layer.bias].shape == (0,)


class Scale(torch.nn.Module):
    """One large parameter whose gradient has equal entries: long float32 sums of it drift to one side."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1_000_003))

    def forward(self, x):
        return (x * self.weight).sum(dim=1)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_norms_of_a_layer_that_float32_sums_get_wrong(mode):
    inputs = torch.tensor([[0.3e-4], [0.1e-4], [0.7e-4]])
    dataset = TensorDataset(inputs, torch.full((3,), -0.5))
    engine, module = PrivacyEngine(accountant="rdp"), Scale()
    made = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(dataset, batch_size=3),
        criterion=torch.nn.MSELoss(),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )
    x, y = next(iter(made[-1]))
    made[1].zero_grad()
    criterion = made[2] if mode == "ghost" else torch.nn.functional.mse_loss
    criterion(made[0](x), y).backward()
    made[1].step()
    (step,) = [event for event in engine.ledger.events() if isinstance(event, Step)]
    exact = inputs.double().numpy()[:, 0] * np.sqrt(1_000_003)
    assert (step.contributions >= exact).all() and (step.contributions <= exact * (1 + 2e-5)).all()


def test_seeded_bug_norms_of_opacus_are_caught():
    values = torch.linspace(0.1, 1, 10)
    stock = torch.stack([torch.full((1, 1_000_003), v).norm(2, dim=-1)[0] for v in values.tolist()])
    short = stock.double() * (1 + clipping.NORM_SLACK) < values.double() * np.sqrt(1_000_003)
    assert short.any()


SHAPES = [(), (3,), (10, 3), (7, 64, 100), (300, 700), (1, 2**17), (10007,)]
"""Of parameters. Large batches of the later ones are added strip by strip."""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 2, 37, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_clipped_sum_is_the_sum_of_scaled_rows(shape, count, dtype):
    generator = torch.Generator().manual_seed(count)
    gradient = torch.randn(count, *shape, generator=generator, dtype=dtype)
    own = torch.rand(count, generator=generator).to(dtype)
    total = clipping.clipped_sum(own, gradient)
    assert total.shape == shape and total.dtype == dtype
    scaled = own.double().view(-1, *[1] * len(shape)) * gradient.double()
    unit = torch.finfo(dtype).eps
    assert ((total.double() - scaled.sum(0)).abs() <= count * unit * scaled.abs().sum(0)).all()


def test_strips_are_used_and_only_where_they_help():
    assert clipping.strip_width(2**17) == 8192 and clipping.strip_width(300 * 700) == 7500
    assert clipping.strip_width(10007) == 0


@pytest.mark.parametrize("shape", [(3,), (300, 700)])
def test_who_is_clipped_at_zero_leaves_no_bit_in_the_sum(shape):
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(20, *shape, generator=generator)
    own = torch.ones(20)
    own[[2, 11]] = 0
    before = clipping.clipped_sum(own, gradient)
    gradient[[2, 11]] *= 1e6
    assert torch.equal(before, clipping.clipped_sum(own, gradient))


def test_rows_that_are_not_contiguous_are_added_as_well():
    gradient = torch.randn(300, 20, 700, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    own = torch.rand(20, generator=torch.Generator().manual_seed(1))
    expected = torch.einsum("i,i...", own.double(), gradient.double())
    assert torch.allclose(clipping.clipped_sum(own, gradient).double(), expected, atol=1e-5)
