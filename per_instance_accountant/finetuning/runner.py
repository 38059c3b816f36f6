"""Carrying out a plan: noisy fine-tuning on the retained instances, recorded step by step, then certified.

A step that was interrupted is repeated with the SAME batch and the SAME noise: both follow from a secret
drawn once per run and the number of the step. So a killed run loses no step, and no release is ever made
twice with fresh noise.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from opacus import GradSampleModule
from opacus.data_loader import DPDataLoader
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from per_instance_accountant.accounting import FixedThresholds, WorstCase
from per_instance_accountant.errors import PlanError, UnsupportedError
from per_instance_accountant.finetuning.admission import (
    refuse_criterion,
    refuse_module,
    same_contributions,
)
from per_instance_accountant.finetuning.files import (
    Progress,
    load_module,
    load_progress,
    load_secret,
    save_module,
    save_progress,
    save_secret,
    secret_beside,
)
from per_instance_accountant.finetuning.retained import forget_thresholds, retained_positions
from per_instance_accountant.ledger import Ledger, LedgerWriter
from per_instance_accountant.ledger.records import Drop, Filter, Step, Thresholds
from per_instance_accountant.opacus_adapter import attach
from per_instance_accountant.opacus_adapter.drawing import set_generator
from per_instance_accountant.results.rounding import rounded_up
from per_instance_accountant.unlearning import Certificate, UnlearningPlan, bound_of, issue
from per_instance_accountant.unlearning.execution import unplanned_since

SAVE_EVERY = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class UnlearningRun:
    """What a finished run leaves: the model, its file, the certificate and its file."""

    module: nn.Module
    checkpoint: Path
    certificate: Path
    content: Certificate
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One plan, ready to run. ``retained``: dataset positions behind the rows of ``dataset``."""

    plan: UnlearningPlan
    steps: int
    module: nn.Module
    dataset: Dataset[Any]
    retained: NDArray[np.int64]
    criterion: Callable[[Any, Any], torch.Tensor]
    forget: Thresholds
    individual: bool


def run_plan(
    plan: UnlearningPlan | str | os.PathLike[str],
    *,
    ledger: str | os.PathLike[str],
    module: nn.Module,
    dataset: Dataset[Any],
    criterion: Callable[[Any, Any], torch.Tensor],
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    positions: ArrayLike | None = None,
    frozen: Iterable[str] = (),
    seed: int | None = None,
    progress: bool = True,
) -> UnlearningRun:
    """Fine-tune ``module`` by the plan's noisy steps on the retained instances only, and certify it.

    ledger: directory of the ledger that the plan was made for; the steps are appended to it. module: the
    model's architecture; its weights are read from ``checkpoint`` (a state dict, or a file of
    ``save_checkpoint``). dataset: the retained instances, as a ``torch.utils.data.Subset`` of the training
    set, or any dataset with ``positions`` (the training positions of its rows). criterion: the training
    loss, with mean reduction. frozen: names of the parameters that require no gradient because training did
    not move them either; every other parameter must. output: directory for the model (``model.pt``) and the
    certificate; a killed run is continued from there. Where that directory was lost the recorded steps are
    repeated from ``checkpoint``, by the secret that the ledger's directory keeps until the end. seed: makes
    batches and noise repeatable for tests and demonstrations; whoever knows it can remove the noise, so leave
    it None for a certificate that is to be relied on.

    Same sampling rate, normaliser and weight decay as the last training phase, and the same noise and
    learning rate unless the plan states its own; a plan
    with ``projection_radius`` projects the trainable parameters before each step.

    Raises PlanError PIA030 (unreachable plan), PIA033 (plan or checkpoint of another moment), PIA034 (the
    data hold an instance that must be forgotten, or not all the others), UsageError PIA070 and PIA071 (a
    module in evaluation mode, frozen parameters, another reduction), UnsupportedError PIA060 (a mechanism
    that was not Poisson-sampled plain SGD, running statistics), LedgerError, CertificateError. Nothing is
    written then.
    """
    refuse_module(module, frozen)
    refuse_criterion(criterion)
    plan = plan if isinstance(plan, UnlearningPlan) else UnlearningPlan.load(plan)
    steps = _planned_steps(plan)
    directory = Path(output)
    opened = Ledger.open(ledger)
    saved = load_progress(directory, plan.digest)
    kept = secret_beside(Path(ledger), plan.digest)
    secret = load_secret(kept) if saved is None else saved.secret
    _refuse_other_moment(plan, opened, resuming=secret is not None)
    forget = opened.positions_of(list(plan.ids))
    retained = retained_positions(opened, forget, dataset, positions)
    job = _Job(
        plan=plan,
        steps=steps,
        module=module,
        dataset=dataset,
        retained=retained,
        criterion=criterion,
        forget=forget_thresholds(opened, plan, forget),
        individual=opened.phases[-1].charging == FixedThresholds.name,
    )
    if saved is None:
        load_module(module, checkpoint, plan.anchor)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        begun = secret is not None
        secret = secret or (secrets.token_bytes(16) if seed is None else secret_of(seed))
        saved = Progress(steps=0, secret=secret)
        if not begun:
            save_secret(kept, secret)
            save_progress(directory, plan.digest, saved, module)
    else:
        module.load_state_dict(saved.weights)
    _take_all(job, Path(ledger), directory, saved, progress)
    return _finish(job, Path(ledger), Path(checkpoint), directory, seeded=seed is not None)


