"""Charging steps by chords: Renyi curves of one step at the nodes of the sensitivity grid, added up
per instance."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, final

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from per_instance_accountant.divergence import SensitivityGrid, sampled_gaussian_rdp
from per_instance_accountant.ledger.records import Phase

Array = NDArray[np.float64]

CHUNK: Final = 1 << 15
"""Instances that are charged at once; bounds the temporary memory."""
INFINITE: Final = 1e300
"""Stands for an infinite loss while adding up, because 0 times it is 0; no finite sum comes near."""


def clip_ratio(phase: Phase) -> float:
    """Sensitivity ratio of the worst case: clip norm over noise std, infinite without noise."""
    return phase.max_grad_norm / phase.noise_std if phase.noise_std > 0 else np.inf


@final
class ChordTables:
    """Renyi curves of one step, one table per sample rate, whose rows are computed when they are
    first needed.

    The nodes of a table lie in ``v = ratio^2 / scale``, scale the largest squared ratio among the
    mechanisms of that rate: a noise or clip norm that changes every step needs no new table, and
    with one mechanism the clip norm is a node. complete: compute all rows at once, so that no
    instance's value depends, in its last bit, on which rows the others need.
    """

    def __init__(self, phases: Iterable[Phase], orders: Array, *, complete: bool = False) -> None:
        self.orders, self._complete = orders, complete
        self.grid = SensitivityGrid(bits=6, octaves=16)
        self._nodes = self.grid.nodes
        self._scale: dict[float, float] = {}
        self._ratios: dict[float, set[float]] = {}
        for phase in phases:
            rate, ratio = phase.amplification_rate, clip_ratio(phase)
            self._ratios.setdefault(rate, set()).add(ratio)
            if np.isfinite(ratio):
                self._scale[rate] = max(self._scale.get(rate, 0.0), ratio)
        self._tables: dict[float, tuple[Array, NDArray[np.bool_]]] = {}
        self._tops: dict[tuple[float, float], Array] = {}

    def top(self, phase: Phase) -> Array:
        """(orders,) loss of one step at the clip norm, exact."""
        rate, ratio = phase.amplification_rate, clip_ratio(phase)
        if (rate, ratio) not in self._tops:
            # All mechanisms of the rate at once: one by one a schedule would cost far more.
            ratios = np.array(sorted(self._ratios[rate]))
            rows = sampled_gaussian_rdp(rate, ratios, self.orders)
            self._tops |= {(rate, float(r)): row for r, row in zip(ratios, rows, strict=True)}
        return self._tops[rate, ratio]

    def losses(self, phase: Phase, squared: Array, steps: NDArray[np.int64]) -> Array:
        """(n, orders) upper bounds of the losses of ``steps`` steps (n,) at ``squared = (bound /
        clip norm)^2`` (n,).

        Entries of at least ``INFINITE / 1e50`` stand for infinity; see :func:`finished`.
        """
        ratio, rate = clip_ratio(phase), phase.amplification_rate
        if not np.isfinite(ratio):
            charged = (squared > 0) & (steps > 0)
            return np.outer(np.where(charged, INFINITE, 0.0), np.ones(self.orders.size))
        shrink = (ratio / self._scale[rate]) ** 2
        if shrink < 1:
            squared = np.minimum(squared * (shrink * (1 + 1e-15)), 1.0)
        lower, weight = self.grid.locate(squared)
        table = self._table(rate, lower)
        if not self._complete and np.ptp(lower) == 0 and np.ptp(weight) == 0 and np.ptp(steps) == 0:
            # In the order of the sparse product: the same bits, however the instances are partitioned.
            low, high = steps[0] * (1 - weight[0]), steps[0] * weight[0]
            one = low * table[lower[0]] + high * table[lower[0] + 1]
            return np.broadcast_to(one, (steps.size, one.size))
        values = np.stack([steps * (1 - weight), steps * weight], axis=1).ravel()
        columns = np.stack([lower, lower + 1], axis=1).ravel()
        starts = np.arange(0, 2 * steps.size + 1, 2)
        shape = (steps.size, table.shape[0])
        return np.asarray(csr_array((values, columns, starts), shape=shape) @ table)

    def _table(self, rate: float, lower: NDArray[np.int64]) -> Array:
        """The table of a rate with the rows ``lower`` and ``lower + 1`` filled in."""
        if rate not in self._tables:
            size = self._nodes.size
            self._tables[rate] = np.zeros((size, self.orders.size)), np.zeros(size, dtype=bool)
        table, known = self._tables[rate]
        needed = np.full_like(known, self._complete)
        needed[lower] = needed[lower + 1] = True
        new = np.flatnonzero(needed & ~known)
        if new.size:
            ratios = np.sqrt(self._nodes[new]) * self._scale[rate]
            values = sampled_gaussian_rdp(rate, ratios, self.orders)
            table[new] = np.where(np.isfinite(values), values, INFINITE)
            known[new] = True
        return table


def finished(rdp: Array) -> Array:
    """The sums with infinity where it belongs, in place."""
    for start in range(0, len(rdp), CHUNK):
        part = rdp[start : start + CHUNK]
        part[part >= INFINITE / 1e50] = np.inf
    return rdp
