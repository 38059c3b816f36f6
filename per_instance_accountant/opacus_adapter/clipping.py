"""Norms and factors for clipping with one threshold per instance.

Every norm here is an UPPER bound of the norm of the stored gradient and every factor a LOWER bound of the
one asked for, so the clipped gradient has norm at most the threshold in exact arithmetic, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from per_instance_accountant.errors import AlignmentError

BLOCK = 256
"""Terms summed in float32 before the sum goes on in float64."""

NORM_SLACK = 136 * 2.0**-24
"""Relative slack added to norms. 129 units of float32 rounding cover a block, whatever the order of its
summation, and its root; one covers the product with the factor (docs/opacus_integration.md)."""

UNDERFLOW = 2.0**-125
"""More than the square of a float32 entry that can vanish by underflow; made up for, for every entry."""

STRIPS, LARGE = (8192, 511), 1 << 18
"""Entries of a sum, at most and more than, that stay in the nearest cache while rows are added; entries of a
gradient for which that matters."""

STOCK_MARGIN = 1e-6
"""What Opacus adds to a norm before it divides; kept, so that training stays equal to Opacus'."""


def block_norms(gradient: torch.Tensor) -> list[torch.Tensor]:
    """Norms (B, blocks) of runs of at most BLOCK entries of each row of a (B, ...) tensor, in its dtype."""
    rows = gradient.flatten(1) if gradient.dim() > 1 else gradient[:, None]
    count, left = divmod(rows.shape[1], BLOCK)
    if not count:
        return [torch.linalg.vector_norm(rows, dim=1, keepdim=True)]
    whole = rows[:, :-left] if left else rows
    blocks = [torch.linalg.vector_norm(whole.view(len(rows), count, BLOCK), dim=2)]
    return [*blocks, *block_norms(rows[:, -left:])] if left else blocks


