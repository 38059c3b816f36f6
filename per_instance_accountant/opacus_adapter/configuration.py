"""What can be tracked, and how it is described: checks that come before anything is changed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from opacus import grad_sample
from opacus.optimizers import AdaClipDPOptimizer, DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch.utils.data import DataLoader

from per_instance_accountant.accounting.rules import (
    ChargingRule,
    FixedThresholds,
    Sweep,
    Unamplified,
    WorstCase,
)
from per_instance_accountant.errors import GuaranteeError, PiaError, UnsupportedError, UsageError
from per_instance_accountant.ledger.records import Run
from per_instance_accountant.opacus_adapter.capture import Tracker
from per_instance_accountant.opacus_adapter.drawing import PoissonSampler, settle_rate
from per_instance_accountant.opacus_adapter.layers import check_layers
from per_instance_accountant.opacus_adapter.optimizers import TRACKED, TrackedOptimizer
from per_instance_accountant.opacus_adapter.precision import check_precision
from per_instance_accountant.opacus_adapter.ranks import RankSampler
from per_instance_accountant.opacus_adapter.recording import Setting
from per_instance_accountant.opacus_adapter.secure import SecureSampler
from per_instance_accountant.opacus_adapter.sweeps import sweep_norms
from per_instance_accountant.opacus_adapter.verifying import Verify


def _classes(*names: str) -> tuple[type[Any], ...]:
    """Those of these classes of Opacus that the installed version has."""
    return tuple(getattr(grad_sample, name) for name in names if hasattr(grad_sample, name))


GHOST_MODULES = _classes("GradSampleModuleFastGradientClipping", "GradSampleHooksFastGradientClipping")
SHARDED_MODULES = _classes(
    "GradSampleModuleFastGradientClippingFSDP", "GradSampleHooksFastGradientClippingFSDP"
)
NO_OP_MODULES = _classes("GradSampleModuleNoOp", "GradSampleHooksNoOp")
EXPANDED_MODULES = _classes("GradSampleModuleExpandedWeights")
MODULES = (
    *_classes("GradSampleModule", "GradSampleHooks"),
    *(*GHOST_MODULES, *SHARDED_MODULES, *NO_OP_MODULES, *EXPANDED_MODULES),
)
MODES = ("hooks", "functorch", "ew", "ghost", "ghost_fsdp", "no_op")


def refuse(reason: str, fix: str) -> NoReturn:
    """Raise UnsupportedError PIA060."""
    raise UnsupportedError("PIA060", reason, "What an instance contributes would not be known exactly", fix)


def check_untracked(optimizer: torch.optim.Optimizer) -> None:
    """Raise UnsupportedError PIA060 for an optimizer that is tracked already, wrapped or not."""
    inner = getattr(optimizer, "original_optimizer", optimizer)
    hooks = getattr(inner, "_optimizer_step_pre_hooks", None)
    if hooks is None:
        refuse("an optimizer inside the wrapper of a framework", "make_private first, then prepare")
    tracked = any(isinstance(getattr(hook, "__self__", None), Tracker) for hook in hooks.values())
    if tracked or isinstance(optimizer, TrackedOptimizer):
        refuse("the optimizer is tracked already", "build a new optimizer for every make_private or attach")


def check_optimizer(optimizer: DPOptimizer) -> None:
    """Raise UnsupportedError PIA060 for an optimizer of another class than Opacus' own, or tracked
    already."""
    check_untracked(optimizer)
    if type(optimizer) not in TRACKED:
        refuse(
            f"an optimizer of class {type(optimizer).__name__}",
            'make_private(clipping="flat", grad_sample_mode="hooks") in one process',
        )
    if isinstance(optimizer, AdaClipDPOptimizer) and not optimizer.expected_batch_size:
        refuse(
            "adaptive clipping without an expected batch size, which its count is divided by",
            "AdaClipDPOptimizer(..., expected_batch_size=...)",
        )
    for p in optimizer.params:
        check_precision(p)


def find_module(optimizer: DPOptimizer) -> Any:
    """The GradSampleModule or GradSampleHooks that fills these parameters. Raises UsageError PIA071 if none
    is alive."""
    mine = {id(p) for p in optimizer.params}
    for candidate in gc.get_objects():
        if type(candidate) in MODULES and mine <= {id(p) for p in candidate._module.parameters()}:
            return candidate
    raise UsageError(
        "PIA071",
        "no GradSampleModule owns the parameters of the optimizer",
        "Forward passes could not be watched",
        "attach(optimizer, data_loader, module=GradSampleModule(model))",
    )


def check_module(module: Any, optimizer: DPOptimizer) -> torch.nn.Module:
    """The user's own module inside ``module``. Raises UnsupportedError PIA060, UsageError PIA071."""
    if type(module) not in MODULES:
        refuse(f"a model wrapped as {type(module).__name__}", "GradSampleModule(model), not distributed")
    core: torch.nn.Module = module._module
    check_layers(core)
    if not getattr(module, "use_ghost_clipping", True):
        refuse("use_ghost_clipping=False", "GradSampleModuleFastGradientClipping(model)")
    if isinstance(module, GHOST_MODULES) != isinstance(optimizer, DPOptimizerFastGradientClipping):
        refuse(
            "one of model and optimizer is for ghost clipping, the other is not",
            "make_private(...) builds both",
        )
    if not {id(p) for p in optimizer.params} <= {id(p) for p in core.parameters()}:
        raise UsageError(
            "PIA071",
            "the optimizer has parameters that are not the module's",
            "Their gradients would not be clipped",
            "optimizer = torch.optim.SGD(module.parameters(), ...)",
        )
    return core


