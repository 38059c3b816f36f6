"""The facts of a tracked run on their way to the ledger: thresholds in force, mechanism, steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.optimizers import AdaClipDPOptimizer, DPOptimizer

from per_instance_accountant.accounting.filter import PrivacyFilter
from per_instance_accountant.accounting.rules import (
    ChargingRule,
    FixedThresholds,
    LastSeen,
    Sweep,
    Unamplified,
)
from per_instance_accountant.accounting.running import RunningLoss
from per_instance_accountant.accounting.spending import Spending
from per_instance_accountant.errors import BudgetExceeded, GuaranteeError, LedgerError
from per_instance_accountant.ledger import (
    Anchor,
    Drop,
    Event,
    LedgerWriter,
    Phase,
    Run,
    Step,
    Thresholds,
)
from per_instance_accountant.opacus_adapter.assumed_loss import AssumedLoss
from per_instance_accountant.opacus_adapter.budgets import adopt_budget, check_budget, not_admitted
from per_instance_accountant.opacus_adapter.clipping import round_up
from per_instance_accountant.opacus_adapter.deferring import Deferral, Due, Observation, write_due
from per_instance_accountant.opacus_adapter.mechanisms import group_rule, optimizer_name, recorded_thresholds
from per_instance_accountant.opacus_adapter.ranks import refuse_part


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is fixed for a tracked optimizer: how batches are drawn, how its steps are described and
    charged."""

    charging: ChargingRule
    sampling: str
    sample_rate: float
    grad_sample_mode: str
    kind: str = "train"
    plan_digest: str | None = None
    projection_radius: float | None = None
    positions: NDArray[np.int64] | None = None
    """Row of the loader's dataset -> dataset position of the run; None when they are the same."""
    budget: PrivacyFilter | None = None
    sampler: Any = None
    """The Poisson sampler, which must go on drawing as it does now; None for other loaders."""

    def drawn_at(self) -> float | None:
        """How often the sampler draws an instance now."""
        return None if self.sampler is None else float(self.sampler.sample_rate)


