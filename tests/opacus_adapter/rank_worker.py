"""One process of a run on several: trains as a list of cases asks, and writes what it saw.

    python -m tests.opacus_adapter.rank_worker RANK WORLD_SIZE FOLDER

FOLDER holds ``cases.json``: name -> options. Cases run one after the other in one process group.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel as DPDDP
from opacus.utils.batch_memory_manager import BatchMemoryManager
from opacus.utils.uniform_sampler import DistributedUniformWithReplacementSampler
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, TensorDataset

from per_instance_accountant import (
    FixedThresholds,
    LastSeen,
    PrivacyEngine,
    PrivacyFilter,
    Sweep,
    Unamplified,
    WorstCase,
)
from per_instance_accountant.errors import GuaranteeError
from per_instance_accountant.opacus_adapter import SGLD, sharding


def sharded(module: nn.Module, **options: Any) -> nn.Module:
    from opacus.utils.fsdp_utils import FSDP2Wrapper  # since Opacus 1.6

    return FSDP2Wrapper(module, **options)


COUNT, CLIP, RATE = 61, 0.8, 0.05
RULES: dict[str, Any] = {
    "worst_case": WorstCase,
    "unamplified": Unamplified,
    "last_seen": LastSeen,
    "fixed": lambda: FixedThresholds(thresholds=[0.1 + 0.01 * i for i in range(COUNT)]),
    "sweep": lambda: Sweep(every=4, slack=1.1),
}
WRAPPERS: dict[str, Any] = {
    "ddp": DDP,
    "dpddp": DPDDP,
    "fsdp": sharded,
    "fsdp low": lambda module: sharded(module, mp_policy=MixedPrecisionPolicy(torch.bfloat16)),
    "fsdp ignored": lambda module: fully_shard(module, ignored_params={module[2].bias}),
    "none": lambda module: module,
}


def examples() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(COUNT, 6, generator=generator) * torch.exp(torch.randn(COUNT, 1, generator=generator))
    return TensorDataset(x, torch.randint(0, 3, (COUNT,), generator=generator))


class Tokens(nn.Module):
    """A sampler of Opacus for every kind of layer; rows of one parameter that no second rank gets."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.tokens, self.narrow = nn.Embedding(9, 4), nn.Linear(4, 5), nn.Linear(5, 1)
        self.convolution, self.scaled, self.out = nn.Conv1d(5, 3, 2), nn.LayerNorm(15), nn.Linear(21, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        entries = (x.clamp(-2, 2) * 2).round().long() + 4
        hidden = torch.tanh(self.tokens(self.embedding(entries)))
        moved = self.scaled(self.convolution(hidden.mT).flatten(1))
        return self.out(torch.cat([moved, self.narrow(hidden).flatten(1)], dim=1))


class Forgetful(nn.Module):
    """Uses its first layer in the first pass only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out, self.passes = nn.Linear(6, 6), nn.Linear(6, 3), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self.out(torch.tanh(self.first(x) if self.passes == 1 else x))


class Scaled(nn.Linear):
    """A layer that Opacus has no sampler for."""


SEEDS = {"seed": 99, "seed again": 1234}


def undivided(layer: nn.Module) -> None:
    if isinstance(layer, FSDPModule):
        layer.set_force_sum_reduction_for_comms(True)
        layer.set_gradient_divide_factor(1.0)


def unsynchronised(layer: nn.Module) -> None:
    if isinstance(layer, FSDPModule):
        layer.set_requires_gradient_sync(False)


REDUCTIONS: dict[str, Any] = {"undivided": undivided, "unsynchronised": unsynchronised}
NETWORKS: dict[str, Any] = {
    "tokens": Tokens,
    "forgetful": Forgetful,
    "scaled": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), Scaled(5, 3)),
}


def network(name: str = "plain") -> nn.Module:
    torch.manual_seed(5)
    if name in NETWORKS:
        module: nn.Module = NETWORKS[name]()
        return module
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def flat(module: nn.Module) -> list[float]:
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return torch.cat([p.detach().flatten() for p in whole]).tolist()


def clip_norm(rank: int, options: dict[str, Any]) -> Any:
    if options.get("clipping") == "per_layer":
        return options.get("layers", [[CLIP / 2] * 4] * 9)[rank]
    return options.get("clip", CLIP)


def private(rank: int, folder: Path, options: dict[str, Any], inner: nn.Module) -> tuple[Any, ...]:
    """(engine, model, optimizer, criterion, loader)"""
    model = WRAPPERS[options.get("wrap", "dpddp")](inner)
    reduction = options.get("reduction", "mean")
    budget = options.get("budget")
    engine = PrivacyEngine(
        accountant="rdp",
        ledger=folder / "run",
        charging=RULES[options.get("rules", [options.get("rule")] * 9)[rank] or "worst_case"](),
        filter=None if budget is None else PrivacyFilter(budget=budget, delta=1e-2),
        verify=options.get("verify", "off"),
        rank_timeout=options.get("timeout", 30.0),
    )
    made = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=RATE),
        data_loader=DataLoader(
            examples(), batch_size=options.get("batch_size", 9), num_workers=options.get("workers", 0)
        ),
        criterion=nn.CrossEntropyLoss(reduction=reduction),
        noise_multiplier=options.get("noises", [options.get("noise", 1.0)] * 9)[rank],
        max_grad_norm=clip_norm(rank, options),
        clipping=options.get("clipping", "flat"),
        loss_reduction=reduction,
        grad_sample_mode=options.get("mode", "hooks"),
        poisson_sampling=options.get("poisson", True),
    )
    criterion = made[2] if len(made) == 4 else nn.CrossEntropyLoss(reduction=reduction)
    return engine, made[0], made[1], criterion, made[-1]


def train(rank: int, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    inner = network(options.get("network", "plain"))
    if options.get("unguarded"):
        sharding.check_sharding = lambda *_: None
    engine, model, optimizer, criterion, loader = private(rank, folder, options, inner)
    if "langevin" in options:
        SGLD(**options["langevin"]).drive(engine)
    where = {"path": folder / f"model-{rank}.pt", "module": model, "optimizer": optimizer}
    if options.get("load"):
        engine.load_checkpoint(**where)
    torch.manual_seed(options.get("seeds", [11, 12])[rank])
    weights: list[list[float]] = []
    for epoch in range(options.get("epochs", 2)):
        loader.batch_sampler.set_epoch(0 if rank in options.get("stuck", []) else epoch)
        parts: Any = contextlib.nullcontext(loader)
        if "physical" in options:
            parts = BatchMemoryManager(
                data_loader=loader, max_physical_batch_size=options["physical"], optimizer=optimizer
            )
        with parts as batches:
            for number, (x, y) in enumerate(batches):
                event = options.get("event", {})
                now = event.get("rank", rank) == rank and event.get("step", number) == number
                if event and now and epoch == 0:
                    happen(event["what"], x, engine)
                steps = engine.ledger.num_steps
                before = flat(inner)
                optimizer.zero_grad()
                criterion(model(x), y).backward()
                optimizer.step()
                if engine.ledger.num_steps > steps:
                    weights.append(before)
        if options.get("save") == epoch:
            engine.save_checkpoint(**where)
    running = metrics(engine, options)
    engine.close()
    return {
        "steps": engine.ledger.num_steps,
        "weights": [*weights, flat(inner)],
        "stock": stock_steps(options),
        "running": running,
    }


def metrics(engine: PrivacyEngine, options: dict[str, Any]) -> str:
    """Largest running epsilon, or the code of the refusal."""
    if not options.get("noise", 1.0):
        return ""
    try:
        return repr(engine.metrics(1e-3)["privacy/epsilon_max"])
    except GuaranteeError as error:
        return error.code


def stock_steps(options: dict[str, Any]) -> int:
    """Batches that Opacus' own sampler hands out on this rank."""
    if options.get("batch_size") != 1:
        return 0
    sampler = DistributedUniformWithReplacementSampler(total_size=COUNT, sample_rate=1 / COUNT)
    return sum(1 for _ in sampler)


def happen(what: str, x: torch.Tensor, engine: Any) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no space left on device")

    if what == "die":
        os._exit(9)
    if what == "die in the sum":
        dist.all_reduce = lambda *_, **__: os._exit(9)
    if what == "sleep":
        time.sleep(60)
    if what == "nan":
        x.fill_(float("nan"))
    if what == "full":
        engine.tracker.recorder.writer._log.append = refuse
    if what in SEEDS:
        torch.manual_seed(SEEDS[what])
    for layer in engine.tracker.module.modules():
        REDUCTIONS.get(what, lambda _: None)(layer)


def main() -> None:
    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=40)
    )
    found: dict[str, Any] = {}
    for name, options in json.loads((folder / "cases.json").read_text()).items():
        place = folder / options.get("place", name)
        place.mkdir(exist_ok=True)
        began = time.monotonic()
        try:
            found[name] = train(rank, place, options)
        except Exception as error:
            found[name] = {"error": str(error)}
        found[name]["seconds"] = time.monotonic() - began
        (folder / f"result-{rank}.json").write_text(json.dumps(found))
    # Without the shutdown of the process group, which waits for processes that are gone.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
