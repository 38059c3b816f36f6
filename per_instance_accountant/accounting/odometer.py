"""Running individual totals during training: work in proportion to the batch per step, all epsilons
in one product."""

from __future__ import annotations

from typing import Final, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from per_instance_accountant.divergence import rdp_to_epsilon, sampled_gaussian_rdp
from per_instance_accountant.divergence.orders import as_float_array, bad_argument

Floats = NDArray[np.float64]

_BITS: Final = 3
_OCTAVES: Final = 18
_NODES: Final = _OCTAVES * 2**_BITS + 2
_SHIFT: Final = 52 - _BITS
_FIRST: Final = np.float64(2.0**-_OCTAVES).view(np.int64)
_UNITS: Final = 256
"""Parts into which the charge of a step between two nodes is divided; the counts are whole numbers
of them."""
_CAPACITY: Final = 2**32 // _UNITS
_CHUNK: Final = 4096


@final
class Odometer:
    """Node counts of one mechanism: step t charges instance i at ``v = (bound / clip norm)^2`` in
    [0, 1].

    The charge is split over the two grid nodes around v (the chord of docs/math/individual_loss.md),
    the share of the upper node rounded up to 1/256, so the totals are upper bounds and no rounding
    error ever adds up. ``4 * 146 + 20`` bytes per instance. Epsilons are on the basis of the bounds
    that were charged.

    >>> odometer = Odometer(num_instances=2, sample_rate=0.01, ratio=1.0)
    >>> odometer.set_bounds(slice(None), [0.0625, 1.0])
    >>> odometer.advance(100)
    >>> odometer.epsilons([2.0, 8.0, 32.0], 1e-5).round(4).tolist()
    [0.2384, 1.3035]
    """

    def __init__(self, num_instances: int, sample_rate: float, ratio: float) -> None:
        """ratio: clip norm / noise std. Everybody is charged the clip norm until bounds are set."""
        if not num_instances >= 1:
            raise bad_argument("num_instances", f"is {num_instances}", "[1, inf)")
        sampled_gaussian_rdp(sample_rate, ratio, 2.0)
        self._rate, self._ratio = sample_rate, ratio
        self._counts = np.zeros((num_instances, _NODES), dtype=np.uint32)
        self._place = np.full(num_instances, (_NODES - 2) * _UNITS + _UNITS, dtype=np.int32)
        self._since = np.zeros(num_instances, dtype=np.int64)
        self._first = np.arange(num_instances, dtype=np.int64) * _NODES
        self._step = 0
        self._tables: dict[bytes, Floats] = {}

    @property
    def bytes_per_instance(self) -> float:
        """Memory that the totals take."""
        return (self._counts.nbytes + self._place.nbytes + 2 * self._since.nbytes) / len(self._place)

    def advance(self, steps: int = 1) -> None:
        """Charge ``steps`` steps to everybody at the present bounds; constant time."""
        if not 0 <= steps <= _CAPACITY - 1 - self._step:
            raise bad_argument("steps", f"is {steps} after {self._step}", f"[0, {_CAPACITY - 1}] in total")
        self._step += steps

    def set_bounds(self, positions: NDArray[np.int64] | slice, squared: ArrayLike) -> None:
        """From now on ``positions`` (distinct) are charged at ``squared`` = (bound / clip norm)^2,
        (b,) in [0, 1].

        Raises UsageError PIA070 for entries outside, before anything is changed.
        """
        v = np.array(as_float_array("squared", squared, 1))
        if not (v.size == 0 or (v.min() >= 0 and v.max() <= 1)):
            raise bad_argument("squared", "has entries outside the range", "[0, 1]")
        self._settle(positions)
        offset = (v + 0.0).view(np.int64) - _FIRST
        # In units of 1/256 of a gap, rounded up; node 0 is v = 0, node 1 the first power of 2.
        inside = _UNITS + -(-offset >> (_SHIFT - 8))
        below = np.ceil(v * (2.0**_OCTAVES * _UNITS))
        self._place[positions] = np.where(offset >= 0, inside, below)

    def rdp(self, orders: ArrayLike) -> Floats:
        """(n, m) upper bounds of the Renyi losses now; ``8 m`` bytes per instance."""
        table = self._table(np.atleast_1d(np.asarray(orders, dtype=np.float64)))
        self._settle(slice(None))
        return np.asarray(self._counts.astype(np.float64) @ table)

    def epsilons(self, orders: ArrayLike, delta: float) -> Floats:
        """(n,) upper bounds of epsilon now, over the given orders (m,); by one matrix product."""
        table = self._table(np.atleast_1d(np.asarray(orders, dtype=np.float64)))
        self._settle(slice(None))
        result = np.empty(len(self._place))
        for start in range(0, len(result), _CHUNK):
            part = slice(start, start + _CHUNK)
            result[part] = rdp_to_epsilon(orders, self._counts[part].astype(np.float64) @ table, delta)
        return result

    def _settle(self, positions: NDArray[np.int64] | slice) -> None:
        """Bring the counts of ``positions`` up to date."""
        steps = self._step - self._since[positions]
        place = self._place[positions]
        upper = place & (_UNITS - 1)
        index = self._first[positions] + (place >> 8)
        flat = self._counts.reshape(-1)
        flat[index] += (steps * (_UNITS - upper)).astype(np.uint32)
        # The last node has nothing above it, and then nothing to add there.
        index += upper > 0
        flat[index] += (steps * upper).astype(np.uint32)
        self._since[positions] = self._step

    def _table(self, orders: Floats) -> Floats:
        """(nodes, m): cost of one unit."""
        key = orders.tobytes()
        if key not in self._tables:
            bits = (np.arange(_NODES - 1, dtype=np.int64) << _SHIFT) + _FIRST
            ratios = self._ratio * np.sqrt(np.concatenate([[0.0], bits.view(np.float64)]))
            curves = sampled_gaussian_rdp(self._rate, ratios * (1 + 1e-15), orders)
            self._tables[key] = curves * ((1 + 1e-13) / _UNITS)
        return self._tables[key]
