"""One sampled Gaussian step, replaced by a discrete pair of laws that dominates it.

The loss of a step is a function of z. The line is cut into cells; the mass of a cell goes to its two ends,
shared so that both laws keep theirs. The curve of the step is thereby replaced by chords in ``exp(epsilon)``
that lie above it (Doroshenko, Ghazi, Kamath, Kumar and Manurangsi 2022), so products of such pairs dominate
the run. Masses and losses are rounded up, which keeps them dominating. What a cell adds to the variance is a
sixth of its squared width: nothing to speak of. Any share of the cells is a positive measure with exact
transforms, which no smooth window can offer. Derivation: docs/math/tight_epsilon.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from per_instance_accountant.divergence.contour import UNIT

Floats = NDArray[np.float64]

COARSE: Final = 16
"""Cells that make a coarse one; cuts are at the ends of coarse cells."""
_START: Final = -8.0
_WIDEST: Final = 0.015
_WIDEST_LOSS: Final = 0.005
"""Widths of fine cells, in z and, up to a loss of 30, in the loss."""
_MOST: Final = 1 << 16
_LARGEST_EXPONENT: Final = 690.0
_FARTHEST: Final = 38.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dots:
    """losses: (p,) rising. masses: (2, p - 1) of each cell at its lower and its upper end. beyond: mass whose
    loss is taken to be infinite."""

    losses: Floats
    masses: Floats
    beyond: float

    def part(self, first: int, last: int) -> tuple[Floats, Floats]:
        """Losses and masses of the cells ``first .. last - 1``."""
        mass = np.zeros(last - first + 1)
        mass[:-1] += self.masses[0, first:last]
        mass[1:] += self.masses[1, first:last]
        return self.losses[first : last + 1], mass


def place_of(loss: Floats | float, q: Floats | float, a: Floats | float) -> Floats:
    """The z at which a step loses ``loss`` > 0."""
    return np.asarray((loss + np.log(-np.expm1(-loss) + q * np.exp(-loss)) - np.log(q)) / a + a / 2)


def cells_below(loss: float, q: float, a: float) -> int:
    """Fine cells of the direction "remove" that end at or below ``loss``, up to whole coarse ones, at least
    one."""
    return _whole(_place(loss, q, a), q, a)


def representable(q: float, a: float, top: float) -> bool:
    """Whether losses up to ``top`` have dots: sampled, not too many of them, and nothing overflows."""
    z = _place(top, q, a) + 1
    if not (q < 1 and a * z - a * a / 2 < _LARGEST_EXPONENT):
        return False
    return _reached(z, a) <= _MOST and _whole(z, q, a) <= _MOST


def _place(loss: float, q: float, a: float) -> float:
    """Where a step loses ``loss``, or farther than N(a, 1) has any mass to speak of."""
    return min(float(place_of(loss, q, a)), a + _FARTHEST)


def _reached(z: float, a: float) -> int:
    """Reference points up to z and a coarse cell more, a power of 2."""
    return int(2 ** math.ceil(math.log2((z + COARSE * _WIDEST - _START) / _reference(a) + 2)))


def _reference(a: float) -> float:
    return min(0.01, 0.1 / a)


@lru_cache(maxsize=512)
def _counted(q: float, a: float, size: int) -> tuple[Floats, Floats]:
    """Reference points, and how many fine cells lie on their left. Cells are narrow where the loss grows
    fast. More points repeat the first ones."""
    z = _START + _reference(a) * np.arange(size)
    exponent = a * z - a * a / 2
    loss = np.logaddexp(math.log1p(-q), math.log(q) + exponent)
    growth = a * np.exp(np.minimum(exponent + math.log(q) - loss, 0.0))
    wanted = _WIDEST_LOSS * np.maximum(1.0, loss / 30) / growth
    widest = min(_WIDEST, max(2 * _WIDEST_LOSS / a, _WIDEST / 6))
    density = 1 / np.minimum(widest, wanted)
    return np.asarray(z, np.float64), np.concatenate(
        [[0.0], np.cumsum((density[1:] + density[:-1]) / 2) * _reference(a)]
    )


def _whole(z: float, q: float, a: float) -> int:
    """Fine cells up to z, rounded up to whole coarse ones."""
    return COARSE * max(1, math.ceil(np.interp(z, *_counted(q, a, _reached(z, a))) / COARSE))


def _ends(z: float, q: float, a: float, cells: int) -> Floats:
    """Ends of the cells up to z, ``cells`` fine ones at a time."""
    points, number = _counted(q, a, _reached(z, a))
    return np.interp(np.arange(0, _whole(z, q, a) + 1, cells), number, points)


@lru_cache(maxsize=128)
def removal(q: float, a: float, top: float, cells: int) -> Dots:
    """Dots of the mixture against N(0, 1) up to about ``top``; cells: fine ones in each."""
    z = _ends(_place(top, q, a), q, a, cells)
    exponent, plain, moved, doubt_plain, doubt_moved = _cell_masses(z, a)
    odds = np.exp(exponent[:-1])
    loss, slack, width = _losses(q, a, z, exponent)
    upper = q * (moved - odds * plain) + q * (doubt_moved + odds * doubt_plain)
    upper = upper / -np.expm1(-width) * (1 + 64 * UNIT)
    total = (1 - q) * (plain + doubt_plain) + q * (moved + doubt_moved)
    masses = _shared(upper, total)
    masses[0, 0] += _mixed(q, z[0], a)
    return Dots(losses=loss + slack, masses=masses, beyond=_mixed(q, -z[-1], -a))


@lru_cache(maxsize=128)
def addition(q: float, a: float, cells: int) -> Dots:
    """Dots of N(0, 1) against the mixture; cells: fine ones in each."""
    z = _ends(-_START, q, a, cells)
    exponent, plain, moved, doubt_plain, doubt_moved = _cell_masses(z, a)
    odds = np.exp(np.minimum(-exponent[1:], _LARGEST_EXPONENT))
    loss, slack, _ = _losses(q, a, z, exponent)
    # The larger loss is that of the left end.
    left = plain - odds * moved + doubt_plain + odds * doubt_moved
    left = left / -np.expm1(-a * np.diff(z)) * (1 + 64 * UNIT)
    masses = _shared(left, plain + doubt_plain)[:, ::-1].copy()
    tail = float(ndtr(z[0])) * (1 + 64 * UNIT * (1 + z[0] ** 2))
    # Farther left no loss exceeds -log(1 - q); farther right losses are raised to the last one's.
    masses[0, 0] += tail
    losses = np.append((slack - loss)[::-1], -math.log1p(-q) * (1 + 8 * UNIT))
    return Dots(losses=losses, masses=np.column_stack([masses, [0.0, tail]]), beyond=0.0)


def _mixed(q: float, z: float, a: float) -> float:
    """What the mixture has below z, rounded up."""
    return float((1 - q) * ndtr(z) + q * ndtr(z - a)) * (1 + 64 * UNIT * (1 + z * z + (z - a) ** 2))


def _shared(upper: Floats, total: Floats) -> Floats:
    upper = np.clip(np.nan_to_num(upper, nan=np.inf), 0.0, total)
    return np.stack([total - upper, upper])


def _cell_masses(z: Floats, a: float) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """``y = a z - a^2 / 2`` at the ends; what N(0, 1) and N(a, 1) have in each cell, and bounds of the errors
    of both that cover those of y and of ``z - a``."""
    exponent = a * z - a * a / 2
    plain, tail_plain = _normal(z)
    moved, tail_moved = _normal(z - a)
    size = np.abs(exponent[:-1]) + np.abs(exponent[1:])
    shift = (np.abs(z[:-1]) + a + 1) / np.diff(z)
    doubt_plain = 16 * UNIT * (tail_plain + plain * (size + 1))
    doubt_moved = 16 * UNIT * (tail_moved + moved * (shift + 1))
    return exponent, plain, moved, doubt_plain, doubt_moved


def _normal(z: Floats) -> tuple[Floats, Floats]:
    """N(0, 1) in each cell, and the larger tail of which it is the difference, times what its relative error
    grows by far out."""
    low, high = ndtr(z), ndtr(-z)
    left, growth = z[:-1] + z[1:] < 0, 1 + np.maximum(z[:-1] ** 2, z[1:] ** 2)
    return np.where(left, np.diff(low), -np.diff(high)), np.where(left, low[1:], high[:-1]) * growth


def _losses(q: float, a: float, z: Floats, exponent: Floats) -> tuple[Floats, Floats, Floats]:
    """``log(1 - q + q exp(y))`` at the ends, a bound of its error, and its growth over each cell."""
    small = np.log1p(q * np.expm1(np.minimum(exponent, 30.0)))
    large = exponent + math.log(q) + np.log1p((1 - q) / q * np.exp(-np.maximum(exponent, 30.0)))
    loss = np.where(exponent > 30, large, small)
    share = np.exp(np.minimum(exponent + math.log(q) - loss, 0.0))
    coarse = np.where(exponent > 30, 1 - math.log(q), 0.0)
    width = np.log1p(share[:-1] * np.expm1(a * np.diff(z)))
    slack = 16 * UNIT * (np.abs(loss) + share * (np.abs(exponent) + 1) + coarse)
    return loss, slack, width
