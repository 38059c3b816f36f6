"""The tracker: knows which instances the next step uses and checks that the training loop keeps to it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer

from per_instance_accountant.errors import AlignmentError, GuaranteeError, UnsupportedError
from per_instance_accountant.ledger import Ledger
from per_instance_accountant.opacus_adapter.checkpoints import NoiseSessions
from per_instance_accountant.opacus_adapter.clipping import clip_factors
from per_instance_accountant.opacus_adapter.deferring import Observation
from per_instance_accountant.opacus_adapter.drawing import DrawSessions
from per_instance_accountant.opacus_adapter.layers import check_statistics, normalising_layers
from per_instance_accountant.opacus_adapter.loader import Delivery
from per_instance_accountant.opacus_adapter.recording import Recorder
from per_instance_accountant.opacus_adapter.verifying import Verifier
from per_instance_accountant.opacus_adapter.watching import addresses, broken, refuse_hook

SAFE_LOOP = "zero_grad, one forward, one backward, one optimizer.step() for each batch of the returned loader"
SWEEP_BATCH = 256

LOOK_BACK = 16
"""How many unused batches are remembered, to notice a loop that reads further ahead than it trains."""


class Tracker:
    """State of one tracked optimizer. Made by :func:`attach`; read :attr:`ledger`, call :meth:`abandon`.

    Every guard runs before anything is accumulated, written or released, and an error changes nothing.
    """

    def __init__(
        self, *, optimizer: DPOptimizer, module: torch.nn.Module, recorder: Recorder, verifier: Verifier
    ) -> None:
        self.optimizer, self.module, self.recorder = optimizer, module, recorder
        self.verifier, self._normalising = verifier, normalising_layers(module)
        self.sessions = NoiseSessions()
        self.draws = DrawSessions(recorder.setting.sampler, recorder.setting.sample_rate)
        self._hook = optimizer.step_hook
        self._check_rate(self._hook)
        self._loops = 0
        self._open: tuple[int, int] | None = None
        """Loop and number of the logical batch that the last batch belongs to."""
        self._skipped: tuple[int, int] | None = None
        self._releasing = False
        self._forget()

    def _forget(self) -> None:
        self._batch: Delivery | None = None
        self._stale: list[Any] = []
        """Batches handed out and not used since the last one that was."""
        self._forwards = 0
        self._mechanism: tuple[float, ...] | None = None
        self._measured: Observation | None = None
        self._pending: list[Observation] = []

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(
            "PIA060",
            "a tracked optimizer or its tracker was copied or pickled",
            "Two optimizers would write steps into one ledger",
            "optimizer.state_dict() for a copy of its state",
        )

    @property
    def ledger(self) -> Ledger:
        """What is written so far; waits for an accelerator that has not delivered all of it."""
        self.recorder.drain()
        return self.recorder.writer.ledger()

    @property
    def batch_is_empty(self) -> bool:
        """Whether the batch in hand has no instances."""
        return self._batch is not None and not len(self._batch.rows)

    @property
    def batch_size(self) -> int:
        """Rows of the batch in hand. Raises AlignmentError PIA001, PIA007 when there is none."""
        return len(self._current().rows)

    @property
    def watches_forward(self) -> bool:
        """Whether the gradients come from forward passes of the module; not where the user writes them."""
        return self.recorder.setting.grad_sample_mode != "no_op"

    @property
    def ends_quietly(self) -> bool:
        """Whether a spent budget ends the loop over the loader instead of raising."""
        return self.recorder.ends_quietly

    @property
    def holds_part(self) -> bool:
        """Whether the model has seen a part of a logical batch that is not its last and was not stepped."""
        batch = self._batch
        return batch is not None and not batch.part.last and self._forwards > 0

    def close(self) -> None:
        """Flush and end the ledger. Raises AlignmentError PIA002 inside a logical batch."""
        self.check_boundary()
        self.recorder.close()

    # ------------------------------------------------------------------------------------------------ loader

    def check_optimizer(self, optimizer: DPOptimizer) -> None:
        """Raise UnsupportedError PIA060 when the loader is about to be split for another optimizer."""
        if optimizer is not self.optimizer:
            raise UnsupportedError(
                "PIA060",
                "BatchMemoryManager was given an optimizer that does not belong to its loader",
                "Steps of one optimizer would be recorded with batches of the other",
                "BatchMemoryManager(data_loader=loader, optimizer=optimizer, ...), both from one call",
            )

    def check_boundary(self) -> None:
        """Raise AlignmentError PIA002 when part of a logical batch is accumulated and not released, PIA006
        when a device has made the last steps void."""
        if self._pending:
            broken("a logical batch is accumulated in part, and its last part was not stepped")
        self.recorder.drain()
        self.recorder.deferral.check()

    def open_loop(self) -> int:
        """A loop over the loader begins: its number. Raises AlignmentError PIA002 inside a logical batch,
        GuaranteeError PIA091 for draws that were used before."""
        self.check_boundary()
        self.draws.begin(self._loops + 1)
        self._loops += 1
        return self._loops

    def begin(self, batch: Delivery) -> None:
        """The user receives a batch. Raises AlignmentError PIA002 when that breaks a logical batch apart."""
        key = (batch.loop, batch.part.logical)
        if self._batch is not None:
            self._discard(self._batch)
        if self._pending and batch.part.first:
            broken("a new logical batch began before the last part of the one before was stepped")
        if not batch.part.first and key != self._open:
            broken("the parts of a logical batch did not arrive one after the other")
        if batch.part.first:
            self._sweep(min(batch.limit or SWEEP_BATCH, SWEEP_BATCH))
            self.recorder.enforce_budgets()
        self._batch, self._open = batch, key
        self.verifier.received(batch.content)
        self.optimizer._step_skip_queue[:] = [] if batch.part.last else [True]

    def _discard(self, batch: Delivery) -> None:
        if self._pending:
            broken("a part of a logical batch was skipped after another part had been accumulated")
        self._skipped = (batch.loop, batch.part.logical)
        self._stale = [*self._stale[-LOOK_BACK:], batch.content]
        self._batch, self._measured = None, None
        # A forward pass whose backward pass ran leaves nothing behind; one without spoils the next batch.
        if not any(getattr(p, "_forward_counter", 0) for p in self.optimizer.params):
            self._forwards = 0

    def _sweep(self, limit: int) -> None:
        stale, self._stale = self._stale, []
        forwards = self._forwards
        try:
            self.recorder.sweep_if_due(limit)
        finally:
            self._stale, self._forwards = stale, forwards

    # --------------------------------------------------------------------------------------------- optimizer

    def count_forward(self, module: torch.nn.Module, inputs: Any) -> None:
        """Counts the forward passes that leave per-sample gradients behind. Raises AlignmentError PIA007."""
        check_statistics(self._normalising)
        if self.verifier.running:
            return
        if module.training and torch.is_grad_enabled():
            if self._stale:
                self._check_identity(inputs)
            self._forwards += 1
            if self.verifier.how != "off":
                self.verifier.before_forward()

    def _check_identity(self, inputs: Any) -> None:
        mine = addresses(self._batch.content) if self._batch else set()
        if (addresses(inputs) - mine) & addresses(self._stale):
            raise AlignmentError(
                "PIA007",
                "the model was given a batch after a later batch had been read",
                "The loop reads batches ahead, so the step would be charged to other instances",
                "iterate over the returned loader directly, one batch for each step",
            )

    def check_loop(self) -> None:
        """All guards that need no gradient. Raises AlignmentError, or UnsupportedError for a GradScaler."""
        self.recorder.deferral.check()
        batch, optimizer = self._current(), self.optimizer
        if self._skipped == (batch.loop, batch.part.logical):
            broken("a part of a logical batch was stepped after another part had been skipped")
        if optimizer._step_skip_queue != ([] if batch.part.last else [True]):
            broken("signal_skip_step was called by hand", "use BatchMemoryManager for larger logical batches")
        if not self._pending and optimizer.holds_sum:
            broken(
                "the clipped sum of an earlier batch is still on the parameters",
                "optimizer.zero_grad() before every backward pass (model.zero_grad() is not enough)",
            )
        if optimizer.step_hook is not self._hook:
            refuse_hook()
        if self._forwards != 1 and self.watches_forward:
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
        if self._mechanism is not None and self._mechanism != self.optimizer.mechanism_now:
            raise AlignmentError(
                "PIA009",
                "max_grad_norm or noise_multiplier changed inside one logical batch",
                "Gradients clipped at one norm would be covered by noise for another",
                "step the scheduler only after an optimizer.step() that ended a logical batch",
            )

    def _current(self) -> Delivery:
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
            "gradients were used without a fresh batch from the tracked loader",
            "The instances of this release are unknown, or were charged already for another one",
            SAFE_LOOP,
        )

    def clip(self, norms: NDArray[np.float64]) -> NDArray[np.float32]:
        """Factors for the batch in hand: (B,) float32. The contributions wait for :meth:`accept`.

        norms: (B,) upper bounds. Raises AlignmentError PIA003 for a wrong number of rows, PIA005 for a second
        backward pass, PIA006 for gradients that are not finite.
        """
        self._check_rows(len(norms))
        if len(norms) and not norms.max() < np.inf:  # So written that NaN is not missed.
            bad = int(np.count_nonzero(~np.isfinite(norms)))
            raise AlignmentError(
                "PIA006",
                f"{bad} of {len(norms)} per-sample gradients are NaN or infinite",
                "The release would expose these instances, so nothing was added and nothing written",
                "remove or repair these instances or lower the learning rate; engine.abandon()",
            )
        batch = self._current()
        self.verifier.check(norms)
        self.recorder.loss.compare(batch.rows, norms, first=batch.part.first, last=batch.part.last)
        positions, limits, mechanism = self._admit()
        factors, contributions = clip_factors(norms, limits)
        contributions = self.optimizer.charged(contributions, limits)
        self._measured = Observation(positions, contributions)
        self._mechanism = mechanism
        return factors

    def defers(self, device: torch.device) -> bool:
        """Whether the norms of the batch in hand are to stay on this device: see :meth:`clip_there`."""
        return self.verifier.how == "off" and self.recorder.defers(device)

    def clip_there(self, norms: torch.Tensor) -> torch.Tensor:
        """As :meth:`clip`, for norms (B,) float64 on a device that nobody waits for. Where one of them is not
        finite, the device makes the release void, and PIA006 follows."""
        self._check_rows(len(norms))
        positions, limits, mechanism = self._admit()
        factors, self._measured = self.recorder.deferral.clip(norms, positions, limits)
        self._mechanism = mechanism
        return factors

    def _check_rows(self, count: int) -> None:
        rows = self._current().rows
        if self._measured is not None:
            raise AlignmentError(
                "PIA005",
                "a second backward pass before optimizer.step()",
                "Gradients would be released without being recorded, or lost",
                SAFE_LOOP,
            )
        if count != len(rows):
            raise AlignmentError(
                "PIA003",
                f"{count} per-sample gradients for a batch of {len(rows)} instances",
                "Gradients cannot be attributed to instances",
                "model(x) with the whole x: no filtering, repeating or reshaping of its first dimension",
            )

    def _admit(self) -> tuple[NDArray[np.int64], NDArray[np.float64], tuple[float, ...]]:
        """Positions of the batch in hand, (B,) norms at which they are clipped, and the mechanism."""
        rows, mapping = self._current().rows, self.recorder.setting.positions
        positions = rows if mapping is None else mapping[rows]
        mechanism = self.optimizer.mechanism_now
        if self._mechanism is None:
            # Again, because noise or clip norm may have changed since the batch was handed out.
            self.recorder.enforce_budgets()
        limits = self.recorder.limits(positions, mechanism[1], self._pending)
        return positions, limits, self._mechanism or mechanism

    def check_clipped(self) -> None:
        """Ghost clipping: raise AlignmentError PIA005 when no backward pass of the returned criterion ran."""
        if self._measured is None:
            raise AlignmentError(
                "PIA005",
                "optimizer.step() without a backward pass of the criterion that make_private returned",
                "Gradients of an ordinary loss are not clipped per instance",
                "model, optimizer, criterion, loader = engine.make_private(...); use this criterion",
            )

    def accept(self) -> None:
        """The measured batch is in the clipped sum."""
        if self._measured is not None:
            self._pending.append(self._measured)
        self._batch, self._stale, self._measured, self._forwards = None, [], None, 0

    def record(self) -> None:
        """Write the step, before noise is added. Raises LedgerError, and then nothing may be released."""
        self.recorder.record(self._pending)
        self._pending, self._mechanism = [], None
        self.draws.use(self._open[0] if self._open else 0)

    def released(self) -> None:
        """Noise is in place: one update of the parameters may follow."""
        self._releasing = True

    def before_update(self, *_: Any) -> None:
        """Pre-hook of the wrapped optimizer. Raises AlignmentError PIA008 before the parameters move."""
        if not self._releasing:
            raise AlignmentError(
                "PIA008",
                "the wrapped optimizer was stepped without a recorded noisy release",
                "The parameters would move by gradients that carry no noise and are in no ledger",
                "call optimizer.step() of the returned optimizer, never optimizer.original_optimizer.step()",
            )
        self._releasing = False
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if not p.requires_grad:
                    p.grad = None  # Frozen after the backward pass: no release has it, and it has no noise.

    def accept_hook(self, hook: Callable[[DPOptimizer], None]) -> None:
        """Note the first step hook of a hand-built optimizer. Raises AlignmentError PIA004 for a second."""
        if self._hook is not None:
            refuse_hook()
        self._check_rate(hook)
        self._hook = hook

    def _check_rate(self, hook: Callable[[DPOptimizer], None] | None) -> None:
        setting = self.recorder.setting
        closure = inspect.getclosurevars(hook).nonlocals if inspect.isfunction(hook) else {}
        assumed, drawn_at = closure.get("sample_rate"), setting.drawn_at()
        if drawn_at is not None and isinstance(assumed, float) and assumed < drawn_at * (1 - 1e-9):
            raise GuaranteeError(
                "PIA010",
                f"Opacus' accountant assumes sample rate {assumed}, the loader samples at {drawn_at}",
                "Its epsilon would be too small",
                "accountant.get_optimizer_hook_fn(sample_rate=loader.batch_sampler.sample_rate)",
            )

    def abandon(self) -> None:
        """Drop a partly accumulated logical batch: nothing of it was released, so nothing is charged."""
        self.recorder.drain()
        self.recorder.deferral.forget()
        self._forget()
        self.optimizer.forget()
        for module in self.module.modules():
            module.__dict__.pop("activations", None)
            module.__dict__.pop("max_batch_len", None)
        for p in self.module.parameters():
            # Else Opacus adds the rows of the next backward pass to what an unfinished one left.
            vars(p).pop("_current_grad_sample", None)
            vars(p).update(grad_sample=None, _norm_sample=None, _forward_counter=0)
