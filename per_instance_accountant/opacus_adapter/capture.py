"""The tracker: knows which instances the next step uses, checks that the loop keeps to it, writes the facts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer

from per_instance_accountant.accounting.rules import ChargingRule, Sweep
from per_instance_accountant.errors import AlignmentError, GuaranteeError, LedgerError, UnsupportedError
from per_instance_accountant.ledger import Anchor, Ledger, LedgerWriter
from per_instance_accountant.ledger.records import Phase, Resume, Run, Step, Thresholds
from per_instance_accountant.opacus_adapter.clipping import clip_factors, round_up
from per_instance_accountant.opacus_adapter.loader import Part

SAFE_LOOP = (
    "one zero_grad, one forward, one backward and one optimizer.step() for each batch of the returned loader"
)
SWEEP_BATCH = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is fixed for a tracker: how batches are drawn, and how the steps are to be described and charged."""

    charging: ChargingRule
    sampling: str
    sample_rate: float
    grad_sample_mode: str
    kind: str = "train"
    plan_digest: str | None = None
    positions: NDArray[np.int64] | None = None
    """Row of the loader's dataset -> dataset position of the run; None when they are the same."""


@dataclass(slots=True, eq=False)
class _Batch:
    """The batch in the user's hands."""

    positions: NDArray[np.int64]
    part: Part
    loop: int
    content: Any


