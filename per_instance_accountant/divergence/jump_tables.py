"""Transforms of two parts of a step's dots: the rest, small losses, and jumps, larger ones.

For a part with masses p at losses X: ``sum p exp(s X)`` on a line ``s = c + i w``, and its logarithm at real
abscissas. Cuts are where a single loss reaches ``low`` and ``top``; what lies beyond ``top`` counts as an
infinite loss. Derivation: docs/math/tight_epsilon.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.divergence.contour import CUT, TRANSFORM, UNIT, fourier_sums
from per_instance_accountant.divergence.dots import COARSE, addition, cells_below, removal
from per_instance_accountant.divergence.recent import Recent

Floats = NDArray[np.float64]
Amplitudes = NDArray[np.complex128]

RUNGS: Final = 2.0 ** (np.arange(-10, 41) / 2)
"""Abscissas: 1 / 32 to 2^20, by half octaves."""
RUNG_COSTS: Final = RUNGS * np.log(RUNGS) - (1 + RUNGS) * np.log1p(RUNGS)
"""``log max_x exp(-c x) (1 - exp(-x))``."""
_FAINT: Final = 1e-18


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Which losses of which step: the rest (up to ``low``) or the jumps (from ``low`` to ``top``)."""

    rate: float
    ratio: float
    low: float
    top: float
    add: bool
    jumps: bool

    def dots(self, cells: int) -> tuple[Floats, Floats]:
        """Losses and masses, from dots ``cells`` fine ones apart. In the direction "add" all is rest."""
        if self.add:
            found = addition(self.rate, self.ratio, cells)
            return found.part(0, 0 if self.jumps else found.masses.shape[1])
        found = removal(self.rate, self.ratio, self.top, cells)
        last = found.masses.shape[1]
        cut = min(cells_below(self.low, self.rate, self.ratio) // cells, last)
        return found.part(cut, last) if self.jumps else found.part(0, cut)


@lru_cache(maxsize=4096)
def log_moments(part: Part) -> Floats:
    """(rungs,) upper bounds of the log moments, -inf for no dots. Coarse dots dominate fine ones."""
    loss, mass = part.dots(COARSE)
    kept = mass > 0
    if not kept.any():
        return np.full(RUNGS.size, -np.inf)
    value = RUNGS[:, None] * loss[kept] + np.log(mass[kept])
    peak = value.max(axis=1)
    result = peak + np.log(np.exp(value - peak[:, None]).sum(axis=1))
    return np.asarray(result + 1e-12 + 1e-14 * np.abs(result))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Line:
    """One step's transforms at n nodes, relative to those at the abscissa.

    rest: (n,) ``log b``; base: its value at the abscissa. jumps: (n,) ``log(1 + u / b)``, or nothing.
    error_rest, error_jumps: bounds of what b and u are wrong by, relative to b and u at the abscissa.
    """

    rest: Amplitudes
    base: float
    error_rest: float
    jumps: Amplitudes | None
    error_jumps: float

    @property
    def nbytes(self) -> int:
        return self.rest.nbytes + (0 if self.jumps is None else self.jumps.nbytes)


_recent: Recent[Line] = Recent(3 << 28)


def tabulate_parts(part: Part, abscissa: float, spacing: float, count: int) -> Line:
    """On ``abscissa + i spacing m``, ``m < count``: the rest, and the jumps too if the part is theirs."""
    nodes = (abscissa, spacing, count)
    return _recent.get((part, nodes), lambda: _tabulate(part, nodes))


def _tabulate(part: Part, nodes: tuple[float, float, int]) -> Line:
    relative, base, error = _transform(*replace(part, jumps=False).dots(1), nodes)
    rest = np.log(np.where(np.abs(relative) < _FAINT, _FAINT, relative))
    if not part.jumps:
        return Line(rest=rest, base=base, error_rest=error, jumps=None, error_jumps=0.0)
    found, height, wrong = _transform(*part.dots(1), nodes)
    steps = _log1p(found * np.exp(height - base) / np.exp(rest))
    return Line(rest=rest, base=base, error_rest=error, jumps=steps, error_jumps=wrong)


def _transform(
    loss: Floats, mass: Floats, nodes: tuple[float, float, int]
) -> tuple[Amplitudes, float, float]:
    """``sum mass exp(s loss)`` relative to its value at the abscissa; the logarithm of that; the error."""
    abscissa, spacing, count = nodes
    kept = mass > 0
    if not kept.any():
        return np.zeros(count, complex), -np.inf, 0.0
    loss = loss[kept]
    weight = abscissa * loss + np.log(mass[kept])
    peak = float(weight.max())
    near = weight > peak - CUT
    loss, weight = loss[near], np.exp(weight[near] - peak)
    total = float(weight.sum())
    weight /= total
    relative = fourier_sums(weight[None], loss[None], spacing, count)[0]
    relative[0] = 1.0
    # A loss is multiplied by at most |s|, and rounded once in the exponent and once in the angle.
    each = 16 + 8 * (abscissa + spacing * count) * np.abs(loss)
    error = UNIT * (float(weight @ each) + TRANSFORM + mass.size) + mass.size * math.exp(-CUT)
    return relative, peak + math.log(total), error * (1 + 1e-9)


def _log1p(x: Amplitudes) -> Amplitudes:
    """With a modulus of at least ``_FAINT``: what is smaller is below the rounding of the parts."""
    square = x.real * (2 + x.real) + x.imag**2
    # Where 1 + x cancels its logarithm is taken directly.
    near = np.log(np.maximum(np.hypot(1 + x.real, x.imag), _FAINT))
    modulus = np.where(square < -0.5, near, 0.5 * np.log1p(np.maximum(square, -0.5)))
    return np.asarray(modulus + 1j * np.arctan2(x.imag, 1 + x.real))


@lru_cache(maxsize=4096)
def beyond(part: Part) -> float:
    """Mass with a loss beyond the top, rounded up."""
    return 0.0 if part.add else removal(part.rate, part.ratio, part.top, 1).beyond
