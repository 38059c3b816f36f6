"""``pia forget``: run a method, measure before and after, write the model and the report."""

from __future__ import annotations

import enum
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from per_instance_accountant.accounting import account
from per_instance_accountant.cli.inputs import load_reference, read_ids
from per_instance_accountant.cli.printing import Page, Table, as_json
from per_instance_accountant.errors import PlanError, UsageError
from per_instance_accountant.evaluation import accuracies, loss_barrier, margins, membership_attack
from per_instance_accountant.finetuning.files import load_module, save_module
from per_instance_accountant.finetuning.methods import (
    METHODS,
    Attack,
    CertifiedRun,
    Ensemble,
    Instances,
    InstanceWise,
    Method,
    NoisyFineTune,
    Schedule,
    UnlearnedModel,
    adversarial_counts,
    ensemble_of,
    instances_of,
    unlearn,
)
from per_instance_accountant.ledger import Ledger
from per_instance_accountant.unlearning import UnlearningPlan


class Goal(enum.StrEnum):
    """What is to become of an instance that is forgotten."""

    MISCLASSIFY = "misclassify"
    RELABEL = "relabel"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The options of the command. radius: of the attack, None for no attack; ledger: privacy losses that
    divide the adversarial examples; plan: carried out with a certificate by the noisy method."""

    model: str
    checkpoint: str
    dataset: str
    ids: str
    method: str
    output: str
    test: str | None = None
    ledger: str | None = None
    plan: str | None = None
    goal: Goal = Goal.RELABEL
    steps: int = 600
    learning_rate: float = 0.01
    radius: float | None = None
    importance: float = 0.0
    noise_std: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Loaded:
    """What the options name. positions: rows of the data to forget."""

    model: nn.Module
    positions: NDArray[np.int64]
    retained: NDArray[np.int64]
    forget: Instances
    retain: Instances
    test: Instances | None


def run(request: Request) -> Page:
    """Forget, measure, write ``model.pt`` and ``report.json`` (owner-only) into the output directory.

    Raises UsageError PIA070 for unknown methods and files that cannot be read or a model that is there
    already, PIA071 for data or weights that do not fit, PlanError PIA032 for unknown or repeated ids.
    """
    method = method_of(request)
    output = Path(request.output)
    if (output / "model.pt").exists() and request.plan is None:
        raise UsageError(
            "PIA070",
            "the output directory holds a model already",
            "Two results under one name would be mistaken for each other",
            "--output another_directory",
        )
    loaded = _load(request)
    if isinstance(method, NoisyFineTune) and request.plan is not None:
        method = _certified(method, request, loaded)
    before = ensemble_of([loaded.model])
    counts = _counts(request, method, loaded)
    done = unlearn(
        method,
        loaded.model,
        loaded.forget,
        loaded.retain if method.needs_retain else None,
        seed=request.seed,
        counts=counts,
        progress=True,
    )
    after = ensemble_of([done.model])
    output.mkdir(mode=0o700, parents=True, exist_ok=True)
    save_module(done.model, output / "model.pt")
    page = _page(
        request, loaded, done, [_row("before", before, before, loaded), _row("after", after, before, loaded)]
    )
    descriptor = os.open(output / "report.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        json.dump(as_json(page.document), stream, indent=2, allow_nan=False)
    return page


def method_of(request: Request) -> Method:
    """The record of the method with the options of the command. Raises UsageError PIA070."""
    schedule = Schedule(steps=request.steps, learning_rate=request.learning_rate)
    own: dict[str, dict[str, Any]] = {
        InstanceWise.name: {
            "goal": request.goal.value,
            "attack": None if request.radius is None else Attack(radius=request.radius, bounds=None),
            "importance": request.importance,
        },
        NoisyFineTune.name: {"noise_std": request.noise_std},
    }
    if request.method not in METHODS:
        raise UsageError(
            "PIA070",
            f"there is no method {request.method!r}",
            "Nothing was unlearned",
            f"--method with one of {', '.join(METHODS)}",
        )
    if request.plan is not None and (request.method != NoisyFineTune.name or request.ledger is None):
        raise UsageError(
            "PIA070",
            f"--plan was given with --method {request.method}, or without --ledger",
            "Only the noisy fine-tuning of a plan carries a certificate",
            f"--method {NoisyFineTune.name} --plan plan.json --ledger runs/a",
        )
    record: Method = METHODS[request.method](schedule=schedule, **own.get(request.method, {}))
    return record


def _load(request: Request) -> _Loaded:
    model = load_reference(request.model, "--model")
    load_module(model, request.checkpoint)
    dataset = load_reference(request.dataset, "--data")
    positions = _positions(request, len(dataset))
    retained = np.setdiff1d(np.arange(len(dataset)), positions)
    test = None if request.test is None else load_reference(request.test, "--test")
    return _Loaded(
        model=model,
        positions=positions,
        retained=retained,
        forget=instances_of(dataset, positions),
        retain=instances_of(dataset, retained),
        test=None if test is None else instances_of(test, np.arange(len(test))),
    )


def _positions(request: Request, count: int) -> NDArray[np.int64]:
    """Rows of the data: by the ledger's ids if there is a ledger, else the ids are the rows."""
    if request.ledger is not None:
        opened = Ledger.open(request.ledger)
        if opened.num_instances != count:
            raise UsageError(
                "PIA071",
                f"the data have {count} rows, the ledger {opened.num_instances} instances",
                "The ids would name other instances than those the model was trained on",
                "--data with the training set of the ledger's run",
            )
        found = np.asarray(opened.positions_of(list(read_ids(request.ids, opened.ids.dtype))), dtype=np.int64)
    else:
        found = read_ids(request.ids, np.dtype(np.int64))
    unknown = int(((found < 0) | (found >= count)).sum())
    if unknown or len(np.unique(found)) != len(found) or len(found) >= count:
        raise PlanError(
            "PIA032",
            f"{unknown} of {len(found)} ids are no rows of the data, or some are repeated, or all are named",
            "Nothing was unlearned",
            "--ids with distinct rows of --data, counted from 0, or --ledger for business ids",
        )
    return found


