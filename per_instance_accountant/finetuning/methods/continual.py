"""Deletion requests that arrive one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from per_instance_accountant.finetuning.methods.ensemble import Ensemble
from per_instance_accountant.finetuning.methods.instances import Instances, refuse
from per_instance_accountant.finetuning.methods.records import InstanceWise
from per_instance_accountant.finetuning.methods.sampling import Draws
from per_instance_accountant.finetuning.methods.unlearning import UnlearnedEnsemble, unlearn_ensemble


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ContinualRun:
    """stages: the models after each request, with their traces. forgotten: (K, requests, requests), entry
    ``[k, r, j]`` the share of request j that is at its goal after request r; above the diagonal the request
    has not come yet."""

    stages: tuple[UnlearnedEnsemble, ...]
    forgotten: NDArray[np.float64]

    @property
    def models(self) -> Ensemble:
        return self.stages[-1].models


def unlearn_in_turn(
    method: InstanceWise,
    models: Ensemble,
    requests: Sequence[Instances],
    retain: Instances | None = None,
    *,
    seeds: Sequence[int],
    keep_earlier: bool = True,
) -> ContinualRun:
    """Carry out requests one after another; the anchor is the model after the request before, adversarial
    examples are made on the model as it was before the first.

    requests: each (K, n_r, ...). keep_earlier: the instances of earlier requests are kept until the last one
    and stay part of the goal. Without it nothing of them is kept, and much of their forgetting is undone by
    later requests, which hold on to the model as it was: ``forgotten`` says how much.

    Raises UsageError PIA071 for no request, or shapes that ``unlearn_ensemble`` refuses.
    """
    if not requests or any(part.labels.ndim != 2 for part in requests):
        raise refuse(
            f"{len(requests)} requests, or instances without the dimension of models",
            "Nothing was unlearned",
            "unlearn_in_turn(method, ensemble_of([model]), [first.stacked, second.stacked], seeds=[0])",
        )
    requests = with_targets(models, requests, seeds) if method.goal == "relabel" else list(requests)
    stages: list[UnlearnedEnsemble] = []
    current = models
    for turn, request in enumerate(requests):
        forget = joined(requests[: turn + 1]) if keep_earlier else request
        turn_seeds = [int(np.random.SeedSequence([abs(seed), turn]).generate_state(1)[0]) for seed in seeds]
        done = unlearn_ensemble(method, current, forget, retain, seeds=turn_seeds, original=models)
        stages.append(done)
        current = done.models
    shares = [[at_goal(stage.models, request, method.goal) for request in requests] for stage in stages]
    return ContinualRun(stages=tuple(stages), forgotten=np.moveaxis(np.array(shares), 2, 0))


def with_targets(models: Ensemble, requests: Sequence[Instances], seeds: Sequence[int]) -> list[Instances]:
    """Each request with its targets; those that bring none get uniform other classes, once for all turns."""
    draws = Draws(seeds)
    with torch.no_grad():
        classes = models.logits(requests[0].inputs[:, :1]).shape[-1]
    return [
        part if part.targets is not None else replace(part, targets=draws.other_classes(part.labels, classes))
        for part in requests
    ]


def joined(requests: Sequence[Instances]) -> Instances:
    """All instances of several requests; targets only if all have them."""
    targets = [part.targets for part in requests if part.targets is not None]
    return Instances(
        inputs=torch.cat([part.inputs for part in requests], 1),
        labels=torch.cat([part.labels for part in requests], 1),
        targets=torch.cat(targets, 1) if len(targets) == len(requests) else None,
    )


def at_goal(models: Ensemble, instances: Instances, goal: str) -> NDArray[np.float64]:
    """(K,) share of the instances that are at the goal: ``"relabel"`` their targets, ``"misclassify"`` any
    label but their own."""
    with torch.no_grad():
        predicted = models.logits(instances.inputs).argmax(-1)
    reached = predicted == instances.targets if goal == "relabel" else predicted != instances.labels
    share: NDArray[np.float64] = torch.as_tensor(reached).double().mean(1).numpy()
    return share
