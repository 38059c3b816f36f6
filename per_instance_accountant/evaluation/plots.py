"""Pictures of a continual run, where matplotlib is installed."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import ArrayLike

from per_instance_accountant.errors import MissingDependencyError, UsageError


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
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "PIA061",
            "matplotlib is not installed",
            "Nothing was drawn; the numbers are complete without the picture",
            "pip install 'per-instance-accountant[plots]'",
        ) from error
    turns = np.arange(1, count + 1)
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(turns, 100 * (kept[:-1] - kept[1:]))
    left.set(xlabel="request", ylabel="retained accuracy lost (points)", xticks=turns)
    for request in range(count):
        name, marker = f"request {request + 1}", "os^Dv<>P"[request % 8]
        right.plot(turns[request:], 100 * held[request:, request], marker=marker, linestyle=":", label=name)
    right.set(xlabel="after request", ylabel="still forgotten (%)", xticks=turns, ylim=(-5, 105))
    right.legend()
    figure.savefig(os.fspath(path))
