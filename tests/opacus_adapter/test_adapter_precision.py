"""Settings that let PyTorch round float32 numbers before it multiplies them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from per_instance_accountant.errors import UnsupportedError
from per_instance_accountant.opacus_adapter import PrivacyEngine, clipping, precision
from tests.opacus_adapter.conftest import Convolutional, examples

pytestmark = pytest.mark.compat
DEVICES = [torch.device("cpu"), torch.device("cuda")]
needs_settings = pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="settings of PyTorch 2.9"
)


@pytest.fixture
def lower():
    """lower("medium"): let products of float32 numbers be less precise, until the test ends."""
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("asked", ["high", "medium"])
def test_every_setting_below_the_highest_is_seen(device, asked, lower):
    assert not precision.rounded_products(device, convolutions=False)
    lower(asked)
    assert precision.rounded_products(device, convolutions=False)


@needs_settings
@pytest.mark.parametrize("rounded", ["tf32", "bf16"])
def test_settings_for_convolutions_count_where_there_are_some(rounded):
    cpu, settings = torch.device("cpu"), torch.backends.mkldnn.conv
    before, settings.fp32_precision = settings.fp32_precision, rounded
    try:
        assert precision.rounded_products(cpu, convolutions=True)
        assert not precision.rounded_products(cpu, convolutions=False)
    finally:
        settings.fp32_precision = before


def test_convolutions_on_cuda_are_rounded_unless_that_is_switched_off(monkeypatch):
    cuda = torch.device("cuda")
    assert precision.rounded_products(cuda, convolutions=True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert not precision.rounded_products(cuda, convolutions=True)


@pytest.mark.parametrize("asked", ["high", "medium"])
def test_ghost_clipping_refuses_products_that_are_rounded(asked, lower, start, stock):
    """In stock Opacus the second backward pass rounds what the first one measured, and nobody is told."""
    lower(asked)
    silent = start(stock(), mode="ghost")
    silent.step(next(iter(silent.loader)))
    training = start(mode="ghost")
    before, batches = training.weights, iter(training.loader)
    with pytest.raises(UnsupportedError, match="PIA060"):
        training.step(next(batches))
    assert torch.equal(training.weights, before) and training.engine.ledger.num_steps == 0
    lower("highest")
    training.engine.abandon()
    training.step(next(batches))
    assert training.engine.ledger.num_steps == 1


@pytest.mark.parametrize("build", [None, Convolutional])
@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_other_modes_clip_what_was_computed(build, mode, lower, start):
    """Rounded or not, gradients are there before they are measured, and no product follows."""
    lower("medium")
    shape = (10,) if build is None else (1, 8, 8)
    module = None if build is None else build()
    training = start(
        PrivacyEngine(accountant="rdp"),
        mode=mode,
        module=module,
        dataset=examples(shape=shape),
        noise_multiplier=0.0,
        reduction="sum",
    )
    training.optimizer.zero_grad()
    x, y = next(iter(training.loader))
    training.criterion(training.model(x), y).backward()
    rows = torch.cat([p.grad_sample.flatten(1) for p in training.optimizer.params], dim=1)
    training.optimizer.step()
    released = torch.cat([p.grad.flatten() for p in training.optimizer.params]).double()
    factors = torch.from_numpy(clipping.clip_factors(clipping.instance_norms([rows]), 0.8)[0]).double()
    exact = factors @ rows.double()
    assert (released - exact).norm() <= len(rows) * 2.0**-23 * float(factors @ rows.double().norm(dim=1))
    assert np.isfinite(released.numpy()).all()


def test_clipping_uses_no_matrix_product(monkeypatch):
    def refuse(*arguments, **named):
        raise AssertionError("a matrix product, whose precision is a setting")

    for name in ("matmul", "mm", "mv", "bmm", "addmv", "einsum", "tensordot"):
        monkeypatch.setattr(torch, name, refuse)
    for name in ("__matmul__", "matmul", "mm", "mv", "bmm"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for shape in ((3,), (300, 700), (10007,)):
        rows = torch.randn(40, *shape, generator=torch.Generator().manual_seed(0))
        total = clipping.clipped_sum(torch.ones(40), rows)
        assert torch.allclose(total, rows.sum(dim=0), atol=1e-4)


def test_one_strip_is_enough(start):
    """As on an accelerator, where strips would gain nothing."""
    rows = torch.randn(40, 10007, generator=torch.Generator().manual_seed(0))
    own = torch.rand(40, generator=torch.Generator().manual_seed(1))
    total = clipping._strip_sum(own, rows, 10007)
    assert torch.allclose(total.double(), own.double() @ rows.double(), atol=1e-4)