def _planned_steps(plan: UnlearningPlan) -> int:
    if plan.steps is None:
        raise PlanError(
            "PIA030",
            f"the plan is unreachable: its best value is {plan.value:.6g} for a target of {plan.target:.6g}",
            "No number of steps carries the promise",
            "retrain without the instances, or plan(..., target_epsilon=...) with a larger target",
        )
    m = plan.mechanism
    if m.sampling != "poisson" or m.optimizer != "SGD" or m.momentum != 0:
        raise UnsupportedError(
            "PIA060",
            f"the last training phase used {m.sampling} batches and {m.optimizer} with momentum {m.momentum}",
            "The runner repeats Poisson-sampled plain SGD only",
            "train with poisson_sampling=True and torch.optim.SGD without momentum, or retrain",
        )
    return plan.steps


def _refuse_other_moment(plan: UnlearningPlan, ledger: Ledger, *, resuming: bool) -> None:
    """The ledger must end where the plan was made, or hold nothing after it but steps of this plan."""
    untouched = ledger.anchor == plan.anchor
    if not untouched and not (
        ledger.holds(plan.anchor) and (resuming or ledger.num_steps == plan.anchor.steps)
    ):
        begun = any(phase.plan_digest == plan.digest for phase in ledger.phases)
        raise PlanError(
            "PIA033",
            f"the plan was made after {plan.anchor.steps} steps, the ledger holds {ledger.num_steps}"
            + (", of this plan among them" if begun else ""),
            "The plan covers no step that was taken after it",
            "run_plan(output=the directory of that run); without it retrain without the instances"
            if begun
            else "plan again: plan(ledger, ids=ids, ...)",
        )
    unplanned = unplanned_since(ledger, plan.anchor.sequence)
    if unplanned and not resuming:
        raise PlanError(
            "PIA033",
            f"{unplanned} statistics were published or updates made from public data since the plan",
            "The plan does not count them, so no certificate could be issued",
            "plan again: plan(ledger, ids=ids, ...)",
        )


def _take_all(job: _Job, ledger: Path, directory: Path, saved: Progress, progress: bool) -> None:
    """Repeat what the ledger holds beyond the saved weights, then take the remaining steps."""
    recorded = Ledger.open(ledger).num_steps - job.plan.anchor.steps
    if saved.steps == recorded == job.steps > 0:
        return
    with closing(_Bar(job, ledger, saved.steps, shown=progress)) as bar:
        if saved.steps < recorded:
            again = _recorded_steps(ledger, job.plan.anchor.steps + saved.steps)
            with _beside(Ledger.open(ledger)) as memory:
                for number in _take(job, memory, saved, recorded):
                    _refuse_difference(memory.ledger(), next(again), number)
                    bar.update()
        with LedgerWriter.resume(ledger) as writer:
            for number in _take(job, writer, saved, job.steps, start=max(saved.steps, recorded)):
                bar.update()
                if (number + 1) % SAVE_EVERY == 0:
                    writer.flush()
                    save_progress(
                        directory,
                        job.plan.digest,
                        Progress(steps=number + 1, secret=saved.secret),
                        job.module,
                    )
    save_progress(directory, job.plan.digest, Progress(steps=job.steps, secret=saved.secret), job.module)