def _counts(request: Request, method: Method, loaded: _Loaded) -> NDArray[np.int64] | None:
    """Adversarial examples divided by privacy loss, if there is a ledger and an attack."""
    if request.ledger is None or not isinstance(method, InstanceWise) or method.attack is None:
        return None
    losses = account(request.ledger).rdp[loaded.positions, 0]
    return adversarial_counts(losses, total=method.attack.per_instance * len(loaded.positions))


def _certified(method: NoisyFineTune, request: Request, loaded: _Loaded) -> NoisyFineTune:
    plan, ledger = UnlearningPlan.load(request.plan or ""), request.ledger or ""
    if sorted(Ledger.open(ledger).positions_of(list(plan.ids))) != sorted(loaded.positions.tolist()):
        raise PlanError(
            "PIA033",
            "--ids are not the instances of the plan",
            "The certificate would be about others than those that were measured",
            "--ids with exactly the ids of the plan",
        )
    files = CertifiedRun(
        plan=request.plan or "",
        ledger=ledger,
        checkpoint=request.checkpoint,
        output=request.output,
        positions=loaded.retained,
    )
    return replace(method, certified=files)


def _row(name: str, models: Ensemble, start: Ensemble, loaded: _Loaded) -> dict[str, Any]:
    barrier = loss_barrier(start, models, loaded.retain)
    row: dict[str, Any] = {
        "model": name,
        "forget": float(accuracies(models, loaded.forget)[0]),
        "retain": float(accuracies(models, loaded.retain)[0]),
        "test": None,
        "attack": None,
        "attack if unseen": None,
        "barrier": float(barrier.above_ends[0]),
        "forget margin": float(margins(models, loaded.forget).mean()),
    }
    if loaded.test is not None:
        score = membership_attack(models, loaded.forget, loaded.test)[0]
        row["test"] = float(accuracies(models, loaded.test)[0])
        row["attack"] = score.auc
        row["attack if unseen"] = f"{score.null_low:.3f} .. {score.null_high:.3f}"
    return row


def _page(request: Request, loaded: _Loaded, done: UnlearnedModel, rows: list[Mapping[str, Any]]) -> Page:
    trace = done.trace
    head = [
        f"Forget {len(loaded.forget)} instances by {request.method}: "
        f"{trace.outcome} after {trace.steps} steps",
        done.statement(),
    ]
    notes = [
        "forget, retain, test: accuracy. attack: area under the curve of the margin, the instances to forget "
        "against the test set; 0.5 is no difference, below it is forgotten too hard.",
        "barrier: largest loss on the line from the model before, above the worse end, on the retained "
        "instances, in nats (a lower bound).",
    ]
    if trace.attack_success is not None:
        notes.append(
            f"adversarial examples: {trace.adversarial} kept, {trace.attack_success:.1%} of the attempts"
        )
    document = {
        "method": request.method,
        "instances": len(loaded.forget),
        "outcome": trace.outcome,
        "steps": trace.steps,
        "attack_success": trace.attack_success,
        "basis": str(done.basis),
        "certificate": None if done.certificate is None else str(done.certificate),
        "statement": done.statement(),
        "model": str(Path(request.output) / "model.pt"),
        "measured": rows,
    }
    # As text: the printer rounds numbers up, as bounds; these are measurements.
    shown = [{key: f"{v:.4f}" if isinstance(v, float) else v for key, v in row.items()} for row in rows]
    return Page(head=head, tables=[Table.of(shown)], document=document, notes=notes)
