"""The random states that loops over a Poisson loader began with, so that no draws are used twice."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from per_instance_accountant.errors import GuaranteeError


class DrawSessions:
    """Amplification by sampling needs fresh coins in every step.

    A loader whose generator is seeded again, in every epoch or by a script that is started again, draws the
    same instances in the same order: those that are in the first batch are in it every time, and lose as
    much as without sampling.
    """

    def __init__(self, sampler: Any, rate: float) -> None:
        self._sampler = sampler if rate < 1 else None
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
