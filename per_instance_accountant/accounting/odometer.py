"""Running individual totals during training: work in proportion to the batch per step, all epsilons
in one product."""

from __future__ import annotations

from functools import lru_cache
from typing import Final, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from per_instance_accountant.accounting.chords import INFINITE, finished
from per_instance_accountant.divergence import rdp_to_epsilon, sampled_gaussian_rdp
from per_instance_accountant.divergence.orders import as_float_array, bad_argument

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]

_BITS: Final = 3
_OCTAVES: Final = 18
_NODES: Final = _OCTAVES * 2**_BITS + 2
_SHIFT: Final = 52 - _BITS
_SMALLEST: Final = 2.0**-_OCTAVES
_FIRST: Final = np.float64(_SMALLEST).view(np.int64)
_UNITS: Final = 256
"""Parts into which the charge of a step between two nodes is divided; the counts are whole numbers
of them."""
_FINE: Final = _SHIFT - 8
"""Bits of a float64 below one unit."""
_UP: Final = (_UNITS << _FINE) + (1 << _FINE) - 1 - int(_FIRST)
"""Turns the bits of a float64, shifted right by ``_FINE``, into its place, rounded up."""
_PLACE: Final = 16
"""Bits of a place: 256 times the index of a node, plus units of the node above it."""
_NODE_MASK: Final = 2 ** (_PLACE - 8) - 1
_CAPACITY: Final = 2**32 // _UNITS
_CHUNK: Final = 4096
_BLOCK: Final = 512
"""Instances whose packed counts stay in the cache while many steps are charged."""


