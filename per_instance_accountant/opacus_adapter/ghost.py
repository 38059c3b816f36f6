"""Ghost clipping: norms without per-sample gradients, and the factors that scale each instance's loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

from per_instance_accountant.errors import AlignmentError, UnsupportedError
from per_instance_accountant.opacus_adapter.clipping import NORM_SLACK, check_counts, row_norms
from per_instance_accountant.opacus_adapter.precision import check_environment, check_signals, exactly
from per_instance_accountant.opacus_adapter.ranks import SHARDED

if TYPE_CHECKING:
    from per_instance_accountant.opacus_adapter.capture import Tracker

Gradients = dict[torch.Tensor, torch.Tensor]
"""Parameter -> (B, ...) gradients, or (B,) norms of gradients, one row for each instance."""
Sampler = Callable[[Any, Any, torch.Tensor], Gradients]
"""(layer, activations, backpropagated signals) -> Gradients."""


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
        factors: torch.Tensor = self.tracker.optimizer.loss_factors(self.module)
        return factors

    def __reduce__(self) -> Any:
        return GhostFactors, ()


def _per_instance_terms(name: str) -> Callable[[Any, Any], Any]:
    """Arithmetic of ghost losses that takes no term which depends on parameters but on no instance."""
    stock = getattr(DPTensorFastGradientClipping, name)

    def combine(self: Any, other: Any) -> Any:
        foreign = isinstance(other, torch.Tensor) and other.requires_grad
        if foreign and isinstance(getattr(self.module, "get_clipping_coef", None), GhostFactors):
            raise UnsupportedError(
                "PIA060",
                "a term that belongs to no instance was combined with the loss under ghost clipping",
                "Its gradient would be released once for every instance, outside of what is clipped",
                "optimizer weight_decay=... for an L2 penalty, or grad_sample_mode='hooks'",
            )
        return stock(self, other)

    return combine


# Opacus adds such a term to the loss of every instance, after the norms were taken. Other losses stay stock.
for _name in ("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__"):
    if hasattr(DPTensorFastGradientClipping, _name):
        setattr(DPTensorFastGradientClipping, _name, _per_instance_terms(_name))


_stock_backward = DPTensorFastGradientClipping.backward


def _backward(self: Any, *args: Any, **named: Any) -> Any:
    """Both backward passes of ghost clipping, of one loss for each instance."""
    factors = getattr(self.module, "get_clipping_coef", None)
    if not isinstance(factors, GhostFactors) or factors.tracker is None:
        return _stock_backward(self, *args, **named)
    if factors.tracker.batch_is_empty and factors.tracker.optimizer.has_stand_in:
        return factors.tracker.optimizer.drop_stand_in(self.loss_per_sample)
    self.loss_per_sample = one_loss_each(self.loss_per_sample, factors.tracker.batch_size)
    try:
        found = exactly(_stock_backward, self, *args, **named)
    except BaseException:
        self.module.enable_hooks()  # Off between the two passes, and they would stay off.
        raise
    factors.tracker.optimizer.seal()
    return found


DPTensorFastGradientClipping.backward = _backward


def one_loss_each(losses: torch.Tensor, count: int) -> torch.Tensor:
    """The losses (B, ...) as (B,), the shape in which Opacus multiplies them by the factors (B,).

    Losses (B, 1) would become a (B, B) product, in which every instance has the sum of all factors; one loss
    of a whole batch, or T losses of a batch of one, would be scaled as wrongly. Raises AlignmentError PIA003.

    >>> one_loss_each(torch.ones(3, 1), 3).shape
    torch.Size([3])
    """
    if losses.numel() != count or (losses.dim() == 0 and count != 1):
        raise AlignmentError(
            "PIA003",
            f"the criterion gave {losses.numel()} losses for a batch of {count} instances",
            "Losses and clip factors would be combined across instances, which then enter unclipped",
            "a criterion with one loss for each instance; criterion(..., shape=logits.shape) for sequences",
        )
    return losses.reshape(count)


def install_ghost(module: Any, tracker: Tracker) -> None:
    """Make ghost clipping use the tracker's factors and norms that no rounding makes too small."""
    check_environment()
    kind_of = getattr(module, "_get_module_type", type)
    kinds = {kind_of(layer) for layer in module.iterate_submodules(module._module)}
    module.NORM_SAMPLERS = {kind: norm_sampler(module, kind) for kind in kinds}
    module.get_clipping_coef = GhostFactors(module, tracker)


def norm_sampler(module: Any, kind: type) -> Sampler:
    """How the norms of layers of this kind are computed: in float64, or in float32 over short blocks.

    Opacus sums float32 numbers over whole layers, which can fall short of the exact sum by more than any
    small margin.
    """
    if kind in (torch.nn.Linear, torch.nn.Embedding):
        return linear_norms if kind is torch.nn.Linear else embedding_norms
    if kind in module.NORM_SAMPLERS:
        return partial(_float64_norms, module.NORM_SAMPLERS[kind])
    functorch = module.force_functorch or kind not in module.GRAD_SAMPLERS
    return partial(_block_norms, ft_compute_per_sample_gradient if functorch else module.GRAD_SAMPLERS[kind])


