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

from per_instance_accountant.opacus_adapter import drawing

pytestmark = pytest.mark.compat
pytestmark = pytest.mark.compat
BITS = {torch.float32: 24, torch.float64: 53}
rates = st.floats(-9.5, 0).map(lambda exponent: 10.0**exponent)


def probability(sampler: UniformWithReplacementSampler) -> Fraction:
    """That the sampler draws an instance: how many multiples of 2^-24 torch finds below its rate."""
    near = max(0, int(sampler.sample_rate * 2**24) - 2)
    values = torch.tensor([k / 2**24 for k in range(near, min(near + 5, 2**24))], dtype=torch.float32)
    return Fraction(near + int((values < sampler.sample_rate).sum()), 2**24)


def test_uniform_numbers_are_multiples_of_the_step():
    scaled = torch.rand(1 << 18, generator=torch.Generator().manual_seed(0)).double() / drawing.STEP
    assert torch.equal(scaled, scaled.round())
    assert (scaled % 2 == 1).double().mean() > 0.4


def check_that_draws_are_charged(*rates: float) -> None:
    for rate in rates:
        sampler = UniformWithReplacementSampler(num_samples=1, sample_rate=rate, steps=1)
        charged, drawn = drawing.settle_rate(sampler), probability(sampler)
        assert drawn <= Fraction(charged)
        # And hardly less, or the denominator of a mean would be wrong.
        assert charged <= max(rate, 2.0**-24)
        assert Fraction(charged) - drawn < Fraction(2, 2**24)


@given(rate=rates)
@example(rate=1.0)
@example(rate=2.0**-24)
@example(rate=1 / 99)
@example(rate=0.1)
def test_nobody_is_drawn_more_often_than_charged(rate):
    check_that_draws_are_charged(rate)


@pytest.mark.parametrize("careless", [float, round, math.ceil])
def test_seeded_bug_other_roundings_are_caught(careless, monkeypatch):
    monkeypatch.setattr(drawing.math, "floor", careless)
    with pytest.raises(AssertionError):
        check_that_draws_are_charged(0.3, 1 / 99, 1e-4, 1e-6)


@pytest.mark.parametrize(("rate", "excess"), [(1e-8, 5.9), (1e-6, 1.013), (1e-4, 1.00015)])
def test_stock_samplers_draw_more_often_than_their_rate(rate, excess):
    stock = UniformWithReplacementSampler(num_samples=1, sample_rate=rate, steps=1)
    assert probability(stock) > Fraction(rate) * Fraction(excess)


def drawn(sampler: UniformWithReplacementSampler) -> float:
    return sum(map(len, sampler)) / (sampler.steps * sampler.num_samples)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_precision_has_no_part_in_draws(dtype):
    def sampler():
        generator = torch.Generator().manual_seed(0)
        return UniformWithReplacementSampler(
            num_samples=200_000, sample_rate=1 / 64, steps=20, generator=generator
        )

    settled, usual = sampler(), drawn(sampler())
    drawing.settle_rate(settled)
    torch.set_default_dtype(dtype)
    try:
        assert drawn(settled) == usual == pytest.approx(1 / 64, rel=0.01)
        if dtype == torch.bfloat16:  # Some of its numbers are rounded up to 1, which becomes 0.
            assert drawn(sampler()) > 1.1 / 64
    finally:
        torch.set_default_dtype(torch.float32)


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


def test_the_loader_draws_at_what_the_ledger_says(start):
    training = start(batch_size=3)
    assert type(training.loader.batch_sampler) is drawing.PoissonSampler
    training.step(next(iter(training.loader)))
    assert probability(training.loader.batch_sampler) <= Fraction(
        training.engine.ledger.phases[0].sample_rate
    )
