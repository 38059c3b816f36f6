"""How a Poisson loader draws: at no higher rate than is charged, and never with the same coins twice."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from per_instance_accountant.errors import GuaranteeError
from per_instance_accountant.opacus_adapter.secure import SecureSampler


def resolution() -> float:
    """Step between the numbers that ``torch.rand`` gives: 2^-24 in float32."""
    return torch.finfo(torch.get_default_dtype()).eps / 2


def settle_rate(sampler: Any) -> float:
    """Make a Poisson sampler draw at its rate or below; the rate to be charged.

    Samplers draw where ``torch.rand(...) < sample_rate``, which happens with probability ``sample_rate``
    rounded UP to a multiple of :func:`resolution`: six times as often as charged for a rate of 1e-8. So the
    sampler's own rate is rounded down to a multiple. Below the smallest one the smallest is charged.

    >>> from opacus.utils.uniform_sampler import UniformWithReplacementSampler
    >>> sampler = UniformWithReplacementSampler(num_samples=1000, sample_rate=0.05)
    >>> settle_rate(sampler), sampler.sample_rate * 2**24
    (0.05, 838860.0)
    """
    rate, step = float(sampler.sample_rate), resolution()
    sampler.sample_rate = max(math.floor(rate / step), 1) * step
    return max(rate, sampler.sample_rate)


class DrawSessions:
    """Amplification by sampling needs fresh coins in every step.

    A loader whose generator is seeded again, in every epoch or by a script that is started again, draws the
    same instances in the same order: those that are in the first batch are in it every time, and lose as
    much as without sampling.
    """

    def __init__(self, sampler: Any, rate: float) -> None:
        self._sampler = None if rate == 1 or isinstance(sampler, SecureSampler) else sampler
        self._began: dict[int, str] = {}
        self._used: dict[str, None] = {}

    def begin(self, loop: int) -> None:
        """A loop over the loader begins. Raises GuaranteeError PIA091 where its draws were used before."""
        if self._sampler is None:
            return
        generator = getattr(self._sampler, "generator", None)
        state = torch.get_rng_state() if generator is None else generator.get_state()
        digest = hashlib.blake2b(state.cpu().numpy().tobytes(), digest_size=16).hexdigest()
        if digest in self._used:
            raise GuaranteeError(
                "PIA091",
                "the loader's random state is one that an earlier loop began with",
                "The same instances would be drawn again in the same order, so no sampling hides them",
                "no seed in the loop, DataLoader(generator=...) with another seed after resuming",
            )
        self._began[loop] = digest

    def use(self, loop: int) -> None:
        """A step of this loop is released."""
        digest = self._began.pop(loop, None)
        if digest is not None:
            self._used[digest] = None

    def state(self) -> list[str]:
        """Where every loop so far began, for a checkpoint."""
        return list(self._used)

    def resume(self, state: Sequence[str]) -> None:
        """After those of a checkpoint."""
        self._used.update(dict.fromkeys(map(str, state)))
