"""Layers whose gradients belong to no single instance, or whose buffers are released without noise."""

from __future__ import annotations

import torch
from opacus.layers.dp_rnn import DPRNNBase
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from per_instance_accountant.errors import UnsupportedError


def check_layers(module: torch.nn.Module) -> None:
    """Raise UnsupportedError PIA060 for layers whose per-sample gradients may come in another order than
    the batch."""
    if any(isinstance(layer, DPRNNBase) for layer in module.modules()):
        raise UnsupportedError(
            "PIA060",
            "a DPRNN, DPGRU or DPLSTM: its gradients are in order of length for packed sequences",
            "What an instance contributes would not be known exactly",
            "use a layer that keeps the order of the batch, such as an embedding with a linear layer",
        )
    words = [
        layer for layer in module.modules() if isinstance(layer, (torch.nn.Embedding, torch.nn.EmbeddingBag))
    ]
    if any(layer.max_norm is not None or layer.scale_grad_by_freq for layer in words):
        raise UnsupportedError(
            "PIA060",
            "an embedding with max_norm or scale_grad_by_freq",
            "Its forward pass changes weights without noise, or instances scale each other's gradients",
            "Embedding(..., max_norm=None, scale_grad_by_freq=False)",
        )


def normalising_layers(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that :func:`check_statistics` has to look at in every pass."""
    return [layer for layer in module.modules() if isinstance(layer, _NormBase)]


def check_statistics(layers: list[torch.nn.Module]) -> None:
    """Raise UnsupportedError PIA060 where a pass would mix instances or collect statistics of them.

    A frozen BatchNorm passes Opacus' validation, and ``model.train()`` switches it to batch statistics: every
    row's gradient then depends on all rows, and the running means are released without noise.
    """
    for layer in layers:
        collects = layer.training and getattr(layer, "running_mean", None) is not None
        mixes = isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None)
        if collects or mixes:
            raise UnsupportedError(
                "PIA060",
                f"a {type(layer).__name__} layer uses or collects statistics of the batch",
                "An instance would enter through the gradients of others, or through buffers without noise",
                "layer.eval() after every model.train(), or GroupNorm in its place",
            )
