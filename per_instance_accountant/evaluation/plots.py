"""Pictures, where matplotlib is installed."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from per_instance_accountant.errors import MissingDependencyError, UsageError
from per_instance_accountant.evaluation.barriers import LossBarrier
from per_instance_accountant.results.files import write_private


def plot_damage(accuracy: ArrayLike, forgotten: ArrayLike, path: str | os.PathLike[str]) -> None:
    """Draw, request by request, what the retained instances lost and how much of the earlier ones is
    still forgotten, and write the picture to ``path`` (its ending chooses the format).

    accuracy: (requests + 1,) retained accuracy before the first request and after each; forgotten:
    (requests, requests) as in ``ContinualRun.forgotten`` for one model. Raises UsageError PIA071 for
    other shapes or values that are not finite, MissingDependencyError PIA061 without matplotlib.
    """
    kept, held = np.asarray(accuracy, dtype=np.float64), np.asarray(forgotten, dtype=np.float64)
    count = len(held)
    fits = kept.shape == (count + 1,) and held.shape == (count, count) and count > 0
    if not fits or not (np.isfinite(kept).all() and np.isfinite(held).all()):
        raise UsageError(
            "PIA071",
            f"accuracies of shape {kept.shape} and shares of {held.shape} do not fit or are not finite",
            "Nothing was drawn",
            "plot_damage(accuracy_before_and_after_each, run.forgotten[0], 'damage.svg')",
        )
    figure = _figure(8)
    turns = np.arange(1, count + 1)
    left, right = figure.subplots(1, 2)
    left.bar(turns, 100 * (kept[:-1] - kept[1:]))
    left.set(xlabel="request", ylabel="retained accuracy lost (points)", xticks=turns)
    for request in range(count):
        name, marker = f"request {request + 1}", "os^Dv<>P"[request % 8]
        right.plot(turns[request:], 100 * held[request:, request], marker=marker, linestyle=":", label=name)
    right.set(xlabel="after request", ylabel="still forgotten (%)", xticks=turns, ylim=(-5, 105))
    right.legend()
    _write(figure, path)


def plot_barriers(barriers: Mapping[str, LossBarrier], path: str | os.PathLike[str]) -> None:
    """Draw the mean loss on the line for every named barrier (before, after; or groups), averaged over
    models, and write the picture to ``path`` (its ending chooses the format).

    Raises UsageError PIA071 for none, MissingDependencyError PIA061 without matplotlib.
    """
    if not barriers:
        raise UsageError(
            "PIA071", "no barrier was given", "Nothing was drawn", "plot_barriers({'a': barrier}, 'line.svg')"
        )
    figure = _figure(5)
    axes = figure.subplots()
    for number, (name, barrier) in enumerate(barriers.items()):
        loss = barrier.path.reshape(len(barrier.path), -1).mean(1)
        axes.plot(np.linspace(0, 1, len(loss)), loss, marker="os^Dv<>P"[number % 8], label=name)
    axes.set(xlabel="share of the second model", ylabel="mean loss (nats)")
    axes.legend()
    _write(figure, path)


def _figure(width: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "PIA061",
            "matplotlib is not installed",
            "Nothing was drawn; the numbers are complete without the picture",
            "pip install 'per-instance-accountant[plots]'",
        ) from error
    return Figure(figsize=(width, 3), layout="constrained")


def _write(figure: Any, path: str | os.PathLike[str]) -> None:
    """Pictures of individual values are as sensitive as their tables."""
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(path).suffix[1:] or "png")
    write_private(path, picture.getvalue())
