"""How often a Poisson loader really draws an instance, against what is charged for."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from scipy import stats
from torch.utils.data import DataLoader, TensorDataset

from per_instance_accountant.errors import GuaranteeError
from per_instance_accountant.opacus_adapter import PrivacyEngine, drawing

pytestmark = pytest.mark.compat
BITS = {torch.float32: 24, torch.float64: 53}
rates = st.floats(-9.5, 0).map(lambda exponent: 10.0**exponent)


def probability(sampler: UniformWithReplacementSampler, bits: int) -> Fraction:
    """That the sampler draws an instance: how many multiples of 2^-bits torch finds below its rate."""
    near = max(0, int(sampler.sample_rate * 2**bits) - 2)
    candidates = [k for k in range(near, near + 5) if k < 2**bits]
    values = torch.tensor([k / 2**bits for k in candidates])  # As torch.rand makes them.
    return Fraction(near + int((values < sampler.sample_rate).sum()), 2**bits)


@pytest.fixture(params=BITS, ids=str)
def bits(request):
    torch.set_default_dtype(request.param)
    yield BITS[request.param]
    torch.set_default_dtype(torch.float32)


def test_uniform_numbers_are_multiples_of_the_resolution(bits):
    assert drawing.resolution() == 2.0**-bits
    scaled = torch.rand(1 << 18, generator=torch.Generator().manual_seed(0)).double() * 2.0**bits
    assert torch.equal(scaled, scaled.round())
    assert (scaled % 2 == 1).double().mean() > 0.4


def check_that_draws_are_charged(bits: int, *rates: float) -> None:
    for rate in rates:
        check_draws(rate, bits)


def check_draws(rate: float, bits: int) -> None:
    sampler = UniformWithReplacementSampler(num_samples=1, sample_rate=rate, steps=1)
    charged = drawing.settle_rate(sampler)
    drawn = probability(sampler, bits)
    assert drawn <= Fraction(charged)
    # And hardly less, or the denominator of a mean would be wrong.
    assert charged <= max(rate, 2.0**-bits)
    assert Fraction(charged) - drawn < Fraction(2, 2**bits)


@given(rate=rates)
@example(rate=1.0)
@example(rate=2.0**-24)
@example(rate=1 / 99)
@example(rate=0.1)
def test_nobody_is_drawn_more_often_than_charged(rate):
    check_draws(rate, 24)


def test_nobody_is_drawn_more_often_than_charged_at_other_resolutions(bits):
    check_that_draws_are_charged(bits, 1.0, 0.3, 1 / 99, 1e-4, 1e-8)


@pytest.mark.parametrize("careless", [float, round, math.ceil])
def test_seeded_bug_other_roundings_are_caught(careless, monkeypatch):
    monkeypatch.setattr(drawing.math, "floor", careless)
    with pytest.raises(AssertionError):
        check_that_draws_are_charged(24, 0.3, 1 / 99, 1e-4, 1e-6)


@pytest.mark.parametrize(("rate", "excess"), [(1e-8, 5.9), (1e-6, 1.013), (1e-4, 1.00015)])
def test_stock_samplers_draw_more_often_than_their_rate(rate, excess):
    stock = UniformWithReplacementSampler(num_samples=1, sample_rate=rate, steps=1)
    assert probability(stock, 24) > Fraction(rate) * Fraction(excess)


def test_all_bits_of_a_source_reach_a_generator():
    """Seeds that agree in 32 bits give the same numbers in PyTorch: one of 100 runs of 10,000 steps that are
    seeded one by one would draw the same noise twice."""
    same = [torch.Generator().manual_seed(5 + (high << 32)) for high in range(2)]
    assert torch.equal(*(torch.rand(100, generator=generator) for generator in same))
    sources = [number.to_bytes(4, "big") for number in range(200)]
    streams = torch.stack([torch.rand(100, generator=source_of(source)) for source in sources])
    assert len(streams.unique(dim=0)) == 200
    assert stats.kstest(streams.flatten().numpy(), "uniform").pvalue > 0.01
    assert torch.corrcoef(streams).fill_diagonal_(0).abs().max() < 0.5
    again = torch.randn(100, generator=source_of(sources[0]))
    assert torch.equal(again, torch.randn(100, generator=source_of(sources[0])))
    words = source_of(b"").get_state()[24:5016].view(624, 8)
    assert len(words.unique(dim=0)) == 624


def source_of(source: bytes) -> torch.Generator:
    return drawing.set_generator(torch.Generator(), source)


def test_the_loader_draws_at_what_the_ledger_says():
    data = TensorDataset(torch.randn(1000, 4), torch.zeros(1000, dtype=torch.int64))
    engine, model = PrivacyEngine(accountant="rdp"), torch.nn.Linear(4, 2)
    _, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=30),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    assert probability(loader.batch_sampler, 24) <= Fraction(engine.tracker.recorder.setting.sample_rate)
    batches = iter(loader)
    x, y = next(batches)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(GuaranteeError, match="PIA010"):
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert engine.ledger.num_steps == 0
