"""The one function behind all methods, and the loop that carries them out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from per_instance_accountant.accounting import Basis
from per_instance_accountant.errors import UsageError
from per_instance_accountant.finetuning.methods.ensemble import Ensemble, Weights, ensemble_of
from per_instance_accountant.finetuning.methods.instances import Instances, refuse
from per_instance_accountant.finetuning.methods.recipes import Recipe, Task, recipe_of
from per_instance_accountant.finetuning.methods.records import Method, NoisyFineTune, Schedule
from per_instance_accountant.finetuning.methods.sampling import Draws
from per_instance_accountant.finetuning.runner import run_plan

Watch = Callable[[int, Ensemble], None]
"""Number of steps taken, models after them."""

EMPIRICAL = (
    "This is empirical forgetting without a certificate: it was measured on these instances, and it bounds "
    "nothing about what the model still holds of them."
)
CERTIFIED = "The certificate states the bound of this run; check it with pia verify."


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Course of one model. at: (t,) numbers of steps taken; loss: (t,) the minimised loss of the step
    before; forgotten: (t,) share of the instances that reached the goal. outcome: ``"reached"``, ``"all
    steps"`` or ``"diverged"`` (the model is then the last observed one that was finite). steps: taken
    in all. attack_success: share of the adversarial examples that reached their class, None without an
    attack; adversarial: how many were kept."""

    at: NDArray[np.int64]
    loss: NDArray[np.float64]
    forgotten: NDArray[np.float64]
    outcome: str
    steps: int
    attack_success: float | None = None
    adversarial: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UnlearnedModel:
    """model: in evaluation mode, its weights finite. basis: ESTIMATE unless a plan was carried out,
    whose certificate then lies at ``certificate``."""

    model: nn.Module
    trace: Trace
    basis: Basis = Basis.ESTIMATE
    certificate: Path | None = None

    def statement(self) -> str:
        """One sentence on what is, and is not, promised."""
        return EMPIRICAL if self.certificate is None else CERTIFIED


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UnlearnedEnsemble:
    """Several models, unlearned side by side. Every number is an ESTIMATE."""

    models: Ensemble
    traces: tuple[Trace, ...]


def unlearn(
    method: Method,
    model: nn.Module,
    forget: Instances,
    retain: Instances | None = None,
    *,
    seed: int = 0,
    counts: ArrayLike | None = None,
    progress: bool = False,
) -> UnlearnedModel:
    """Make a copy of ``model`` forget instances; the model itself is left as it is.

    forget, retain: of one model, without leading dimension. seed: of every random draw; the same seed
    gives the same model. counts: (n,) adversarial examples per instance, in place of the attack's
    number for all.

    Raises UsageError PIA071 if the method needs retained instances and has none, or shapes do not fit;
    PIA070 if no adversarial example succeeds; what ``run_plan`` raises for a certified run.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Linear(2, 3)
    >>> forget = Instances(inputs=torch.eye(2), labels=torch.tensor([0, 1]))
    >>> from per_instance_accountant.finetuning.methods import InstanceWise, Schedule
    >>> done = unlearn(InstanceWise(schedule=Schedule(steps=99, learning_rate=0.1)), model, forget)
    >>> done.trace.outcome, float(done.trace.forgotten[-1]), str(done.basis)
    ('reached', 1.0, 'ESTIMATE')
    """
    if forget.labels.ndim != 1 or (retain is not None and retain.labels.ndim != 1):
        raise refuse(
            "the instances are those of several models",
            "Nothing was unlearned",
            "unlearn_ensemble(method, ensemble_of(models), forget, ...)",
        )
    if isinstance(method, NoisyFineTune) and method.certified is not None:
        return _certified(method, model, retain, progress)
    done = unlearn_ensemble(
        method,
        ensemble_of([model]),
        forget.stacked,
        None if retain is None else retain.stacked,
        seeds=[seed],
        counts=counts,
        progress=progress,
    )
    return UnlearnedModel(model=done.models.member(0), trace=done.traces[0])


