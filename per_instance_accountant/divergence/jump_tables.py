"""Transforms of two parts of a step's dots: the rest, small losses, and jumps, larger ones.

For a part with masses p at losses X: ``sum p exp(s X)`` on a line ``s = c + i w``, and its logarithm at real
abscissas. Cuts are where a single loss reaches ``low`` and ``top``; what lies beyond ``top`` counts as an
infinite loss. Derivation: docs/math/tight_epsilon.md.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.divergence.contour import UNIT, fourier_sums
from per_instance_accountant.divergence.dots import COARSE, addition, cells_below, removal

Floats = NDArray[np.float64]
Amplitudes = NDArray[np.complex128]

RUNGS: Final = 2.0 ** (np.arange(-10, 41) / 2)
"""Abscissas: 1 / 32 to 2^20, by half octaves."""
RUNG_COSTS: Final = RUNGS * np.log(RUNGS) - (1 + RUNGS) * np.log1p(RUNGS)
"""``log max_x exp(-c x) (1 - exp(-x))``."""
_CUT: Final = 45.0
_FAINT: Final = 1e-18
_TRANSFORM: Final = 1200
_CACHED_BYTES: Final = 3 << 28


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
    def size(self) -> int:
        return self.rest.nbytes + (0 if self.jumps is None else self.jumps.nbytes)


@dataclass(slots=True)
class _Cache:
    """The lines used last, up to a number of bytes."""

    kept: OrderedDict[tuple[Any, ...], Line] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    size: int = 0

    def look_up(self, key: tuple[Any, ...]) -> Line | None:
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
            return self.kept.get(key)

    def keep(self, key: tuple[Any, ...], line: Line) -> None:
        with self.lock:
            if key not in self.kept:
                self.kept[key], self.size = line, self.size + line.size
            while self.size > _CACHED_BYTES:
                self.size -= self.kept.popitem(last=False)[1].size


_cache = _Cache()


def tabulate_parts(part: Part, abscissa: float, spacing: float, count: int) -> Line:
    """On ``abscissa + i spacing m``, ``m < count``: the rest, and the jumps too if the part is theirs."""
    key = (part, abscissa, spacing, count)
    line = _cache.look_up(key)
    if line is None:
        line = _tabulate(part, (abscissa, spacing, count))
        _cache.keep(key, line)
    return line


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
    near = weight > peak - _CUT
    loss, weight = loss[near], np.exp(weight[near] - peak)
    total = float(weight.sum())
    weight /= total
    relative = fourier_sums(weight[None], loss[None], spacing, count)[0]
    relative[0] = 1.0
    # A loss is multiplied by at most |s|, and rounded once in the exponent and once in the angle.
    each = 16 + 8 * (abscissa + spacing * count) * np.abs(loss)
    error = UNIT * (float(weight @ each) + _TRANSFORM + mass.size) + mass.size * math.exp(-_CUT)
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
