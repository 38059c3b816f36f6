"""The distribution of a sum of independent inclusions, rounded up, and the epsilon it gives at a delta."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.divergence import gaussian_delta
from per_instance_accountant.unlearning.bounds.inclusion import Inclusions

Array = NDArray[np.float64]

_CELLS: Final = 1 << 13
_COINS: Final = 20_000
_TAIL: Final = 1e-4
_UP: Final = 1 + 1e-10


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HiddenSizes:
    """A distribution that dominates S stochastically: ``sizes[k]`` with probability ``chances[k]``.

    beyond: probability left out above the last size. sizes, chances: (k,).
    """

    sizes: Array
    chances: Array
    beyond: float

    def delta_at(self, epsilon: float, tau: float) -> float:
        """Upper bound of ``E delta_{S / sqrt(tau)}(epsilon)``, ``delta_mu`` of a Gaussian pair (1 beyond)."""
        if tau == 0:
            return 1.0
        each = np.asarray(gaussian_delta(self.sizes / math.sqrt(tau), epsilon))
        return float(self.chances @ each) * _UP + self.beyond

    def epsilon_at(self, delta: float, tau: float) -> float:
        """Least epsilon (rounded up, 1e-10 relative) with ``delta_at(epsilon) <= delta``; inf above 1e4."""
        if self.delta_at(0.0, tau) <= delta:
            return 0.0
        low, high = 0.0, 1e-6
        while self.delta_at(high, tau) > delta:
            low, high = high, 4 * high
            if high > 1e4:
                return math.inf
        while high - low > 1e-10 * high:
            middle = (low + high) / 2
            low, high = (low, middle) if self.delta_at(middle, tau) <= delta else (middle, high)
        return high


def hidden_sizes(coins: Inclusions, delta: float) -> HiddenSizes | None:
    """The distribution on about 8,192 cells, every weight rounded up to whole cells; None above 20,000 coins.

    The grid ends where about ``1e-4 delta`` is left out (counted in ``beyond``), or at the sum of all.
    Adding non-negative numbers only, so nothing cancels.
    """
    if coins.counts.sum() > _COINS or not np.all(np.isfinite(coins.weights)):
        return None
    if not len(coins.weights):
        return HiddenSizes(sizes=np.zeros(1), chances=np.ones(1), beyond=0.0)
    width = _likely_top(coins, delta) / _CELLS
    cells = np.ceil(coins.weights / width * (1 - 1e-12)).astype(np.int64)
    # Rounding up adds at most one cell per coin, so the sum of all weights is always inside.
    chances = np.zeros(_CELLS + int(coins.counts.sum()) + 2)
    chances[0], beyond = 1.0, 0.0
    for cell, rate, count in zip(cells.tolist(), coins.rates.tolist(), coins.counts.tolist(), strict=True):
        for _ in range(int(count)):
            moved = rate * chances
            beyond += float(moved[max(0, len(chances) - cell) :].sum())
            chances *= 1 - rate
            chances[cell:] += moved[: max(0, len(chances) - cell)]
    used = chances > 0
    sizes = np.arange(len(chances), dtype=np.float64) * (width * (1 + 1e-11))
    return HiddenSizes(sizes=sizes[used], chances=chances[used], beyond=beyond * _UP)


def _likely_top(coins: Inclusions, delta: float) -> float:
    """A size that S hardly exceeds (Bernstein's inequality), at most the sum of all weights."""
    mean = float(coins.counts @ (coins.rates * coins.weights))
    variance = float(coins.counts @ (coins.rates * (1 - coins.rates) * coins.weights**2))
    log = -math.log(_TAIL * delta)
    largest = float(coins.weights.max())
    deviation = largest * log / 3 + math.sqrt((largest * log / 3) ** 2 + 2 * variance * log)
    return min(float(coins.counts @ coins.weights), 1.25 * (mean + deviation)) * (1 + 1e-9)