def unlearn_ensemble(
    method: Method,
    models: Ensemble,
    forget: Instances,
    retain: Instances | None = None,
    *,
    seeds: Sequence[int],
    counts: ArrayLike | None = None,
    original: Ensemble | None = None,
    watch: Watch | None = None,
    progress: bool = False,
) -> UnlearnedEnsemble:
    """``unlearn`` for K models at once; model k sees what it would see alone with ``seeds[k]``.

    forget: (K, n, ...), retain: (K, m, ...), counts: (n,) or (K, n). original: the models that
    adversarial examples are made on, where ``models`` have forgotten before. watch: called with the
    number of steps and the models at every look, the first before any step; it must change nothing.
    Raises as ``unlearn``, and UsageError PIA071 for a certified run or numbers that differ from K.
    """
    sizes = {models.size, len(seeds), *(len(part.labels) for part in (forget, retain) if part is not None)}
    stacked = all(part.labels.ndim == 2 for part in (forget, retain) if part is not None)
    if len(sizes) != 1 or not stacked or getattr(method, "certified", None) is not None:
        raise refuse(
            f"{models.size} models, {len(seeds)} seeds and instances of other shapes, or a certified run",
            "Nothing was unlearned",
            "unlearn_ensemble(method, models, forget, retain, seeds=range(models.size))",
        )
    task = Task(
        models=models,
        forget=forget,
        retain=retain,
        seeds=seeds,
        draws=Draws(seeds),
        counts=None if counts is None else torch.as_tensor(np.asarray(counts, dtype=np.int64)),
        original=original,
    )
    _refuse_labels(models, forget, retain)
    return _descend(recipe_of(method, task), method.schedule, task, watch, progress)


def _refuse_labels(models: Ensemble, forget: Instances, retain: Instances | None) -> None:
    with torch.no_grad():
        outputs = models.logits(forget.inputs[:, :1])
    highest = max(
        int(t.max())
        for part in (forget, retain)
        if part
        for t in (part.labels, part.targets)
        if t is not None
    )
    if outputs.ndim != 3 or highest >= outputs.shape[2]:
        raise refuse(
            f"outputs of shape {tuple(outputs.shape[1:])} do not fit labels up to {highest}",
            "Nothing was unlearned",
            "a classifier that returns (n, classes) logits, with labels in 0 .. classes - 1",
        )


class _Observations:
    """Loss, share forgotten and health at the steps looked at, and the last weights known to be
    finite."""

    def __init__(self, recipe: Recipe, task: Task) -> None:
        self.recipe, self.task = recipe, task
        self.sound = recipe.start.parameters
        self.active = torch.ones(task.models.size, dtype=torch.bool)
        self.diverged = torch.zeros_like(self.active)
        self.taken = torch.zeros(task.models.size, dtype=torch.int64)
        self.rows: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self.look(0, self.sound, torch.zeros(task.models.size))

    def look(self, step: int, parameters: Weights, loss: Tensor) -> Weights:
        """Note where the models are; put back those that are not finite, stop those that are done."""
        forget, goal = self.task.forget, self.recipe.goal
        with torch.no_grad():
            logits = self.recipe.start.logits(forget.inputs, parameters)
        finite = torch.isfinite(logits).flatten(1).all(1) & torch.isfinite(loss)
        for value in parameters.values():
            finite &= torch.isfinite(value).flatten(1).all(1)
        self.sound = _where(finite, parameters, self.sound)
        predicted = logits.argmax(-1)
        share = ((predicted != forget.labels) if goal is None else (predicted == goal)).double().mean(1)
        seen = self.active & finite
        self.diverged |= self.active & ~finite
        self.taken = torch.where(seen, torch.full_like(self.taken, step), self.taken)
        self.rows.append((step, seen, loss.detach().double(), share))
        self.active = seen & ~(share == 1) if self.recipe.stops else seen
        return self.sound

    def traces(self) -> tuple[Trace, ...]:
        return tuple(self._trace(number) for number in range(self.task.models.size))

    def _trace(self, number: int) -> Trace:
        rows = [
            (step, float(loss[number]), float(share[number]))
            for step, seen, loss, share in self.rows
            if seen[number]
        ]
        at, loss, share = (np.array(column) for column in zip(*rows, strict=True))
        reached = self.recipe.stops and share[-1] == 1
        outcome = "diverged" if self.diverged[number] else "reached" if reached else "all steps"
        made = self.recipe.examples
        return Trace(
            at=at.astype(np.int64),
            loss=loss,
            forgotten=share,
            outcome=outcome,
            steps=int(self.taken[number]),
            attack_success=None if made is None else float(made.success[number]),
            adversarial=0 if made is None else int(made.counts[number]),
        )


