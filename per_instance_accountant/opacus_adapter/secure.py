"""Noise and draws for ``secure_mode``, from the operating system's generator.

Opacus takes them from torchcsprng, which current PyTorch cannot install, and makes the noise in float32:
added to sums in float64 it leaves their last bits as they are, for everybody to read.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import opacus
import torch
from numpy.typing import NDArray
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch.utils.data import DataLoader

SUMMANDS = 4
"""Holohan and Braghin (2021), section 5.1 with n = 2: half the sum of four normals, each from other uniforms,
so that nobody finds them by trying the numbers near to what is released."""


def _words(count: int) -> NDArray[np.uint64]:
    return np.frombuffer(os.urandom(8 * count), dtype=np.uint64)


def _normals(count: int) -> NDArray[np.float64]:
    """Standard normals by Box and Muller, two from every pair of 53-bit uniforms."""
    pairs = (count + 1) // 2
    uniform = (_words(2 * pairs) >> np.uint64(11)).astype(np.float64)
    radius = np.sqrt(-2 * np.log((uniform[:pairs] + 1) * 2.0**-53))
    angle = uniform[pairs:] * (2 * math.pi * 2.0**-53)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def secure_normals(count: int) -> NDArray[np.float64]:
    """Standard normals that no seed repeats: (count,) float64.

    >>> bool(abs(secure_normals(10_000).std() - 1) < 0.1)
    True
    """
    total = np.zeros(count)
    for _ in range(SUMMANDS):
        total += _normals(count)
    return total / math.sqrt(SUMMANDS)


def with_secure_noise(total: torch.Tensor, std: float) -> torch.Tensor:
    """A clipped sum with noise of this standard deviation: added in float64, rounded once.

    Rounding a sum with noise tells nothing more; rounding the noise before it is added does.

    >>> noisy = with_secure_noise(torch.zeros(2, 3), 1.0)
    >>> noisy.shape, noisy.dtype
    (torch.Size([2, 3]), torch.float32)
    """
    noise = torch.from_numpy(secure_normals(total.numel())).view(total.shape)
    return (total.double() + std * noise.to(total.device)).to(total.dtype)


class SecureEngine(opacus.PrivacyEngine):
    """Opacus' engine with a secure mode that needs no torchcsprng."""

    def __init__(self, *, accountant: str, secure_mode: bool) -> None:
        with warnings.catch_warnings():
            if secure_mode:
                warnings.filterwarnings("ignore", message="Secure RNG turned off")
            super().__init__(accountant=accountant, secure_mode=False)
        self.secure_mode = secure_mode

    def _prepare_data_loader(self, data_loader: DataLoader[Any], **named: Any) -> DataLoader[Any]:
        if self.secure_mode and not named.get("poisson_sampling"):
            return data_loader  # Nothing rests on how it shuffles. Opacus would take its generator away.
        prepared: DataLoader[Any] = super()._prepare_data_loader(data_loader, **named)
        return prepared


class SecureSampler(UniformWithReplacementSampler):
    """Opacus' Poisson sampler with draws that no seed repeats, at its rate rounded down to a multiple of
    2^-64.

    >>> list(SecureSampler(num_samples=8, sample_rate=1.0))
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            words = _words(self.num_samples)
            # 2^64 itself is no word: at rate 1 everybody is drawn.
            drawn = words < np.uint64(int(self.sample_rate * 2**64)) if self.sample_rate < 1 else words >= 0
            yield np.flatnonzero(drawn).tolist()
