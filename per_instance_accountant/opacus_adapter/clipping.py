"""Flat clipping with one threshold per instance, and the DPOptimizers that do it.

Every norm here is an UPPER bound of the norm of the stored gradient and every factor a LOWER bound of the
one asked for, so the clipped gradient has norm at most the threshold in exact arithmetic, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed

from per_instance_accountant.errors import AlignmentError, UnsupportedError

if TYPE_CHECKING:
    from per_instance_accountant.opacus_adapter.capture import Tracker

BLOCK = 256
"""Terms summed in float32 before the sum goes on in float64."""

NORM_SLACK = 136 * 2.0**-24
"""Relative slack added to norms. 129 units of float32 rounding cover a block, whatever the order of its
summation, and its root; one covers the product with the factor (docs/opacus_integration.md)."""

UNDERFLOW = 2.0**-125
"""More than the square of a float32 entry that can vanish by underflow; added to the sum for every entry."""

STOCK_MARGIN = 1e-6
"""What Opacus adds to a norm before it divides; kept, so that training stays equal to Opacus'."""


def block_norms(gradient: torch.Tensor) -> list[torch.Tensor]:
    """Norms (B, blocks) of runs of at most BLOCK entries of each row of a (B, ...) tensor, in its dtype."""
    rows = gradient.flatten(1)
    if rows.shape[1] <= BLOCK:
        return [torch.linalg.vector_norm(rows, dim=1, keepdim=True)]
    width = rows.shape[1] - rows.shape[1] % BLOCK
    blocks = [torch.linalg.vector_norm(rows[:, :width].unflatten(1, (-1, BLOCK)), dim=2)]
    return blocks if width == rows.shape[1] else [*blocks, *block_norms(rows[:, width:])]


def instance_norms(gradients: Sequence[torch.Tensor]) -> NDArray[np.float64]:
    """Upper bounds of the norms of per-sample gradients that are spread over parameters.

    gradients: one (B, ...) float32 or float64 tensor per parameter. Returns (B,) float64; NaN or infinity
    exactly where a gradient is not finite.

    >>> instance_norms([torch.tensor([[3.0], [0.0]]), torch.tensor([[4.0], [0.0]])]).round(3).tolist()
    [5.0, 0.0]
    """
    if not len(gradients[0]):
        return np.empty(0)
    gradients = [g.unsqueeze(1) if g.dim() == 1 else g for g in gradients]
    device, entries = gradients[0].device, sum(g[0].numel() for g in gradients)
    blocks = torch.cat([block.to(device) for g in gradients for block in block_norms(g)], dim=1).double()
    squares = blocks.square_().sum(dim=1).cpu().numpy()
    norms: NDArray[np.float64] = np.sqrt(squares + entries * UNDERFLOW) * (1 + NORM_SLACK)
    overflown = np.flatnonzero(~np.isfinite(norms))
    if len(overflown):
        # Squares of finite float32 numbers above 1e19 overflow in float32, not in float64.
        rows = [g[overflown].flatten(1).double().cpu() for g in gradients]
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
    contributions = round_up(factors.astype(np.float64) * norms)
    return factors, np.minimum(contributions, round_up(np.asarray(limits)))


class TrackedOptimizer(DPOptimizer):
    """A DPOptimizer whose steps are written to a ledger before noise is added. Made by :func:`install`
    only."""

    tracker: Tracker
    # With this flag torch.amp.GradScaler announces itself through `found_inf`, and can be refused.
    _step_supports_amp_scaling = True

    def __reduce__(self) -> Any:
        return self.tracker.__reduce__()

    def attach_step_hook(self, fn: Callable[[DPOptimizer], None]) -> None:
        self.tracker.accept_hook(fn)
        super().attach_step_hook(fn)

    def clip_and_accumulate(self) -> None:
        for p in self.params:
            _check_processed_flag(p.grad_sample)
        gradients = [self._get_flat_grad_sample(p).to(p.dtype) for p in self.params]
        factors = torch.from_numpy(self.tracker.clip(instance_norms(gradients)))
        for p, gradient in zip(self.params, gradients, strict=True):
            factors = factors.to(device=gradient.device, dtype=gradient.dtype)
            total = torch.einsum("i,i...", factors, gradient)
            if p.summed_grad is None:
                p.summed_grad = total
            else:
                p.summed_grad += total
            _mark_as_processed(p.grad_sample)
        self.tracker.accept()

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        self.tracker.check_loop()
        self.clip_and_accumulate()
        return self._release()

    def _release(self) -> bool:
        if self._check_skip_next_step():
            self._is_last_step_skipped = True
            return False
        self.tracker.record()
        self.add_noise()
        self.scale_grad()
        if self.step_hook:
            self.step_hook(self)
        self.tracker.released()
        self._is_last_step_skipped = False
        return True


