"""Random draws, one generator per model: what a model draws does not depend on the models beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Draws:
    """Generators of an ensemble, one per seed."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def _each(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([draw(generator) for generator in self._generators])

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal values; ``shape`` has the leading dimension of models."""
        return self._each(lambda generator: torch.randn(tuple(shape[1:]), generator=generator))

    def positions(self, counts: Tensor, size: int) -> Tensor:
        """(K, size) uniform positions below ``counts``, with replacement."""
        uniform = self._each(lambda generator: torch.rand(size, generator=generator, dtype=torch.float64))
        return (uniform * counts[:, None]).long().clamp(max=counts[:, None] - 1)

    def subset(self, count: int, size: int) -> Tensor:
        """(K, min(size, count)) distinct positions below ``count``; all of them, in order, if they fit."""
        if count <= size:
            return torch.arange(count).expand(len(self._generators), count)
        return self._each(lambda generator: torch.randperm(count, generator=generator)[:size])

    def other_classes(self, labels: Tensor, classes: int) -> Tensor:
        """For each label a class uniform over the ``classes - 1`` others.

        >>> Draws([0]).other_classes(torch.tensor([[0, 1]]), 2)
        tensor([[1, 0]])
        """
        shape = labels.shape[1:]
        offsets = self._each(lambda generator: torch.randint(1, classes, shape, generator=generator))
        return (labels + offsets) % classes

    def in_ball(self, shape: Sequence[int], radius: float) -> Tensor:
        """Points uniform in the L2 ball of ``radius``; (K, m, ...) with one point per leading pair."""
        directions = self.normal(shape)
        flat = directions.flatten(2)
        uniform = self._each(lambda generator: torch.rand(shape[1], generator=generator))
        scale = radius * uniform ** (1 / flat.shape[2]) / flat.norm(dim=2)
        return (flat * scale[..., None]).reshape(directions.shape)
