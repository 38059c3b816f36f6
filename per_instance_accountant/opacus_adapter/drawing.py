"""How a Poisson loader draws: at no higher rate than is charged, and never with the same coins twice."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from opacus.utils.uniform_sampler import UniformWithReplacementSampler

from per_instance_accountant.errors import GuaranteeError
from per_instance_accountant.opacus_adapter.secure import SecureSampler

MERSENNE, PHILOX = 5056, 16
"""Sizes of the states of torch's generators for CPU and CUDA."""
FIRST_WORD, WORDS = 24, 624
"""Where the words of a Mersenne twister begin in its state, 8 bytes for each."""


STEP = 2.0**-24
"""Between the numbers that ``torch.rand`` gives in float32."""


def draw(count: int, rate: float, generator: torch.Generator | None) -> torch.Tensor:
    """(count,) who is drawn, each with probability ``rate`` rounded up to a multiple of STEP; in float32,
    because half precision rounds some numbers up to 1, which becomes 0."""
    return torch.rand(count, generator=generator, dtype=torch.float32, device="cpu") < rate


class PoissonSampler(UniformWithReplacementSampler):
    """Opacus' Poisson sampler, whatever torch's default precision and device are."""

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            yield draw(self.num_samples, self.sample_rate, self.generator).nonzero().flatten().tolist()


def settle_rate(sampler: Any, *, secure: bool = False) -> float:
    """Make a Poisson sampler draw at its rate or below; the rate to be charged. secure: by the operating
    system's generator, whatever generator it was given.

    Opacus draws where ``torch.rand(...) < sample_rate``, which happens with probability ``sample_rate``
    rounded UP to a multiple of STEP: six times as often as charged for a rate of 1e-8. So the
    sampler's own rate is rounded down to a multiple. Below the smallest one the smallest is charged.

    >>> sampler = UniformWithReplacementSampler(num_samples=1000, sample_rate=0.05)
    >>> settle_rate(sampler), sampler.sample_rate * 2**24
    (0.05, 838860.0)
    """
    rate = float(sampler.sample_rate)
    if secure and type(sampler) in (UniformWithReplacementSampler, PoissonSampler):
        sampler.__class__, sampler.generator = SecureSampler, None
    if isinstance(sampler, SecureSampler):
        return rate
    if type(sampler) is UniformWithReplacementSampler:
        sampler.__class__ = PoissonSampler
    sampler.sample_rate = max(math.floor(rate / STEP), 1) * STEP
    return max(rate, sampler.sample_rate)


def set_generator(generator: torch.Generator, source: bytes) -> torch.Generator:
    """Set a generator's whole state from ``source``, which nothing else may be set from.

    ``manual_seed`` takes 32 bits of its seed on the CPU: of 10,000 seeds two are the same with probability
    0.01, and whoever tries all of them finds the noise.

    >>> [torch.rand(1, generator=set_generator(torch.Generator(), b"a")).item() for _ in range(2)]
    [0.061814725399017334, 0.061814725399017334]
    """
    generator.manual_seed(int.from_bytes(hashlib.shake_256(source).digest(8), "little") >> 1)
    state = generator.get_state()
    if len(state) == MERSENNE:
        words = np.frombuffer(hashlib.shake_256(source).digest(4 * WORDS), dtype="<u4").astype(np.uint64)
        state[FIRST_WORD : FIRST_WORD + words.nbytes] = torch.from_numpy(words.view(np.uint8))
        generator.set_state(state)
    return generator


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
