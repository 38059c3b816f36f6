"""Settings that let PyTorch round float32 numbers before it multiplies them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from per_instance_accountant.errors import UnsupportedError
from per_instance_accountant.opacus_adapter import PrivacyEngine, clipping, precision
from tests.opacus_adapter.conftest import Convolutional, examples, perceptron

pytestmark = pytest.mark.compat
NAMES = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
needs_settings = pytest.mark.skipif(
    not hasattr(torch.backends.cudnn, "conv"), reason="settings of PyTorch 2.9"
)


def asked() -> list[str]:
    """What PyTorch may do to float32 numbers before it multiplies them, by device and operation."""
    groups = [name.split(".") for name in NAMES]
    return [getattr(getattr(torch.backends, one), other).fp32_precision for one, other in groups]


SEEN: list[list[str]] = []


class Looking(torch.autograd.Function):
    """Looks at the settings in every backward pass."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        SEEN.append(asked())
        return gradient


class Watched(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = perceptron()

    def forward(self, x):
        return Looking.apply(self.inner(x))


@pytest.fixture
def anywhere(monkeypatch):
    """As where PyTorch was built for CUDA, too."""
    monkeypatch.setattr(precision, "_settings", precision._settings.__wrapped__)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)


@pytest.fixture
def lower(anywhere):
    """lower("medium"): let products of float32 numbers be less precise, until the test ends."""
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")


@needs_settings
@pytest.mark.parametrize("precise", ["high", "medium"])
def test_both_passes_of_ghost_clipping_multiply_exactly(precise, lower, start, stock):
    """In stock Opacus the second backward pass rounds what the first one measured, and nobody is told."""
    lower(precise)
    before = asked()
    SEEN.clear()
    silent = start(stock(), mode="ghost", module=Watched())
    silent.step(next(iter(silent.loader)))
    assert [before, before] == SEEN and {"tf32", "bf16"} & set(before)
    SEEN.clear()
    training = start(mode="ghost", module=Watched())
    training.step(next(iter(training.loader)))
    assert len(SEEN) == 2
    assert all(set(seen) <= {"none", "ieee"} for seen in SEEN)
    assert asked() == before and torch.get_float32_matmul_precision() == precise


@needs_settings
@pytest.mark.parametrize(
    ("where", "value"), [*((where, "tf32") for where in range(6)), *((where, "bf16") for where in (3, 4, 5))]
)
def test_every_setting_is_looked_at_and_put_back(where, value, anywhere):
    def fail():
        assert set(asked()) <= {"none", "ieee"}
        raise ZeroDivisionError

    one, other = NAMES[where].split(".")
    group = getattr(getattr(torch.backends, one), other)
    before, group.fp32_precision = group.fp32_precision, value
    try:
        assert asked()[where] == value
        with pytest.raises(ZeroDivisionError):
            precision.exactly(fail)
        assert asked()[where] == value
    finally:
        group.fp32_precision = before


def test_the_settings_of_older_pytorch(monkeypatch):
    older = SimpleNamespace(
        cuda=SimpleNamespace(matmul=SimpleNamespace(allow_tf32=True)),
        cudnn=SimpleNamespace(allow_tf32=True),
        mkldnn=SimpleNamespace(),
    )
    monkeypatch.setattr(precision, "_settings", precision._settings.__wrapped__)
    monkeypatch.setattr(precision.torch, "backends", older)
    inside = precision.exactly(lambda: (older.cuda.matmul.allow_tf32, older.cudnn.allow_tf32))
    assert inside == (False, False)
    assert older.cuda.matmul.allow_tf32 and older.cudnn.allow_tf32


@pytest.mark.parametrize(("mode", "refused"), [("BF16", True), ("any", True), ("STRICT", False)])
def test_the_environment_of_onednn(mode, refused, monkeypatch, start):
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", mode)
    start(mode="hooks")
    if not refused:
        start(mode="ghost")
        return
    with pytest.raises(UnsupportedError, match="PIA060"):
        start(mode="ghost")


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


def test_one_strip_is_enough():
    """As on an accelerator, where strips would gain nothing."""
    rows = torch.randn(40, 10007, generator=torch.Generator().manual_seed(0))
    own = torch.rand(40, generator=torch.Generator().manual_seed(1))
    total = clipping._strip_sum(own, rows, 10007)
    assert torch.allclose(total.double(), own.double() @ rows.double(), atol=1e-4)
