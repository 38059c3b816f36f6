"""DPOptimizers of several processes: each records its own part of a step before all of them release it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from opacus.data_loader import DPDataLoader
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel as DPDDP
from opacus.optimizers import DPOptimizer
from opacus.optimizers.ddp_perlayeroptimizer import SimpleDistributedPerLayerOptimizer
from opacus.optimizers.ddpoptimizer import DistributedDPOptimizer
from opacus.optimizers.ddpoptimizer_fast_gradient_clipping import DistributedDPOptimizerFastGradientClipping
from opacus.utils.uniform_sampler import DistributedUniformWithReplacementSampler
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader

from per_instance_accountant.accounting.rules import ChargingRule, FixedThresholds, Unamplified
from per_instance_accountant.errors import AlignmentError, UnsupportedError
from per_instance_accountant.ledger import LedgerWriter, Run
from per_instance_accountant.opacus_adapter import configuration as check
from per_instance_accountant.opacus_adapter.loader import with_sampler
from per_instance_accountant.opacus_adapter.optimizers import (
    TRACKED,
    TrackedGhostOptimizer,
    TrackedOptimizer,
    TrackedPerLayerOptimizer,
)
from per_instance_accountant.opacus_adapter.ranks import (
    SHARDED,
    Ranks,
    RankSampler,
    parameter_digest,
    random_state,
    refuse_part,
)
from per_instance_accountant.opacus_adapter.recording import Recorder, Setting


class RankStep(TrackedOptimizer):
    """Adds to a tracked optimizer that all ranks agree on a step when each of them has recorded it."""

    ranks: Ranks
    can_defer = False
    _session: Any = None
    _agreed = 0

    def draws_noise(self) -> bool:
        return self.ranks.rank == 0

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        try:
            return super().pre_step(closure)
        except BaseException:
            self.ranks.fail()
            raise

    def add_noise(self) -> None:
        # Here because the step is recorded and nothing of it has left this process yet.
        recorder = self.tracker.recorder
        facts: dict[str, Any] = {
            "number of steps": self._agreed,
            "noise, clip norm or learning rate": recorder.mechanism(),
            "thresholds": recorder.thresholds,
            "dropped instances": None if recorder.spending is None else recorder.spending.dropped,
        }
        if recorder.writer is not self._session and not isinstance(self.tracker.module, SHARDED):
            facts["model"] = parameter_digest(list(self.params))
        state = random_state(self.tracker.recorder.setting.sampler.generator)
        self.ranks.agree("a step", facts, {} if state is None else {"random state": state})
        self._session, self._agreed = recorder.writer, self._agreed + 1
        super().add_noise()

    def reduce_gradients(self) -> None:
        try:
            super().reduce_gradients()
        except RuntimeError:
            self.ranks.broken = True
            for p in self.params:
                p.grad = None
            raise AlignmentError(
                "PIA102",
                "a process ended while the gradients were added up",
                "Every rank has recorded the step, so it stays charged",
                "end all processes and continue them together: engine.load_checkpoint(...) on every rank",
            ) from None


class GhostRankStep(RankStep, TrackedGhostOptimizer):
    """Adds to ghost clipping that no rank waits in a second backward pass for one that does not come."""

    def loss_factors(self, module: Any) -> torch.Tensor:
        try:
            factors = super().loss_factors(module)
        except BaseException:
            self.ranks.fail()
            raise
        if self.ranks.linked:
            self.ranks.agree("the second backward pass", {})
        return factors


class TrackedDistributedOptimizer(RankStep, TrackedOptimizer, DistributedDPOptimizer):
    """A DistributedDPOptimizer whose steps are written to one part of a ledger on each rank."""


class TrackedDistributedGhostOptimizer(GhostRankStep, DistributedDPOptimizerFastGradientClipping):
    """The same for ghost clipping."""


class TrackedDistributedPerLayerOptimizer(
    RankStep, TrackedPerLayerOptimizer, SimpleDistributedPerLayerOptimizer
):
    """The same for clipping of every parameter on its own."""


DISTRIBUTED: dict[type[DPOptimizer], type[RankStep]] = {
    DistributedDPOptimizer: TrackedDistributedOptimizer,
    SimpleDistributedPerLayerOptimizer: TrackedDistributedPerLayerOptimizer,
    DistributedDPOptimizerFastGradientClipping: TrackedDistributedGhostOptimizer,
}
TRACKED.update(DISTRIBUTED)


def join_ranks(optimizer: DPOptimizer, module: Any, timeout: float) -> Ranks | None:
    """The processes that share this optimizer, or None for one that is alone.

    Raises UnsupportedError PIA060 when model and optimizer are not both made for several processes.
    """
    distributed, wrapper = type(optimizer) in DISTRIBUTED, getattr(module, "_module", module)
    if distributed != isinstance(wrapper, (DPDDP, DDP, *SHARDED)):
        refuse_ranks("only one of model and optimizer is made for several processes")
    if distributed and optimizer.secure_mode:
        raise UnsupportedError(
            "PIA060",
            "secure_mode on several processes",
            "Their draws would come from PyTorch's generator, which somebody may predict",
            "PrivacyEngine(secure_mode=True) on one process",
        )
    return Ranks(timeout, linked=isinstance(wrapper, (DDP, *SHARDED))) if distributed else None


def part_loader(loader: DataLoader[Any], ranks: Ranks) -> DataLoader[Any]:
    """The loader with a sampler that keeps ranks in step. Raises UnsupportedError PIA060 for others."""
    sampler = loader.batch_sampler
    if not isinstance(loader, DPDataLoader) or type(sampler) is not DistributedUniformWithReplacementSampler:
        refuse_ranks("a loader that is no distributed Poisson loader of Opacus")
    return with_sampler(loader, RankSampler(sampler, ranks))


def part_of_run(run: Run, ranks: Ranks, ledger: Any) -> tuple[Run, Any]:
    """The facts and the directory of this rank's part. Raises LedgerError PIA040 for another one's writer."""
    identity = ranks.run_id()
    if isinstance(ledger, LedgerWriter):
        if (ledger.run.rank, ledger.run.world_size) != (ranks.rank, ranks.world_size):
            refuse_part(ledger.run, ranks.rank, ranks.world_size)
        return run, ledger
    part = replace(run, run_id=identity, rank=ranks.rank, world_size=ranks.world_size)
    return part, None if ledger is None else Path(ledger) / f"rank-{ranks.rank}"


def agree_on_run(ranks: Ranks, recorder: Recorder) -> None:
    """Compare what is fixed for the run. Raises AlignmentError PIA102, UnsupportedError PIA060."""
    setting, rule = recorder.setting, recorder.setting.charging
    check_rule_over_ranks(setting)
    thresholds = (
        rule.as_float32() if isinstance(rule, FixedThresholds) and rule.thresholds is not None else None
    )
    budget: Mapping[str, Any] = {}
    if setting.budget is not None:
        stated = setting.budget.stated(
            setting.budget.per_instance(recorder.run.num_instances, recorder.run.groups), recorder.mechanism()
        )
        budget = {"budgets": stated.budgets, "orders of the budgets": stated.orders}
    rule_facts = (rule.name, getattr(rule, "every", None), getattr(rule, "slack", None))
    facts = {
        "mechanism": (recorder.run.num_instances, recorder.mechanism()),
        "charging rule": rule_facts,
        "clip norms of the layers": getattr(recorder.optimizer, "max_grad_norms", None),
        "thresholds": thresholds,
        **budget,
    }
    ranks.agree("attaching", facts)


def prepare_sweep(
    ranks: Ranks | None, charging: ChargingRule, module: Any, optimizer: Any, loader: Any, criterion: Any
) -> Any:
    """As ``configuration.prepare_sweep``; with several processes each measures its share."""
    if ranks is None:
        return check.prepare_sweep(charging, module, optimizer, loader, criterion)
    sweep = check.prepare_sweep(charging, module, optimizer, ranks.share(loader), criterion)
    return None if sweep is None else ranks.sweeping(sweep, len(loader.dataset))


def check_rule_over_ranks(setting: Setting) -> None:
    """Raise UnsupportedError PIA060 for what a rank cannot know from its own draws."""
    if setting.grad_sample_mode not in ("hooks", "functorch", "ghost", "ghost_fsdp"):
        refuse_ranks(f"grad_sample_mode={setting.grad_sample_mode!r} on several processes")
    if setting.kind != "train":
        refuse_ranks("unlearning over several processes")
    if setting.budget is not None and isinstance(setting.charging, Unamplified):
        refuse_ranks("a filter with Unamplified(): no rank knows what an instance spent on the others")


def refuse_ranks(reason: str) -> NoReturn:
    """Raise UnsupportedError PIA060."""
    raise UnsupportedError(
        "PIA060",
        reason,
        "What an instance contributes over all processes would not be known exactly",
        "make_private(module=DPDDP(model), ...) on every rank, poisson_sampling=True, one rule for all",
    )
