"""Ghost clipping of a model whose parameters are spread over processes (FSDP2, ``fully_shard``).

Each rank draws its own rows and sees every layer whole while it runs, so the norms of its rows are complete
without any exchange. The second backward pass adds the clipped sums of all ranks and divides by their number.
Each rank adds noise to the shard of the parameters that it holds, so every entry gets noise once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from opacus import optimizers
from opacus.optimizers.optimizer import _generate_noise
from torch.distributed.tensor import DTensor, Replicate

from per_instance_accountant.opacus_adapter.optimizers import TRACKED
from per_instance_accountant.opacus_adapter.rank_steps import DISTRIBUTED, GhostRankStep, refuse_ranks
from per_instance_accountant.opacus_adapter.ranks import SHARDED

try:
    from opacus.optimizers import FSDPOptimizerFastGradientClipping as _Stock
except ImportError:  # Opacus before 1.5.4
    from opacus.optimizers import DPOptimizerFastGradientClipping as _Stock


PRECISE = {None, torch.float32, torch.float64}


class ShardNoise(_Stock):
    """Noise as Opacus makes it, also for parameters that leave some rank without a row."""

    world_size: int
    grad_state: dict[Any, dict[str, Any]]

    def add_noise(self) -> None:
        std = self.noise_multiplier * self.max_grad_norm
        if self.loss_reduction == "mean":
            std /= self.world_size
        for p in self.params:
            total = self.grad_state[p]["summed_grad"]
            # For the whole parameter, of which the rank keeps its shard: generators that were seeded alike
            # on all ranks do no harm then.
            noise = _generate_noise(std, total, generator=self.generator, secure_mode=self.secure_mode)
            whole = DTensor.from_local(noise, total.device_mesh, [Replicate()], run_check=False)
            p.grad = total + whole.redistribute(placements=total.placements)


class TrackedShardedOptimizer(GhostRankStep, ShardNoise):
    """An FSDPOptimizerFastGradientClipping whose steps are written to one part of a ledger on each rank.

    Differs from Opacus for ``loss_reduction="sum"``: the sum of all ranks is released, as ``DPDDP`` does,
    not their mean with the noise of the sum.
    """

    core: torch.nn.Module

    def draws_noise(self) -> bool:
        return True

    @property
    def holds_sum(self) -> bool:
        return any(state["summed_grad"] is not None for state in self.grad_state.values())

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        try:
            check_sharding(self.core, self.params, self.world_size)
        except BaseException:
            self.ranks.fail()
            raise
        return super().pre_step(closure)

    def accumulate(self) -> None:
        if self.loss_reduction == "sum":
            for p in self.params:
                p.grad.mul_(self.world_size)
        ShardNoise.accumulate(self)

    def forget(self) -> None:
        super().forget()
        for state in self.grad_state.values():
            state["summed_grad"] = None
        for layer in self.core.modules():
            layer.__dict__.pop("norm_sample", None)
            layer.__dict__.pop("_forward_counter", None)


if hasattr(optimizers, "FSDPOptimizerFastGradientClipping"):
    DISTRIBUTED[_Stock] = TRACKED[_Stock] = TrackedShardedOptimizer


def prepare_sharded(optimizer: Any, module: Any, verify: str) -> None:
    """Check a sharded model before it is tracked; nothing for others. Raises UnsupportedError PIA060."""
    core: Any = module._module
    if not isinstance(core, SHARDED):
        return
    if verify != "off":
        refuse_ranks(f"verify={verify!r} with FSDP: no rank holds the parameters that it would need")
    known = {*module.GRAD_SAMPLERS, *module.NORM_SAMPLERS}
    layers = [layer for layer in core.modules() if any(p.requires_grad for p in layer.parameters(False))]
    if {module._get_module_type(layer) for layer in layers} - known:
        refuse_ranks("FSDP with trainable parameters in a layer that Opacus has no sampler for")
    check_sharding(core, optimizer.params, optimizer.world_size)
    optimizer.core = core


def check_sharding(core: torch.nn.Module, parameters: list[Any], world_size: int) -> None:
    """Raise UnsupportedError PIA060 unless FSDP divides the sum of all ranks by their number, in the
    parameters' precision, for every trainable parameter: the noise is made for that.

    ``set_gradient_divide_factor(1.0)`` would release a sum that is ``world_size`` times larger,
    ``set_requires_gradient_sync(False)`` the sum of one rank.
    """
    groups = [group for layer in core.modules() if isinstance(layer, SHARDED) for group in _groups(layer)]
    for group in groups:
        policy, mesh = group.mp_policy, group.mesh_info.mesh
        if not {policy.param_dtype, policy.reduce_dtype, policy.output_dtype} <= PRECISE:
            refuse_ranks("FSDP with a MixedPrecisionPolicy of low precision")
        if mesh.ndim != 1 or mesh.size() != world_size:
            refuse_ranks("FSDP over another mesh than one dimension with all processes")
        plain = group.reduce_grads and group.all_reduce_grads and group._all_reduce_hook is None
        stock = type(group._reduce_scatter_comm).__name__ == "DefaultReduceScatter"
        if not (plain and stock and group.gradient_divide_factor is None):
            refuse_ranks("FSDP with another reduction of gradients than the mean over all processes")
    managed = {id(held.sharded_param) for group in groups for held in group.fsdp_params}
    trainable = [*parameters, *(p for p in core.parameters() if p.requires_grad)]
    if not {id(p) for p in trainable} <= managed:
        refuse_ranks("trainable parameters that FSDP does not shard (ignored_params)")


def _groups(layer: Any) -> list[Any]:
    """The groups of parameters that this layer communicates together."""
    state = layer._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return [state._fsdp_param_group] if groups is None and state._fsdp_param_group else list(groups or [])