def check_clipping(
    mode: str, clipping: str, arguments: Mapping[str, Any], charging: ChargingRule | None
) -> None:
    """Raise UnsupportedError PIA060, PIA101, UsageError PIA071 for a way of clipping that cannot be accounted
    for."""
    if clipping not in ("flat", "per_layer", "adaptive"):
        refuse(f"clipping={clipping!r}", 'make_private(clipping="flat")')
    if clipping != "flat" and mode.startswith("ghost"):
        refuse(f"clipping={clipping!r} with ghost clipping", 'make_private(grad_sample_mode="hooks")')
    check_rule(clipping, charging)
    check_criterion(mode, arguments.get("criterion"))
    norms, optimizer = arguments.get("max_grad_norm"), arguments.get("optimizer")
    if clipping == "per_layer" and isinstance(optimizer, torch.optim.Optimizer):
        count = sum(p.requires_grad for group in optimizer.param_groups for p in group["params"])
        values = np.asarray(norms, dtype=np.float64)
        if values.shape != (count,) or not (values > 0).all() or not np.isfinite(values).all():
            raise UsageError(
                "PIA071",
                f"per-layer clipping with max_grad_norm of shape {values.shape} for {count} parameters",
                "A layer without a clip norm of its own has no bound",
                "max_grad_norm=[0.5] * number_of_trainable_parameters, all of them positive",
            )


def check_criterion(mode: str, criterion: Any) -> None:
    """Raise UnsupportedError PIA101 for a mean that is divided by the class weights of the batch."""
    weighted = isinstance(criterion, (torch.nn.CrossEntropyLoss, torch.nn.NLLLoss))
    divided = weighted and criterion.weight is not None and criterion.reduction == "mean"
    # Ghost clipping takes the loss of each instance, and no mean.
    if divided and not mode.startswith("ghost"):
        raise UnsupportedError(
            "PIA101",
            f"{type(criterion).__name__} with class weights and reduction='mean'",
            "The mean is over the weights of the whole batch: each instance scales the others' gradients",
            "loss_reduction='sum' with reduction='sum', or grad_sample_mode='ghost'",
        )