class _Bar:
    """Progress bar; from time to time it shows the bound after the steps so far."""

    def __init__(self, job: _Job, ledger: Path, done: int, *, shown: bool) -> None:
        self._every, self._done = max(1, job.steps // 10), done
        self._bar = tqdm(
            total=job.steps, initial=done, desc="unlearning", unit="step", disable=None if shown else True
        )
        self._bound = None if self._bar.disable else bound_of(job.plan, ledger)
        self._show()

    def update(self) -> None:
        self._done += 1
        self._bar.update()
        if self._done % self._every == 0 or self._done == self._bar.total:
            self._show()

    def _show(self) -> None:
        if self._bound is not None:
            self._bar.set_postfix_str(f"epsilon <= {rounded_up(self._bound.value(self._done))}")

    def close(self) -> None:
        self._bar.close()


def _beside(recorded: Ledger) -> LedgerWriter:
    """A ledger in memory for steps that are repeated; whom a filter dropped stays dropped."""
    writer = LedgerWriter.create(None, recorded.run)
    for event in recorded.events():
        if isinstance(event, Filter | Drop):
            writer.append(event)
    return writer


def _take(
    job: _Job, writer: LedgerWriter, saved: Progress, stop: int, start: int | None = None
) -> Iterator[int]:
    """Take the steps ``start .. stop-1`` on ``job.module`` and record them with ``writer``."""
    start = saved.steps if start is None else start
    writer.append(job.forget)
    if start >= stop:
        return
    m, sampling, noise = job.plan.mechanism, torch.Generator(), torch.Generator()
    wrapped = GradSampleModule(job.module, loss_reduction="mean")
    optimizer = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=m.learning_rate, weight_decay=m.weight_decay),
        noise_multiplier=m.noise_std / m.max_grad_norm,
        max_grad_norm=m.max_grad_norm,
        expected_batch_size=m.denominator,
        generator=noise,
    )
    loader = DPDataLoader(job.dataset, sample_rate=m.sample_rate, generator=sampling)
    _, tracked = attach(
        optimizer,
        loader,
        module=wrapped,
        ledger=writer,
        charging=FixedThresholds() if job.individual else WorstCase(),
        positions=job.retained,
        kind="unlearn",
        plan_digest=job.plan.digest,
        projection_radius=m.projection_radius,
    )
    try:
        for number in range(start, stop):
            reseed(sampling, noise, secret=saved.secret, step=number)
            project(job.module, m.projection_radius)
            # A new iteration each time: what an iterator has consumed before must not matter for the draw.
            inputs, targets = next(iter(tracked))
            optimizer.zero_grad()
            job.criterion(wrapped(inputs), targets).backward()
            optimizer.step()
            yield number
    finally:
        wrapped.to_standard_module()


@torch.no_grad()
def project(module: nn.Module, radius: float | None) -> None:
    """Project all trainable parameters together onto the ball of ``radius`` about 0; None leaves them.

    Onto the ball, not the sphere: parameters inside are not moved. Norm and factor in float64.
    """
    if radius is None:
        return
    parameters = [p for p in module.parameters() if p.requires_grad]
    norm = math.sqrt(sum(float(p.double().square().sum()) for p in parameters))
    if norm > radius:
        for parameter in parameters:
            parameter.mul_(radius / norm)


def secret_of(seed: int) -> bytes:
    """The secret that ``run_plan(seed=...)`` uses."""
    return seed.to_bytes(16, "big", signed=True)


def reseed(sampling: torch.Generator, noise: torch.Generator, *, secret: bytes, step: int) -> None:
    """Set the generators of one unlearning step: batch and noise follow from the secret and the step's
    number."""
    for generator, purpose in ((sampling, b"batch"), (noise, b"noise")):
        set_generator(generator, hashlib.blake2b(purpose + step.to_bytes(8, "big"), key=secret).digest())


def _recorded_steps(ledger: Path, first: int) -> Iterator[Step]:
    steps = (event for event in Ledger.open(ledger).events() if isinstance(event, Step))
    return (step for number, step in enumerate(steps) if number >= first)


def _refuse_difference(repeated: Ledger, recorded: Step, number: int) -> None:
    """A repeated step must draw and clip the recorded instances as they were, else it is another release
    under the same noise."""
    last = None
    for event in repeated.events():
        last = event if isinstance(event, Step) else last
    same = last is not None and np.array_equal(last.positions, recorded.positions)
    if last is None or not same or not same_contributions(last.contributions, recorded.contributions):
        raise PlanError(
            "PIA033",
            f"unlearning step {number} cannot be repeated as it was recorded",
            "A second release of the same step would be a step that no certificate covers",
            "plan again: plan(ledger, ids=ids, ...), with the data and the seed of the first run",
        )


def _finish(job: _Job, ledger: Path, checkpoint: Path, directory: Path, *, seeded: bool) -> UnlearningRun:
    model, certificate = directory / "model.pt", directory / "certificate.json"
    bad = sum(int((~torch.isfinite(value)).sum()) for value in job.module.state_dict().values())
    if bad:
        raise PlanError(
            "PIA033",
            f"{bad} weights are not finite after {job.steps} steps",
            "A model that diverged is no result of the plan's mechanism",
            "retrain without the instances",
        )
    save_module(job.module, model)
    content = issue(job.plan, ledger, checkpoint, model, noise="seed" if seeded else "system")
    content.save(certificate)
    # The secret would let its reader remove the noise from the finished model.
    secret_beside(ledger, job.plan.digest).unlink(missing_ok=True)
    save_progress(directory, job.plan.digest, Progress(steps=job.steps, secret=b""), job.module)
    return UnlearningRun(
        module=job.module, checkpoint=model, certificate=certificate, content=content, steps=job.steps
    )
