"""From a method's record to what is minimised in each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from per_instance_accountant.finetuning.methods.ensemble import Ensemble, Weights, fresh
from per_instance_accountant.finetuning.methods.instances import Instances, refuse
from per_instance_accountant.finetuning.methods.losses import (
    absolute_sum,
    anchor_loss,
    distillation_loss,
    misclassify_loss,
    relabel_loss,
    training_loss,
)
from per_instance_accountant.finetuning.methods.records import (
    FineTune,
    GradientAscent,
    InstanceWise,
    Method,
    NegGradPlus,
    NoisyFineTune,
    RandomRelabel,
    Retrain,
    SalUn,
    Schedule,
    Scrub,
    SparseFineTune,
)
from per_instance_accountant.finetuning.methods.regularisers import (
    AdversarialExamples,
    adversarial_examples,
    importance,
    reversed_importance,
)
from per_instance_accountant.finetuning.methods.sampling import Draws

Objective = Callable[[Weights, int], Tensor]
"""Parameters and the number of the step -> (K,) losses to descend on."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """What a method is given. forget, retain: with the leading dimension of models. counts: adversarial
    examples per instance, (n,) or (K, n), None for the same number each. original: models to make
    adversarial examples on, None for ``models``."""

    models: Ensemble
    forget: Instances
    retain: Instances | None
    seeds: Sequence[int]
    draws: Draws
    counts: Tensor | None = None
    original: Ensemble | None = None

    def forget_batch(self, size: int) -> Instances:
        return _rows(self.forget, self.draws.subset(len(self.forget), size))

    def retain_batch(self, size: int) -> Instances:
        if self.retain is None:
            raise refuse(
                "this method needs retained instances and was given none",
                "Nothing was unlearned",
                "unlearn(method, model, forget, retain=retain), or InstanceWise(...), which needs none",
            )
        count = len(self.retain)
        return _rows(self.retain, self.draws.positions(torch.full((self.models.size,), count), size))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recipe:
    """What the loop carries out. start: weights before the first step. goal: labels (K, n) to be reached by
    the instances to forget, None for "any other than their own". stops: as soon as the goal is reached.
    mask: 1 where a weight may change. noise_std: of Gaussian noise on every gradient."""

    start: Ensemble
    objective: Objective
    stops: bool = False
    goal: Tensor | None = None
    mask: Weights | None = None
    noise_std: float = 0.0
    examples: AdversarialExamples | None = None


def _rows(instances: Instances, index: Tensor) -> Instances:
    models = torch.arange(len(index))[:, None]

    def take(values: Tensor) -> Tensor:
        return values[models, index]

    targets = None if instances.targets is None else take(instances.targets)
    return replace(instances, inputs=take(instances.inputs), labels=take(instances.labels), targets=targets)


def _with_targets(task: Task) -> Task:
    """Targets drawn uniformly over the other classes, unless the instances bring their own."""
    if task.forget.targets is not None:
        return task
    with torch.no_grad():
        classes = task.models.logits(task.forget.inputs[:, :1]).shape[-1]
    targets = task.draws.other_classes(task.forget.labels, classes)
    return replace(task, forget=replace(task.forget, targets=targets))


def _wanted(instances: Instances) -> Tensor:
    if instances.targets is None:
        raise refuse("the instances have no targets", "Nothing was changed", "Instances(..., targets=wrong)")
    return instances.targets


def _retained_loss(task: Task, schedule: Schedule) -> Objective:
    def objective(parameters: Weights, _: int) -> Tensor:
        batch = task.retain_batch(schedule.batch_size)
        return training_loss(task.models.logits(batch.inputs, parameters), batch.labels)

    return objective


def _instance_wise(method: InstanceWise, task: Task) -> Recipe:
    relabels = method.goal == "relabel"
    task = _with_targets(task) if relabels else task
    examples = None
    if method.attack is not None:
        attacked = task.original or task.models
        examples = adversarial_examples(attacked, task.forget, method.attack, task.draws, task.counts)
    weights = None
    if method.importance > 0:
        weights = reversed_importance(importance(task.models, task.forget.inputs))

    def others() -> Instances | None:
        if examples is not None:
            rows = task.draws.positions(examples.counts, method.adversarial_batch)
            return _rows(Instances(inputs=examples.inputs, labels=examples.labels), rows)
        return task.retain_batch(method.adversarial_batch) if method.replay else None

    def objective(parameters: Weights, _: int) -> Tensor:
        batch, beside = task.forget_batch(method.schedule.batch_size), others()
        inputs = batch.inputs if beside is None else torch.cat([batch.inputs, beside.inputs], 1)
        logits, count = task.models.logits(inputs, parameters), len(batch)
        if relabels:
            loss = relabel_loss(logits[:, :count], _wanted(batch))
        else:
            loss = misclassify_loss(logits[:, :count], batch.labels)
        if beside is not None:
            share = method.forget_share or count / (count + len(beside))
            loss = share * loss + (1 - share) * training_loss(logits[:, count:], beside.labels)
        if weights is not None:
            loss = loss + method.importance * anchor_loss(parameters, task.models.parameters, weights)
        return loss

    goal = task.forget.targets if relabels else None
    return Recipe(start=task.models, objective=objective, stops=True, goal=goal, examples=examples)


def _fine_tune(method: FineTune, task: Task) -> Recipe:
    return Recipe(start=task.models, objective=_retained_loss(task, method.schedule))


def _noisy_fine_tune(method: NoisyFineTune, task: Task) -> Recipe:
    objective = _retained_loss(task, method.schedule)
    return Recipe(start=task.models, objective=objective, noise_std=method.noise_std)


def _retrain(method: Retrain, task: Task) -> Recipe:
    start = fresh(task.models.module, task.seeds)
    return Recipe(start=start, objective=_retained_loss(task, method.schedule))


def _gradient_ascent(method: GradientAscent, task: Task) -> Recipe:
    def objective(parameters: Weights, _: int) -> Tensor:
        batch = task.forget_batch(method.schedule.batch_size)
        return -training_loss(task.models.logits(batch.inputs, parameters), batch.labels)

    return Recipe(start=task.models, objective=objective, stops=True)


def _neg_grad_plus(method: NegGradPlus, task: Task) -> Recipe:
    retained = _retained_loss(task, method.schedule)

    def objective(parameters: Weights, step: int) -> Tensor:
        batch = task.forget_batch(method.schedule.batch_size)
        forgotten = training_loss(task.models.logits(batch.inputs, parameters), batch.labels)
        return method.retain_weight * retained(parameters, step) - (1 - method.retain_weight) * forgotten

    return Recipe(start=task.models, objective=objective)


def _relabelled(schedule: Schedule, task: Task) -> Objective:
    """Mean over one batch of both kinds together, wrong labels for the instances to forget."""

    def objective(parameters: Weights, _: int) -> Tensor:
        batch, kept = task.forget_batch(schedule.batch_size), task.retain_batch(schedule.batch_size)
        inputs = torch.cat([batch.inputs, kept.inputs], 1)
        labels = torch.cat([_wanted(batch), kept.labels], 1)
        return training_loss(task.models.logits(inputs, parameters), labels)

    return objective


def _random_relabel(method: RandomRelabel, task: Task) -> Recipe:
    task = _with_targets(task)
    return Recipe(start=task.models, objective=_relabelled(method.schedule, task))


def _salun(method: SalUn, task: Task) -> Recipe:
    task = _with_targets(task)
    mask = saliency_mask(task.models, task.forget, method.keep)
    return Recipe(start=task.models, objective=_relabelled(method.schedule, task), mask=mask)


def saliency_mask(models: Ensemble, forget: Instances, keep: float) -> Weights:
    """1 for the ``floor(keep * weights)`` weights of each model with the largest absolute gradient of the
    forget loss, 0 elsewhere. Exactly so many, by rank over all tensors: a threshold at a quantile keeps
    everything when most gradients are zero."""
    parameters = {name: value.detach().requires_grad_(True) for name, value in models.parameters.items()}
    loss = training_loss(models.logits(forget.inputs, parameters), forget.labels).sum()
    slopes = torch.autograd.grad(loss, list(parameters.values()))
    flat = torch.cat([slope.flatten(1).abs() for slope in slopes], 1)
    best = flat.argsort(dim=1, descending=True, stable=True)[:, : int(keep * flat.shape[1])]
    chosen = torch.zeros_like(flat).scatter_(1, best, 1.0)
    parts = chosen.split([slope[0].numel() for slope in slopes], dim=1)
    return {
        name: part.reshape(slope.shape) for name, part, slope in zip(parameters, parts, slopes, strict=True)
    }


def _scrub(method: Scrub, task: Task) -> Recipe:
    def objective(parameters: Weights, step: int) -> Tensor:
        ascends, size = method.ascends(step), method.schedule.batch_size
        batch = task.forget_batch(size) if ascends else task.retain_batch(size)
        with torch.no_grad():
            teacher = task.models.logits(batch.inputs)
        student = task.models.logits(batch.inputs, parameters)
        apart = distillation_loss(student, teacher, method.temperature)
        if ascends:
            return -apart
        return method.distillation * apart + training_loss(student, batch.labels)

    return Recipe(start=task.models, objective=objective)


def _sparse(method: SparseFineTune, task: Task) -> Recipe:
    retained = _retained_loss(task, method.schedule)

    def objective(parameters: Weights, step: int) -> Tensor:
        strength = method.strength * (1 - step / method.schedule.steps)
        return retained(parameters, step) + strength * absolute_sum(parameters)

    return Recipe(start=task.models, objective=objective)


_RECIPES: Final[dict[type, Callable[[Any, Task], Recipe]]] = {
    InstanceWise: _instance_wise,
    FineTune: _fine_tune,
    NoisyFineTune: _noisy_fine_tune,
    GradientAscent: _gradient_ascent,
    NegGradPlus: _neg_grad_plus,
    RandomRelabel: _random_relabel,
    SalUn: _salun,
    Scrub: _scrub,
    SparseFineTune: _sparse,
    Retrain: _retrain,
}


def recipe_of(method: Method, task: Task) -> Recipe:
    """The recipe of a method for a task. Raises UsageError PIA071 if retained instances are missing."""
    if method.needs_retain:
        task.retain_batch(1)
    return _RECIPES[type(method)](method, task)
