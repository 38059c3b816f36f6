"""``secure_mode``: noise and draws that no seed repeats, and noise that leaves no bit of a sum alone."""

from __future__ import annotations

import math
import sys

import numpy as np
import opacus
import pytest
import torch
from opacus import GradSampleModule
from opacus.data_loader import DPDataLoader
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel as DPDDP
from opacus.optimizers import DistributedDPOptimizer, DPOptimizer
from opacus.optimizers.optimizer import _generate_noise
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from scipy import stats
from torch.utils.data import DataLoader, TensorDataset

from per_instance_accountant.errors import UnsupportedError
from per_instance_accountant.opacus_adapter import PrivacyEngine, attach, drawing, secure
from per_instance_accountant.opacus_adapter.rank_steps import join_ranks

pytestmark = pytest.mark.compat
ADAPTIVE = {
    "target_unclipped_quantile": 0.5,
    "clipbound_learning_rate": 0.2,
    "max_clipbound": 10.0,
    "min_clipbound": 0.1,
    "unclipped_num_std": 3.0,
}
WAYS = [{"mode": mode} for mode in ("hooks", "functorch", "ew", "ghost")]
WAYS += [{"clipping": "per_layer", "max_grad_norm": [0.4] * 4}, {"clipping": "adaptive", **ADAPTIVE}]


@pytest.fixture
def entropy(monkeypatch):
    """Bytes of a seeded generator in place of the operating system's, so that tests are deterministic."""
    monkeypatch.setattr(secure.os, "urandom", np.random.default_rng(0).bytes)


def bits_left_alone(noisy: torch.Tensor, total: torch.Tensor) -> float:
    """Share of entries whose bits from 2^-41 to 2^-48 are those of the sum without noise."""
    units = (noisy - total) * 2.0**40
    return float(((units - units.round()).abs() < 2.0**-8).double().mean())


def test_stock_noise_leaves_the_last_bits_of_a_sum_alone(entropy):
    generator = torch.Generator().manual_seed(0)
    total = torch.rand(20_000, generator=generator, dtype=torch.float64)
    stock = total + _generate_noise(1.0, total, generator=generator, secure_mode=True)
    # A release tells 8 bits of nearly every entry of the clipped sum. By chance 1 in 128 agrees.
    assert bits_left_alone(stock, total) > 0.99
    assert bits_left_alone(secure.with_secure_noise(total, 1.0), total) < 0.01


def test_noise_is_normal_and_independent(entropy):
    noise = secure.secure_normals(200_001)
    assert stats.kstest(noise, "norm").pvalue > 0.01
    assert stats.normaltest(noise).pvalue > 0.01
    # Halves come from the same pairs of uniforms.
    first, second = noise[:100_000], noise[100_001:]
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.01
    assert abs(np.corrcoef(first**2, second**2)[0, 1]) < 0.01
    assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 0.01


@pytest.mark.parametrize("words", [np.uint64(0), np.uint64(2**64 - 1), np.uint64(2047)])
def test_extreme_words_give_finite_noise(words, monkeypatch):
    monkeypatch.setattr(secure, "_words", lambda count: np.full(count, words))
    assert np.isfinite(secure.secure_normals(7)).all()


@pytest.mark.parametrize("wrong", [1, 3])
def test_seeded_bug_a_wrong_number_of_summands_is_caught(wrong, monkeypatch, entropy):
    total = np.zeros(50_000)
    for _ in range(wrong):
        total += secure._normals(50_000)
    assert stats.kstest(total / math.sqrt(secure.SUMMANDS), "norm").pvalue < 1e-6


def test_noise_has_the_shape_precision_and_size_that_are_asked_for(entropy):
    for dtype in (torch.float32, torch.float64):
        noisy = secure.with_secure_noise(torch.zeros(40, 50, dtype=dtype), 3.0)
        assert noisy.shape == (40, 50) and noisy.dtype == dtype
        assert noisy.std().item() == pytest.approx(3.0, rel=0.1)
    assert secure.with_secure_noise(torch.ones(()), 0.0).item() == 1.0