class Recorder:
    """Writes what one optimizer does. ``thresholds``: (N,) in force, or None when only max_grad_norm
    clips."""

    def __init__(
        self,
        *,
        optimizer: DPOptimizer,
        run: Run,
        ledger: str | Path | LedgerWriter | None,
        setting: Setting,
        thresholds: NDArray[np.float32] | None = None,
        sweep: Callable[[int], NDArray[np.float32]] | None = None,
        loss_assumed: bool = False,
    ) -> None:
        self.optimizer, self.run, self.setting, self.thresholds = optimizer, run, setting, thresholds
        self._sweep, self._until_sweep = sweep, 0
        self._drawn_at = setting.drawn_at()
        self.loss = AssumedLoss(loss_assumed)
        self.deferral = Deferral()
        self._denominator: float | None = None
        self.spending: Spending | None = None
        """What was spent of the budgets of a privacy filter; None without one."""
        self._running: RunningLoss | None = None
        self._stated: tuple[Any, ...] | None = None
        """What the last Phase was made of."""
        self._path = None if isinstance(ledger, LedgerWriter) else ledger
        self._writer: LedgerWriter | None = None
        # A mechanism that no ledger could describe is refused now, not after the first gradients.
        mechanism = self.mechanism()
        if setting.budget is not None:
            budgets = setting.budget.per_instance(run.num_instances, run.groups)
            setting.budget.stated(budgets, mechanism)
            check_budget(setting.budget, setting.charging, budgets)
        if isinstance(ledger, LedgerWriter):
            self._adopt(ledger)

    @property
    def writer(self) -> LedgerWriter:
        """The writer, created at first use. Raises LedgerError PIA045 when the path holds a ledger
        already."""
        writer = self._writer
        if writer is None:
            writer = self._open(LedgerWriter.create(self._path, self.run))
        return writer

    def _open(self, writer: LedgerWriter) -> LedgerWriter:
        try:
            self._adopt(writer)
        except BaseException:
            # Otherwise the lock would keep the right run out.
            writer.close()
            raise
        return writer

    def _adopt(self, writer: LedgerWriter) -> None:
        recorded = writer.ledger()
        if recorded.num_instances != self.run.num_instances:
            raise LedgerError(
                "PIA040",
                f"the ledger is about {recorded.num_instances} instances, not {self.run.num_instances}",
                "Positions would name other instances than the ones that were trained on",
                "load the data set that the ledger was written for, in the same order",
            )
        if (recorded.run.rank, recorded.run.world_size) != (self.run.rank, self.run.world_size):
            refuse_part(recorded.run, self.run.rank, self.run.world_size)
        self.spending, self._running = adopt_budget(writer, self.setting.budget, self.mechanism()), None
        fixed, in_force = recorded_thresholds(recorded)
        given = self.thresholds if self._sweep is None else None
        if fixed is not None and given is not None and not np.array_equal(fixed, given):
            raise LedgerError(
                "PIA045",
                "the thresholds given differ from the ones that the ledger recorded as fixed",
                "Thresholds that are changed later may depend on what was released",
                "pass the same FixedThresholds(thresholds=...) as at the start of the run",
            )
        if in_force is None and given is not None:
            self._append(writer, Thresholds(values=given, source="fixed"))
            in_force = given
        if in_force is None and isinstance(self.setting.charging, FixedThresholds):
            raise GuaranteeError(
                "PIA013",
                "FixedThresholds() for a ledger without thresholds in force",
                "Nobody would be clipped below max_grad_norm, but everybody charged for less",
                "FixedThresholds(thresholds=norm_bounds)",
            )
        if in_force is not None and isinstance(self.optimizer, AdaClipDPOptimizer):
            raise GuaranteeError(
                "PIA013",
                "adaptive clipping for a ledger with thresholds in force",
                "The count query costs more than a threshold says, and would not be charged",
                'make_private(clipping="flat"), or a new ledger',
            )
        self.thresholds, self._writer, self._stated, self._until_sweep = in_force, writer, None, 0

    def _append(self, writer: LedgerWriter, event: Event) -> None:
        self.drain()
        writer.append(event)
        for follower in (self.spending, self._running):
            if follower is not None:
                follower.take(event)

    def _promise(self, writer: LedgerWriter, event: Phase | Step, parts: Sequence[Observation] = ()) -> None:
        """As :meth:`_append`, for contributions that are still on a device."""
        finish = partial(self._step, clip_norm=float(self.optimizer.max_grad_norm)) if parts else None
        number = writer.promise(event)
        self.deferral.add(Due(number, event, parts, finish))
        if self.spending is not None:
            self.spending.take(event)  # By thresholds: other rules are not deferred under a filter.

    def _write_due(self, due: list[Due], values: NDArray[np.float32]) -> None:
        def follow(event: Event) -> None:
            if self._running is not None:
                self._running.take(event)

        write_due(self.writer, due, values, follow)

    def defers(self, device: torch.device) -> bool:
        """Whether the contributions of a batch on this device may come after its release: nothing that this
        process decides depends on them."""
        setting = self.setting
        return (
            device.type in self.deferral.devices
            and getattr(self.optimizer, "can_defer", False)
            and setting.kind == "train"
            and not self.loss.in_doubt
            and not (self.spending is not None and isinstance(setting.charging, Unamplified))
        )

    def drain(self) -> None:
        """Write all contributions that are still on a device, waiting for it."""
        if not self.deferral.idle:
            self.deferral.drain(self._write_due)

    def flush(self) -> None:
        """Write everything, and force it to the device of the ledger. Raises AlignmentError PIA006 then,
        if the last steps were void."""
        self.drain()
        self.writer.flush()
        self.deferral.check()

    @property
    def running(self) -> RunningLoss:
        """Running totals, which follow every event from the first time on that they were asked for. Raises
        GuaranteeError PIA117 on one of several ranks where they depend on whom the others drew."""
        writer = self.writer
        self.drain()
        if self._running is None:
            if isinstance(self.setting.charging, (Unamplified, LastSeen)):
                writer.ledger().require_whole()
            self._running = RunningLoss.of(writer.ledger())
        return self._running

    def enforce_budgets(self) -> None:
        """Drop whoever the next step would take beyond the budget, or raise BudgetExceeded PIA020
        before it.

        A ledger that states a filter drops, whoever continues it. Steps of unlearning are not filtered.
        """
        if self.setting.kind != "train" or (self.spending is None and self.setting.budget is None):
            return
        writer, inputs = self.writer, self._inputs()
        if self.spending is None:
            return
        leaving = self.spending.exceeding(None if inputs == self._stated else self.mechanism())
        if not leaving.size:
            return
        if self.setting.budget is not None and self.setting.budget.on_spent != "drop":
            raise BudgetExceeded(
                "PIA020",
                f"the next step would exceed the budget of {leaving.size} instances",
                "It was not taken: every budget holds for all steps so far",
                'PrivacyFilter(on_spent="drop") to train on without them',
            )
        self._append(writer, Drop(positions=leaving))

    @property
    def ends_quietly(self) -> bool:
        """Whether a spent budget ends the loop over the loader instead of raising."""
        return self.setting.budget is not None and self.setting.budget.on_spent == "stop"

    def resume(self, anchor: Anchor) -> None:
        """Continue the ledger from a checkpoint taken at ``anchor``; later steps of the ledger stay
        charged.

        Raises LedgerError PIA040 when ledger and checkpoint do not belong together.
        """
        current = self._writer
        if current is not None and current.anchor == anchor:
            return
        if self._path is None:
            raise LedgerError(
                "PIA040",
                f"the checkpoint belongs to a ledger of {anchor.steps} steps, this ledger is kept in memory",
                "The steps before the checkpoint would be missing from every loss",
                'PrivacyEngine(ledger="runs/a") before training and when resuming',
            )
        self.close()
        self._writer = None
        self._open(LedgerWriter.resume(self._path, anchor, session=self.run.run_id))

    def close(self) -> None:
        """Flush and end the ledger; later steps raise LedgerError PIA044."""
        if self._writer is not None:
            try:
                self.drain()
            finally:
                self._writer.close()

    def limits(
        self, positions: NDArray[np.int64], clip_norm: float, taken: Sequence[Observation]
    ) -> NDArray[np.float64]:
        """(B,) norms at which instances are clipped now; taken: earlier parts of the logical batch.

        In float64: float32 would round a limit up beyond the clip norm that the noise is made for.
        """
        limits = np.full(len(positions), clip_norm)
        if self.thresholds is not None:
            limits = np.minimum(limits, self.thresholds[positions].astype(np.float64))
        if self.spending is not None:
            limits[not_admitted(self.spending, positions, (part.positions for part in taken))] = 0.0
        return limits

    def sweep_if_due(self, limit: int) -> None:
        """Measure all norms and state new thresholds, when the next step is one of Sweep's public
        steps."""
        rule = self.setting.charging
        if self._sweep is None or self._until_sweep or not isinstance(rule, Sweep):
            return
        writer = self.writer
        norms = self._sweep(limit).astype(np.float64)
        self.loss.swept(norms)
        bounds = round_up(np.minimum(norms * rule.slack, float(self.optimizer.max_grad_norm)))
        values = np.zeros(self.run.num_instances, dtype=np.float32)
        values[slice(None) if self.setting.positions is None else self.setting.positions] = bounds
        self._append(writer, Thresholds(values=values, source="sweep"))
        self.thresholds, self._until_sweep = values, rule.every

    def record(self, observations: Sequence[Observation]) -> None:
        """Write one step made of these parts, before noise is added.

        Raises LedgerError, and UsageError for a mechanism without a bound; then nothing may be released.
        """
        self._refuse_changes()
        clip_norm = float(self.optimizer.max_grad_norm)
        step, writer, inputs = self._step(observations, clip_norm), self.writer, self._inputs()
        later = any(part.measured is not None for part in observations)
        if later:
            self.deferral.advance(self._write_due)
        else:
            self.drain()
        self.deferral.check()
        if inputs != self._stated:
            (self._promise if later else self._append)(writer, self.mechanism())
            self._stated = inputs
        if later:
            self._promise(writer, step, observations)
        else:
            self._append(writer, step)
        self.loss.moved()
        self._denominator = self.optimizer.expected_batch_size
        self._until_sweep = max(0, self._until_sweep - 1)

    def _refuse_changes(self) -> None:
        """Batches may be on their way from workers, so nobody knows which of them a new rate drew."""
        if (drawn_at := self.setting.drawn_at()) != self._drawn_at:
            raise GuaranteeError(
                "PIA010",
                f"the sample rate was changed from {self._drawn_at} to {drawn_at}",
                "Steps would be charged at a rate they were not drawn at",
                "make_private with a new loader and engine.load_checkpoint for another rate",
            )
        if self._denominator not in (None, self.optimizer.expected_batch_size):
            raise GuaranteeError(
                "PIA092",
                "expected_batch_size was changed during training",
                "If it follows the batches that were drawn, every step tells how many there were, for free",
                "change the learning rate instead, or make_private again and engine.load_checkpoint",
            )

    def _step(self, observations: Sequence[Observation], clip_norm: float) -> Step:
        positions, contributions, _ = observations[0]
        if len(observations) > 1:
            positions = np.concatenate([part.positions for part in observations])
            contributions = np.concatenate([part.contributions for part in observations])
        if self.setting.sampling != "poisson":
            # A replacement sampler may draw an instance m times. Clipping allows it m clip norms then,
            # whatever its gradients are now, and the worst case must know m. A filter lets it in once.
            positions, inverse = np.unique(positions, return_inverse=True)
            total = np.bincount(inverse, contributions.astype(np.float64), len(positions)).astype(np.float64)
            drawn = np.bincount(inverse, minlength=len(positions))
            repeated = drawn * clip_norm
            several = (drawn > 1) & (self.spending is None)
            contributions = round_up(np.where(several, np.maximum(total, repeated), total))
        return Step(positions=positions, contributions=contributions)

    def _inputs(self) -> tuple[Any, ...]:
        """All numbers of the optimizer that :meth:`mechanism` reads."""
        optimizer = self.optimizer
        denominator = 1.0
        if optimizer.loss_reduction == "mean":
            # Opacus states the expected batch of one process, and divides by their number as well.
            denominator = optimizer.expected_batch_size * getattr(optimizer, "world_size", 1)
        numbers = (optimizer.noise_multiplier, optimizer.max_grad_norm, denominator)
        return (*map(float, numbers), *(group_rule(group) for group in optimizer.param_groups))

    def mechanism(self) -> Phase:
        """What one step of the optimizer does now. Raises UsageError PIA070 when it has no bound."""
        setting = self.setting
        noise_multiplier, clip_norm, denominator, *rules = self._inputs()
        learning_rate, weight_decay, momentum, _ = map(max, zip(*rules, strict=True))
        return Phase(
            kind=setting.kind,
            sampling=setting.sampling,
            sample_rate=setting.sample_rate,
            noise_std=noise_multiplier * clip_norm,
            max_grad_norm=clip_norm,
            charging=setting.charging.name,
            denominator=denominator,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            momentum=momentum,
            optimizer=optimizer_name(self.optimizer, rules),
            grad_sample_mode=setting.grad_sample_mode,
            plan_digest=setting.plan_digest,
            projection_radius=setting.projection_radius,
        )