def _where(chosen: Tensor, new: Weights, old: Weights) -> Weights:
    return {
        name: torch.where(chosen.reshape((-1,) + (1,) * (value.ndim - 1)), value, old[name])
        for name, value in new.items()
    }


def _descend(
    recipe: Recipe, schedule: Schedule, task: Task, watch: Watch | None, progress: bool
) -> UnlearnedEnsemble:
    seen = _Observations(recipe, task)
    parameters = recipe.start.parameters
    if watch is not None:
        watch(0, recipe.start)
    momenta = {name: torch.zeros_like(value) for name, value in parameters.items()}
    bar = tqdm(total=schedule.steps, desc="forgetting", unit="step", disable=None if progress else True)
    with closing(bar):
        for step in range(schedule.steps):
            if not bool(seen.active.any()):
                break
            loss, slopes = _slopes(recipe, parameters, step, task.draws)
            moved = _moved(recipe, schedule, parameters, momenta, slopes)
            parameters = _where(seen.active, moved, parameters)
            if (step + 1) % schedule.observe_every == 0 or step + 1 == schedule.steps:
                parameters = seen.look(step + 1, parameters, loss)
                if watch is not None:
                    watch(step + 1, recipe.start.with_parameters(parameters))
            bar.update()
    return UnlearnedEnsemble(models=recipe.start.with_parameters(seen.sound), traces=seen.traces())


def _slopes(recipe: Recipe, parameters: Weights, step: int, draws: Draws) -> tuple[Tensor, Weights]:
    """The loss and its gradient, with the recipe's noise."""
    leaves = {name: value.detach().requires_grad_(True) for name, value in parameters.items()}
    loss = recipe.objective(leaves, step)
    slopes = dict(zip(leaves, torch.autograd.grad(loss.sum(), list(leaves.values())), strict=True))
    if recipe.noise_std > 0:
        slopes = {name: s + recipe.noise_std * draws.normal(s.shape).to(s) for name, s in slopes.items()}
    return loss, slopes


def _moved(
    recipe: Recipe, schedule: Schedule, parameters: Weights, momenta: Weights, slopes: Weights
) -> Weights:
    """One step of descent. The mask is applied to the step, not to the gradient: momentum and weight
    decay would move masked weights otherwise."""
    moved = {}
    for name, value in parameters.items():
        slope = slopes[name] + schedule.weight_decay * value
        momenta[name] = schedule.momentum * momenta[name] + slope
        change = momenta[name] if recipe.mask is None else recipe.mask[name] * momenta[name]
        moved[name] = value - schedule.learning_rate * change
    return moved


def _certified(
    method: NoisyFineTune, model: nn.Module, retain: Instances | None, progress: bool
) -> UnlearnedModel:
    """Carry out the plan; its steps, not the instances to forget, carry the promise."""
    files = method.certified
    if files is None or retain is None:
        raise UsageError(
            "PIA071",
            "a plan is to be carried out without the retained instances",
            "Its steps are noisy fine-tuning on exactly those",
            "unlearn(method, model, forget, retain=retain)",
        )
    run = run_plan(
        files.plan,
        ledger=files.ledger,
        # Per-sample gradients are captured in training mode only.
        module=copy.deepcopy(model).train(),
        dataset=TensorDataset(retain.inputs, retain.labels),
        criterion=nn.CrossEntropyLoss(),
        checkpoint=files.checkpoint,
        output=files.output,
        positions=files.positions,
        progress=progress,
    )
    empty = np.empty(0)
    trace = Trace(
        at=empty.astype(np.int64), loss=empty, forgotten=empty, outcome="all steps", steps=run.steps
    )
    basis = Basis(run.content.predicate.claim.basis)
    return UnlearnedModel(model=run.module.eval(), trace=trace, basis=basis, certificate=run.certificate)
