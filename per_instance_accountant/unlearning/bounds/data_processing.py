"""R0: the unlearning steps are post-processing, so what training cost is never exceeded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from per_instance_accountant.accounting.disclosures import disclosure_rdp
from per_instance_accountant.divergence import DEFAULT_ORDERS, group_gaussian_rdp, sampled_gaussian_rdp
from per_instance_accountant.errors import UsageError
from per_instance_accountant.unlearning.bounds.interface import MAX_STEPS, Bound, Measure, require

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DataProcessing(Bound):
    """Composition of all training steps: ``sum_t D_order(rate_t, ratios_t)``, the same for every K.

    counts, rates: (S,) spans of equal steps; ratios: (S, f) sensitivity over noise std, one column per
    member. disclosed: epsilons, for one member, of statistics that were published beside the model.
    """

    name: ClassVar[str] = "R0 data processing"
    assumptions_used: ClassVar[tuple[str, ...]] = ()
    measure: Measure
    counts: Array
    rates: Array
    ratios: Array
    disclosed: tuple[float, ...] = ()
    direction: str = "both"

    def rdp(self, steps: int, orders: Array) -> Array:
        """(m,) upper bounds in nats, whatever ``steps``."""
        del steps
        mu = self._gaussian()
        if mu is not None:
            return orders * (mu**2 / 2)
        total = np.zeros(len(orders))
        for rate in np.unique(self.rates).tolist():
            rows = self.rates == rate
            total += self.counts[rows] @ _step_rdp(rate, self.ratios[rows], orders)
        for epsilon in self.disclosed:
            total += disclosure_rdp(epsilon * self.ratios.shape[1], orders)
        return total * (1 + 1e-12)

    def mu(self, steps: int) -> float | None:
        """``sqrt(sum_t (sum_i ratio_ti)^2)`` when nothing is amplified by sampling, else None."""
        del steps
        return self._gaussian()

    def steps(self, target: float, max_steps: int = MAX_STEPS) -> float:
        """0 or inf: steps change nothing. Raises UsageError PIA070 unless target is in (0, inf)."""
        require(0 < target < math.inf, "target", target, "(0, inf)")
        require(max_steps >= 0 and max_steps == int(max_steps), "max_steps", max_steps, "[0, inf)")
        return 0 if self.value(0) <= target else math.inf

    def _gaussian(self) -> float | None:
        total = self.ratios.sum(axis=1)
        if self.disclosed or np.any((self.rates < 1) & (total > 0)):
            return None
        return math.sqrt(float(self.counts @ total**2)) * (1 + 1e-12)

    def conversion_orders(self, steps: int) -> Array:
        """``divergence.DEFAULT_ORDERS``."""
        return np.asarray(DEFAULT_ORDERS, dtype=np.float64)


def _step_rdp(rate: float, ratios: Array, orders: Array) -> Array:
    """(S, m) both-direction upper bounds of one step each; a group needs the joint bound, never a sum over
    members."""
    members = (ratios > 0).sum(axis=1)
    values = np.empty((len(ratios), len(orders)))
    single = members <= 1
    if single.any():
        values[single] = sampled_gaussian_rdp(rate, ratios[single].sum(axis=1), orders)
    for row in np.flatnonzero(~single).tolist():
        values[row] = group_gaussian_rdp(rate, ratios[row], orders)
    return values


def data_processing_from(
    counts: ArrayLike, rates: Array, ratios: Array, measure: Measure, disclosed: tuple[float, ...] = ()
) -> DataProcessing:
    """R0 for spans; equal spans are merged."""
    keys, inverse = np.unique(np.column_stack([rates, ratios]), axis=0, return_inverse=True)
    merged = np.bincount(inverse.ravel(), weights=np.asarray(counts, dtype=np.float64), minlength=len(keys))
    return DataProcessing(
        measure=measure,
        counts=merged.astype(np.float64),
        rates=keys[:, 0],
        ratios=keys[:, 1:],
        disclosed=disclosed,
    )


def data_processing(
    *,
    ratio: ArrayLike,
    sample_rate: float,
    training_steps: int,
    order: float | None = None,
    delta: float | None = None,
) -> DataProcessing:
    """R0: both directions, no assumption. Zero unlearning steps suffice or no number does.

    ratio: sensitivity over noise std of one instance, or (f,) of the members of a forget set. Raises
    UsageError PIA070, PIA071. One step: Mironov, Talwar and Zhang 2019; groups: our derivation,
    docs/math/unlearning_bounds.md.

    >>> bound = data_processing(ratio=1.0, sample_rate=0.01, training_steps=100, order=8)
    >>> round(bound.value(0), 6), bound.steps(0.1), bound.steps(0.01)
    (0.089364, 0, inf)
    """
    ratios = np.atleast_1d(np.asarray(ratio, dtype=np.float64))
    if ratios.ndim != 1:
        raise UsageError(
            "PIA071",
            f"ratio has shape {ratios.shape}",
            "Each member of the forget set needs one ratio",
            "data_processing(ratio=[0.5, 0.7], ...)",
        )
    require(bool(np.all(ratios >= 0)), "ratio", "negative or NaN", "[0, inf]")
    require(0 <= sample_rate <= 1, "sample_rate", sample_rate, "[0, 1]")
    require(training_steps >= 0, "training_steps", training_steps, "[0, inf)")
    counts, rates = np.array([float(training_steps)]), np.array([float(sample_rate)])
    return data_processing_from(counts, rates, ratios[None, :], Measure(order=order, delta=delta))
