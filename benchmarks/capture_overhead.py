"""CPU time of a tracked training step relative to the same step in stock Opacus, with an A/A control.

Two stock trainings and a tracked one take turns, one block of steps each, in changing order. The control is
stock against stock: how far chance alone moves a ratio.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import opacus
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import Figure, arguments, report
from per_instance_accountant.opacus_adapter import PrivacyEngine, sweep_norms

BATCH, COUNT, STARTS = 64, 1024, 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way of training. target: ratio to stock Opacus that is not to be exceeded."""

    model: str
    mode: str = "hooks"
    clipping: str = "flat"
    managed: bool = False
    """Two persistent workers, and physical batches of half the size."""
    target: float = 1.02

    @property
    def key(self) -> str:
        words = (self.model, self.mode, "" if self.clipping == "flat" else self.clipping)
        return "_".join(filter(None, (*words, "managed" if self.managed else "")))


WAYS = (
    *(Way(model="mlp", mode=mode) for mode in ("hooks", "functorch", "ew")),
    Way(model="mlp", mode="ghost", target=1.05),
    *(Way(model="mlp", clipping=clipping) for clipping in ("per_layer", "adaptive")),
    *(Way(model="mlp", mode=mode, managed=True, target=1.05) for mode in ("hooks", "ghost")),
    Way(model="cnn"),
    Way(model="cnn", mode="ghost", target=1.05),
)
SWEEP_TARGETS = {"ghost": 0.8, "hooks": None}
"""Cost of one sweep over the data in epochs of training."""
ADAPTIVE = {
    "target_unclipped_quantile": 0.5,
    "clipbound_learning_rate": 0.2,
    "max_clipbound": 10.0,
    "min_clipbound": 0.1,
    "unclipped_num_std": 5.0,
}


def perceptron() -> nn.Module:
    """669,706 parameters."""
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def convolutional() -> nn.Module:
    """554,282 parameters."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 32, 5, stride=2), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2), nn.GroupNorm(8, 64), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(1600, 330), nn.ReLU(), nn.Linear(330, 10)),
    )


MODELS = {"mlp": perceptron, "cnn": convolutional}


def batches(loader: Any, optimizer: Any, managed: bool) -> Iterator[Any]:
    while True:
        if not managed:
            yield from loader
            continue
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=BATCH // 2, optimizer=optimizer
        ) as parts:
            yield from parts


def prepare(engine: Any, way: Way) -> tuple[Callable[[int], float], Callable[[], float]]:
    """A function that takes so many steps and returns the CPU seconds of 64 instances, and one that sweeps
    all data and returns the CPU seconds of one instance."""
    torch.manual_seed(0)
    dataset = TensorDataset(torch.randn(COUNT, 784), torch.randint(0, 10, (COUNT,)))
    module, criterion = MODELS[way.model](), nn.CrossEntropyLoss()
    layers = [1.0 / math.sqrt(6)] * len(list(module.parameters()))
    workers: dict[str, Any] = {"num_workers": 2, "persistent_workers": True} if way.managed else {}
    made = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.01),
        data_loader=DataLoader(dataset, batch_size=BATCH, **workers),
        criterion=criterion,
        noise_multiplier=1.0,
        max_grad_norm=layers if way.clipping == "per_layer" else 1.0,
        grad_sample_mode=way.mode,
        clipping=way.clipping,
        **(ADAPTIVE if way.clipping == "adaptive" else {}),
    )
    net, optimizer, loader = made[0], made[1], batches(made[-1], made[1], way.managed)
    loss = made[2] if len(made) == 4 else criterion

    def run(steps: int) -> float:
        used = 0
        start = time.process_time()
        for _ in range(steps):
            x, y = next(loader)
            used += len(x)
            optimizer.zero_grad()
            loss(net(x), y).backward()
            optimizer.step()
        # Poisson batches differ in size; per instance the blocks are comparable.
        return (time.process_time() - start) * BATCH / used

    def sweep() -> float:
        start = time.process_time()
        sweep_norms(net, optimizer, made[-1], loss, batch_size=BATCH)
        return (time.process_time() - start) / COUNT

    return run, sweep


def compare(way: Way, rounds: int, steps: int) -> dict[str, Figure]:
    """Ratios tracked/stock and stock/stock, and milliseconds of a step of 64 instances; medians of several
    starts, because where a model's memory happens to lie moves a ratio by a percent or two."""
    figures = np.median([start(way, rounds, steps) for _ in range(STARTS)], axis=0).tolist()
    targets = {"ratio": way.target}
    return {
        f"{way.key}_{name}": Figure(value=value, target=targets.get(name))
        for name, value in zip(("ratio", "control_ratio", "added_ms", "stock_ms"), figures, strict=True)
    }


def start(way: Way, rounds: int, steps: int) -> tuple[float, ...]:
    """The figures of :func:`compare` for models that are made anew, of lower quartiles."""
    gc.collect()
    with tempfile.TemporaryDirectory() as directory:
        tracked = PrivacyEngine(accountant="rdp", ledger=Path(directory) / "run")
        engines = [tracked, *(opacus.PrivacyEngine(accountant="rdp") for _ in range(2))]
        runs = [prepare(engine, way)[0] for engine in engines]
        for run in runs:
            run(steps)
        times = np.empty((rounds, 3))
        order = np.random.default_rng(0)
        for row in times:
            for which in order.permutation(3):
                row[which] = runs[which](steps)
    # Other processes only ever add time: the lower quartile is what they disturb least.
    tracked_time, stock_time, other_time = np.quantile(times, 0.25, axis=0)
    stock = (stock_time + other_time) / 2
    return tracked_time / stock, stock_time / other_time, 1e3 * (tracked_time - stock), 1e3 * stock


def sweep_cost(mode: str, rounds: int) -> dict[str, Figure]:
    """CPU time of a sweep over the data relative to an epoch of tracked training, taking turns."""
    run, sweep = prepare(PrivacyEngine(accountant="rdp"), Way(model="mlp", mode=mode))
    run(2), sweep()
    times = np.array([(run(COUNT // BATCH) / BATCH, sweep()) for _ in range(rounds)])
    epoch, swept = np.quantile(times, 0.25, axis=0)
    return {f"sweep_{mode}_epochs": Figure(value=float(swept / epoch), target=SWEEP_TARGETS[mode])}


def keep_memory() -> None:
    """Let malloc keep large blocks: page faults of newly mapped gradients are most of the noise otherwise."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def main() -> None:
    warnings.filterwarnings("ignore")
    keep_memory()
    torch.set_num_threads(1)
    options = arguments(__doc__)
    rounds, steps = (4, 2) if options.quick else (9, 3)
    figures: dict[str, Figure] = {}
    for way in WAYS:
        figures |= compare(way, rounds, steps)
    for mode in SWEEP_TARGETS:
        figures |= sweep_cost(mode, max(3, rounds // 2))
    report("capture_overhead", figures, options.format)


if __name__ == "__main__":
    main()