@final
class Odometer:
    """Node counts of one mechanism: step t charges instance i at ``v = (bound / clip norm)^2`` in
    [0, 1].

    The charge is split over the two grid nodes around v (the chord of docs/math/individual_loss.md),
    the share of the upper node rounded up to 1/256, so the totals are upper bounds and no rounding
    error ever adds up. ``4 * 146 + 16`` bytes per instance. Epsilons are on the basis of the bounds
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
        # One more than the last node of the last instance, which has no node above it.
        self._flat = np.zeros(num_instances * _NODES + 1, dtype=np.uint32)
        self._counts = self._flat[:-1].reshape(num_instances, _NODES)
        self._first = np.arange(num_instances, dtype=np.int64) * _NODES
        self._state = np.full(num_instances, (_NODES - 1) * _UNITS, dtype=np.int64)
        """The step from which on an instance is still to be charged, and the place at which."""
        self._step = 0

    @property
    def bytes_per_instance(self) -> float:
        """Memory that the totals take."""
        return (self._flat.nbytes + self._first.nbytes + self._state.nbytes) / len(self._state)

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
        self._settle(positions, _places(np.atleast_1d(as_float_array("squared", squared, 1))))

    def charge(self, squared: ArrayLike) -> None:
        """Charge t steps to everybody, step j at ``squared[j]``, (t, n) in [0, 1]; the bounds that were
        set stand for the steps after these.

        Raises UsageError PIA070 for entries outside or too many steps, PIA071 for another shape,
        before anything is changed.

        >>> odometer = Odometer(num_instances=2, sample_rate=0.01, ratio=1.0)
        >>> odometer.charge([[0.0625, 1.0]] * 100)
        >>> odometer.epsilons([2.0, 8.0, 32.0], 1e-5).round(4).tolist()
        [0.2384, 1.3035]
        """
        values, size = as_float_array("squared", squared, 2), len(self._state)
        if values.ndim != 2 or values.shape[1] != size:
            raise bad_argument("squared", f"has shape {values.shape}", f"(t, {size})", code="PIA071")
        _smallest(values)
        self._settle(slice(None))
        self.advance(len(values))
        for start in range(0, size, _BLOCK):
            self._charge_block(start, values[:, start : start + _BLOCK])
        self._state += len(values) << _PLACE

    def _charge_block(self, start: int, squared: Floats) -> None:
        """Steps in the upper and units in the lower half of one number for each cell between nodes."""
        width = squared.shape[1]
        packed = np.zeros(width * _NODES, dtype=np.int64)
        first = self._first[:width]
        for rows in range(0, len(squared), _BLOCK):
            place = _places(squared[rows : rows + _BLOCK])
            upper = place & (_UNITS - 1)
            upper += 1 << 32
            place >>= 8
            place += first
            np.add.at(packed, place.ravel(), upper.ravel())
        cells = packed.reshape(width, _NODES)
        upper = cells & (2**32 - 1)
        units = (cells >> 32) * _UNITS - upper
        units[:, 1:] += upper[:, :-1]
        self._counts[start : start + width] += units.astype(np.uint32)

    def rdp(self, orders: ArrayLike) -> Floats:
        """(n, m) upper bounds of the Renyi losses now; ``8 m`` bytes per instance."""
        table = self._table(orders)
        self._settle(slice(None))
        return finished(np.asarray(self._counts.astype(np.float64) @ table))

    def epsilons(self, orders: ArrayLike, delta: float) -> Floats:
        """(n,) upper bounds of epsilon now, over the given orders (m,); by one matrix product."""
        table = self._table(orders)
        self._settle(slice(None))
        result = np.empty(len(self._state))
        for start in range(0, len(result), _CHUNK):
            part = slice(start, start + _CHUNK)
            curves = finished(self._counts[part].astype(np.float64) @ table)
            result[part] = rdp_to_epsilon(orders, curves, delta)
        return result

    def _settle(self, positions: NDArray[np.int64] | slice, place: Whole | None = None) -> None:
        """Bring the counts of ``positions`` up to date; from now on they are charged at ``place``."""
        state = self._state[positions]
        steps = self._step - (state >> _PLACE)
        upper = state & (_UNITS - 1)
        upper *= steps
        index = state >> 8
        index &= _NODE_MASK
        index += self._first[positions]
        lower = steps << 8
        lower -= upper
        np.add.at(self._flat, index, lower.astype(np.uint32))
        index += 1
        np.add.at(self._flat, index, upper.astype(np.uint32))
        if place is None:
            self._state[positions] = state + (steps << _PLACE)
        else:
            place += self._step << _PLACE
            self._state[positions] = place

    def _table(self, orders: ArrayLike) -> Floats:
        grid = np.atleast_1d(np.asarray(orders, dtype=np.float64))
        return _unit_costs(self._rate, self._ratio, grid.tobytes())


@lru_cache(maxsize=32)
def _unit_costs(rate: float, ratio: float, orders: bytes) -> Floats:
    """(nodes, m): cost of one unit."""
    bits = (np.arange(_NODES - 1, dtype=np.int64) << _SHIFT) + _FIRST
    ratios = ratio * np.sqrt(np.concatenate([[0.0], bits.view(np.float64)]))
    curves = sampled_gaussian_rdp(rate, ratios * (1 + 1e-15), np.frombuffer(orders))
    return np.where(np.isfinite(curves), curves, INFINITE) * ((1 + 1e-13) / _UNITS)


def _smallest(values: Floats) -> float:
    """The smallest value. Raises UsageError PIA070 for entries outside [0, 1]."""
    low, high = (values.min(), values.max()) if values.size else (0.0, 0.0)
    # A NaN is the smallest and the largest, and no comparison with it holds.
    if not (low >= 0 and high <= 1):
        raise bad_argument("squared", "has entries outside the range", "[0, 1]")
    return float(low)


def _places(v: Floats) -> Whole:
    """Places on the grid, rounded up: node 0 is v = 0, node 1 the smallest power of 2."""
    lowest = _smallest(v)
    place: Whole = np.ascontiguousarray(v).view(np.int64) + _UP
    place >>= _FINE
    if lowest < _SMALLEST:
        small = v < _SMALLEST
        place[small] = np.ceil(v[small] * (_UNITS / _SMALLEST))
    return place
