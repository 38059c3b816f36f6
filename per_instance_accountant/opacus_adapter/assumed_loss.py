"""Whether the loss that a sweep assumed is the loss of the training loop."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.errors import UsageError

Norms = NDArray[np.float64]
LOSS_FACTOR = 2.0
"""By how much the median norm of a sweep may differ from that of the loop: dropout is off in sweeps."""


class AssumedLoss:
    """Compares norms of a sweep with those of the loop at the same parameters, until one step agreed.

    assumed: whether the loss of the loop is not known.
    """

    def __init__(self, assumed: bool) -> None:
        self._assumed = assumed
        self._swept: Norms | None = None
        self._compared: list[Norms] = []

    @property
    def in_doubt(self) -> bool:
        """Whether the next step is to be compared."""
        return self._swept is not None

    def swept(self, norms: Norms) -> None:
        """Norms (N,) of all rows, just measured."""
        self._swept = norms if self._assumed else None

    def moved(self) -> None:
        """The parameters change, so that norms of the sweep are no longer those of the loop."""
        self._swept, self._compared = None, []

    def compare(self, rows: NDArray[np.int64], norms: Norms, *, first: bool, last: bool) -> None:
        """Compare the norms of a part of a logical batch. Raises UsageError PIA071."""
        if self._swept is None:
            return
        compared = [] if first else list(self._compared)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = norms / self._swept[rows]
        compared.append(np.where(np.isnan(ratios), 1.0, ratios))
        together = np.concatenate(compared)
        if not last or not together.size:
            self._compared = compared
        elif 1 / LOSS_FACTOR <= np.median(together) <= LOSS_FACTOR:
            self._assumed = False
            self.moved()
        else:
            raise UsageError(
                "PIA071",
                "the sweep used another loss than the loop: their norms of the same instances disagree",
                "Instances would be clipped at norms of a loss that is not trained; nothing was released",
                "make_private(..., criterion=...) with the loss of the training loop",
            )
