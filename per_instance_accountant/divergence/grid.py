"""A grid of sensitivities: the RDP of one step is tabulated on it once and then looked up, rounding up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from per_instance_accountant.divergence.orders import as_float_array, bad_argument

_MANTISSA_BITS = 52


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityGrid:
    """Nodes in ``v = (threshold / clip_norm)^2``: 0, then ``2^-e (1 + m / 2^bits)`` from ``2^-octaves`` to 1.

    The RDP of one step is convex and increasing in v at every order above 1 (our derivation,
    docs/math/sampled_gaussian.md), so ``(1 - weight) * table[lower] + weight * table[lower + 1]`` bounds it
    from above at every v in [0, 1]; it is exact at the nodes, in particular at v = 1 and v = 0.
    Nodes sit at float64 bit positions, so no search is needed and every weight is exact, not rounded.

    >>> grid = SensitivityGrid()
    >>> grid.nodes.size, grid.nodes[[0, 1, -1]].tolist()
    (642, [0.0, 9.094947017729282e-13, 1.0])
    """

    bits: int = 4
    octaves: int = 40

    def __post_init__(self) -> None:
        for name, value, high in (("bits", self.bits, 20), ("octaves", self.octaves, 1000)):
            if not (isinstance(value, int) and 0 <= value <= high):
                raise bad_argument(name, f"is {value!r}", f"[0, {high}]")

    @property
    def nodes(self) -> NDArray[np.float64]:
        """(size,) ascending, from 0 to 1."""
        positions = np.arange(self.octaves * 2**self.bits + 1, dtype=np.int64) << (_MANTISSA_BITS - self.bits)
        return np.concatenate([[0.0], (positions + self._first_bits()).view(np.float64)])

    def locate(self, v: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Index of the node at or below v, and the weight in [0, 1] of the node above it; shapes as v.

        ``lower + 1`` is always a node: v = 1 is returned as weight 1 on the last node.
        Raises UsageError PIA070 if an entry is NaN or outside [0, 1].

        >>> SensitivityGrid(bits=1, octaves=2).nodes.tolist()
        [0.0, 0.25, 0.375, 0.5, 0.75, 1.0]
        >>> [part.tolist() for part in SensitivityGrid(bits=1, octaves=2).locate([0.0, 0.125, 0.4375, 1.0])]
        [[0, 0, 2, 4], [0.0, 0.5, 0.5, 1.0]]
        """
        values = np.array(as_float_array("v", v, 32), order="C") + 0.0
        outside = ~((values >= 0) & (values <= 1))
        if outside.any():
            raise bad_argument("v", f"has {int(outside.sum())} entries outside", "[0, 1]")
        shift = _MANTISSA_BITS - self.bits
        offset = np.atleast_1d(values).view(np.int64).reshape(values.shape) - self._first_bits()
        lower = np.where(offset >= 0, (offset >> shift) + 1, 0)
        inside = (offset & ((1 << shift) - 1)) * 2.0**-shift
        weight = np.where(offset >= 0, inside, values * 2.0**self.octaves)
        last = values == 1
        return np.where(last, lower - 1, lower), np.where(last, 1.0, weight)

    def _first_bits(self) -> np.int64:
        return np.float64(2.0**-self.octaves).view(np.int64)