def _float64_norms(sampler: Sampler, layer: Any, activations: Any, backprops: torch.Tensor) -> Gradients:
    check_signals(backprops, *activations)
    return sampler(layer, activations, backprops.double())


def _block_norms(sampler: Sampler, layer: Any, activations: Any, backprops: torch.Tensor) -> Gradients:
    check_signals(backprops, *activations)
    found = sampler(layer, activations, backprops)
    return {p: row_norms([gradient]) for p, gradient in found.items()}


def linear_norms(
    layer: torch.nn.Linear, activations: list[torch.Tensor], backprops: torch.Tensor
) -> Gradients:
    """Norms (B,) of the per-sample gradients of a linear layer, without forming them, in float64.

    With several positions per instance the squared norm is a sum of products of inner products. In float32
    its rounding can exceed a norm that is small by cancellation; in float64 it cannot, for norms worth
    clipping.
    """
    check_signals(backprops, activations[0])
    count = len(backprops)
    norms: Gradients = {}
    if backprops.numel() == count * backprops.shape[-1]:
        signals, inputs = _row_norms(backprops), _row_norms(activations[0])
        if layer.weight.requires_grad:
            norms[layer.weight] = signals * inputs
        if layer.bias is not None and layer.bias.requires_grad:
            norms[layer.bias] = signals
        return norms
    left = backprops.double().flatten(1, -2)
    right = activations[0].double().reshape(*left.shape[:2], activations[0].shape[-1])
    if layer.weight.requires_grad:
        norms[layer.weight] = ((left @ left.mT) * (right @ right.mT)).sum(dim=(1, 2)).clamp(min=0).sqrt()
    if layer.bias is not None and layer.bias.requires_grad:
        norms[layer.bias] = left.sum(dim=1).norm(dim=1)
    return norms


def _row_norms(values: torch.Tensor) -> torch.Tensor:
    """(B,) float64 norms of the rows of (B, ...), one rounding away from those of float64 sums."""
    found: torch.Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1, dtype=torch.float64)
    return found


def embedding_norms(
    layer: torch.nn.Embedding, activations: list[torch.Tensor], backprops: torch.Tensor
) -> Gradients:
    """Norms (B,) of the per-sample gradients of an embedding, in float64: signals at the same entry add up,
    those at ``padding_idx`` vanish."""
    check_signals(backprops)
    count, words = len(activations[0]), layer.num_embeddings
    entries = (activations[0].flatten(1) if activations[0].dim() > 1 else activations[0][:, None]).long()
    signals = backprops.double().reshape(entries.numel(), layer.embedding_dim)
    rows = torch.arange(count, device=entries.device)[:, None] * words
    kept = slice(None) if layer.padding_idx is None else (entries != layer.padding_idx).flatten()
    places, which = torch.unique((rows + entries).flatten()[kept], return_inverse=True)
    sums = signals.new_zeros(len(places), layer.embedding_dim).index_add(0, which, signals[kept])
    squares = signals.new_zeros(count).index_add(0, places // words, sums.square().sum(dim=1))
    return {layer.weight: squares.sqrt()}


def _parts_of_layer(layer: torch.nn.Module) -> list[torch.Tensor]:
    """The norms that Opacus' FSDP hooks left on a layer, if there is one for each of its parameters."""
    found = layer.__dict__.pop("norm_sample", [])
    trainable = sum(p.requires_grad for p in layer.parameters(recurse=False))
    return found if len(found) == trainable and all(part.dim() == 1 for part in found) else []


def ghost_norms(module: Any) -> torch.Tensor:
    """Upper bounds (B,) float64 of the norms whose parts the first backward pass of ghost clipping left on
    the parameters (with FSDP, on the layers); taken away, so that none is used twice.

    Raises AlignmentError PIA003 when a trainable parameter has no norm for this batch.
    """
    # Asked anew: a layer that was unfrozen after wrapping would be released without having been clipped.
    core: Any = module._module
    owned = list(core.parameters())
    parameters = [p for p in owned if p.requires_grad]
    parts: list[torch.Tensor] = [
        p._norm_sample for p in parameters if getattr(p, "_norm_sample", None) is not None
    ]
    if isinstance(core, SHARDED):
        parts = [part for layer in core.modules() for part in _parts_of_layer(layer)]
    missing = len(parameters) - len(parts)
    if missing:
        raise AlignmentError(
            "PIA003",
            f"{missing} of {len(parameters)} trainable parameters have no per-sample norm for this batch",
            "Norms of an earlier batch would have been used, so instances could enter the sum unclipped",
            "layer.requires_grad_(False) for layers that not every forward pass uses",
        )
    for p in owned:
        p._norm_sample = None
    check_counts([len(part) for part in parts])
    together = torch.stack([part.to(parts[0].device, torch.float64) for part in parts])
    norms = torch.linalg.vector_norm(together, dim=0)
    module.per_sample_gradient_norms = norms.float()
    return norms * (1 + NORM_SLACK)
