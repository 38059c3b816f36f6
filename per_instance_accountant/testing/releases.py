"""What an Opacus optimizer really releases: sums, noise and scales, taken where they are made.

Works with stock and tracked optimizers. torch is imported when a function is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from per_instance_accountant.testing.components import (
    LEVEL,
    ComponentFault,
    check_noise,
    check_noise_is_fresh,
    draws_for,
)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Release:
    """One noisy step. clipped_sum, noise: (d,) over all parameters. claimed_std: noise multiplier times clip
    norm at that moment. denominator: by which the noisy sum was divided."""

    clipped_sum: Floats
    noise: Floats
    claimed_std: float
    denominator: float


@contextmanager
def watch_releases(optimizer: Any) -> Iterator[list[Release]]:
    """The releases of the steps that are taken inside the block, in their order.

    The list holds every gradient in the clear; it is for tests, never for runs whose model is released.
    """
    found: list[Release] = []
    add_noise, scale_grad = optimizer.add_noise, optimizer.scale_grad
    made: list[tuple[Floats, Floats]] = []

    def watched_noise() -> None:
        total = _flat([p.summed_grad for p in optimizer.params])
        add_noise()
        made.append((total, _flat([p.grad for p in optimizer.params]) - total))

    def watched_scale() -> None:
        before = _flat([p.grad for p in optimizer.params])
        scale_grad()
        after = _flat([p.grad for p in optimizer.params])
        largest = int(np.argmax(np.abs(after)))
        total, noise = made.pop()
        std = float(optimizer.noise_multiplier) * float(optimizer.max_grad_norm)
        found.append(
            Release(
                clipped_sum=total,
                noise=noise,
                claimed_std=std,
                denominator=float(before[largest] / after[largest]) if after[largest] else 1.0,
            )
        )

    optimizer.add_noise, optimizer.scale_grad = watched_noise, watched_scale
    try:
        yield found
    finally:
        del optimizer.add_noise, optimizer.scale_grad


def _flat(tensors: list[Any]) -> Floats:
    return np.concatenate([t.detach().double().flatten().cpu().numpy() for t in tensors])


def noise_of(optimizer: Any, draws: int) -> Floats:
    """At least ``draws`` numbers that the optimizer adds to a sum of zeros, one row per call, (k, d).

    Before training, or between steps after ``optimizer.zero_grad()``. The random state moves on, so that
    no noise that was seen here is used again. Raises ValueError inside a batch that is being accumulated.
    """
    import torch

    if any(p.summed_grad is not None for p in optimizer.params):
        raise ValueError("a clipped sum is being accumulated")
    size = sum(p.numel() for p in optimizer.params)
    rows = []
    try:
        for _ in range(max(2, -(-draws // size))):
            for p in optimizer.params:
                p.summed_grad, p.grad = torch.zeros_like(p), None
            optimizer.add_noise()
            rows.append(_flat([p.grad for p in optimizer.params]))
    finally:
        for p in optimizer.params:
            p.summed_grad = p.grad = None
    return np.stack(rows)


def check_noise_of(optimizer: Any, *, deficit: float = 0.01) -> float:
    """The optimizer's noise has the claimed std, is Gaussian and fresh from step to step; returns a p-value.

    To call once after make_private, before training: finds a std that is too small by ``deficit`` in 999
    of 1,000 cases, and accuses a correct optimizer in one of 500,000. Raises ComponentFault.
    """
    rows = noise_of(optimizer, draws_for(deficit))
    p = check_noise(rows, float(optimizer.noise_multiplier) * float(optimizer.max_grad_norm))
    return min(p, check_noise_is_fresh(rows[: min(len(rows), 200)])) if rows.shape[1] >= 100 else p


def check_noise_in_training(optimizer: Any, *, deficit: float = 0.01, level: float = LEVEL) -> None:
    """From now on measure the noise of the releases themselves; judge its std once, when there is enough.

    To call once after make_private. Nothing is drawn, so the noise is what it would have been. After as many
    steps as give ``draws_for(deficit)`` numbers (305,862 for 1 %, so one step of a model with that many
    parameters), a std that is too small by ``deficit`` raises ComponentFault, in 999 of 1,000 cases, before
    that step's update; a correct one does with probability ``level``. The steps before it are released. Not
    found: noise that was used before (``check_noise_of``), and a clip norm that is not enforced. In several
    processes only the one that draws is judged. It costs a float64 copy of the gradient at each step until
    then.
    """
    before = vars(optimizer).get("add_noise")
    add_noise, needed = optimizer.add_noise, draws_for(deficit, level=level)
    count, total = 0, 0.0

    def measured() -> None:
        nonlocal count, total
        sums = [p.summed_grad for p in optimizer.params]
        add_noise()
        std = float(optimizer.noise_multiplier) * float(optimizer.max_grad_norm)
        if std > 0 and _draws(optimizer):
            for p, own in zip(optimizer.params, sums, strict=True):
                total += float((p.grad.detach().double() - own.double().view_as(p)).div(std).square().sum())
                count += p.numel()
        if count >= needed:
            del optimizer.add_noise
            if before is not None:
                optimizer.add_noise = before
            # Written as what must hold, so that NaN fails it.
            if not (p_value := float(chi2.cdf(total, count))) >= level:
                share = math.sqrt(total / count)
                raise ComponentFault(f"the std is {share:.4f} of the one claimed (p = {p_value:.2g})")

    optimizer.add_noise = measured


def _draws(optimizer: Any) -> bool:
    """Whether this process adds the noise: one of several does in Opacus, and so says a tracked optimizer."""
    draws = getattr(optimizer, "draws_noise", None)
    return bool(draws()) if callable(draws) else getattr(optimizer, "rank", 0) == 0


def norms_of_gradients(module: Any, loss: Callable[[Any, Any], Any], inputs: Any, targets: Any) -> Floats:
    """(B,) norms of the gradients of single instances by ``torch.func`` in float64, without Opacus.

    module: not wrapped. loss: of a batch of one instance, such as ``torch.nn.functional.cross_entropy``.
    """
    import torch

    parameters = {name: p.detach().double() for name, p in module.named_parameters() if p.requires_grad}
    rest = {name: b.double() if b.is_floating_point() else b for name, b in module.named_buffers()}
    rest |= {name: p.detach().double() for name, p in module.named_parameters() if not p.requires_grad}
    inputs = inputs.double() if inputs.is_floating_point() else inputs

    def single(trained: Any, x: Any, y: Any) -> Any:
        return loss(torch.func.functional_call(module, {**trained, **rest}, (x[None],)), y[None])

    gradients = torch.func.vmap(torch.func.grad(single), in_dims=(None, 0, 0))(parameters, inputs, targets)
    squares = sum(g.reshape(len(g), -1).square().sum(dim=1) for g in gradients.values())
    return np.asarray(squares.sqrt().numpy(), dtype=np.float64)
