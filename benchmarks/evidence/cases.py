"""Data sets that ship with scikit-learn, synthetic images, and the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from torch import Tensor, nn

from per_instance_accountant.cli.inputs import load_reference
from per_instance_accountant.evaluation import Training
from per_instance_accountant.evaluation.oracle import checkpoints
from per_instance_accountant.finetuning.methods import Ensemble, Instances, instances_of
from per_instance_accountant.finetuning.methods.ensemble import fresh


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """A data set with a model and the Langevin training ``noisy``. clip: clip norm of the recorded run,
    so large that it seldom binds."""

    name: str
    train: Instances
    test: Instances
    module: nn.Module
    noisy: Training
    clip: float

    @property
    def silent(self) -> Training:
        """The same training without noise: plain SGD."""
        return with_noise(self.noisy, 0.0)

    def start(self, seeds: range) -> Ensemble:
        return fresh(self.module, seeds)

    def trained(self, training: Training, seeds: range, looks: int) -> list[Ensemble]:
        """Checkpoints at equal distances, the first before any step."""
        at = np.unique(np.linspace(0, training.steps, looks).astype(int)).tolist()
        return checkpoints(self.start(seeds), self.train, training, seeds=seeds, at=at)


def with_noise(training: Training, noise_std: float) -> Training:
    return Training(
        steps=training.steps,
        learning_rate=training.learning_rate,
        sample_rate=training.sample_rate,
        denominator=training.denominator,
        weight_decay=training.weight_decay,
        noise_std=noise_std,
    )


def perceptron(inputs: int, hidden: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def _bundled(loader: Callable[[], Any], count: int, scale: float | None) -> tuple[Instances, Instances]:
    """Rows in a fixed random order; features divided by ``scale``, or standardised and divided by 3."""
    loaded = loader()
    rows = np.random.default_rng(0).permutation(len(loaded.target))
    values = loaded.data[rows]
    values = (values - values.mean(0)) / values.std(0) / 3 if scale is None else values / scale
    inputs = torch.tensor(values, dtype=torch.float32)
    labels = torch.tensor(loaded.target[rows], dtype=torch.int64)
    return (
        Instances(inputs=inputs[:count], labels=labels[:count]),
        Instances(inputs=inputs[count:], labels=labels[count:]),
    )


def digits() -> Case:
    train, test = _bundled(load_digits, 500, 16.0)
    return Case(
        name="digits",
        train=train,
        test=test,
        module=perceptron(64, 32, 10),
        noisy=training(500, steps=400, weight_decay=5e-3, noise_std=2.0),
        clip=20.0,
    )


def breast_cancer() -> Case:
    train, test = _bundled(load_breast_cancer, 300, None)
    return Case(
        name="breast_cancer",
        train=train,
        test=test,
        module=perceptron(30, 16, 2),
        noisy=training(300, steps=300, weight_decay=1e-2, noise_std=1.0),
        clip=10.0,
    )


def wine() -> Case:
    train, test = _bundled(load_wine, 120, None)
    return Case(
        name="wine",
        train=train,
        test=test,
        module=perceptron(13, 16, 3),
        noisy=training(120, steps=300, weight_decay=1e-2, noise_std=0.5),
        clip=10.0,
    )


def diabetes() -> Case:
    """Whether the disease progresses more than the median: labels that much of the data does not explain."""
    train, test = _bundled(load_diabetes, 300, None)
    middle = train.labels.median()
    return Case(
        name="diabetes",
        train=Instances(inputs=train.inputs, labels=(train.labels > middle).long()),
        test=Instances(inputs=test.inputs, labels=(test.labels > middle).long()),
        module=perceptron(10, 16, 2),
        noisy=training(300, steps=300, weight_decay=1e-2, noise_std=1.0),
        clip=10.0,
    )


def training(
    count: int, *, steps: int, weight_decay: float, noise_std: float, learning_rate: float = 0.5
) -> Training:
    """A tenth of the instances in a batch. Without weight decay nothing contracts,
    and fine-tuning forgets next to nothing."""
    return Training(
        steps=steps,
        learning_rate=learning_rate,
        sample_rate=0.1,
        denominator=0.1 * count,
        weight_decay=weight_decay,
        noise_std=noise_std,
    )


class ResidualNetwork(nn.Module):
    """A small ResNet with group normalisation: batch normalisation mixes instances, which no accounting
    allows."""

    def __init__(self, classes: int, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.first = nn.Sequential(
            nn.GroupNorm(4, width), nn.ReLU(), nn.Conv2d(width, width, 3, stride=2, padding=1)
        )
        self.second = nn.Sequential(nn.GroupNorm(4, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(self.stem(images))
        hidden = hidden + self.second(hidden)
        scores: Tensor = self.head(hidden.mean((2, 3)))
        return scores


def images(count: int = 60, classes: int = 4) -> Case:
    """Synthetic 3 x 32 x 32 images: a fixed pattern per class plus noise, a tenth with a wrong label.
    It exercises the path of CIFAR-10 and a ResNet, and shows nothing about them."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(classes, 3, 8, 8, generator=generator)
    patterns = nn.functional.interpolate(patterns, scale_factor=4)
    labels = torch.arange(2 * count) % classes
    inputs = patterns[labels] + torch.randn(2 * count, 3, 32, 32, generator=generator)
    noisy_labels = labels.clone()
    noisy_labels[: count // 10] = (labels[: count // 10] + 1) % classes
    return Case(
        name="images",
        train=Instances(inputs=inputs[:count], labels=noisy_labels[:count]),
        test=Instances(inputs=inputs[count:], labels=labels[count:]),
        module=ResidualNetwork(classes),
        noisy=training(count, steps=400, weight_decay=2e-2, noise_std=0.2, learning_rate=0.1),
        clip=20.0,
    )


def own(data: str, model: str, count: int, held_out: int, noise_std: float, steps: int) -> Case:
    """The user's map-style dataset of (input, label) pairs and module, both ``package.module:name``."""
    dataset, module = load_reference(data, "--data"), load_reference(model, "--model")
    order = np.random.default_rng(0).permutation(len(dataset))
    train = instances_of(dataset, order[:count])
    test = instances_of(dataset, order[count : count + held_out])
    return Case(
        name="own",
        train=train,
        test=test,
        module=module,
        noisy=training(len(train), steps=steps, weight_decay=5e-3, noise_std=noise_std),
        clip=20.0,
    )


BUNDLED: dict[str, Callable[[], Case]] = {
    "digits": digits,
    "breast_cancer": breast_cancer,
    "wine": wine,
    "diabetes": diabetes,
}