class TrackedGhostOptimizer(TrackedOptimizer, DPOptimizerFastGradientClipping):
    """A DPOptimizerFastGradientClipping whose steps are written to a ledger before noise is added."""

    def clip_and_accumulate(self) -> None:
        return None

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        self.tracker.check_loop()
        self.tracker.check_clipped()
        self.accumulate()
        self.tracker.accept()
        return self._release()


TRACKED: dict[type[DPOptimizer], type[TrackedOptimizer]] = {
    DPOptimizer: TrackedOptimizer,
    DPOptimizerFastGradientClipping: TrackedGhostOptimizer,
}
"""Optimizer class -> its tracked twin. A class that is not here is refused."""


def install(optimizer: DPOptimizer, tracker: Tracker) -> None:
    """Turn a DPOptimizer into its tracked twin, in place, and close the way around it."""
    optimizer.tracker = tracker
    optimizer.__class__ = TRACKED[type(optimizer)]
    optimizer.original_optimizer.register_step_pre_hook(tracker.before_update)


class GhostFactors:
    """``get_clipping_coef`` of a tracked module: the only place where ghost clipping scales an instance.

    Copies of the module get one that refuses, because their steps belong to no tracker.
    """

    def __init__(self, module: Any = None, tracker: Tracker | None = None) -> None:
        self.module, self.tracker = module, tracker

    def __call__(self) -> torch.Tensor:
        if self.tracker is None:
            raise AlignmentError(
                "PIA007",
                "a copy of a tracked module was trained",
                "Its steps would be in no ledger",
                "train the module that make_private returned; copies are for evaluation",
            )
        norms = ghost_norms(self.module)
        return torch.from_numpy(self.tracker.clip(norms.cpu().numpy())).to(norms.device)

    def __reduce__(self) -> Any:
        return GhostFactors, ()


def install_ghost(module: Any, tracker: Tracker) -> None:
    """Make ghost clipping use the tracker's factors, and norms of linear layers that survive cancellation."""
    module.NORM_SAMPLERS = {**module.NORM_SAMPLERS, torch.nn.Linear: linear_norms}
    module.get_clipping_coef = GhostFactors(module, tracker)


def linear_norms(
    layer: torch.nn.Linear, activations: list[torch.Tensor], backprops: torch.Tensor
) -> dict[torch.Tensor, torch.Tensor]:
    """Norms (B,) of the per-sample gradients of a linear layer, without forming them, in float64.

    With several positions per instance the squared norm is a sum of products of inner products. In float32
    its rounding can exceed a norm that is small by cancellation; in float64 it cannot, for norms worth
    clipping.
    """
    left = backprops.double().flatten(1, -2) if backprops.dim() > 2 else backprops.double().unsqueeze(1)
    right = activations[0].double().reshape(*left.shape[:2], activations[0].shape[-1])
    norms: dict[torch.Tensor, torch.Tensor] = {}
    if layer.weight.requires_grad:
        if left.shape[1] == 1:
            squares = left.square().sum(dim=(1, 2)) * right.square().sum(dim=(1, 2))
        else:
            squares = ((left @ left.mT) * (right @ right.mT)).sum(dim=(1, 2)).clamp(min=0)
        norms[layer.weight] = squares.sqrt()
    if layer.bias is not None and layer.bias.requires_grad:
        norms[layer.bias] = left.sum(dim=1).norm(dim=1)
    return norms


def ghost_norms(module: Any) -> torch.Tensor:
    """Upper bounds (B,) float64 of the norms whose parts the first backward pass of ghost clipping left on
    the parameters; taken away, so that none is used twice.

    Raises AlignmentError PIA003 when a trainable parameter has no norm for this batch, UnsupportedError
    PIA060 when norms were computed in low precision.
    """
    parameters = module.trainable_parameters
    parts: list[torch.Tensor] = [
        p._norm_sample for p in parameters if getattr(p, "_norm_sample", None) is not None
    ]
    missing = len(parameters) - len(parts)
    if missing:
        raise AlignmentError(
            "PIA003",
            f"{missing} of {len(parameters)} trainable parameters have no per-sample norm for this batch",
            "Norms of an earlier batch would have been used, so instances could enter the sum unclipped",
            "layer.requires_grad_(False) for layers that not every forward pass uses",
        )
    if any(part.dtype not in (torch.float32, torch.float64) for part in parts):
        raise UnsupportedError(
            "PIA060",
            "ghost clipping computed norms in low precision",
            "Rounding can make a norm 0, and its gradient would enter the sum unclipped",
            "train without autocast, or grad_sample_mode='hooks'",
        )
    for p in parameters:
        p._norm_sample = None
    norms = torch.stack([part.to(parts[0].device, torch.float64) for part in parts]).norm(dim=0)
    module.per_sample_gradient_norms = norms.float()
    largest = max(p.numel() for p in parameters)
    # Layers without a norm sampler are summed by Opacus in float32 over all their entries.
    return norms * (1 + NORM_SLACK + 4 * math.sqrt(largest) * 2.0**-24)
