"""The models that ``pia demo`` trains: real data, real Opacus, one training run per function.

Everything that scales a feature or bounds a gradient is a public constant, so the thresholds and the
contraction
factor are known before any data are seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from tqdm.auto import tqdm

from per_instance_accountant.accounting import FixedThresholds, Sweep, WorstCase
from per_instance_accountant.finetuning import reseed, secret_of
from per_instance_accountant.opacus_adapter import PrivacyEngine, sgld_configuration
from per_instance_accountant.unlearning import softmax_regression

PIXEL_SCALE = 80.0
"""Public: pixels lie in 0..16, so rows divided by 80 have norm at most 1.6, and are clipped to norm 1."""
BIAS = 0.2
TRAINING_SET = 1437
SLACK = 1.001
"""Thresholds are this much above the largest possible gradient norm, so that clipping never binds, also in
float32."""
CLIP = math.sqrt(2) * SLACK
WEIGHT_DECAY = 0.02
FORGET = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """Scikit-learn's digits, split once. features: rows of norm at most 1 with a constant bias entry."""

    train: TensorDataset
    test_features: Tensor
    test_labels: Tensor

    @property
    def features(self) -> Tensor:
        return self.train.tensors[0]

    @property
    def labels(self) -> Tensor:
        return self.train.tensors[1]

    def accuracy(self, model: nn.Module) -> float:
        """Share of the held-out digits that ``model`` gets right."""
        with torch.no_grad():
            return float((model(self.test_features).argmax(1) == self.test_labels).float().mean())


def load_data(seed: int) -> Digits:
    """The bundled digits, shuffled by ``seed`` into 1,437 rows for training and 360 for testing."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(pixels))
    rows = np.concatenate([pixels / PIXEL_SCALE, np.full((len(pixels), 1), BIAS)], axis=1)[order]
    rows *= np.minimum(1.0, (1 - 1e-6) / np.linalg.norm(rows, axis=1))[:, None]
    x, y = torch.tensor(rows, dtype=torch.float32), torch.tensor(labels[order])
    train = TensorDataset(x[:TRAINING_SET], y[:TRAINING_SET])
    return Digits(train=train, test_features=x[TRAINING_SET:], test_labels=y[TRAINING_SET:])


def convex_model() -> nn.Linear:
    """Softmax regression from 65 features to 10 classes, started at zero (a point that everybody knows)."""
    model = nn.Linear(65, 10, bias=False)
    nn.init.zeros_(model.weight)
    return model


def neural_network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(65, 32), nn.ReLU(), nn.Linear(32, 10))


def input_thresholds(digits: Digits) -> FixedThresholds:
    """A softmax gradient is (p - e_y) x^T with norm at most sqrt(2) |x|: a bound that needs no look at any
    gradient."""
    norms = digits.features.double().norm(dim=1).numpy()
    return FixedThresholds(thresholds=math.sqrt(2) * SLACK * norms)


def train_convex(
    digits: Digits,
    *,
    seed: int,
    ledger: Path | None,
    steps: int,
    sample_rate_inverse: int = 2,
    noise_multiplier: float = 6.0,
    learning_rate: float = 1.0,
    without: list[int] | None = None,
    continued: int = 0,
) -> tuple[PrivacyEngine, nn.Linear]:
    """DP-SGD on the convex model.

    without: rows to leave out, with sampling rate and normaliser of the full run. continued: further steps,
    with the batches and the noise that unlearning with this seed uses, so that both can be compared.
    """
    model = convex_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY)
    denominator = TRAINING_SET // sample_rate_inverse
    rule: Any = input_thresholds(digits)
    data: Dataset[Any] = digits.train
    if without is not None:
        kept = np.setdiff1d(np.arange(TRAINING_SET), without)
        data, rule = Subset(digits.train, kept.tolist()), WorstCase()
    engine = PrivacyEngine(
        accountant="rdp",
        ledger=ledger,
        charging=rule,
        groups=None if without is not None else {"digit": digits.labels.numpy()},
        assumptions=softmax_regression(
            feature_norm=1.0,
            num_instances=TRAINING_SET,
            denominator=float(denominator),
            individual_thresholds=without is None,
        ).to_dict(),
    )
    made = _make_private(engine, model, optimizer, data, sample_rate_inverse, seed, noise_multiplier, CLIP)
    made.optimizer.expected_batch_size = denominator
    _fit(made, steps, "convex model" if without is None else "retraining")
    _fit(made, continued, "retraining, continued", secret=secret_of(seed))
    return engine, model


def train_network(digits: Digits, *, seed: int, ledger: Path, steps: int) -> tuple[PrivacyEngine, nn.Module]:
    """DP-SGD on the small network, individual thresholds from public sweeps."""
    model = neural_network(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    engine = PrivacyEngine(
        accountant="rdp",
        ledger=ledger,
        charging=Sweep(every=20, slack=1.2),
        groups={"digit": digits.labels.numpy()},
    )
    made = _make_private(engine, model, optimizer, digits.train, 10, seed, 1.5, 1.0)
    _fit(made, steps, "neural network")
    return engine, model


def train_sgld(
    digits: Digits, *, seed: int, ledger: Path, steps: int, step_size: float, temperature: float
) -> tuple[PrivacyEngine, nn.Linear]:
    """Full-batch SGLD on the mean potential: theta - eta grad U(theta) + N(0, 2 eta T)."""
    learning_rate, noise_multiplier = sgld_configuration(
        step_size=step_size,
        temperature=temperature,
        expected_batch_size=TRAINING_SET,
        num_instances=TRAINING_SET,
        max_grad_norm=CLIP,
        potential="mean",
    )
    return train_convex(
        digits,
        seed=seed,
        ledger=ledger,
        steps=steps,
        sample_rate_inverse=1,
        noise_multiplier=noise_multiplier,
        learning_rate=learning_rate,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Private:
    """What make_private returned, with the generators that draw batches and noise."""

    model: nn.Module
    optimizer: Any
    loader: DataLoader[Any]
    sampling: torch.Generator
    noise: torch.Generator


def _make_private(
    engine: PrivacyEngine,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Dataset[Any],
    sample_rate_inverse: int,
    seed: int,
    noise_multiplier: float,
    max_grad_norm: float,
) -> _Private:
    batch_size = -(-len(data) // sample_rate_inverse)  # type: ignore[arg-type]
    sampling = torch.Generator().manual_seed(seed)
    noise = torch.Generator().manual_seed(seed + 1_000_003)
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(data, batch_size=batch_size, generator=sampling),
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        criterion=nn.CrossEntropyLoss(),
        noise_generator=noise,
    )
    return _Private(model=private, optimizer=optimizer, loader=loader, sampling=sampling, noise=noise)


def _endless(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def _fit(made: _Private, steps: int, title: str, secret: bytes | None = None) -> None:
    criterion = nn.CrossEntropyLoss()
    batches = _endless(made.loader)
    for step in tqdm(range(steps), desc=title, unit="step", disable=None, leave=False):
        if secret is not None:
            reseed(made.sampling, made.noise, secret=secret, step=step)
        features, labels = next(batches) if secret is None else next(iter(made.loader))
        made.optimizer.zero_grad()
        criterion(made.model(features), labels).backward()
        made.optimizer.step()