@pytest.mark.parametrize("rate", [1e-12, 0.25, 0.3, 1.0])
def test_draws_are_never_above_the_rate(rate, monkeypatch):
    limit = math.floor(rate * 2**64)
    edge = [word for word in (0, limit - 1, limit, 2**64 - 1) if 0 <= word < 2**64]
    monkeypatch.setattr(secure, "_words", lambda count: np.array(edge, dtype=np.uint64))
    sampler = secure.SecureSampler(num_samples=len(edge), sample_rate=rate, steps=2)
    expected = [row for row, word in enumerate(edge) if word < limit]
    assert list(sampler) == [expected, expected]


def test_a_generator_of_the_users_own_is_not_used():
    loader = DPDataLoader(TensorDataset(torch.ones(4, 1)), sample_rate=0.5, generator=torch.Generator())
    drawing.settle_rate(loader.batch_sampler, secure=True)
    assert type(loader.batch_sampler) is secure.SecureSampler and loader.batch_sampler.generator is None


def test_a_sampler_of_the_users_own_keeps_its_draws():
    class Own(UniformWithReplacementSampler):
        pass

    module = GradSampleModule(torch.nn.Linear(1, 1))
    optimizer = DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=2,
        secure_mode=True,
    )
    own = Own(num_samples=4, sample_rate=0.5, generator=torch.Generator())
    tracker, loader = attach(optimizer, DataLoader(TensorDataset(torch.ones(4, 1)), batch_sampler=own))
    # Nobody knows how it draws, so it is charged without amplification.
    assert type(loader.batch_sampler) is Own and own.generator is not None
    assert tracker.recorder.setting.sampling != "poisson"


def test_loaders_that_opacus_does_not_replace_stay_as_they_are():
    data = TensorDataset(torch.ones(12, 3), torch.zeros(12, dtype=torch.int64))
    for shuffle in (False, True):
        own, model = torch.Generator(), torch.nn.Linear(3, 2)
        loader = DataLoader(data, batch_size=4, shuffle=shuffle, generator=own)
        engine = PrivacyEngine(accountant="rdp", secure_mode=True)
        model, optimizer, tracked = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
        )
        assert loader.generator is tracked.generator is own
        for x, y in tracked:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        assert engine.ledger.num_steps == 3


def test_one_sum_gets_noise_once(start):
    training = start(PrivacyEngine(accountant="rdp", secure_mode=True))
    training.step(next(iter(training.loader)))
    with pytest.raises(ValueError, match="cleared"):
        training.optimizer.add_noise()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_training_needs_no_other_package_and_no_seed_repeats_it(way, start):
    assert "torchcsprng" not in sys.modules
    weights, drawn = [], []
    for _ in range(2):
        torch.manual_seed(0)
        training = start(PrivacyEngine(accountant="rdp", secure_mode=True), **way)
        assert type(training.loader.batch_sampler) is secure.SecureSampler
        for number, batch in enumerate(training.loader):
            if number == 3:
                break
            torch.manual_seed(1)  # Would be refused where noise comes from this generator.
            training.step(batch)
        weights.append(training.weights)
        drawn.append([tuple(step.positions) for step in training.steps])
        assert training.engine.ledger.num_steps == 3
    assert drawn[0] != drawn[1]
    assert not torch.equal(*weights)


def test_stock_needs_a_package_that_is_not_there():
    with pytest.raises(ImportError, match="torchcsprng"):
        opacus.PrivacyEngine(secure_mode=True)


def test_the_noise_of_a_step_is_what_the_ledger_says(start, entropy):
    training = start(PrivacyEngine(accountant="rdp", secure_mode=True), noise_multiplier=2.0)
    found = []
    for _ in range(4):
        for batch in training.loader:
            training.step(batch)
            for p in training.optimizer.params:
                scale = training.optimizer.expected_batch_size
                found.append((p.grad * scale - p.summed_grad).flatten())
    std = training.engine.ledger.phases[0].noise_std
    assert stats.kstest(torch.cat(found).numpy() / std, "norm").pvalue > 0.01


def test_several_processes_are_refused():
    optimizer = object.__new__(DistributedDPOptimizer)
    optimizer.secure_mode = True
    wrapper = object.__new__(DPDDP)
    torch.nn.Module.__init__(wrapper)
    with pytest.raises(UnsupportedError, match="secure_mode on several processes"):
        join_ranks(optimizer, wrapper, 1.0)
