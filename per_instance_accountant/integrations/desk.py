"""What the frameworks share: batches that wait for the model, and the place in a ledger that a checkpoint
keeps."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, NoReturn

import torch
from opacus.optimizers import DPOptimizer

from per_instance_accountant.errors import (
    AlignmentError,
    LedgerError,
    MissingDependencyError,
    UnsupportedError,
)
from per_instance_accountant.ledger import Anchor
from per_instance_accountant.opacus_adapter import PrivacyEngine, Tracker
from per_instance_accountant.opacus_adapter.drawing import PoissonSampler, set_generator
from per_instance_accountant.opacus_adapter.loader import Delivery, IndexedCollate, TrackedLoader


class Desk:
    """Between a loader and a tracker: batches that a framework fetched ahead wait until the model gets them.

    Each batch that the loader hands out gets the next ticket. :meth:`collect` tells the tracker about the
    batches up to a ticket, in order, as if the loop had received them only now: a batch that never reached
    the model counts as skipped.
    """

    ends_quietly = False

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._waiting: dict[int, Delivery] = {}
        self.issued = 0
        self.empty = False
        """Whether the latest batch has no instances."""

    def check_optimizer(self, optimizer: DPOptimizer) -> None:
        self._tracker.check_optimizer(optimizer)

    def check_boundary(self) -> None:
        """The loader is ahead of the model, so its end says nothing; the next loop or checkpoint checks."""

    def open_loop(self) -> int:
        loop = self._tracker.open_loop()
        self._waiting.clear()
        return loop

    def begin(self, batch: Delivery) -> None:
        self.issued += 1
        self.empty = not len(batch.rows)
        self._waiting[self.issued] = replace(batch, content=None)

    def collect(self, ticket: int) -> None:
        """The model receives the batch of this ticket. Raises AlignmentError PIA001 for a used ticket."""
        if ticket not in self._waiting:
            raise AlignmentError(
                "PIA001",
                "the model was given a batch a second time, or one of an earlier epoch",
                "Its instances would enter a release without being drawn for it",
                "one forward pass for each batch that the loader hands out",
            )
        for number in [number for number in self._waiting if number <= ticket]:
            self._tracker.begin(self._waiting.pop(number))


def stand_in(loader: TrackedLoader, optimizer: Any) -> Any:
    """A batch of one instance for the model when a draw is empty: many models cannot do without.

    ``optimizer`` drops its gradient, whatever it is, and nothing is charged.
    """
    optimizer.has_stand_in = True
    collate = loader.collate_fn
    inner = collate.inner if isinstance(collate, IndexedCollate) else collate
    return inner([loader.dataset[0]])


def own_randomness(optimizer: Any, loader: TrackedLoader) -> None:
    """Give noise and draws generators of their own, with fresh seeds.

    Frameworks put torch's random state back when they resume. The noise of the steps after the checkpoint
    would be drawn a second time, and the same instances with it.
    """
    if optimizer.generator is None and not optimizer.secure_mode:
        optimizer.generator = torch.Generator(device=optimizer.params[0].device)
        set_generator(optimizer.generator, secrets.token_bytes(64))
    sampler: Any = loader.batch_sampler
    if isinstance(sampler, PoissonSampler) and sampler.generator is None:
        sampler.generator = set_generator(torch.Generator(), secrets.token_bytes(64))


def position(engine: PrivacyEngine) -> dict[str, Any]:
    """Where the run stands, in plain values for a checkpoint; flushes the ledger.

    Raises AlignmentError PIA002 inside a logical batch.
    """
    engine.tracker.check_boundary()
    accountant = engine.accountant.state_dict()
    accountant["history"] = [list(entry) for entry in accountant["history"]]
    return {
        "version": 1,
        "anchor": engine.tracker.recorder.writer.anchor.to_dict(),
        "noise": engine.tracker.sessions.state(),
        "draws": engine.tracker.draws.state(),
        "max_grad_norm": float(engine.tracker.optimizer.max_grad_norm),
        "accountant": dict(accountant),
    }


def continue_from(engine: PrivacyEngine, saved: Any) -> None:
    """Continue the ledger where a checkpoint was taken; steps beyond it stay charged.

    saved: what :func:`position` returned. Raises LedgerError PIA040 when it says nothing about this ledger.
    """
    known = isinstance(saved, Mapping) and saved.get("version") == 1
    if not known or not isinstance(saved.get("anchor"), Mapping):
        raise LedgerError(
            "PIA040",
            "the checkpoint does not say where in a ledger it was taken",
            "The steps before it are in no ledger, so every loss would be too small",
            "resume from a checkpoint that was saved while the IndividualPrivacyCallback was attached",
        )
    engine.tracker.recorder.resume(Anchor.from_dict(dict(saved["anchor"])))
    history = [tuple(entry) for entry in saved["accountant"]["history"]]
    engine.accountant.load_state_dict({**saved["accountant"], "history": history})
    engine.tracker.optimizer.continue_from(saved)
    engine.tracker.sessions.resume(saved.get("noise", []))
    engine.tracker.draws.resume(saved.get("draws", []))


def uses_ghost(options: Mapping[str, Any]) -> bool:
    """Whether ``make_private`` with these options returns a criterion that must be used."""
    return "ghost" in str(options.get("grad_sample_mode", "hooks"))


def refuse(happened: str, fix: str) -> NoReturn:
    """Raise UnsupportedError PIA100."""
    raise UnsupportedError(
        "PIA100",
        happened,
        "Steps would be changed, repeated or hidden outside of the recorded mechanism",
        fix,
    )


def refuse_arguments(options: Mapping[str, Any]) -> None:
    """Raise UnsupportedError PIA100 for arguments of ``make_private`` that no framework's loop can carry
    out."""
    owned = sorted({"module", "optimizer", "data_loader", "wrap_model"} & set(options))
    if owned:
        refuse(f"{', '.join(owned)} given to the callback", "leave them out: the framework's own are used")


def require(package: str, extra: str) -> None:
    """Raise MissingDependencyError PIA061 when ``package`` is not installed."""
    if find_spec(package) is None:
        raise MissingDependencyError(
            "PIA061",
            f"{package} is not installed",
            "There is no loop to attach to",
            f'pip install "per-instance-accountant[{extra}]"',
        )
