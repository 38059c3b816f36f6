"""What holds the rest back while instances are forgotten, from the model and those instances alone.

Adversarial examples show the classes next to an instance; weight importance says which weights the instances
do not need (Cha et al. 2024, "Learning to Unlearn").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from per_instance_accountant.errors import UsageError
from per_instance_accountant.finetuning.methods.ensemble import Ensemble, Weights
from per_instance_accountant.finetuning.methods.instances import Instances, refuse
from per_instance_accountant.finetuning.methods.losses import cross_entropies
from per_instance_accountant.finetuning.methods.records import Attack
from per_instance_accountant.finetuning.methods.sampling import Draws

_INSIDE = 1 - 1e-6
"""Projection aims this much inside the ball, so that rounding cannot leave it."""
_CHUNK = 32
"""Instances whose gradients are held at once."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdversarialExamples:
    """Successful examples only. inputs: (K, m, ...) and labels (K, m), the classes that the attack aimed at;
    rows beyond ``counts[k]`` repeat earlier ones. tried: attempts per model; success: (K,) shares.
    """

    inputs: Tensor
    labels: Tensor
    counts: Tensor
    tried: int

    @property
    def success(self) -> Tensor:
        return self.counts / self.tried


def adversarial_examples(
    models: Ensemble, forget: Instances, attack: Attack, draws: Draws, counts: Tensor | None = None
) -> AdversarialExamples:
    """Targeted L2-PGD around every instance; targets uniform over the other classes, drawn anew each time.

    forget: (K, n, ...). counts: (n,) or (K, n) examples per instance (equal sums), default
    ``attack.per_instance`` for all. Raises UsageError PIA070 if some model ends with no successful example.
    """
    wanted = torch.full_like(forget.labels, attack.per_instance) if counts is None else counts
    wanted = wanted.expand_as(forget.labels)
    if len(set(wanted.sum(1).tolist())) != 1 or bool((wanted < 0).any()) or not bool(wanted.sum() > 0):
        raise refuse(
            "the numbers of examples are negative, all zero, or differ in sum between models",
            "No example was made",
            "adversarial_counts(losses, total=20 * len(losses))",
        )
    rows = torch.stack([torch.repeat_interleave(torch.arange(len(forget)), row) for row in wanted])
    labels = forget.labels.gather(1, rows)
    start = torch.stack([x[row] for x, row in zip(forget.inputs, rows, strict=True)])
    with torch.no_grad():
        classes = models.logits(start[:, :1]).shape[-1]
    targets = draws.other_classes(labels, classes)
    found = projected_descent(models, start, targets, attack, draws)
    with torch.no_grad():
        succeeded = models.logits(found).argmax(-1) == targets
    return _kept(found, targets, succeeded, attack)


def projected_descent(
    models: Ensemble, inputs: Tensor, targets: Tensor, attack: Attack, draws: Draws
) -> Tensor:
    """(K, m, ...) points within ``attack.radius`` (L2) of the inputs, and within its bounds, at which the
    cross-entropy to ``targets`` was driven down by steps of normalised gradient (Madry et al. 2018).

    Raises UsageError PIA070 if an input lies outside the bounds.
    """
    low, high = attack.bounds or (-torch.inf, torch.inf)
    if bool(((inputs < low) | (inputs > high)).any()):
        raise refuse(
            f"some inputs lie outside the bounds [{low}, {high}] of the attack",
            "Its results would be no inputs that the model knows",
            "Attack(radius=2.0, bounds=None), or bounds that hold for the data",
            "PIA070",
        )

    # Adding the shift to the input rounds every entry by up to half a unit in the last place.
    largest = float(inputs.abs().max()) + attack.radius
    rounding = torch.finfo(inputs.dtype).eps * largest * inputs[0, 0].numel() ** 0.5
    radius = max(attack.radius * _INSIDE - rounding, 0.0)

    def project(shift: Tensor) -> Tensor:
        norms = _norms(shift).clamp_min(torch.finfo(shift.dtype).tiny)
        inside = shift * (radius / norms).clamp(max=1)
        return (inputs + inside).clamp(low, high) - inputs

    shift = project(draws.in_ball(inputs.shape, attack.radius).to(inputs))
    for _ in range(attack.iterations):
        shift.requires_grad_(True)
        loss = cross_entropies(models.logits(inputs + shift), targets).sum()
        (slope,) = torch.autograd.grad(loss, shift)
        with torch.no_grad():
            norms = _norms(slope).clamp_min(torch.finfo(slope.dtype).tiny)
            shift = project(shift.detach() - attack.step_size * slope / norms)
    return (inputs + shift).detach().clamp(low, high)


def _norms(values: Tensor) -> Tensor:
    flat = values.flatten(2).norm(dim=2)
    return flat.reshape(flat.shape + (1,) * (values.ndim - 2))


def _kept(found: Tensor, targets: Tensor, succeeded: Tensor, attack: Attack) -> AdversarialExamples:
    counts = succeeded.sum(1)
    if bool((counts == 0).any()):
        raise UsageError(
            "PIA070",
            f"none of {succeeded.shape[1]} adversarial examples within {attack.radius} reached its class",
            "Without successful examples nothing holds the other classes back, and failed ones do harm",
            "Attack(radius=...) with a larger radius, or more iterations",
        )
    # Stable order: successful ones first; the remaining places repeat them.
    order = succeeded.int().argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
    place = torch.arange(order.shape[1]).expand_as(order) % counts[:, None]
    rows = order.gather(1, place)
    return AdversarialExamples(
        inputs=torch.stack([x[row] for x, row in zip(found, rows, strict=True)]),
        labels=targets.gather(1, rows),
        counts=counts,
        tried=succeeded.shape[1],
    )


def importance(models: Ensemble, inputs: Tensor) -> Weights:
    """Mean over the instances of ``|d ||f(x)||_2 / d weight|``: memory-aware synapses (Aljundi et al. 2018,
    with the norm not squared, as Cha et al. 2024 use it), (K, ...) for every parameter.

    inputs: (K, n, ...).
    """

    def output_norm(parameters: Weights, fixed: Weights, x: Tensor) -> Tensor:
        outputs: Tensor = functional_call(models.module, parameters | fixed, (x[None],))
        return outputs.norm()

    per_instance = vmap(grad(output_norm), in_dims=(None, None, 0), chunk_size=_CHUNK)
    results: list[Weights] = []
    for number in range(models.size):
        parameters = {name: value[number] for name, value in models.parameters.items()}
        fixed = {name: value[number] for name, value in models.fixed.items()}
        slopes = per_instance(parameters, fixed, inputs[number])
        results.append({name: slope.abs().mean(0) for name, slope in slopes.items()})
    return {name: torch.stack([one[name] for one in results]) for name in models.parameters}


def reversed_importance(weights: Weights) -> Weights:
    """Each tensor of each model scaled to [0, 1] and subtracted from 1: large where the instances to forget
    need the weight least. A tensor without any difference is held fully (1).

    >>> reversed_importance({"w": torch.tensor([[1.0, 3.0, 2.0]])})["w"].tolist()
    [[1.0, 0.0, 0.5]]
    """
    scaled = {}
    for name, value in weights.items():
        flat = value.flatten(1)
        low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
        span = torch.where(high > low, high - low, torch.ones_like(high))
        scaled[name] = (1 - (flat - low) / span).reshape(value.shape)
    return scaled
