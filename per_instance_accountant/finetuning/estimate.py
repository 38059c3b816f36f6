"""Fine-tuning without noise: what most of practice does. It promises nothing, and says so."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from numpy.typing import ArrayLike
from opacus.data_loader import DPDataLoader
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from per_instance_accountant.accounting import Basis
from per_instance_accountant.errors import PlanError, UsageError
from per_instance_accountant.finetuning.files import load_module, save_module
from per_instance_accountant.finetuning.retained import retained_positions
from per_instance_accountant.ledger import Ledger
from per_instance_accountant.results.files import write_private

STATEMENT: Final = (
    "ESTIMATE: fine-tuned without noise. The Renyi divergence from retraining is unbounded, so no number of"
    " steps carries a promise, and no certificate can be issued for this model."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateRun:
    """A model without a promise, its file, and the file that says so."""

    module: nn.Module
    checkpoint: Path
    note: Path
    steps: int
    basis: str = Basis.ESTIMATE.value
    statement: str = STATEMENT


def run_estimate(
    ids: Iterable[int | str],
    *,
    steps: int,
    ledger: str | os.PathLike[str],
    module: nn.Module,
    dataset: Dataset[Any],
    criterion: Callable[[Any, Any], torch.Tensor],
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    positions: ArrayLike | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> EstimateRun:
    """Fine-tune by ``steps`` plain SGD steps on the retained instances: no clipping, no noise, no guarantee.

    Learning rate, weight decay and sampling rate are those of the last training phase; other arguments as in
    :func:`run_plan`. Writes ``model.pt`` and ``estimate.json`` to ``output`` and nothing to the ledger: a
    ledger without the steps of a plan is what keeps every certificate away from this model.

    Raises UsageError PIA070 (steps), PlanError PIA034 (the data are not exactly the retained instances) and
    PIA033 (``output`` holds a run of a plan, the checkpoint is of another moment), LedgerError,
    CertificateError PIA051 (the checkpoint).
    """
    if type(steps) is not int or steps < 0:
        raise UsageError("PIA070", f"steps is {steps!r}", "Nothing was run", "steps=100")
    opened, directory = Ledger.open(ledger), Path(output)
    forget = opened.positions_of(list(ids))
    retained_positions(opened, forget, dataset, positions)
    if (directory / "certificate.json").exists() or (directory / "progress.pt").exists():
        raise PlanError(
            "PIA033",
            "the output directory holds the run of a plan",
            "A model without a guarantee beside a certificate would be taken for the certified one",
            "run_estimate(output=another_directory)",
        )
    load_module(module, checkpoint, opened.anchor)
    _descend(module, opened, dataset, criterion, steps, seed, progress)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    save_module(module, directory / "model.pt")
    note = directory / "estimate.json"
    content = {"basis": Basis.ESTIMATE.value, "steps": steps, "statement": STATEMENT}
    write_private(note, (json.dumps(content, indent=2) + "\n").encode())
    return EstimateRun(module=module, checkpoint=directory / "model.pt", note=note, steps=steps)


def _descend(
    module: nn.Module,
    ledger: Ledger,
    dataset: Dataset[Any],
    criterion: Callable[[Any, Any], torch.Tensor],
    steps: int,
    seed: int | None,
    progress: bool,
) -> None:
    phase = next(phase for phase in reversed(ledger.phases) if phase.kind == "train")
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    loader = DPDataLoader(dataset, sample_rate=phase.sample_rate, generator=generator)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=phase.learning_rate, weight_decay=phase.weight_decay)
    bar = tqdm(range(steps), desc="fine-tuning (estimate)", unit="step", disable=None if progress else True)
    batches = iter(loader)
    for _ in bar:
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            batch = next(batches)
        inputs, targets = batch
        if not len(targets):
            continue  # The mean loss of an empty Poisson batch is NaN.
        optimizer.zero_grad()
        (criterion(module(inputs), targets) * (len(targets) / phase.denominator)).backward()
        optimizer.step()
