"""The DPOptimizers whose steps are written to a ledger before noise is added: one tracked twin for each way
of clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import opacus
import torch
from numpy.typing import NDArray
from opacus.optimizers import (
    AdaClipDPOptimizer,
    DPOptimizer,
    DPOptimizerFastGradientClipping,
    DPPerLayerOptimizer,
)
from opacus.optimizers.optimizer import _check_processed_flag, _generate_noise, _mark_as_processed

from per_instance_accountant.errors import AlignmentError
from per_instance_accountant.opacus_adapter.adaptive import CountQuery
from per_instance_accountant.opacus_adapter.clipping import (
    check_counts,
    clipped_sum,
    instance_norms,
    layer_factors,
    layer_factors_on_device,
    layer_limits,
    norms_on_device,
)
from per_instance_accountant.opacus_adapter.ghost import ghost_norms
from per_instance_accountant.opacus_adapter.precision import check_precision
from per_instance_accountant.opacus_adapter.secure import with_secure_noise

if TYPE_CHECKING:
    from per_instance_accountant.opacus_adapter.capture import Tracker

OLD = tuple(map(int, opacus.__version__.split(".")[:2])) < (1, 6)


class TrackedOptimizer(DPOptimizer):
    """A DPOptimizer whose steps are written to a ledger before noise is added. Made by :func:`install`
    only."""

    tracker: Tracker
    clipping = "flat"
    gradient_scale = 1.0
    """What a framework divided the loss by: rows are multiplied by it before they are measured."""
    can_defer = True
    """Whether no step of this optimizer needs what an earlier one measured."""
    has_stand_in = False
    """Whether the model is given one made-up instance for an empty batch; its gradient is dropped."""
    # With this flag torch.amp.GradScaler announces itself through `found_inf`, and can be refused.
    _step_supports_amp_scaling = True

    def __reduce__(self) -> Any:
        return self.tracker.__reduce__()

    def draws_noise(self) -> bool:
        """Whether this process draws noise that is released: of several the first does it for all."""
        return True

    @property
    def holds_sum(self) -> bool:
        """Whether the clipped sum of a batch is on the parameters."""
        return any(p.summed_grad is not None for p in self.params)

    @property
    def mechanism_now(self) -> tuple[float, ...]:
        """The numbers that must not change inside a logical batch."""
        return float(self.noise_multiplier), float(self.max_grad_norm)

    def attach_step_hook(self, fn: Callable[[DPOptimizer], None]) -> None:
        self.tracker.accept_hook(fn)
        super().attach_step_hook(fn)

    def measure(self, gradients: Sequence[torch.Tensor]) -> NDArray[np.float64]:
        """(B,) upper bounds of what would enter the sum if no instance had a threshold below the clip
        norm's."""
        return instance_norms(gradients)

    def factors(self, gradients: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """For each parameter (B,) factors that clip the rows of its gradient."""
        if self.tracker.defers(gradients[0].device):
            own = self.tracker.clip_there(norms_on_device(gradients))
        else:
            own = torch.from_numpy(self.tracker.clip(self.measure(gradients)))
        return [own] * len(gradients)

    def charged(self, contributions: NDArray[np.float32], limits: NDArray[np.float64]) -> NDArray[np.float32]:
        """(B,) contributions, larger where more than the sum is released. limits: 0 for who is not in it."""
        return contributions

    def clip_and_accumulate(self) -> None:
        gradients = self._fresh_gradients()
        moved: dict[Any, torch.Tensor] = {}
        for p, gradient, own in zip(self.params, gradients, self.factors(gradients), strict=True):
            # Once for each device and precision, not for each parameter.
            key = (id(own), gradient.device, gradient.dtype)
            if key not in moved:
                moved[key] = own.to(device=gradient.device, dtype=gradient.dtype)
            total = clipped_sum(moved[key], gradient)
            if p.summed_grad is None:
                p.summed_grad = total
            else:
                p.summed_grad += total
            _mark_as_processed(p.grad_sample)
        self.tracker.accept()

    def _fresh_gradients(self) -> list[torch.Tensor]:
        """One (B, ...) tensor for each parameter. An empty batch needs no backward pass."""
        empty = self.tracker.batch_is_empty
        for p in self.params:
            sample = getattr(p, "grad_sample", None)
            if empty and (sample is None or self.has_stand_in):
                p.grad_sample = sample = torch.zeros((0, *p.shape), dtype=p.dtype, device=p.device)
            parts = sample if isinstance(sample, list) else [sample]
            if sample is None or any(hasattr(part, "_processed") for part in parts):
                missing = "no" if sample is None else "old"
                raise AlignmentError(
                    "PIA003",
                    f"a trainable parameter has {missing} per-sample gradients for this batch",
                    "What the instances contribute through it is unknown, so nothing was added",
                    "let every trainable layer take part, or layer.requires_grad_(False) before make_private",
                )
            check_precision(p)
        rows = [self._get_flat_grad_sample(p).to(p.dtype) for p in self.params]
        check_counts([len(gradient) for gradient in rows])
        return rows if self.gradient_scale == 1 else [row * self.gradient_scale for row in rows]

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        self.tracker.check_loop()
        self.clip_and_accumulate()
        return self._release()

    def _release(self) -> bool:
        if self._check_skip_next_step():
            self._is_last_step_skipped = True
            return False
        self.tracker.sessions.check(self)
        self.tracker.record()
        self.add_noise()
        self.tracker.sessions.drawn(self)
        self.scale_grad()
        self.tracker.recorder.deferral.void(self.params)
        if self.step_hook:
            self.step_hook(self)
        self.tracker.released()
        self._is_last_step_skipped = False
        return True

    def add_noise(self) -> None:
        if self.secure_mode:
            self._add_secure_noise()
        else:
            super().add_noise()

    def _add_secure_noise(self) -> None:
        std = self.noise_multiplier * self.max_grad_norm
        for p in self.params:
            _check_processed_flag(p.summed_grad)
            p.grad = with_secure_noise(p.summed_grad, std).view_as(p)
            _mark_as_processed(p.summed_grad)

    def continue_from(self, position: Mapping[str, Any]) -> None:
        """Take over what a checkpoint says about the state of the clipping: nothing where it has none."""

    def forget(self) -> None:
        """Drop what was accumulated and not released."""
        self._step_skip_queue.clear()
        self._is_last_step_skipped = False
        self.__dict__.pop("found_inf", None)
        for p in self.params:
            p.summed_grad = p.grad_sample = p.grad = None
            p._forward_counter = 0


class TrackedGhostOptimizer(TrackedOptimizer, DPOptimizerFastGradientClipping):
    """A DPOptimizerFastGradientClipping whose steps are written to a ledger before noise is added."""

    hides_sum = False
    """Whether ``p.grad`` is empty between backward pass and step, for loops that look at or scale it."""
    _sealed: Mapping[int, tuple[torch.Tensor, int]] = MappingProxyType({})
    _owned: frozenset[int] | set[int] = frozenset()

    def loss_factors(self, module: Any) -> torch.Tensor:
        """(B,) factors for the losses of the batch, between the two backward passes."""
        norms = ghost_norms(module)
        if self.tracker.defers(norms.device):
            return self.tracker.clip_there(norms)
        return torch.from_numpy(self.tracker.clip(norms.cpu().numpy())).to(norms.device)

    def clip_and_accumulate(self) -> None:
        return None

    def accumulate(self) -> None:
        # Opacus makes deep copies, which take several times as long.
        for p in self.params:
            if p.summed_grad is None:
                p.summed_grad = p.grad.detach().clone()
            else:
                p.summed_grad += p.grad.detach()

    def drop_stand_in(self, losses: torch.Tensor) -> None:
        """The backward passes of an empty batch for which the model was given a made-up instance."""
        losses.sum().backward()  # The hooks take what the forward pass left behind.
        self.zero_grad()
        for p in self.params:
            p.grad, p._norm_sample = torch.zeros_like(p), None
        self.tracker.clip(np.zeros(0))
        self.seal()

    def seal(self) -> None:
        """Remember the clipped sums that the backward pass left, so that a change is noticed."""
        self._sealed = {id(p): (p.grad, p.grad._version) for p in self.params if p.grad is not None}
        if self.hides_sum:
            for p in self.params:
                p.grad = None

    def _check_sealed(self) -> None:
        present = {id(p) for p in self.params}
        if not present <= self._owned:
            self._owned = {id(p) for p in self.tracker.module.parameters()}
        if not present <= self._owned:
            raise AlignmentError(
                "PIA003",
                "the optimizer got a parameter that is not the model's",
                "Ghost clipping does not measure it, so instances would be released through it unclipped",
                "make_private with a module and an optimizer that have all parameters",
            )
        changed = False
        for p in self.params:
            grad, version = self._sealed.get(id(p), (None, 0))
            left = None if self.hides_sum else grad
            changed |= grad is None or p.grad is not left or grad._version != version
        if changed:
            raise AlignmentError(
                "PIA005",
                "p.grad was changed between the backward pass and optimizer.step()",
                "It holds the clipped sum in ghost mode: another backward pass adds to it without clipping",
                "change gradients before criterion(...).backward() or in the loss; engine.abandon()",
            )
        for p in self.params:
            p.grad = self._sealed[id(p)][0]
        self._sealed = {}

    def forget(self) -> None:
        super().forget()
        self._sealed = {}

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        self.tracker.check_loop()
        self.tracker.check_clipped()
        if self._sealed or not self.tracker.batch_is_empty:
            self._check_sealed()
        self.accumulate()
        self.tracker.accept()
        return self._release()


class TrackedPerLayerOptimizer(TrackedOptimizer, DPPerLayerOptimizer):
    """A DPPerLayerOptimizer: every parameter's gradient is clipped at its own norm, then all of them together
    at the instance's threshold.

    The norms of the layers are scaled so that their root of squares is ``max_grad_norm``, which noise is
    made for: a scheduler that changes the one changes the other.
    """

    clipping = "per_layer"

    def _limits(self, gradients: Sequence[torch.Tensor]) -> NDArray[np.float64]:
        """(L,) norms at which the gradients of the parameters are clipped."""
        if len(gradients) != len(self.max_grad_norms):
            raise AlignmentError(
                "PIA003",
                f"{len(gradients)} trainable parameters and {len(self.max_grad_norms)} clip norms",
                "A parameter would be clipped at another one's norm",
                "freeze or unfreeze parameters before make_private(clipping='per_layer', ...)",
            )
        return layer_limits(np.asarray(self.max_grad_norms), float(self.max_grad_norm))

    def measure(self, gradients: Sequence[torch.Tensor]) -> NDArray[np.float64]:
        return layer_factors(gradients, self._limits(gradients))[1]

    def factors(self, gradients: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        if self.tracker.defers(gradients[0].device):
            there, norms = layer_factors_on_device(gradients, self._limits(gradients))
            both = there * self.tracker.clip_there(norms)[:, None]
            return list(torch.nextafter(both, torch.zeros_like(both)).T.contiguous())
        layers, together = layer_factors(gradients, self._limits(gradients))
        own = self.tracker.clip(together)
        product = np.nextafter(layers * own[:, None], np.float32(0))
        return [torch.from_numpy(column) for column in np.ascontiguousarray(product.T)]


class TrackedAdaptiveOptimizer(TrackedOptimizer, AdaClipDPOptimizer):
    """An AdaClipDPOptimizer whose count query is charged and says nothing about the size of the batch.

    Differs from Opacus in the count's denominator: the expected batch size, not the drawn one, which is
    private; and in that the count is kept across physical batches (docs/opacus_integration.md).
    """

    clipping = "adaptive"
    can_defer = False
    noise_multiplier: float
    max_grad_norm: float
    unclipped_num: float

    @property
    def query(self) -> CountQuery:
        """The two noises of the next release. Raises UsageError PIA070 where the count's is too small."""
        return CountQuery(noise_multiplier=self.noise_multiplier, count_std=self.unclipped_num_std)

    @property
    def mechanism_now(self) -> tuple[float, ...]:
        return (*super().mechanism_now, float(self.unclipped_num_std))

    def charged(self, contributions: NDArray[np.float32], limits: NDArray[np.float64]) -> NDArray[np.float32]:
        return self.query.charge(contributions, limits, float(self.max_grad_norm))

    def factors(self, gradients: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        found = super().factors(gradients)
        own = found[0]
        # Half a vote each: the mean of the two answers is what nobody's presence can move by more.
        self._votes = float(((own == 1).double() - 0.5)[own > 0].sum())
        return found

    def clip_and_accumulate(self) -> None:
        super().clip_and_accumulate()
        self.unclipped_num += self._votes

    def zero_grad(self, set_to_none: bool = False) -> None:
        # Not AdaClipDPOptimizer's, which would forget the votes of earlier physical batches.
        DPOptimizer.zero_grad(self, set_to_none)

    def add_noise(self) -> None:
        query, stated = self.query, self.noise_multiplier
        self.noise_multiplier = query.gradient_noise_multiplier
        try:
            # Not AdaClipDPOptimizer's, which adds noise to the count as well.
            self._add_secure_noise() if self.secure_mode else DPOptimizer.add_noise(self)
        finally:
            self.noise_multiplier = stated

    def _release(self) -> bool:
        released = super()._release()
        if released:
            self._adapt()
        return released

    def _adapt(self) -> None:
        votes = torch.tensor(self.unclipped_num, dtype=torch.float64, device=self.params[0].device)
        if self.secure_mode:
            votes = with_secure_noise(votes, self.unclipped_num_std)
        else:
            reference = torch.zeros((), device=votes.device)
            votes += _generate_noise(self.unclipped_num_std, reference, generator=self.generator)
        fraction = 0.5 + float(votes) / float(self.expected_batch_size)
        self.unclipped_num = 0.0
        rate = self.clipbound_learning_rate * (fraction - self.target_unclipped_quantile)
        moved = float(self.max_grad_norm) * float(np.exp(np.clip(-rate, -700, 700)))
        self.max_grad_norm = min(max(moved, self.min_clipbound), self.max_clipbound)

    def continue_from(self, position: Mapping[str, Any]) -> None:
        self.max_grad_norm = float(position.get("max_grad_norm", self.max_grad_norm))

    def forget(self) -> None:
        super().forget()
        self.unclipped_num = 0.0


TRACKED: dict[type[DPOptimizer], type[TrackedOptimizer]] = {
    DPOptimizer: TrackedOptimizer,
    DPOptimizerFastGradientClipping: TrackedGhostOptimizer,
    DPPerLayerOptimizer: TrackedPerLayerOptimizer,
    AdaClipDPOptimizer: TrackedAdaptiveOptimizer,
}
"""Optimizer class -> its tracked twin. A class that is not here is refused."""


def prepare(optimizer: DPOptimizer) -> None:
    """Undo what Opacus before 1.6 does to the noise multiplier of AdaClip: it put the sum's in the place of
    the pair's, which accountants read."""
    if type(optimizer) is AdaClipDPOptimizer and OLD and optimizer.noise_multiplier > 0:
        parts = (1 / optimizer.noise_multiplier, 1 / (2 * optimizer.unclipped_num_std))
        optimizer.noise_multiplier = 1 / math.hypot(*parts)


def install(optimizer: DPOptimizer, tracker: Tracker) -> None:
    """Turn a DPOptimizer into its tracked twin, in place, and close the way around it."""
    prepare(optimizer)
    optimizer.tracker = tracker
    optimizer.__class__ = TRACKED[type(optimizer)]
    if isinstance(optimizer, TrackedGhostOptimizer):
        optimizer._owned = {id(p) for p in optimizer.params}
    optimizer.original_optimizer.register_step_pre_hook(tracker.before_update)