class Tracker:
    """State of one tracked optimizer. Made by :func:`attach`; read :attr:`ledger`, call :meth:`abandon`."""

    def __init__(
        self,
        *,
        optimizer: DPOptimizer,
        module: torch.nn.Module,
        run: Run,
        ledger: str | Path | LedgerWriter | None,
        setting: Setting,
        thresholds: NDArray[np.float32] | None = None,
        sweep: Callable[[int], NDArray[np.float32]] | None = None,
    ) -> None:
        self.optimizer, self.module, self.run, self.setting = optimizer, module, run, setting
        self.thresholds = thresholds
        """(N,) thresholds in force, or None: everybody is clipped at max_grad_norm."""
        self._sweep, self._until_sweep = sweep, 0
        self._hook = optimizer.step_hook
        self._check_rate(self._hook)
        self._loops = 0
        self._phase: Phase | None = None
        self._releasing = False
        self._open: tuple[int, int] | None = None
        self._skipped: tuple[int, int] | None = None
        self._forget()
        self._path = None if isinstance(ledger, LedgerWriter) else ledger
        self._writer: LedgerWriter | None = None
        if isinstance(ledger, LedgerWriter):
            self._adopt(ledger)

    def _forget(self) -> None:
        self._batch: _Batch | None = None
        self._stale: Any = None
        self._forwards = 0
        self._mechanism: tuple[float, float] | None = None
        self._measured: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None
        self._pending: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []

    # ------------------------------------------------------------------------------------------------ ledger

    @property
    def writer(self) -> LedgerWriter:
        """The writer, created at first use. Raises LedgerError PIA045 when the path holds a ledger already."""
        writer = self._writer
        if writer is None:
            writer = LedgerWriter.create(self._path, self.run)
            self._adopt(writer)
        return writer

    @property
    def ledger(self) -> Ledger:
        """What is written so far."""
        return self.writer.ledger()

    def _adopt(self, writer: LedgerWriter) -> None:
        ledger = writer.ledger()
        if ledger.num_instances != self.run.num_instances:
            raise LedgerError(
                "PIA040",
                f"the ledger is about {ledger.num_instances} instances, the data set has {self.run.num_instances}",
                "Positions would name other instances than the ones that were trained on",
                "load the data set that the ledger was written for, in the same order",
            )
        fixed, in_force = _recorded_thresholds(ledger)
        if fixed is not None and self.thresholds is not None and not np.array_equal(fixed, self.thresholds):
            raise LedgerError(
                "PIA045",
                "the thresholds given differ from the ones that the ledger recorded as fixed",
                "Fixed thresholds are chosen before training; changing them later depends on what was released",
                "pass the same FixedThresholds(thresholds=...) as at the start of the run",
            )
        if in_force is None and self.thresholds is not None:
            writer.append(Thresholds(values=self.thresholds, source="fixed"))
            in_force = self.thresholds
        self.thresholds, self._writer, self._phase, self._until_sweep = in_force, writer, None, 0

    def resume(self, anchor: Anchor) -> None:
        """Continue the ledger from a checkpoint taken at ``anchor``; later steps of the ledger stay charged.

        Raises LedgerError PIA040 when ledger and checkpoint do not belong together, AlignmentError PIA002 inside a
        logical batch.
        """
        self.check_boundary()
        current = self._writer
        if current is not None and current.anchor == anchor:
            return
        if self._path is None:
            raise LedgerError(
                "PIA040",
                f"the checkpoint was taken after {anchor.steps} steps of a ledger on disk, this one is in memory",
                "The steps before the checkpoint would be missing from every loss",
                'PrivacyEngine(ledger="runs/a") before training and when resuming',
            )
        if current is not None:
            current.close()
            self._writer = None
        self._adopt(LedgerWriter.resume(self._path, anchor))

    # ------------------------------------------------------------------------------------------------ loader

    def check_optimizer(self, optimizer: DPOptimizer) -> None:
        """Raise UnsupportedError PIA060 when the loader is about to be split for another optimizer."""
        if optimizer is not self.optimizer:
            raise UnsupportedError(
                "PIA060",
                "BatchMemoryManager was given another optimizer than the one this loader was made private with",
                "Steps of one optimizer would be recorded with batches of the other",
                "BatchMemoryManager(data_loader=loader, optimizer=optimizer) with both from one make_private",
            )

    def check_boundary(self) -> None:
        """Raise AlignmentError PIA002 when part of a logical batch is accumulated and not released."""
        if self._pending:
            _broken("a logical batch is accumulated in part, and its last part was not stepped")

    def open_loop(self) -> None:
        """A loop over the loader begins. Raises AlignmentError PIA002 when a logical batch is unfinished."""
        self.check_boundary()
        self._loops += 1

    def begin(self, rows: NDArray[np.int64], part: Part, batch: Any, limit: int | None) -> None:
        """The user receives a batch. Raises AlignmentError PIA002 inside an unfinished logical batch."""
        key = (self._loops, part.logical)
        if self._batch is not None:
            self._discard(self._batch)
        if self._pending and (part.first or key != self._open):
            _broken("a new logical batch began before the last part of the one before was stepped")
        if part.first and self._sweep is not None and not self._until_sweep:
            self._measure_thresholds(self._sweep, limit)
        positions = rows if self.setting.positions is None else self.setting.positions[rows]
        self._batch, self._open = _Batch(positions, part, self._loops, batch), key
        self.optimizer._step_skip_queue[:] = [] if part.last else [True]

    def _discard(self, batch: _Batch) -> None:
        if self._pending:
            _broken("a part of a logical batch was skipped after another part had been accumulated")
        self._skipped = (batch.loop, batch.part.logical)
        self._stale, self._batch, self._measured = batch.content, None, None
        # A forward pass whose backward pass ran leaves nothing behind; one without would spoil the next batch.
        if not any(getattr(p, "_forward_counter", 0) for p in self.optimizer.params):
            self._forwards = 0

    def _measure_thresholds(self, sweep: Callable[[int], NDArray[np.float32]], limit: int | None) -> None:
        rule = self.setting.charging
        slack, every = (rule.slack, rule.every) if isinstance(rule, Sweep) else (1.0, 1)
        writer, forwards = self.writer, self._forwards
        norms = sweep(min(limit or SWEEP_BATCH, SWEEP_BATCH)).astype(np.float64)
        self._forwards = forwards
        bounds = round_up(np.minimum(norms * slack, np.float64(self.optimizer.max_grad_norm)))
        rows = self.setting.positions
        values = bounds if rows is None else np.zeros(self.run.num_instances, dtype=np.float32)
        if rows is not None:
            values[rows] = bounds
        writer.append(Thresholds(values=values, source="sweep"))
        self.thresholds, self._until_sweep = values, every

    # --------------------------------------------------------------------------------------------- optimizer

    def count_forward(self, module: torch.nn.Module, inputs: Any) -> None:
        """Forward pre-hook: counts the passes that leave per-sample gradients behind."""
        if module.training and torch.is_grad_enabled():
            if self._stale is not None:
                self._check_identity(inputs)
            self._forwards += 1

    def _check_identity(self, inputs: Any) -> None:
        mine = _addresses(self._batch.content) if self._batch else set()
        seen = _addresses(inputs) - mine
        if seen & _addresses(self._stale):
            raise AlignmentError(
                "PIA007",
                "the model was given a batch after a later batch had been read",
                "The loop reads batches ahead, so the step would be charged to other instances",
                "iterate over the returned loader directly, one batch for each step",
            )

    def check_loop(self, optimizer: DPOptimizer) -> None:
        """All guards that need no gradient. Raises AlignmentError or UnsupportedError; changes nothing."""
        batch = self._current()
        if self._skipped == (batch.loop, batch.part.logical):
            _broken("a part of a logical batch was stepped after another part had been skipped")
        if optimizer._step_skip_queue != ([] if batch.part.last else [True]):
            _broken("signal_skip_step was called by hand")
        if optimizer.step_hook is not self._hook:
            _refuse_hook()
        if self._forwards != 1:
            raise AlignmentError(
                "PIA005",
                f"{self._forwards} training forward passes of the model since the last step, expected 1",
                "Rows of several passes would be added, so one instance could enter the sum more than once",
                SAFE_LOOP,
            )
        if hasattr(optimizer, "found_inf"):
            raise UnsupportedError(
                "PIA060",
                "the step was taken through torch.amp.GradScaler",
                "Scaled losses make every gradient look larger than it is, so all would be clipped",
                "torch.amp.GradScaler(enabled=False)",
            )
        if self._mechanism is not None and self._mechanism != self._mechanism_now():
            raise AlignmentError(
                "PIA009",
                "max_grad_norm or noise_multiplier changed inside one logical batch",
                "Gradients clipped at one norm would be covered by noise for another",
                "step the scheduler only after an optimizer.step() that ended a logical batch",
            )

    def _current(self) -> _Batch:
        if self._batch is not None:
            return self._batch
        if not self._loops:
            raise AlignmentError(
                "PIA007",
                "a step was taken before any batch came out of the tracked loader",
                "Another loader was iterated, so the instances of the step are unknown",
                "iterate over the loader that make_private or attach returned",
            )
        raise AlignmentError(
            "PIA001",
            "a gradient was used without a fresh batch from the tracked loader",
            "The instances of this release are unknown, or were charged already for another one",
            SAFE_LOOP,
        )

    def _mechanism_now(self) -> tuple[float, float]:
        return (float(self.optimizer.noise_multiplier), float(self.optimizer.max_grad_norm))

    def clip(self, norms: NDArray[np.float64]) -> NDArray[np.float32]:
        """Factors for the batch in hand: (B,) float32. The contributions wait for :meth:`accept`.

        norms: (B,) upper bounds. Raises AlignmentError PIA003 for a wrong number of rows, PIA005 for a second
        backward pass, PIA006 for gradients that are not finite; nothing was accumulated then.
        """
        positions = self._current().positions
        if self._measured is not None:
            raise AlignmentError(
                "PIA005",
                "a second backward pass before optimizer.step()",
                "Gradients would be released without being recorded, or lost",
                SAFE_LOOP,
            )
        if len(norms) != len(positions):
            raise AlignmentError(
                "PIA003",
                f"{len(norms)} per-sample gradients for a batch of {len(positions)} instances",
                "Gradients cannot be attributed to instances",
                "pass the whole batch through the model: no filtering, repeating or reshaping of its first dimension",
            )
        bad = int(np.count_nonzero(~np.isfinite(norms)))
        if bad:
            raise AlignmentError(
                "PIA006",
                f"{bad} of {len(norms)} per-sample gradients are NaN or infinite",
                "The release would expose these instances, so nothing was added and nothing written",
                "remove or repair these instances or lower the learning rate; engine.abandon()",
            )
        mechanism = self._mechanism_now()
        clip_norm = np.float64(mechanism[1])
        limits = clip_norm if self.thresholds is None else np.minimum(self.thresholds[positions], clip_norm)
        factors, contributions = clip_factors(norms, limits)
        self._measured, self._mechanism = (positions, contributions), self._mechanism or mechanism
        return factors

    def check_clipped(self) -> None:
        """Ghost clipping: raise AlignmentError PIA005 when no backward pass of the returned criterion ran."""
        if self._measured is None:
            raise AlignmentError(
                "PIA005",
                "optimizer.step() without a backward pass of the criterion that make_private returned",
                "Gradients of an ordinary loss are not clipped per instance",
                "model, optimizer, criterion, loader = engine.make_private(...); criterion(model(x), y).backward()",
            )

    def accept(self) -> None:
        """The measured batch is in the clipped sum."""
        if self._measured is not None:
            self._pending.append(self._measured)
        self._batch, self._stale, self._measured, self._forwards = None, None, None, 0

    def record(self) -> None:
        """Write the step, before noise is added to the sum. Raises LedgerError, and then nothing may be released."""
        phase = self._phase_now()
        writer = self.writer
        if phase != self._phase:
            writer.append(phase)
            self._phase = phase
        writer.append(self._step())
        self._pending, self._mechanism = [], None
        self._until_sweep = max(0, self._until_sweep - 1)

    def _step(self) -> Step:
        positions = np.concatenate([p for p, _ in self._pending])
        contributions = np.concatenate([c for _, c in self._pending])
        if self.setting.sampling != "poisson":
            # A replacement sampler may draw an instance twice: its vectors add up in the release.
            positions, inverse = np.unique(positions, return_inverse=True)
            total = np.zeros(len(positions))
            np.add.at(total, inverse, contributions.astype(np.float64))
            contributions = round_up(total)
        return Step(positions=positions, contributions=contributions)

    def _phase_now(self) -> Phase:
        optimizer, setting = self.optimizer, self.setting
        groups = optimizer.param_groups
        lr, decay, momentum = (
            max(float(g.get(name, 0.0)) for g in groups) for name in ("lr", "weight_decay", "momentum")
        )
        noise_multiplier, clip_norm = self._mechanism_now()
        mean = optimizer.loss_reduction == "mean"
        return Phase(
            kind=setting.kind,
            sampling=setting.sampling,
            sample_rate=setting.sample_rate,
            noise_std=noise_multiplier * clip_norm,
            max_grad_norm=clip_norm,
            charging=setting.charging.name,
            denominator=float(optimizer.expected_batch_size) if mean else 1.0,
            learning_rate=lr,
            weight_decay=decay,
            momentum=momentum,
            optimizer=_optimizer_name(optimizer.original_optimizer),
            grad_sample_mode=setting.grad_sample_mode,
            plan_digest=setting.plan_digest,
        )

    def released(self) -> None:
        """Noise is in place: one update of the parameters may follow."""
        self._releasing = True

    def before_update(self, *_: Any) -> None:
        """Pre-hook of the wrapped optimizer. Raises AlignmentError PIA008, before the parameters move."""
        if not self._releasing:
            raise AlignmentError(
                "PIA008",
                "the wrapped optimizer was stepped without a recorded noisy release",
                "The parameters would move by gradients that carry no noise and are in no ledger",
                "call optimizer.step() of the returned optimizer, never optimizer.original_optimizer.step()",
            )
        self._releasing = False

    def accept_hook(self, hook: Callable[[DPOptimizer], None]) -> None:
        """Note the first step hook of a hand-built optimizer. Raises AlignmentError PIA004 for a second one."""
        if self._hook is not None:
            _refuse_hook()
        self._check_rate(hook)
        self._hook = hook

    def _check_rate(self, hook: Callable[[DPOptimizer], None] | None) -> None:
        assumed = (
            inspect.getclosurevars(hook).nonlocals.get("sample_rate") if inspect.isfunction(hook) else None
        )
        if isinstance(assumed, float) and assumed < self.setting.sample_rate * (1 - 1e-9):
            raise GuaranteeError(
                "PIA010",
                f"Opacus' accountant assumes sample rate {assumed}, the loader samples at {self.setting.sample_rate}",
                "Its epsilon would be too small",
                "accountant.get_optimizer_hook_fn(sample_rate=loader.batch_sampler.sample_rate)",
            )

    def abandon(self) -> None:
        """Drop a logical batch that is accumulated in part: nothing of it was released, so nothing is charged."""
        self._forget()
        optimizer = self.optimizer
        optimizer._step_skip_queue.clear()
        optimizer._is_last_step_skipped = False
        for p in optimizer.params:
            p.summed_grad = p.grad_sample = p.grad = None
            p._forward_counter = 0
        for module in self.module.modules():
            module.__dict__.pop("activations", None)
            module.__dict__.pop("max_batch_len", None)