def check_verify(verify: Verify) -> Verify:
    """Raise UsageError PIA070 for an unknown word."""
    if verify not in ("off", "first_step", "every_step"):
        raise UsageError(
            "PIA070",
            f"verify={verify!r}, allowed are 'off', 'first_step' and 'every_step'",
            "The loop would not be checked",
            'verify="first_step"',
        )
    return verify


def check_rule(clipping: str, charging: ChargingRule | None) -> None:
    """Raise UnsupportedError PIA060 for individual thresholds with adaptive clipping."""
    if clipping == "adaptive" and isinstance(charging, (FixedThresholds, Sweep)):
        refuse(
            f"charging rule {charging.name!r} with adaptive clipping: the count query has a price of its own "
            "that moves with the clip norm, which no threshold in a ledger includes",
            'charging=WorstCase(), or clipping="flat"',
        )


def choose_charging(charging: ChargingRule | None, poisson: bool) -> ChargingRule:
    """The rule to charge by. Raises GuaranteeError PIA010 for an amplified rule without Poisson sampling."""
    if charging is None:
        return WorstCase() if poisson else Unamplified()
    if not poisson and not isinstance(charging, Unamplified):
        raise GuaranteeError(
            "PIA010",
            f"charging rule {charging.name!r} with a loader that is no Poisson sampler",
            "Losses would be reduced for sampling that did not happen",
            "make_private(poisson_sampling=True), or charging=Unamplified()",
        )
    return charging


def is_poisson(loader: DataLoader[Any]) -> bool:
    """Whether every instance is drawn independently: a subclass of Opacus' sampler might do anything else."""
    kinds = (UniformWithReplacementSampler, PoissonSampler, SecureSampler, RankSampler)
    return type(loader.batch_sampler) in kinds


def mode_of(module: Any) -> str:
    """Opacus' name of the way in which this wrapper finds per-sample gradients."""
    modes = {"ghost_fsdp": SHARDED_MODULES, "ghost": GHOST_MODULES}
    modes |= {"no_op": NO_OP_MODULES, "ew": EXPANDED_MODULES}
    for name, kinds in modes.items():
        if isinstance(module, kinds):
            return name
    return "functorch" if getattr(module, "force_functorch", False) else "hooks"


def describe_setting(
    loader: DataLoader[Any],
    charging: ChargingRule | None,
    module: Any,
    kind: str,
    plan_digest: str | None,
    positions: NDArray[np.int64] | None,
    *,
    secure: bool = False,
) -> Setting:
    """How this loader draws, which is settled here, and this module computes. Raises GuaranteeError PIA010
    as :func:`choose_charging`."""
    sampler: Any = loader.batch_sampler
    poisson = is_poisson(loader)
    rows = len(loader.dataset)  # type: ignore[arg-type]
    rate = settle_rate(sampler, secure=secure) if poisson else min(1.0, (loader.batch_size or rows) / rows)
    return Setting(
        charging=choose_charging(charging, poisson),
        sampling="poisson" if poisson else "shuffled",
        sample_rate=float(rate),
        sampler=sampler if poisson else None,
        grad_sample_mode=mode_of(module),
        kind=kind,
        plan_digest=plan_digest,
        positions=positions,
    )


def check_positions(positions: ArrayLike | None, rows: int, num_instances: int) -> NDArray[np.int64] | None:
    """(rows,) int64 distinct dataset positions in [0, num_instances). Raises UsageError PIA071."""
    if positions is None and rows == num_instances:
        return None
    array = np.asarray(positions)
    ok = array.shape == (rows,) and array.dtype.kind in "iu" and len(np.unique(array)) == rows
    if not ok or array.min() < 0 or array.max() >= num_instances:
        raise UsageError(
            "PIA071",
            f"positions are not {rows} distinct integers in [0, {num_instances})",
            "Steps would be charged to other instances",
            "attach(optimizer, loader, positions=retained) where loader is over Subset(dataset, retained)",
        )
    return array.astype(np.int64)


