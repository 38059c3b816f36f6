"""Expanded weights on the empty batches that Poisson sampling draws."""

from __future__ import annotations

from typing import Any

import torch
from opacus.grad_sample import GradSampleModuleExpandedWeights

from per_instance_accountant.errors import UnsupportedError


class TrackedExpandedWeights(GradSampleModuleExpandedWeights):
    """A GradSampleModuleExpandedWeights whose forward pass takes empty batches, unlike Opacus'. The tracked
    optimizer knows that an empty batch has no gradients."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled(x.device.type):
            raise UnsupportedError(
                "PIA060",
                "a forward pass of expanded weights under autocast",
                "Their backward pass mixes precisions and fails",
                "train without autocast, or grad_sample_mode='hooks'",
            )
        if not len(x):
            return self._module(x, *args, **kwargs)
        return super().forward(x, *args, **kwargs)