def _recorded_thresholds(ledger: Ledger) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
    """Thresholds last stated as fixed, and those in force now: a resume leaves behind what was stated after it."""
    fixed = in_force = None
    steps = stated_at = 0
    for event in ledger.events():
        if isinstance(event, Thresholds):
            in_force, stated_at = event.values, steps
            fixed = event.values if event.source == "fixed" else fixed
        elif isinstance(event, Resume) and stated_at >= event.at_step:
            in_force = None
        steps += isinstance(event, Step)
    return fixed, in_force


def _broken(happened: str) -> None:
    raise AlignmentError(
        "PIA002",
        happened,
        "The release would be of a batch that nobody drew, or an instance could enter it twice",
        "step every physical batch of a logical batch; after break or an error call engine.abandon()",
    )


def _refuse_hook() -> None:
    raise AlignmentError(
        "PIA004",
        "attach_step_hook was called after the optimizer got its accountant",
        "Opacus keeps one hook only, so its own accountant would stay at epsilon 0",
        "remove that attach_step_hook call; use torch's register_step_post_hook on optimizer.original_optimizer",
    )


def _optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    """``"SGD"`` only when every parameter moves by the same plain rule; bounds that need the rule look for it."""
    name = type(optimizer).__name__
    rules = {(float(g["lr"]), float(g.get("weight_decay", 0.0))) for g in optimizer.param_groups}
    if len(rules) > 1:
        return f"{name} with different groups"
    if type(optimizer) is torch.optim.SGD and any(g.get("maximize", False) for g in optimizer.param_groups):
        return "SGD maximizing"
    return name if type(optimizer) is torch.optim.SGD or name != "SGD" else "a subclass of SGD"


def _addresses(content: Any) -> set[int]:
    """Addresses of the tensors inside a batch."""
    if isinstance(content, torch.Tensor):
        return {content.data_ptr()} if content.numel() else set()
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, (list, tuple)):
        return set().union(*(_addresses(item) for item in content)) if content else set()
    return set()