def describe_run(
    loader: DataLoader[Any],
    ids: ArrayLike | None,
    groups: Mapping[str, ArrayLike] | None,
    assumptions: Mapping[str, Any] | None,
    appended: Run | None = None,
) -> Run:
    """The facts that are fixed for a run over this loader's data set. Raises UsageError PIA071 for wrong
    lengths."""
    if appended is not None:
        if ids is not None or groups or assumptions:
            raise UsageError(
                "PIA071",
                "ids, groups or assumptions for a ledger that exists already",
                "They are facts of the whole run and cannot change in its middle",
                "attach(optimizer, loader, ledger=writer) without them",
            )
        return appended
    count = len(loader.dataset)  # type: ignore[arg-type]
    columns = {"ids": ids, **(groups or {})}
    arrays = {name: np.asarray(column) for name, column in columns.items() if column is not None}
    wrong = [name for name, column in arrays.items() if column.shape != (count,)]
    if wrong:
        raise UsageError(
            "PIA071",
            f"{wrong[0]} has shape {arrays[wrong[0]].shape}, the data set has {count} instances",
            "Numbers would be reported under wrong names",
            "pass one value per dataset position, in dataset order",
        )
    labels = {name: arrays[name] for name in groups or {}}
    software = {name: version(name) for name in ("opacus", "torch")}
    return Run(
        num_instances=count,
        ids=arrays.get("ids") if ids is not None else None,
        groups=labels,
        assumptions=assumptions,
        software=software,
    )


def fixed_thresholds(
    charging: ChargingRule, num_instances: int, *, recorded: bool = False
) -> NDArray[np.float32] | None:
    """(N,) thresholds of FixedThresholds, None for other rules.

    recorded: the ledger may hold them, so none need be given. Raises UsageError PIA071 for a wrong length.
    """
    if not isinstance(charging, FixedThresholds) or (recorded and charging.thresholds is None):
        return None
    values = charging.as_float32()
    if values.shape != (num_instances,):
        raise UsageError(
            "PIA071",
            f"{len(values)} thresholds for {num_instances} instances",
            "Without a threshold per instance there is no individual bound to enforce",
            "FixedThresholds(thresholds=norm_bounds) with one number per dataset position",
        )
    return values


def prepare_sweep(
    charging: ChargingRule, module: Any, optimizer: Any, loader: DataLoader[Any], criterion: Any
) -> Callable[[int], NDArray[np.float32]] | None:
    """The pass that measures all norms, for ``Sweep``; None for other rules. Without a criterion it uses
    Opacus' default, and raises UsageError PIA071 where the model or the batches have another loss."""
    if not isinstance(charging, Sweep):
        return None
    if isinstance(module, NO_OP_MODULES):
        refuse(
            "Sweep with grad_sample_mode='no_op', where nobody else knows how to find gradients",
            "charging=WorstCase() or FixedThresholds(...)",
        )
    if criterion is not None:
        return lambda size: sweep_norms(module, optimizer, loader, criterion, batch_size=size)
    assumed: Any = torch.nn.CrossEntropyLoss(reduction=optimizer.loss_reduction)
    if isinstance(module, GHOST_MODULES):
        assumed = DPLossFastGradientClipping(module, optimizer, assumed, optimizer.loss_reduction)
    return partial(_sweep_assuming, module, optimizer, loader, assumed)


def _sweep_assuming(
    module: Any, optimizer: Any, loader: Any, criterion: Any, batch_size: int
) -> NDArray[np.float32]:
    try:
        return sweep_norms(module, optimizer, loader, criterion, batch_size=batch_size)
    except PiaError:
        raise
    # Whatever a loss raises for outputs or targets that it is not made for.
    except Exception as error:
        raise UsageError(
            "PIA071",
            f"the sweep could not compute cross entropy, the loss it assumes ({type(error).__name__})",
            "No threshold can be set without the norms of all instances; nothing was written or released",
            "make_private(..., criterion=...) with the loss of the training loop",
        ) from error
