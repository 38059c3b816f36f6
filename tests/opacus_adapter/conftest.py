"""Small private trainings with data whose instances can be told apart by their bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import opacus
import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from per_instance_accountant.ledger import Step
from per_instance_accountant.opacus_adapter import PrivacyEngine

torch.set_num_threads(1)


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.second = nn.Conv2d(4, 6, 3, stride=2)
        self.last = nn.Linear(54, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.first(x)))
        return self.last(torch.relu(self.second(hidden)).flatten(1))


class Tokens(nn.Module):
    """An embedding and a linear layer over a sequence: per-instance sums over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.last = nn.Embedding(20, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.hidden(self.embedding(x)))).mean(dim=1)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3))


def examples(count: int = 97, shape: tuple[int, ...] = (10,), seed: int = 0) -> TensorDataset:
    """Inputs of very different sizes, so that gradients differ and some are clipped."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *shape, generator=generator)
    scale = torch.exp(torch.randn(count, *([1] * len(shape)), generator=generator))
    return TensorDataset(x * scale, torch.randint(0, 3, (count,), generator=generator))


def token_examples(count: int = 60) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 20, (count, 7), generator=generator)
    return TensorDataset(x, torch.randint(0, 3, (count,), generator=generator))


@dataclass
class Training:
    """What make_private returned, and what went into it."""

    engine: Any
    model: Any
    optimizer: Any
    criterion: Any
    loader: Any
    module: nn.Module
    dataset: TensorDataset
    seen: list[torch.Tensor] = field(default_factory=list)

    @property
    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.module.parameters()])

    @property
    def steps(self) -> list[Step]:
        return [event for event in self.engine.ledger.events() if isinstance(event, Step)]

    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.module.named_parameters()}

    def step(self, batch: Any) -> None:
        x, y = batch
        self.optimizer.zero_grad()
        self.criterion(self.model(x), y).backward()
        self.optimizer.step()

    @contextlib.contextmanager
    def physical(self, limit: int | None = 5) -> Iterator[Any]:
        if limit is None:
            yield self.loader
            return
        with BatchMemoryManager(
            data_loader=self.loader, max_physical_batch_size=limit, optimizer=self.optimizer
        ) as loader:
            yield loader

    def train(self, epochs: int = 1, limit: int | None = None) -> Training:
        for _ in range(epochs):
            with self.physical(limit) as loader:
                for batch in loader:
                    self.step(batch)
        return self

    def rows_of(self, x: torch.Tensor) -> list[int]:
        """Positions of these inputs, found by their bytes."""
        table = {row.numpy().tobytes(): i for i, row in enumerate(self.dataset.tensors[0])}
        return [table[row.numpy().tobytes()] for row in x]


def norms_by_hand(module: nn.Module, parameters: Any, x: Any, y: Any) -> np.ndarray:
    """Per-instance gradient norms by torch.func in float64, without any code of Opacus."""
    parameters = {k: v.double() for k, v in parameters.items()}
    x = x.double() if x.is_floating_point() else x

    def loss(p: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(module, p, (a[None],)), b[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    squares = sum(g.reshape(len(g), -1).square().sum(dim=1) for g in gradients.values())
    return squares.sqrt().numpy()


@pytest.fixture
def by_hand() -> Callable[..., np.ndarray]:
    return norms_by_hand


@pytest.fixture
def start() -> Callable[..., Training]:
    """start(engine=..., mode=..., ...) -> Training."""

    def build(
        engine: Any = None,
        *,
        mode: str = "hooks",
        module: nn.Module | None = None,
        dataset: TensorDataset | None = None,
        batch_size: int = 12,
        noise_multiplier: float = 0.7,
        max_grad_norm: float = 0.8,
        reduction: str = "mean",
        lr: float = 0.05,
        seed: int = 1,
        loader: dict[str, Any] | None = None,
        optimizer: Any = None,
        criterion: Any = None,
        **arguments: Any,
    ) -> Training:
        torch.manual_seed(seed)
        engine = engine or PrivacyEngine(accountant="rdp")
        module, dataset = module or perceptron(), dataset or examples()
        optimizer = optimizer or torch.optim.SGD(module.parameters(), lr=lr)
        criterion = criterion or nn.CrossEntropyLoss(reduction=reduction)
        made = engine.make_private(
            module=module,
            optimizer=optimizer,
            data_loader=DataLoader(dataset, batch_size=batch_size, **(loader or {})),
            criterion=criterion,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            loss_reduction=reduction,
            grad_sample_mode=mode,
            **arguments,
        )
        model = module if arguments.get("wrap_model") is False else made[0]
        loss = made[2] if len(made) == 4 else criterion
        return Training(engine, model, made[1], loss, made[-1], module, dataset)

    return build


@pytest.fixture
def stock() -> Callable[..., Any]:
    """A stock Opacus engine."""
    return lambda: opacus.PrivacyEngine(accountant="rdp")


@pytest.fixture
def models() -> dict[str, Callable[[], tuple[nn.Module, TensorDataset]]]:
    return {
        "perceptron": lambda: (perceptron(), examples()),
        "convolutional": lambda: (Convolutional(), examples(60, (1, 8, 8))),
        "tokens": lambda: (Tokens(), token_examples()),
    }
