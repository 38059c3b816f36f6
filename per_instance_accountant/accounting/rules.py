"""Charging rules: where the bound on one instance's contribution at one step comes from, and what the sum
then means."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from per_instance_accountant.errors import UsageError


class Basis(enum.StrEnum):
    """What a number about one instance means. Never print one without its basis.

    CERTIFIED: both Renyi divergences between training with and without the instance are at most this value.
    OUTPUT_SPECIFIC: holds on the set of runs whose accumulated loss stays under a budget fixed in advance
    (Yu et al. 2023; Feldman and Zrnic 2021); the realised sum itself is NOT a bound on the divergence.
    ESTIMATE: a score. Ranks instances, bounds nothing.
    """

    CERTIFIED = "CERTIFIED"
    OUTPUT_SPECIFIC = "OUTPUT_SPECIFIC"
    ESTIMATE = "ESTIMATE"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstCase:
    """Everybody is charged the clip norm at every step: Opacus' own accounting, for every instance."""

    name: ClassVar[str] = "worst_case"
    basis: ClassVar[Basis] = Basis.CERTIFIED


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FixedThresholds:
    """Instance i is clipped at ``min(thresholds[i], max_grad_norm)``, chosen before training from x_i and
    public things.

    thresholds: (N,) non-negative finite numbers, in dataset order. Needed for training; when reading a ledger
    ``FixedThresholds()`` means the thresholds that the ledger recorded as enforced.

    >>> FixedThresholds(thresholds=[0.5, 1.0]).as_float32().tolist()
    [0.5, 1.0]
    """

    thresholds: ArrayLike | None = None
    name: ClassVar[str] = "fixed_thresholds"
    basis: ClassVar[Basis] = Basis.CERTIFIED

    def as_float32(self) -> NDArray[np.float32]:
        """Thresholds in the precision that clipping enforces and the ledger records: (N,) float32.

        Raises UsageError PIA070 for NaN, infinite or negative values, PIA071 for a wrong shape or None.
        """
        values = (
            np.asarray(self.thresholds, dtype=np.float64) if self.thresholds is not None else np.empty((0, 0))
        )
        if values.ndim != 1:
            raise UsageError(
                "PIA071",
                f"thresholds has shape {values.shape}, expected one number per instance",
                "Without a threshold per instance there is no individual bound to enforce",
                "FixedThresholds(thresholds=norm_bounds) with one number per dataset position",
            )
        bad = ~(np.isfinite(values) & (values >= 0))
        if bad.any():
            raise UsageError(
                "PIA070",
                f"{int(bad.sum())} of {values.size} thresholds are negative, NaN or infinite",
                "They cannot be enforced by clipping, so they would bound nothing",
                "FixedThresholds(thresholds=np.minimum(norm_bounds, max_grad_norm))",
            )
        return values.astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """At public steps 0, every, 2*every, ... all norms are measured; until the next sweep instance i is
    clipped at
    ``min(max_grad_norm, slack * norm_i)``.

    every: steps between sweeps, at least 1. slack: at least 1; larger changes training less and charges more.
    """

    every: int
    slack: float = 1.2
    name: ClassVar[str] = "sweep"
    basis: ClassVar[Basis] = Basis.OUTPUT_SPECIFIC

    def __post_init__(self) -> None:
        if self.every < 1 or self.every != int(self.every):
            raise UsageError(
                "PIA070",
                f"Sweep(every={self.every!r}), allowed is an integer of at least 1",
                "Without sweeps no threshold exists",
                "Sweep(every=50, slack=1.2)",
            )
        if not (math.isfinite(self.slack) and self.slack >= 1):
            raise UsageError(
                "PIA070",
                f"Sweep(slack={self.slack!r}), allowed is [1, inf)",
                "A slack below 1 would clip every instance below its own measured norm",
                "Sweep(every=50, slack=1.2)",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Unamplified:
    """0 when not drawn, the observed contribution when drawn, no amplification by sampling.

    The right rule for shuffled, cyclic and other non-Poisson loaders: it holds whatever the public batch
    order.
    """

    name: ClassVar[str] = "unamplified"
    basis: ClassVar[Basis] = Basis.OUTPUT_SPECIFIC


@dataclass(frozen=True, slots=True, kw_only=True)
class LastSeen:
    """The norm with which the instance was last drawn, charged at every step; the clip norm until then.

    A score after Yu et al. 2023 and Thudi et al. 2024 practice: nothing enforces the norm between two draws.
    """

    name: ClassVar[str] = "last_seen"
    basis: ClassVar[Basis] = Basis.ESTIMATE


ChargingRule = WorstCase | FixedThresholds | Sweep | Unamplified | LastSeen
