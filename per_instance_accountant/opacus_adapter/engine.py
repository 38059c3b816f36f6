"""The two entry points: ``attach`` for a hand-built DPOptimizer, and a drop-in ``PrivacyEngine`` on
top of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from opacus.grad_sample import GradSampleModuleExpandedWeights
from opacus.optimizers import DPOptimizer
from torch.utils.data import DataLoader

from per_instance_accountant.accounting.filter import PrivacyFilter
from per_instance_accountant.accounting.rules import ChargingRule
from per_instance_accountant.accounting.spending import Spending
from per_instance_accountant.errors import UsageError
from per_instance_accountant.ledger import Ledger, LedgerWriter
from per_instance_accountant.opacus_adapter import configuration as check
from per_instance_accountant.opacus_adapter.calibration import calibrate, split_options
from per_instance_accountant.opacus_adapter.capture import Tracker
from per_instance_accountant.opacus_adapter.checkpoints import (
    CHECKPOINT_KEY,
    load_plain,
    plain_mechanism,
    read_anchor,
    stored_again,
)
from per_instance_accountant.opacus_adapter.expanded import TrackedExpandedWeights
from per_instance_accountant.opacus_adapter.ghost import install_ghost
from per_instance_accountant.opacus_adapter.layers import check_layers
from per_instance_accountant.opacus_adapter.loader import TrackedLoader, check_loader, track_loader
from per_instance_accountant.opacus_adapter.optimizers import TRACKED, install
from per_instance_accountant.opacus_adapter.rank_steps import (
    agree_on_run,
    join_ranks,
    part_loader,
    part_of_run,
    prepare_sweep,
)
from per_instance_accountant.opacus_adapter.ranks import SHARDED
from per_instance_accountant.opacus_adapter.recording import Recorder
from per_instance_accountant.opacus_adapter.secure import SecureEngine
from per_instance_accountant.opacus_adapter.sharding import prepare_sharded
from per_instance_accountant.opacus_adapter.verifying import Verifier, Verify
from per_instance_accountant.opacus_adapter.watching import ForwardWatch


def attach(
    optimizer: DPOptimizer,
    data_loader: DataLoader[Any],
    *,
    module: Any = None,
    ledger: str | Path | LedgerWriter | None = None,
    charging: ChargingRule | None = None,
    ids: ArrayLike | None = None,
    groups: Mapping[str, ArrayLike] | None = None,
    assumptions: Mapping[str, Any] | None = None,
    criterion: Callable[..., Any] | None = None,
    positions: ArrayLike | None = None,
    kind: str = "train",
    plan_digest: str | None = None,
    projection_radius: float | None = None,
    filter: PrivacyFilter | None = None,
    verify: Verify = "off",
    rank_timeout: float = 600.0,
) -> tuple[Tracker, TrackedLoader]:
    """Track a hand-built DPOptimizer: returns the tracker and the loader to iterate over from now on.

    optimizer: a DPOptimizer with flat, per-layer or adaptive clipping, or DPOptimizerFastGradientClipping
    (ghost); it is changed in place. module: its GradSampleModule or GradSampleHooks; found by itself
    when it is alive. ledger: a directory for a new ledger, an open :class:`LedgerWriter` to append
    to, or None for memory. Thresholds that an open ledger recorded last stay in force. charging:
    default WorstCase for a Poisson loader, Unamplified for any other. positions: (rows of the
    loader's dataset,) dataset positions in the run, needed when the loader is over a part of the
    run's data set. criterion: the loss that the sweeps of ``Sweep`` measure, default cross entropy.
    filter: budgets that are enforced before every step. verify: ``"first_step"`` or ``"every_step"``
    compares norms of some rows with what reverse differentiation of the loader's own rows and
    ``criterion`` gives, and raises AlignmentError PIA090, for a loop that no count can check.
    rank_timeout: seconds that one of several processes waits for the others (docs/several_processes.md).
    kind, plan_digest, projection_radius: see
    :class:`~per_instance_accountant.ledger.records.Phase`; projecting is the caller's.

    Raises UnsupportedError PIA060, GuaranteeError PIA010 for a rule that the loader's sampling does not
    support, UsageError for arguments that do not fit the data set, LedgerError PIA040 for another
    ledger.
    """
    check.check_optimizer(optimizer)
    check.check_rule(TRACKED[type(optimizer)].clipping, charging)
    module = check.find_module(optimizer) if module is None else module
    core = check.check_module(module, optimizer)
    ranks = join_ranks(optimizer, module, rank_timeout)
    data_loader = data_loader if ranks is None else part_loader(data_loader, ranks)
    prepare_sharded(optimizer, module, verify)
    check_loader(data_loader)
    appended = ledger.run if isinstance(ledger, LedgerWriter) else None
    run = check.describe_run(data_loader, ids, groups, assumptions, appended)
    if ranks is not None:
        run, ledger = part_of_run(run, ranks, ledger)
    rows = len(data_loader.dataset)  # type: ignore[arg-type]
    mapping = check.check_positions(positions, rows, run.num_instances)
    setting = replace(
        check.describe_setting(
            data_loader, charging, module, kind, plan_digest, mapping, secure=optimizer.secure_mode
        ),
        projection_radius=projection_radius,
        budget=filter,
    )
    recorder = Recorder(
        optimizer=optimizer,
        run=run,
        ledger=ledger,
        setting=setting,
        thresholds=check.fixed_thresholds(setting.charging, run.num_instances, recorded=appended is not None),
        sweep=prepare_sweep(ranks, setting.charging, module, optimizer, data_loader, criterion),
        loss_assumed=criterion is None,
    )
    verifier = Verifier(
        module=module,
        core=core,
        optimizer=optimizer,
        criterion=criterion or torch.nn.CrossEntropyLoss(reduction=optimizer.loss_reduction),
        how=check.check_verify(verify),
        ghost=isinstance(module, check.GHOST_MODULES),
    )
    if ranks is not None:
        agree_on_run(ranks, recorder)
        optimizer.ranks = ranks
    tracker = Tracker(optimizer=optimizer, module=core, recorder=recorder, verifier=verifier)
    loader = track_loader(data_loader, tracker)
    install(optimizer, tracker)
    if isinstance(module, check.GHOST_MODULES):
        install_ghost(module, tracker)
    elif type(module) is GradSampleModuleExpandedWeights:
        module.__class__ = TrackedExpandedWeights
    if tracker.watches_forward:
        core.register_forward_pre_hook(ForwardWatch(tracker), with_kwargs=True)
    return tracker, loader


class PrivacyEngine(SecureEngine):
    """Drop-in for :class:`opacus.PrivacyEngine` that also records every instance's part in every step.

    accountant: as in Opacus. secure_mode: noise and draws from the operating system's generator, without
    torchcsprng; noise is added in float64. ledger: directory of the ledger, or None to keep the facts in
    memory. charging, ids, groups, assumptions, filter, verify, rank_timeout: see
    :func:`attach`.

    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> model, examples = torch.nn.Linear(2, 1), TensorDataset(torch.ones(8, 2), torch.ones(8, 1))
    >>> engine = PrivacyEngine(accountant="rdp")
    >>> model, optimizer, loader = engine.make_private(
    ...     module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    ...     data_loader=DataLoader(examples, batch_size=4), noise_multiplier=1.0, max_grad_norm=1.0)
    >>> for x, y in loader:
    ...     optimizer.zero_grad()
    ...     torch.nn.functional.mse_loss(model(x), y).backward()
    ...     optimizer.step()
    >>> engine.ledger.num_steps
    2
    """

    def __init__(
        self,
        *,
        accountant: str = "prv",
        secure_mode: bool = False,
        ledger: str | Path | None = None,
        charging: ChargingRule | None = None,
        ids: ArrayLike | None = None,
        groups: Mapping[str, ArrayLike] | None = None,
        assumptions: Mapping[str, Any] | None = None,
        filter: PrivacyFilter | None = None,
        verify: Verify = "off",
        rank_timeout: float = 600.0,
    ) -> None:
        super().__init__(accountant=accountant, secure_mode=secure_mode)
        self._tracking: dict[str, Any] = {
            "ledger": ledger,
            "charging": charging,
            "ids": ids,
            "groups": groups,
            "assumptions": assumptions,
            "filter": filter,
            "rank_timeout": rank_timeout,
            "verify": check.check_verify(verify),
        }
        self._tracker: Tracker | None = None

    @property
    def tracker(self) -> Tracker:
        """The tracker. Raises UsageError PIA070 before make_private."""
        if self._tracker is None:
            raise UsageError(
                "PIA070",
                "the engine tracks nothing yet",
                "There are no facts about any step",
                "model, optimizer, loader = engine.make_private(...) first",
            )
        return self._tracker

    @property
    def ledger(self) -> Ledger:
        """The facts recorded so far."""
        return self.tracker.ledger

    def metrics(self, delta: float) -> dict[str, float]:
        """Running epsilons as one flat dictionary for any logger: ``privacy/epsilon_worst`` (CERTIFIED),
        ``_max``, ``_p50``, ``_p90``, ``_p99`` (on the basis of the charging rule), ``privacy/steps``, and
        with a filter ``privacy/dropped``. Upper bounds, as private as the data. From the first call on every
        step costs O(batch) more.

        Raises UsageError PIA070 for an impossible delta or before make_private.
        """
        recorder = self.tracker.recorder
        values = recorder.running.metrics(delta)
        if recorder.spending is not None:
            values["privacy/dropped"] = float(recorder.spending.dropped.sum())
        return values

    @property
    def _spending(self) -> Spending:
        recorder = self.tracker.recorder
        if recorder.setting.budget is not None:
            _ = recorder.writer
        if recorder.spending is None:
            raise UsageError(
                "PIA070",
                "the engine has no privacy filter",
                "There are no budgets to compare with",
                "PrivacyEngine(filter=PrivacyFilter(budget=8.0, delta=1e-5))",
            )
        return recorder.spending

    @property
    def spent(self) -> NDArray[np.float64]:
        """(N,) what the steps so far cost each instance, rounded up, in the unit of the filter's
        sums: nats at the instance's order, or squared ratios for a Gaussian filter. As private as
        the data."""
        return self._spending.spent()

    @property
    def remaining(self) -> NDArray[np.float64]:
        """(N,) what is left of the budgets, in the unit of :attr:`spent`, not below 0. As private as
        the data."""
        spending = self._spending
        return np.maximum(spending.filter.budgets - spending.spent(), 0.0)

    @property
    def dropped(self) -> NDArray[np.bool_]:
        """(N,) who left training because the next step would have exceeded the budget."""
        return self._spending.dropped.copy()

    @property
    def would_exceed(self) -> NDArray[np.bool_]:
        """(N,) whose budget the next step would exceed, at the present noise, clip norm and
        thresholds: those who leave before it, and those who left before. A sweep that is due may
        still change it."""
        spending = self._spending
        mask = spending.dropped.copy()
        mask[spending.exceeding(self.tracker.recorder.mechanism())] = True
        return mask

    def abandon(self) -> None:
        """Drop a partly accumulated logical batch after ``break`` or an error; it was not released or
        charged."""
        self.tracker.abandon()

    def close(self) -> None:
        """Flush and end the ledger. Raises AlignmentError PIA002 inside a logical batch."""
        self.tracker.close()

    def make_private(self, *, criterion: Any = None, **arguments: Any) -> Any:
        """As in Opacus, same arguments and same tuple; the loader must be iterated directly or through
        Opacus' BatchMemoryManager. criterion: the loss, cross entropy if none is given, as in
        Opacus. Ghost clipping and the sweeps of ``Sweep`` use it; for a loop with another loss an
        assumed one raises UsageError PIA071 before anything is released.

        Raises UnsupportedError PIA060 for configurations that are not accounted for, GuaranteeError
        PIA010 for a charging rule that the loader's sampling does not support, UsageError for
        arguments that do not fit.
        """
        self._check_arguments({"criterion": criterion, **arguments})
        if criterion is not None:
            arguments["criterion"] = criterion
        made = super().make_private(**arguments)
        module, optimizer, loader = made[0], made[1], made[-1]
        loss = made[2] if criterion is not None and len(made) == 4 else criterion
        self._tracker, tracked = attach(optimizer, loader, module=module, criterion=loss, **self._tracking)
        return (*made[:-1], tracked)

    def make_private_with_epsilon(
        self,
        *,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: float,
        **arguments: Any,
    ) -> Any:
        """As in Opacus, same arguments and same tuple; see :meth:`make_private`.

        After ``epochs`` passes over the returned loader ``get_epsilon(target_delta)`` is at most
        ``target_epsilon``, also where Opacus plans with another number of steps than its loader has. Raises
        GuaranteeError PIA010 without Poisson sampling, for which the noise would be calibrated.
        """
        options, arguments = split_options(self.accountant, arguments)
        noise = calibrate(
            data_loader,
            poisson=arguments.get("poisson_sampling", True),
            epochs=epochs,
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            accountant=self.accountant.mechanism(),
            **options,
        )
        return self.make_private(data_loader=data_loader, noise_multiplier=noise, **arguments)

    def _check_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Refuse before the model is changed what :func:`attach` would refuse after it."""
        if self._tracker is not None:
            check.refuse(
                "make_private was called twice on one engine", "PrivacyEngine(ledger=...) for each run"
            )
        mode, clipping = arguments.get("grad_sample_mode", "hooks"), arguments.get("clipping", "flat")
        if mode not in check.MODES:
            check.refuse(f"grad_sample_mode={mode!r}", 'make_private(grad_sample_mode="hooks")')
        if (mode == "ghost_fsdp") != isinstance(arguments.get("module"), SHARDED):
            check.refuse(
                f"grad_sample_mode={mode!r} with a {type(arguments.get('module')).__name__}",
                "make_private(module=FSDP2Wrapper(model), grad_sample_mode='ghost_fsdp')",
            )
        if mode == "ew" and not arguments.get("wrap_model", True):
            check.refuse("expanded weights without a wrapper that runs them", "wrap_model=True")
        check.check_clipping(mode, clipping, arguments, self._tracking["charging"])
        if arguments.get("rand_on_empty"):
            check.refuse(
                "rand_on_empty=True puts an invented instance into an empty batch", "rand_on_empty=False"
            )
        optimizer, loader = arguments.get("optimizer"), arguments.get("data_loader")
        if loader is not None:
            check_loader(loader)
            poisson = arguments.get("poisson_sampling", True) or check.is_poisson(loader)
            rule = check.choose_charging(self._tracking["charging"], poisson)
            check.describe_run(loader, *(self._tracking[name] for name in ("ids", "groups", "assumptions")))
            check.fixed_thresholds(rule, len(loader.dataset))
        if isinstance(optimizer, torch.optim.Optimizer):
            check.check_untracked(optimizer)
        if isinstance(arguments.get("module"), torch.nn.Module):
            check_layers(arguments["module"])

    def save_checkpoint(self, *, checkpoint_dict: dict[str, Any] | None = None, **arguments: Any) -> None:
        """As in Opacus; the file also says where in the ledger the model stands.

        Raises AlignmentError PIA002 inside a logical batch, LedgerError when the ledger cannot be
        written.
        """
        self.tracker.check_boundary()
        position = {
            "version": 1,
            "anchor": self.tracker.recorder.writer.anchor.to_dict(),
            "noise": self.tracker.sessions.state(),
            "draws": self.tracker.draws.state(),
            "max_grad_norm": float(self.tracker.optimizer.max_grad_norm),
        }
        with plain_mechanism(self.accountant):
            super().save_checkpoint(
                checkpoint_dict={**(checkpoint_dict or {}), CHECKPOINT_KEY: position}, **arguments
            )

    def load_checkpoint(
        self, *, path: Any, torch_load_kwargs: dict[str, Any] | None = None, **arguments: Any
    ) -> dict[str, Any]:
        """As in Opacus, but never runs code from the file, and continues the ledger where the checkpoint
        was taken.

        Steps that the ledger holds beyond the checkpoint stay charged. The first step after it raises
        GuaranteeError PIA091 if it would draw the noise of an earlier session again. Raises LedgerError
        PIA040 when ledger and checkpoint do not belong together, before model or optimizer change;
        UnsupportedError PIA060 for a file that only pickle could load.
        """
        checkpoint = load_plain(path, torch_load_kwargs or {})
        anchor = read_anchor(checkpoint)
        self.tracker.check_boundary()
        self.tracker.recorder.resume(anchor)
        loaded = super().load_checkpoint(path=stored_again(checkpoint, self.accountant), **arguments)
        self.tracker.optimizer.continue_from(checkpoint[CHECKPOINT_KEY])
        self.tracker.sessions.resume(checkpoint[CHECKPOINT_KEY].get("noise", []))
        self.tracker.draws.resume(checkpoint[CHECKPOINT_KEY].get("draws", []))
        return loaded