def row_norms(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Norms of the rows of (B, ...) tensors taken together: (B,) float64, where the first of them is.

    Relative error at most 129 * 2^-24; what vanishes by underflow is made up for.

    >>> row_norms([torch.tensor([[3.0, 4.0], [0.0, 1.0]])]).tolist()
    [5.0, 1.0]
    """
    if not len(gradients[0]):
        return torch.zeros(0, dtype=torch.float64)
    device, entries = gradients[0].device, sum(g.numel() for g in gradients) // len(gradients[0])
    blocks = torch.cat([block.to(device) for g in gradients for block in block_norms(g)], dim=1)
    norms: torch.Tensor = torch.linalg.vector_norm(blocks, dim=1, dtype=torch.float64)
    return norms.add_(math.sqrt(entries * UNDERFLOW))


@cache
def strip_width(entries: int) -> int:
    """Into strips of how many entries a sum of so many is divided; 0 if it does not divide well.

    >>> strip_width(784 * 512), strip_width(10007)
    (8192, 0)
    """
    return next((width for width in range(*STRIPS, -1) if entries % width == 0), 0)


def clipped_sum(factors: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The rows of a (B, ...) tensor, each times its factor (B,), added up.

    Not by a matrix product, which ``torch.set_float32_matmul_precision`` lets round rows to 8 or 11 bits: up
    to one part in 250 more than was clipped.

    >>> clipped_sum(torch.tensor([1.0, 0.5]), torch.tensor([[1.0, 2.0], [4.0, 8.0]])).tolist()
    [3.0, 6.0]
    """
    rows = gradient.flatten(1) if gradient.dim() > 1 else gradient[:, None]
    count, entries = rows.shape
    width = entries
    if rows.is_cpu:
        width = strip_width(entries) if rows.numel() >= LARGE and rows.is_contiguous() else 0
    if width and count:
        total = _strip_sum(factors, rows, width)
    else:
        pieces = rows.split(STRIPS[0], dim=1)
        total = torch.cat([(piece * factors[:, None]).sum(dim=0) for piece in pieces])
    return total.view(gradient.shape[1:])


def _strip_sum(factors: torch.Tensor, rows: torch.Tensor, width: int) -> torch.Tensor:
    """Strip by strip, so that on a CPU the sum stays in the nearest cache. A matrix product goes over all of
    it for every few rows, and takes a fifth longer."""
    count, strips = len(rows), rows.shape[1] // width
    places = torch.arange(count * strips, device=rows.device).view(count, strips).t().contiguous()
    weights = factors.expand(strips, count).contiguous()
    total: torch.Tensor = torch.nn.functional.embedding_bag(
        places, rows.reshape(-1, width), mode="sum", per_sample_weights=weights
    )
    return total


def instance_norms(gradients: Sequence[torch.Tensor]) -> NDArray[np.float64]:
    """Upper bounds of the norms of per-sample gradients that are spread over parameters.

    gradients: one (B, ...) float32 or float64 tensor per parameter. Returns (B,) float64; NaN or infinity
    exactly where a gradient is not finite.

    >>> instance_norms([torch.tensor([[3.0], [0.0]]), torch.tensor([[4.0], [0.0]])]).round(3).tolist()
    [5.0, 0.0]
    """
    norms: NDArray[np.float64] = norms_on_device(gradients).cpu().numpy()
    if len(norms) and not norms.max() < np.inf:  # So written that NaN is not missed.
        overflown = np.flatnonzero(~np.isfinite(norms))
        # Squares of finite float32 numbers above 1e19 overflow in float32, not in float64.
        rows = [g[overflown].reshape(len(overflown), -1).double().cpu() for g in gradients]
        norms[overflown] = torch.cat(rows, dim=1).norm(dim=1).numpy() * (1 + NORM_SLACK)
    return norms


def round_up(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """The smallest float32 numbers that are not below ``values``.

    >>> bool(round_up(np.array([0.1]))[0] >= 0.1)
    True
    """
    near = values.astype(np.float32)
    return np.where(near < values, np.nextafter(near, np.float32(np.inf)), near)


def clip_factors(
    norms: NDArray[np.float64], limits: NDArray[np.float64] | float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Factors that bring gradients under their limits, and upper bounds of the norms that remain.

    norms: (B,) upper bounds of the norms. limits: the thresholds, a number or (B,). Returns (factors,
    contributions), both (B,) float32 with ``factors * norms <= contributions <= limits``.

    >>> factors, contributions = clip_factors(np.array([0.5, 4.0]), 1.0)
    >>> factors.round(4).tolist(), contributions.round(4).tolist()
    ([1.0, 0.25], [0.5, 1.0])
    """
    exact = np.minimum(1.0, limits / (norms + STOCK_MARGIN))
    factors = exact.astype(np.float32)
    factors = np.where(factors > exact, np.nextafter(factors, np.float32(0)), factors)
    return factors, round_up(np.minimum(factors * norms, limits))


def round_up_on_device(values: torch.Tensor) -> torch.Tensor:
    """As :func:`round_up`, the same bits, for a tensor that stays where it is."""
    near = values.float()
    return torch.where(near < values, torch.nextafter(near, torch.full_like(near, np.inf)), near)


def clip_on_device(norms: torch.Tensor, limits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`clip_factors`, the same bits, for (B,) float64 tensors that stay where they are. The host
    waits for nothing.

    >>> factors, contributions = clip_on_device(torch.tensor([0.5, 4.0]).double(), torch.ones(2).double())
    >>> factors.double().round(decimals=4).tolist(), contributions.double().round(decimals=4).tolist()
    ([1.0, 0.25], [0.5, 1.0])
    """
    exact = (limits / (norms + STOCK_MARGIN)).clamp(max=1.0)
    factors = exact.float()
    factors = torch.where(factors > exact, torch.nextafter(factors, torch.zeros_like(factors)), factors)
    return factors, round_up_on_device(torch.minimum(factors.double() * norms, limits))


def norms_on_device(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """As :func:`instance_norms`, but (B,) float64 where the gradients are, and infinite also where squares
    overflow float32: above 1e19.

    >>> norms_on_device([torch.tensor([[3.0, 4.0], [0.0, 1e30]])]).float().tolist()
    [5.000040531158447, inf]
    """
    return row_norms(gradients).mul_(1 + NORM_SLACK)


def check_counts(counts: Sequence[int]) -> None:
    """Raise AlignmentError PIA003 when layers disagree on how many instances the batch has."""
    different = sorted(set(counts))
    if len(different) > 1:
        raise AlignmentError(
            "PIA003",
            f"layers have {' and '.join(map(str, different))} per-sample gradients for the same batch",
            "Rows of different layers belong to different instances",
            "keep the batch as first dimension of what every layer gets, e.g. (batch, tokens, width)",
        )


def layer_limits(layer_norms: NDArray[np.float64], clip_norm: float) -> NDArray[np.float64]:
    """(L,) clip norms of parameters, scaled so that their root of squares is ``clip_norm``.

    >>> layer_limits(np.array([3.0, 4.0]), 1.0).round(4).tolist()
    [0.6, 0.8]
    """
    return layer_norms * (clip_norm / float(np.linalg.norm(layer_norms)))


def layer_factors(
    gradients: Sequence[torch.Tensor], limits: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Factors that clip every parameter's gradient on its own, and upper bounds of the norms that remain.

    gradients: one (B, ...) tensor for each of the L parameters. limits: (L,), see :func:`layer_limits`.
    Returns (B, L) float32 factors and (B,) float64 norms of all layers together, at most the root of squares
    of the limits up to rounding; not finite where a gradient is not finite.

    >>> rows = [torch.tensor([[3.0, 0.0]]), torch.tensor([[0.1]])]
    >>> factors, together = layer_factors(rows, np.array([0.6, 0.8]))
    >>> factors.astype(float).round(4).tolist(), together.round(4).tolist()
    ([[0.2, 1.0]], [0.6083])
    """
    norms = _layer_norms(gradients)
    finite = np.isfinite(norms)
    factors, remaining = clip_factors(np.where(finite, norms, 0.0), limits)
    squares = np.square(remaining.astype(np.float64)).sum(axis=1)
    together = np.sqrt(squares) * (1 + (norms.shape[1] + 2) * 2.0**-52)
    return factors, np.where(finite.all(axis=1), together, np.inf)


def _layer_norms(gradients: Sequence[torch.Tensor]) -> NDArray[np.float64]:
    """(B, L) upper bounds, copied from the device once."""
    there = torch.stack([norms_on_device([gradient]) for gradient in gradients], dim=1)
    norms: NDArray[np.float64] = there.cpu().numpy()
    for layer in np.flatnonzero(~np.isfinite(norms).all(axis=0)).tolist():
        norms[:, layer] = instance_norms([gradients[layer]])
    return norms


def layer_factors_on_device(
    gradients: Sequence[torch.Tensor], limits: NDArray[np.float64]
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`layer_factors` for tensors that stay where they are, up to the last bits of float64, for
    which it leaves room.

    >>> rows = [torch.tensor([[3.0, 0.0]]), torch.tensor([[0.1]])]
    >>> factors, together = layer_factors_on_device(rows, np.array([0.6, 0.8]))
    >>> [round(factor, 4) for factor in factors[0].tolist()], round(together.item(), 4)
    ([0.2, 1.0], 0.6083)
    """
    norms = torch.stack([norms_on_device([gradient]) for gradient in gradients], dim=1)
    there = torch.stack([torch.full_like(norms[:, 0], limit) for limit in limits.tolist()], dim=1)
    factors, remaining = clip_on_device(norms, there)
    squares = sum(remaining.double().square().unbind(dim=1), torch.zeros_like(norms[:, 0]))
    together = squares.sqrt() * (1 + (len(limits) + 2) * 2.0**-52)
    return factors, torch.where(norms.isfinite().all(dim=1), together, torch.inf)
