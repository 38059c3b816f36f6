"""CPU time of a tracked training step relative to the same step in stock Opacus, with an A/A control.

Two stock trainings and a tracked one take turns, one block of steps each, in changing order. The control is
stock against stock: how far chance alone moves a ratio.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import opacus
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import Figure, arguments, report
from per_instance_accountant.opacus_adapter import PrivacyEngine

BATCH, COUNT = 64, 1024
TARGETS = {"hooks": 1.02, "ghost": 1.05}


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


def batches(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def prepare(engine: Any, model: Callable[[], nn.Module], mode: str) -> Callable[[int], float]:
    """A function that takes so many training steps and returns the CPU seconds of one."""
    torch.manual_seed(0)
    dataset = TensorDataset(torch.randn(COUNT, 784), torch.randint(0, 10, (COUNT,)))
    module, criterion = model(), nn.CrossEntropyLoss()
    made = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.01),
        data_loader=DataLoader(dataset, batch_size=BATCH),
        criterion=criterion,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )
    net, optimizer, loader = made[0], made[1], batches(made[-1])
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

    return run


def compare(model: str, mode: str, rounds: int, steps: int) -> dict[str, Figure]:
    """Ratios tracked/stock and stock/stock of lower quartiles, and milliseconds of a step of 64 instances."""
    with tempfile.TemporaryDirectory() as directory:
        tracked = PrivacyEngine(accountant="rdp", ledger=Path(directory) / "run")
        engines = [tracked, *(opacus.PrivacyEngine(accountant="rdp") for _ in range(2))]
        runs = [prepare(engine, MODELS[model], mode) for engine in engines]
        for run in runs:
            run(steps)
        times = np.empty((rounds, 3))
        order = np.random.default_rng(0)
        for row in times:
            for which in order.permutation(3):
                row[which] = runs[which](steps)
        tracked.close()
    # Other processes only ever add time: the lower quartile is what they disturb least.
    tracked_time, stock_time, other_time = np.quantile(times, 0.25, axis=0)
    stock = (stock_time + other_time) / 2
    key = f"{model}_{mode}"
    return {
        f"{key}_ratio": Figure(value=float(tracked_time / stock), target=TARGETS[mode]),
        f"{key}_control_ratio": Figure(value=float(stock_time / other_time)),
        f"{key}_added_ms": Figure(value=float(1e3 * (tracked_time - stock))),
        f"{key}_stock_ms": Figure(value=float(1e3 * stock)),
    }


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
    rounds, steps = (25, 2) if options.quick else (60, 3)
    figures: dict[str, Figure] = {}
    for model in MODELS:
        for mode in TARGETS:
            gc.collect()
            figures |= compare(model, mode, rounds, steps)
    report("capture_overhead", figures, options.format)


if __name__ == "__main__":
    main()
