"""A peer for the benchmarks: individual accounting as published by Yu, Kamath, Kulkarni, Liu, Yin and
Zhang (TMLR 2023), written anew from the published algorithm.

Norms are rounded to the NEAREST level, every instance holds the Renyi curve of its level and the sum
of its curves over 1,022 integer orders, and epsilon is read off each sum with the classic conversion.
The published program assigns levels in a loop over instances; ``vectorised`` gathers them instead,
which it does not do.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from per_instance_accountant.divergence import sampled_gaussian_rdp

ORDERS = np.arange(2, 1024)


class PublishedTracker:
    """n instances, clip norm 1, noise multiplier 1, levels ``step, 2 step, ..``; on the CPU."""

    def __init__(self, n: int, sample_rate: float, step: float, *, vectorised: bool = False) -> None:
        levels = np.arange(1, round(1 / step) + 1) * step
        self.levels = torch.tensor(levels, dtype=torch.float32)
        self.curves = torch.tensor(sampled_gaussian_rdp(sample_rate, levels, ORDERS), dtype=torch.float32)
        self.current = self.curves[-1].repeat(n, 1)
        self.total = torch.zeros(n, ORDERS.size)
        self.vectorised = vectorised

    def step(self, norms: torch.Tensor) -> None:
        """Charge one step at the norms (n,)."""
        nearest = torch.argmin((norms[:, None] - self.levels).abs(), dim=1)
        if self.vectorised:
            self.current = self.curves[nearest]
        else:
            for i in range(len(norms)):
                norms[i] = self.levels[nearest[i]]
                self.current[i] = self.curves[nearest[i]]
        self.total += self.current

    def epsilons(self, delta: float) -> np.ndarray:
        """(n,) epsilons, one after another."""
        return np.array([(row - math.log(delta) / (ORDERS - 1)).min() for row in self.total.numpy()])
