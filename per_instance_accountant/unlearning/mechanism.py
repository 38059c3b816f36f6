"""One noisy step, as facts of a ledger and as a plan state it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from per_instance_accountant.ledger.records import Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Mechanism:
    """One noisy step: ``theta <- theta - learning_rate * ((sum of clipped gradients + N(0, noise_std^2)) /
    denominator + weight_decay * theta)`` over a batch drawn at ``sample_rate``, with ``theta`` projected onto
    a ball before it where ``projection_radius`` is stated."""

    learning_rate: float
    denominator: float
    noise_std: float
    sampling: str
    sample_rate: float
    weight_decay: float
    max_grad_norm: float
    optimizer: str
    momentum: float
    projection_radius: float | None

    @classmethod
    def of(cls, phase: Phase) -> Mechanism:
        """The mechanism of a phase."""
        return cls(**{name: getattr(phase, name) for name in cls.__slots__})

    def agrees_with(self, other: Mechanism) -> bool:
        """Equal up to the rounding of numbers that were divided and multiplied back (1e-14 relative)."""
        pairs = [(getattr(self, name), getattr(other, name)) for name in self.__slots__]
        numbers = (int, float)
        return all(
            math.isclose(a, b, rel_tol=1e-14) if isinstance(a, numbers) and isinstance(b, numbers) else a == b
            for a, b in pairs
        )
