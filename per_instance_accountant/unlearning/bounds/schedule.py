"""A training run as the bounds see it: shifts, noise and contraction per step, measured at the end of
training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from per_instance_accountant.errors import UsageError
from per_instance_accountant.unlearning.bounds.interface import Tail, require

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Schedule:
    """T training steps followed by identical unlearning steps.

    Step t moves the iterate by a map that is ``contraction[t]``-Lipschitz without the forget set, adds
    ``N(0, noise_std[t]^2 I)``, and member i of the forget set, when drawn, shifts it by at most ``shifts[t,
    i]``.

    shifts: (T, f). noise_std, contraction, rates: (T,); ``rates`` are sampling probabilities (1: no
    amplification). tail: the unlearning steps. Raises UsageError PIA070 for negative, NaN or infinite
    entries, PIA071 for shapes.
    """

    shifts: Array
    noise_std: Array
    contraction: Array
    rates: Array
    tail: Tail

    def __post_init__(self) -> None:
        steps = self.shifts.shape[0]
        for name in ("noise_std", "contraction", "rates"):
            if getattr(self, name).shape != (steps,) or self.shifts.ndim != 2:
                raise UsageError(
                    "PIA071",
                    f"{name} has shape {getattr(self, name).shape}, the shifts {self.shifts.shape}",
                    "Every training step needs one entry",
                    f"pass {name} with one number per training step",
                )
        for name in ("shifts", "noise_std", "contraction"):
            values = getattr(self, name)
            require(
                bool(np.all(np.isfinite(values) & (values >= 0))),
                name,
                "an array with bad entries",
                "[0, inf)",
            )
        ok = (self.rates >= 0) & (self.rates <= 1)
        require(bool(np.all(ok)), "rates", "an array with bad entries", "[0, 1]")

    def weights(self) -> Array:
        """(T,) ``w_t = prod_{r>t} contraction_r``: what is left at the end of training of a distance after
        step t."""
        later = np.concatenate([self.contraction[1:], np.ones(1)])[: len(self.contraction)]
        with np.errstate(over="ignore"):
            return np.cumprod(later[::-1])[::-1]

    def arrivals(self) -> Array:
        """(T, f) shifts measured at the end of training."""
        with np.errstate(invalid="ignore", over="ignore"):
            return np.where(self.shifts > 0, self.shifts * self.weights()[:, None], 0.0)

    def variances(self) -> Array:
        """(T,) noise variances measured at the end of training."""
        with np.errstate(invalid="ignore", over="ignore"):
            return np.where(self.noise_std > 0, (self.noise_std * self.weights()) ** 2, 0.0)

    @property
    def is_constant(self) -> bool:
        """Whether shift, noise and contraction are the same at every step."""
        per_step = np.column_stack([self.shifts, self.noise_std, self.contraction])
        return bool(len(per_step) and np.all(per_step == per_step[0]))


def schedule(
    *,
    sensitivity: ArrayLike,
    noise_std: ArrayLike,
    contraction: ArrayLike,
    training_steps: int | None = None,
    sample_rate: ArrayLike = 1.0,
    unlearning_noise_std: float | None = None,
    unlearning_contraction: float | None = None,
) -> Schedule:
    """A :class:`Schedule` from plain numbers (the same at every step) or arrays (one entry per training
    step).

    sensitivity: number, (T,) or (T, f). noise_std, contraction, sample_rate: number or (T,). All on the
    iterate: sensitivity is ``learning_rate * threshold / denominator``, noise_std ``learning_rate * noise /
    denominator``. The unlearning steps use the last training step's noise and contraction unless given.
    """
    given = [np.asarray(v, dtype=np.float64) for v in (sensitivity, noise_std, contraction, sample_rate)]
    lengths = {v.shape[0] for v in given if v.ndim} | (
        {int(training_steps)} if training_steps is not None else set()
    )
    if len(lengths) != 1 or not min(lengths) >= 1:
        raise UsageError(
            "PIA071",
            f"{len(lengths)} different numbers of training steps were given",
            "The bound needs the same number of training steps in every schedule",
            "training_steps=1000 with numbers, or arrays of one length",
        )
    count = lengths.pop()
    shifts = given[0] if given[0].ndim == 2 else np.broadcast_to(given[0], (count,))[:, None]
    noise, factor, rates = (np.broadcast_to(v, (count,)).astype(np.float64) for v in given[1:])
    tail = Tail(
        noise_std=float(noise[-1] if unlearning_noise_std is None else unlearning_noise_std),
        contraction=float(factor[-1] if unlearning_contraction is None else unlearning_contraction),
    )
    return Schedule(shifts=shifts, noise_std=noise, contraction=factor, rates=rates, tail=tail)
