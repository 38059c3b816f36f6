"""Precision that leaves norms, clipping and what is released in agreement."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
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


@cache
def _settings() -> list[tuple[Any, str, Any]]:
    """Where PyTorch says whether it may round float32 numbers to 8 or 11 bits before it multiplies them, and
    what stands for that it may not."""
    backends: Any = torch.backends
    if not hasattr(backends.cudnn, "conv"):  # PyTorch before 2.9
        groups = [backends.cuda.matmul, backends.cudnn, backends.mkldnn]
        return [(group, "allow_tf32", False) for group in groups if hasattr(group, "allow_tf32")]
    groups = [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
    if backends.cuda.is_built():
        groups += [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    return [(group, "fp32_precision", "ieee") for group in groups]


def exactly(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call a function while no setting lets PyTorch round float32 numbers before it multiplies them.

    ``set_float32_matmul_precision`` lets it, and for convolutions on CUDA it is the default. The second
    backward pass of ghost clipping, which makes the gradients that are released, would then round what the
    first one measured: up to a few parts in 1000 more than is recorded.

    >>> exactly(torch.get_float32_matmul_precision)
    'highest'
    """
    lowered = []
    for group, name, exact in _settings():
        value = getattr(group, name)
        if value not in (exact, "none"):
            lowered.append((group, name, value, exact))
    try:
        for group, name, _, exact in lowered:
            setattr(group, name, exact)
        return function(*arguments, **named)
    finally:
        for group, name, value, _ in lowered:
            setattr(group, name, value)


def check_environment() -> None:
    """Raise UnsupportedError PIA060 where the environment lets oneDNN round, whatever PyTorch says."""
    for name in ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"):
        if os.environ.get(name, "STRICT").upper() != "STRICT":
            raise UnsupportedError(
                "PIA060",
                f"ghost clipping with {name}={os.environ[name]}",
                "The released gradients would be larger than their recorded norms",
                f"unset {name}, or grad_sample_mode='hooks'",
            )
