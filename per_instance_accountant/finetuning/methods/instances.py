"""The instances that a method works on: tensors of one model, or of several models side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import Dataset

from per_instance_accountant.errors import UsageError


def refuse(happened: str, meaning: str, fix: str, code: str = "PIA071") -> UsageError:
    """A usage error of the methods; wrong type or shape unless ``code`` says otherwise."""
    return UsageError(code, happened, meaning, fix)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Instances:
    """Inputs with their labels, and the labels wanted instead where the goal is to relabel.

    inputs: (n, ...) floating point, finite; labels: (n,) int64, not negative; targets: None or (n,) int64,
    each different from its label. For K models side by side everything has a leading dimension K.
    Raises UsageError PIA071 for other shapes, no instance, NaN or infinite inputs.

    >>> len(Instances(inputs=torch.zeros(3, 2), labels=torch.tensor([0, 1, 1])))
    3
    """

    inputs: Tensor
    labels: Tensor
    targets: Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.labels.shape)
        fix = "Instances(inputs=x, labels=y) with x of shape (n, ...) and y of shape (n,) and type int64"
        if self.labels.dtype != torch.int64 or len(shape) not in (1, 2) or 0 in shape:
            raise refuse(
                f"labels have shape {shape} and type {self.labels.dtype}", "Nothing was changed", fix
            )
        if tuple(self.inputs.shape[: len(shape)]) != shape or not self.inputs.is_floating_point():
            raise refuse(
                f"inputs of shape {tuple(self.inputs.shape)} do not belong to labels of shape {shape}",
                "Nothing was changed",
                fix,
            )
        if not bool(torch.isfinite(self.inputs).all()) or bool((self.labels < 0).any()):
            raise refuse(
                "some inputs are NaN or infinite, or some labels negative", "Nothing was changed", fix
            )
        if self.targets is not None and (
            self.targets.shape != self.labels.shape
            or self.targets.dtype != torch.int64
            or bool(((self.targets == self.labels) | (self.targets < 0)).any())
        ):
            raise refuse(
                "targets must be one other class per instance",
                "An instance whose target is its own label would count as forgotten without being changed",
                "Instances(inputs=x, labels=y, targets=wrong) with wrong != y everywhere",
            )

    def __len__(self) -> int:
        """Instances of one model."""
        return int(self.labels.shape[-1])

    @property
    def stacked(self) -> Instances:
        """With the leading dimension of models; one model if there was none."""
        if self.labels.ndim == 2:
            return self
        targets = None if self.targets is None else self.targets[None]
        return replace(self, inputs=self.inputs[None], labels=self.labels[None], targets=targets)

    def select(self, positions: ArrayLike) -> Instances:
        """Some of the instances, by position, of every model alike."""
        index = torch.as_tensor(np.asarray(positions, dtype=np.int64))
        along = self.labels.ndim - 1
        targets = None if self.targets is None else self.targets.index_select(along, index)
        return Instances(
            inputs=self.inputs.index_select(along, index),
            labels=self.labels.index_select(along, index),
            targets=targets,
        )


def instances_of(dataset: Dataset[Any], positions: ArrayLike) -> Instances:
    """Rows of a map-style dataset of ``(input, label)`` pairs, as tensors.

    Raises UsageError PIA071 if a row is no such pair or a position does not exist.

    >>> from torch.utils.data import TensorDataset
    >>> instances_of(TensorDataset(torch.eye(3), torch.arange(3)), [2]).labels
    tensor([2])
    """
    try:
        rows = [dataset[int(position)] for position in np.asarray(positions).tolist()]
        inputs = torch.stack([torch.as_tensor(row[0]) for row in rows])
        labels = torch.stack([torch.as_tensor(row[1], dtype=torch.int64) for row in rows])
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise refuse(
            f"the data cannot be read as pairs of an input and a label ({type(error).__name__})",
            "The instances to forget are not known",
            "torch.utils.data.TensorDataset(features, labels)",
        ) from error
    return Instances(inputs=inputs, labels=labels)
