"""The privacy loss of an instance decides how much work it gets. Every decision here is an ESTIMATE: it ranks
and saves work, it promises nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from per_instance_accountant.errors import UsageError

Reals = NDArray[np.float64]
Whole = NDArray[np.int64]


def _losses(losses: ArrayLike) -> Reals:
    values = np.asarray(losses, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all() or (values < 0).any():
        raise UsageError(
            "PIA070",
            f"privacy losses of shape {values.shape} are not all finite and at least 0",
            "No work can be divided by them",
            "losses = account(ledger).rdp[positions, 0]",
        )
    return values


def adversarial_counts(losses: ArrayLike, total: int, least: int = 1) -> Whole:
    """(n,) adversarial examples per instance, ``total`` in all: ``least`` each, the rest in proportion to the
    rank of the privacy loss (largest remainders; ranks, because losses differ by orders of magnitude).

    losses: (n,) in nats. Raises UsageError PIA070 for losses that are no numbers or a total below
    ``n * least``.

    >>> adversarial_counts([0.1, 5.0, 0.7], total=12).tolist()
    [3, 5, 4]
    """
    values = _losses(losses)
    spare = total - least * values.size
    if least < 0 or spare < 0:
        raise UsageError(
            "PIA070",
            f"{total} examples are fewer than {least} for each of {values.size} instances",
            "No example was made",
            f"adversarial_counts(losses, total={20 * values.size})",
        )
    ranks = np.empty(values.size)
    ranks[np.argsort(values, kind="stable")] = np.arange(1, values.size + 1)
    shares = spare * ranks / ranks.sum()
    counts = np.floor(shares).astype(np.int64)
    behind = np.argsort(counts - shares, kind="stable")[: spare - int(counts.sum())]
    counts[behind] += 1
    return counts + least


def requests_by_loss(losses: ArrayLike, requests: int, first: Literal["low", "high"] = "low") -> list[Whole]:
    """Positions in ``requests`` chunks of nearly equal size, in the order of the privacy loss.

    >>> [part.tolist() for part in requests_by_loss([0.3, 0.1, 0.2, 0.4], 2)]
    [[1, 2], [0, 3]]
    """
    values = _losses(losses)
    if not 1 <= requests <= values.size or first not in ("low", "high"):
        raise UsageError(
            "PIA070",
            f"{requests} requests of {values.size} instances, {first!r} first",
            "No order was chosen",
            'requests_by_loss(losses, requests=4, first="low")',
        )
    order = np.argsort(values if first == "low" else -values, kind="stable")
    return [part.astype(np.int64) for part in np.array_split(order, requests)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepCalibration:
    """Steps that requests of known privacy loss needed, measured on models of the same kind.

    losses: (g,) increasing, in nats; steps: (g,) not decreasing.
    """

    losses: Reals
    steps: Whole

    def __post_init__(self) -> None:
        fits = self.losses.shape == self.steps.shape and bool((np.diff(self.steps) >= 0).all())
        if not fits or not (np.diff(_losses(self.losses)) > 0).all():
            raise UsageError(
                "PIA070",
                "losses do not increase, or steps fall",
                "Nothing could be read off between them",
                "calibrate(losses, gaps, at, tolerance)",
            )


def calibrate(losses: ArrayLike, gaps: ArrayLike, at: ArrayLike, tolerance: float) -> StepCalibration:
    """Steps from which on the gap to retraining stays within the tolerance, never fewer for a larger loss.

    losses: (g,) distinct losses of g requests; gaps: (g, t) distance from the retrained model after ``at``
    (t,) increasing numbers of steps. Raises UsageError PIA070 where a request never stays within it.

    >>> calibrate([1.0, 2.0], [[0.0, 0.0], [0.3, 0.0]], [0, 40], 0.1).steps.tolist()
    [0, 40]
    """
    values, distance = _losses(losses), np.asarray(gaps, dtype=np.float64)
    steps = np.asarray(at, dtype=np.int64)
    fits = distance.shape == (values.size, steps.size) and steps.size > 0 and bool((np.diff(steps) > 0).all())
    within = np.isfinite(distance) & (distance <= tolerance) if fits else np.zeros((1, 1), dtype=bool)
    if not within[:, -1].all():
        raise UsageError(
            "PIA070",
            f"{int((~within[:, -1]).sum())} requests are not within {tolerance} after the last step",
            "No number of steps is known for them",
            "calibrate(losses, gaps, at, tolerance) with more steps or a larger tolerance",
        )
    since = within.shape[1] - np.logical_and.accumulate(within[:, ::-1], axis=1).sum(1)
    order = np.argsort(values, kind="stable")
    return StepCalibration(losses=values[order], steps=np.maximum.accumulate(steps[since][order]))


def steps_for(losses: ArrayLike, calibration: StepCalibration) -> Whole:
    """(n,) steps of the next larger calibrated loss.

    Raises UsageError PIA070 for a loss above all of them: nothing was measured there.

    >>> steps_for([0.5, 1.5], calibrate([1.0, 2.0], [[0.0, 0.0], [0.3, 0.0]], [0, 40], 0.1)).tolist()
    [0, 40]
    """
    values = _losses(losses)
    place = np.searchsorted(calibration.losses, values, side="left")
    beyond = int((place == calibration.losses.size).sum())
    if beyond:
        raise UsageError(
            "PIA070",
            f"{beyond} losses lie above every calibrated one",
            "The steps they need were never measured",
            "retrain for these requests, or calibrate with larger losses",
        )
    return calibration.steps[place]
