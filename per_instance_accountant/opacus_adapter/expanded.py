"""Expanded weights on the empty batches that Poisson sampling draws."""

from __future__ import annotations

from typing import Any

import torch
from opacus.grad_sample import GradSampleModuleExpandedWeights


class TrackedExpandedWeights(GradSampleModuleExpandedWeights):
    """A GradSampleModuleExpandedWeights whose forward pass takes empty batches, which expanded weights do not.
    The tracked optimizer knows that an empty batch has no gradients."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not len(x):
            return self._module(x, *args, **kwargs)
        return super().forward(x, *args, **kwargs)
