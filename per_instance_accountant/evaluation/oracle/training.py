"""Many runs of one training, paired: the same start, batches and noise, only the instances left out
differ.

A run without an instance draws the batches of the full run and gives that instance's gradient the
weight 0; rates and denominators stay. So two runs differ by what the instance did and by nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from per_instance_accountant.errors import GuaranteeError, UsageError
from per_instance_accountant.finetuning.methods import Ensemble, Instances
from per_instance_accountant.finetuning.methods.ensemble import Weights
from per_instance_accountant.finetuning.methods.losses import cross_entropies

Ids = Sequence[ArrayLike]


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """``w -= learning_rate ((sum of gradients + N(0, noise_std^2)) / denominator + weight_decay w)`` on
    Poisson batches: a DP-SGD or Langevin run whose clip norm never binds, plain SGD for
    ``noise_std=0``.

    noise_std: per coordinate of the sum, ``noise_multiplier * max_grad_norm``. denominator: expected
    batch size. Raises UsageError PIA070.

    >>> Training(steps=10, learning_rate=0.5, sample_rate=0.1, denominator=50.0).noise_std
    0.0
    """

    steps: int
    learning_rate: float
    sample_rate: float
    denominator: float
    weight_decay: float = 0.0
    noise_std: float = 0.0

    def __post_init__(self) -> None:
        numbers = (self.learning_rate, self.sample_rate, self.denominator, self.weight_decay, self.noise_std)
        positive = min(self.steps, self.learning_rate, self.sample_rate, self.denominator) > 0
        if not all(map(math.isfinite, numbers)) or not positive or self.sample_rate > 1 or min(numbers) < 0:
            raise UsageError(
                "PIA070",
                f"{self} has a number outside its range",
                "Nothing was trained",
                "Training(steps=500, learning_rate=0.5, sample_rate=0.1, denominator=50.0)",
            )


class PairedTraining:
    """R requests times S seeds, member ``r * S + s``: request r leaves out the instances ``without[r]``.

    start: S models, or R * S. train: N instances, without leading dimension. The draws of a seed depend
    on the seed and the stream alone: on neither the other seeds, the requests nor how the steps are
    divided. device: where the arithmetic happens; draws are made on the CPU, so that they are the same
    everywhere.
    """

    def __init__(
        self,
        start: Ensemble,
        train: Instances,
        training: Training,
        *,
        seeds: Sequence[int],
        without: Ids,
        stream: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.training, self.seeds, self.device = training, tuple(seeds), torch.device(device)
        self._requests = len(without)
        if train.labels.ndim != 1 or start.size not in {len(self.seeds), self._requests * len(self.seeds)}:
            raise UsageError(
                "PIA071",
                f"{start.size} models, {len(self.seeds)} seeds, labels with {train.labels.ndim} dimensions",
                "Runs could not be paired",
                "PairedTraining(fresh(module, seeds), train, training, seeds=seeds, without=[[], [3]])",
            )
        self._inputs, self._labels = train.inputs.to(self.device), train.labels.to(self.device)
        self._keep = _kept(without, len(train)).to(self.device)
        repeats = self._requests * len(self.seeds) // start.size
        self._state = start.with_parameters(_tiled(start.parameters, repeats, self.device))
        self._state = Ensemble(
            module=start.module,
            parameters=self._state.parameters,
            fixed=_tiled(start.fixed, repeats, self.device),
        )
        self._draws = [
            torch.Generator().manual_seed(
                int(np.random.SeedSequence([abs(seed), stream]).generate_state(1)[0])
            )
            for seed in self.seeds
        ]

    @property
    def models(self) -> Ensemble:
        """All R * S models, on the CPU."""
        cpu = {name: value.cpu() for name, value in self._state.parameters.items()}
        fixed = {name: value.cpu() for name, value in self._state.fixed.items()}
        return Ensemble(module=self._state.module, parameters=cpu, fixed=fixed)

    def advance(self, steps: int) -> None:
        """Take so many further steps. Raises GuaranteeError PIA011 if a weight is no longer finite."""
        for _ in range(steps):
            self._step()
        finite = [bool(torch.isfinite(value).all()) for value in self._state.parameters.values()]
        if not all(finite):
            raise GuaranteeError(
                "PIA011",
                "some weights became NaN or infinite in training",
                "No loss, accuracy or distance of such a model means anything",
                f"Training(learning_rate={self.training.learning_rate / 10:g}, ...)",
            )

    def _batch(self) -> tuple[Tensor, Tensor]:
        """(S, B) positions, padded to the largest batch, and which of them are real."""
        count = len(self._labels)
        if self.training.sample_rate == 1:
            every = torch.arange(count).expand(len(self.seeds), count)
            return every, torch.ones_like(every, dtype=torch.bool)
        uniform = torch.stack([torch.rand(count, generator=g, dtype=torch.float64) for g in self._draws])
        drawn = uniform < self.training.sample_rate
        width = max(int(drawn.sum(1).max()), 1)
        index = drawn.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
        return index, drawn.gather(1, index)

    def _step(self) -> None:
        index, real = (part.to(self.device) for part in self._batch())
        weights = (self._keep[:, index] & real).flatten(0, 1)
        leaves = {name: w.detach().requires_grad_(True) for name, w in self._state.parameters.items()}
        inputs = _tile(self._inputs[index], self._requests)
        labels = _tile(self._labels[index], self._requests)
        losses = cross_entropies(self._state.logits(inputs, leaves), labels)
        total = torch.where(weights, losses, 0.0).sum() / self.training.denominator
        slopes = torch.autograd.grad(total, list(leaves.values()))
        self._state = self._state.with_parameters(self._moved(slopes))

    def _moved(self, slopes: Sequence[Tensor]) -> Weights:
        setting = self.training
        moved = {}
        for (name, value), slope in zip(self._state.parameters.items(), slopes, strict=True):
            change = slope + setting.weight_decay * value
            if setting.noise_std > 0:
                shape = tuple(value.shape[1:])
                noise = torch.stack([torch.randn(shape, generator=g) for g in self._draws]).to(value)
                change = change + _tile(noise, self._requests) * (setting.noise_std / setting.denominator)
            moved[name] = value - setting.learning_rate * change
        return moved

    def fork(self, training: Training, without: Ids, member: int) -> PairedTraining:
        """Runs that go on from request ``member`` here, with the batches and the noise that follow
        here."""
        count = len(self.seeds)
        start = part(self.models, range(member * count, (member + 1) * count))
        train = Instances(inputs=self._inputs.cpu(), labels=self._labels.cpu())
        other = PairedTraining(start, train, training, seeds=self.seeds, without=without, device=self.device)
        for own, copied in zip(other._draws, self._draws, strict=True):
            own.set_state(copied.get_state())
        return other

    def go_on_with(self, training: Training) -> None:
        """Another setting from here on, for example the one of fine-tuning."""
        self.training = training


def _kept(without: Ids, count: int) -> Tensor:
    keep = torch.ones(len(without), count, dtype=torch.bool)
    for row, positions in enumerate(without):
        index = np.asarray(positions, dtype=np.int64).ravel()
        if index.size and (index.min() < 0 or index.max() >= count or np.unique(index).size != index.size):
            raise UsageError(
                "PIA071",
                f"request {row} names positions outside 0 .. {count - 1} or twice",
                "Nothing was trained",
                "without=[[], [3], [17]] with positions of the training set",
            )
        keep[row, torch.from_numpy(index)] = False
    return keep


def _tile(values: Tensor, repeats: int) -> Tensor:
    return values if repeats == 1 else values.repeat((repeats,) + (1,) * (values.ndim - 1))


def _tiled(weights: Weights, repeats: int, device: torch.device) -> Weights:
    return {name: _tile(value.to(device), repeats) for name, value in weights.items()}


def part(models: Ensemble, members: Iterable[int]) -> Ensemble:
    """Some members of an ensemble, by number."""
    index = torch.as_tensor(list(members))
    return Ensemble(
        module=models.module,
        parameters={name: value[index] for name, value in models.parameters.items()},
        fixed={name: value[index] for name, value in models.fixed.items()},
    )


def checkpoints(
    start: Ensemble,
    train: Instances,
    training: Training,
    *,
    seeds: Sequence[int],
    at: Sequence[int],
    device: str | torch.device = "cpu",
) -> list[Ensemble]:
    """The models of one ordinary training after ``at`` (increasing) steps, one model per seed.

    Raises UsageError PIA070 for steps that do not increase or exceed the training.
    """
    taken = np.asarray(at, dtype=np.int64)
    if not taken.size or taken[0] < 0 or (np.diff(taken) <= 0).any() or taken[-1] > training.steps:
        raise UsageError(
            "PIA070",
            f"{taken.size} checkpoints are not increasing steps in 0 .. {training.steps}",
            "Nothing was trained",
            "checkpoints(start, train, training, seeds=seeds, at=[0, 100, 200])",
        )
    run = PairedTraining(start, train, training, seeds=seeds, without=[[]], device=device)
    found = []
    for before, after in zip((0, *taken[:-1].tolist()), taken.tolist(), strict=True):
        run.advance(after - before)
        found.append(run.models)
    return found
