"""Adaptive clipping releases a second number, how many gradients were not clipped: its price and noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.errors import UsageError
from per_instance_accountant.opacus_adapter.clipping import round_up


@dataclass(frozen=True, slots=True, kw_only=True)
class CountQuery:
    """The joint release of a clipped sum and of a count of half votes, as one Gaussian mechanism.

    noise_multiplier: z, what both together cost at most: an instance at the clip norm C costs 1/z, in
    standard deviations. count_std: s, standard deviation of the count's noise. An instance whose part in the
    sum has norm c moves the pair by ``sqrt((c / (g C))^2 + (1 / (2 s))^2)`` standard deviations, where
    ``1/g^2 = 1/z^2 - 1/(2 s)^2`` (Andrew, Thakkar, McMahan and Ramaswamy 2021, Theorem 1;
    docs/opacus_integration.md). Raises UsageError PIA070 unless ``0 <= z < 2 s``.

    >>> query = CountQuery(noise_multiplier=1.0, count_std=2.0)
    >>> round(query.gradient_noise_multiplier, 4)
    1.0328
    """

    noise_multiplier: float
    count_std: float

    def __post_init__(self) -> None:
        noise, count = self.noise_multiplier, self.count_std
        if not (math.isfinite(count) and 0 <= noise < 2 * count):
            raise UsageError(
                "PIA070",
                f"adaptive clipping with noise_multiplier={noise!r} and unclipped_num_std={count!r}",
                "The count alone would cost more than both releases together may",
                "unclipped_num_std > noise_multiplier / 2",
            )

    @property
    def share(self) -> float:
        """Part of the squared price that the count has, rounded up."""
        return (self.noise_multiplier / (2 * self.count_std)) ** 2 * (1 + 2.0**-50)

    @property
    def gradient_noise_multiplier(self) -> float:
        """g, rounded up: noise of the sum in units of the clip norm."""
        return self.noise_multiplier / math.sqrt(1 - self.share) * (1 + 2.0**-50)

    def charge(
        self, contributions: NDArray[np.float32], limits: NDArray[np.float64], clip_norm: float
    ) -> NDArray[np.float32]:
        """Norms (B,) that cost as much in the sum alone, with noise ``z C``, as the pair does; rounded up.

        limits: (B,) 0 for instances that take part in neither release.

        >>> query, norms = CountQuery(noise_multiplier=1.0, count_std=1.0), np.float32([0.0, 0.5, 1.0, 0.0])
        >>> query.charge(norms, np.array([1.0, 1.0, 1.0, 0.0]), 1.0).astype(float).round(4).tolist()
        [0.5, 0.6614, 1.0, 0.0]
        """
        relative = np.minimum(contributions.astype(np.float64) / clip_norm, 1.0)
        joint = np.sqrt(np.square(relative) * (1 - self.share) + self.share) * (1 + 2.0**-50)
        if self.noise_multiplier == 0:
            joint[:] = 1.0
        return round_up(np.where(limits > 0, clip_norm * np.minimum(joint, 1.0), 0.0))
