"""Precision that leaves norms, clipping and what is released in agreement."""

from __future__ import annotations

from typing import Any

import torch

from per_instance_accountant.errors import UnsupportedError

EXACT = (torch.float32, torch.float64)


def check_precision(parameter: torch.Tensor) -> None:
    """Raise UnsupportedError PIA060 for a parameter whose gradients have coarser rounding than the norms
    allow for."""
    if parameter.dtype not in EXACT:
        raise UnsupportedError(
            "PIA060",
            "parameters in low precision, where clipping is inexact",
            "What an instance contributes would not be known exactly",
            "model.float()",
        )


def check_signals(*tensors: Any) -> None:
    """Raise UnsupportedError PIA060 before anything is cast: gradients of bfloat16 signals are larger than
    float64 norms of them say."""
    for tensor in tensors:
        if torch.is_tensor(tensor) and tensor.is_floating_point() and tensor.dtype not in EXACT:
            raise UnsupportedError(
                "PIA060",
                "a forward or backward pass ran in low precision under ghost clipping",
                "The released gradients would be larger than their recorded norms",
                "train without autocast, or grad_sample_mode='hooks'",
            )


def rounded_products(device: torch.device, *, convolutions: bool) -> bool:
    """Whether PyTorch may round float32 numbers to 8 or 11 bits before it multiplies them on this device.

    >>> rounded_products(torch.device("cpu"), convolutions=True)
    False
    """
    backends: Any = torch.backends
    products, layers = (
        (backends.cuda.matmul, backends.cudnn)
        if device.type == "cuda"
        else (backends.mkldnn.matmul, backends.mkldnn)
    )
    if not hasattr(products, "fp32_precision"):  # PyTorch before 2.9
        rounded = torch.get_float32_matmul_precision() != "highest"
        return rounded or (convolutions and device.type == "cuda" and backends.cudnn.allow_tf32)
    asked = [products.fp32_precision, *([layers.conv.fp32_precision] if convolutions else [])]
    return not set(asked) <= {"none", "ieee"}


def has_convolutions(module: torch.nn.Module) -> bool:
    """Whether the model has layers for which PyTorch has a setting of precision of their own."""
    kinds = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return any(isinstance(layer, kinds) for layer in module.modules())


def check_products(device: torch.device, *, convolutions: bool) -> None:
    """Raise UnsupportedError PIA060 where the second backward pass of ghost clipping, which makes the
    gradients that are released, would round more than the norms allow for."""
    if rounded_products(device, convolutions=convolutions):
        raise UnsupportedError(
            "PIA060",
            "ghost clipping with float32 products that are rounded to TF32 or bfloat16",
            "The released gradients would be larger than their recorded norms, by up to a few parts in 1000",
            "torch.set_float32_matmul_precision('highest') and torch.backends.cudnn.allow_tf32 = False, or "
            "grad_sample_mode='hooks'",
        )
