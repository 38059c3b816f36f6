"""Log moments of the privacy loss on a vertical line of the complex plane, with bounds on what is
not tabulated.

One Poisson-sampled Gaussian step has the loss ``X = log r(z)``, ``r(z) = 1 - q + q exp(a z - a^2 /
2)``, drawn from the mixture ("remove"), or ``X = -log r(z)``, z ~ N(0, 1) ("add"). With ``beta = 1 +
s`` and ``beta = -s``

    phi(s) = E exp(s X) = E r(z)^beta,   z ~ N(0, 1).

On the line ``s = c + i w`` the law with density ``exp(c X) / phi(c)`` (the tilted law) has the
characteristic function ``phi(c + i w) / phi(c)``. Derivations: docs/math/tight_epsilon.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

UNIT: Final = float(np.finfo(np.float64).eps) / 2
_REACH: Final = 9.5
CUT: Final = 45.0
"""Terms below ``exp(-CUT)`` of the largest are dropped, and windows end where the integrand is that
small."""
_ACCURACY: Final = 40.0
"""The strip bound of the quadrature error is kept below ``exp(-_ACCURACY)``."""
_WINDOWS: Final = np.array([0.0, 1.0, 4.0, 12.0])
"""Precisions of the Gaussian windows in z under which the spread of the loss is measured."""
_LARGEST_STEP: Final = 0.2
_LONGEST: Final = 60_000
_BLOCK: Final = 150_000
_POWERS: Final = 22
"""``(pi / 2)^22 / 22! < 2e-17`` bounds what the series of an exponential leaves out."""
TRANSFORM: Final = 1200
"""Units in the last place that a Fourier transform of up to 2^17 bins and the series may lose."""
_LOG_SQRT_2PI: Final = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Line:
    """Tables on ``s = abscissa + i spacing m``, ``m = 0 .. n - 1``, one row for each of k levels.

    log_moment: (k, n) complex, ``log phi(s)``. error: (k,) bound of ``|phi computed - phi| /
    phi(abscissa)`` at every node. second, fourth: (k, v), LOWER and UPPER bound of ``E[g g' Y^2]``
    and ``E[g g' Y^4]``, Y the difference of two independent draws of the tilted loss, g one of v
    windows. log_variation: (k,) upper bound of the logarithm of the total variation of the density
    of the tilted loss.
    """

    abscissa: float
    spacing: float
    log_moment: NDArray[np.complex128]
    error: Floats
    second: Floats
    fourth: Floats
    log_variation: Floats

    @property
    def nbytes(self) -> int:
        """Bytes of the part that grows with n."""
        return self.log_moment.nbytes

    @property
    def nodes(self) -> NDArray[np.complex128]:
        """(n,) points s."""
        return np.asarray(
            self.abscissa + 1j * self.spacing * np.arange(self.log_moment.shape[1]), np.complex128
        )

    def log_decay(self, edges: Floats) -> Floats:
        """(k, g): upper bounds, at most 0, of ``log |phi(c + i w) / phi(c)|`` for ``w`` in
        ``[edges[j], edges[j+1]]``.

        edges: (g + 1,) rising, above 0; the last may be inf.
        ``1 - |phi / phi(c)|^2 = E[1 - cos(w Y)] >= E[g g' (w^2 Y^2 / 2 - w^4 Y^4 / 24)]``, concave
        in w^2, so its least value on an interval is at an end; and ``|phi / phi(c)| <= variation / w``.
        """
        square = edges * edges
        with np.errstate(all="ignore"):
            gain = self.second[:, :, None] * square / 2 - self.fourth[:, :, None] * square * square / 24
            gain = np.where(np.isfinite(gain), gain, -np.inf)
            least = np.minimum(gain[:, :, :-1], gain[:, :, 1:]).max(axis=1)
            smooth = 0.5 * np.log1p(-np.clip(least, 0.0, 1 - 1e-9))
        return np.asarray(
            np.minimum(smooth, np.minimum(self.log_variation[:, None] - np.log(edges[:-1]), 0.0))
        )


@np.errstate(all="ignore")
def tabulate(
    rates: Floats, ratios: Floats, abscissa: float, spacing: float, count: int, *, add: bool
) -> Line:
    """The tables of k levels; rates (k,) in (0, 1], ratios (k,) in (0, inf), abscissa and spacing
    above 0."""
    size, windows = ratios.size, _WINDOWS.size
    log_moment = np.zeros((size, count), dtype=np.complex128)
    error, log_variation = np.full(size, np.inf), np.full(size, np.inf)
    second, fourth = np.zeros((size, windows)), np.zeros((size, windows))
    full = rates == 1
    if full.any():
        s = abscissa + 1j * spacing * np.arange(count)
        square = ratios[full] ** 2
        log_moment[full] = 0.5 * square[:, None] * (s * s + s)
        error[full] = 8 * UNIT
        # |phi / phi(c)| = exp(-a^2 w^2 / 2): the loss is Gaussian with variance a^2 under every tilt.
        second[full, 0], fourth[full, 0] = 2 * square, 12 * square * square
        log_variation[full] = math.log(2) - _LOG_SQRT_2PI - 0.5 * np.log(square)
    for rate in np.unique(rates[~full]):
        rows = np.flatnonzero(rates == rate)
        rows = rows[np.argsort(ratios[rows], kind="stable")]
        octave = np.frexp(np.maximum(ratios[rows], 1e-3))[1]
        for exponent in np.unique(octave):
            _fill(
                float(rate),
                ratios,
                rows[octave == exponent],
                (abscissa, spacing, add),
                (log_moment, error, second, fourth, log_variation),
            )
    return Line(
        abscissa=abscissa,
        spacing=spacing,
        log_moment=log_moment,
        error=error,
        second=second,
        fourth=fourth,
        log_variation=log_variation,
    )


def _fill(
    q: float,
    ratios: Floats,
    rows: NDArray[np.intp],
    line: tuple[float, float, bool],
    tables: tuple[NDArray[Any], ...],
) -> None:
    """Tabulate the rows, whose ratios are within a factor of 2 of each other, in blocks on one
    lattice each."""
    abscissa, spacing, add = line
    count = tables[0].shape[1]
    lattice = _lattice(q, float(ratios[rows].max()), abscissa, spacing * (count - 1), add)
    if lattice is None:
        return
    bins = 4 * count + lattice[0].size
    for block in np.array_split(rows, min(rows.size, math.ceil(rows.size * bins / _BLOCK))):
        values = _block(q, ratios[block], abscissa, spacing, count, lattice, add)
        for table, value in zip(tables, values, strict=True):
            table[block] = value


def _lattice(q: float, a: float, c: float, top: float, add: bool) -> tuple[Floats, Floats, Floats] | None:
    """Nodes in z for ratios up to ``a`` and frequencies up to ``top``; log errors and heights of the
    strips used.

    In the strip ``|Im z| = y < pi / a`` the modulus of the integrand is at most ``exp(y^2 / 2 + w a
    y)`` times its value on the axis, and ``cos(a y / 2)^-c`` times that for "add"; the error of the
    trapezoidal rule is at most twice that over ``exp(2 pi y / step) - 1``.
    """
    y = min(0.95 * math.pi / a, 8.0) * np.linspace(0.02, 1, 50)
    growth = math.log(2.01) + y * y / 2 - (c * np.log(np.cos(a * y / 2)) if add else 0.0)
    step = min(float((2 * math.pi * y / (_ACCURACY + growth + top * a * y)).max()), _LARGEST_STEP)
    if add:
        odds = q / (1 - q) * math.exp(-min(a * a / 8, 700.0))
        low, high = -_REACH - c * a * odds / (1 + odds), _REACH
    else:
        low, high = -_REACH, _REACH + (1 + c) * a
    if not (high - low) / step < _LONGEST:
        return None
    z = np.arange(math.floor(low / step), math.ceil(high / step) + 1) * step
    strip = growth + _WINDOWS[:, None] * y * y / 2 - 2 * math.pi * y / step
    best = strip.argmin(axis=1)
    return np.asarray(z, np.float64), strip[np.arange(_WINDOWS.size), best], np.asarray(y[best])


def _block(
    q: float,
    a: Floats,
    c: float,
    spacing: float,
    count: int,
    lattice: tuple[Floats, Floats, Floats],
    add: bool,
) -> tuple[NDArray[np.complex128], Floats, Floats, Floats, Floats]:
    """log_moment, error, second, fourth, log_variation of ratios a (b,)."""
    beta = -c if add else 1 + c
    z, log_strip, height = lattice
    log_ratio = _log_ratio(q, a, z)
    weight = beta * log_ratio - z * z / 2
    peak = weight.max(axis=1)
    kept = (weight > peak[:, None] - CUT).any(axis=0)
    z, log_ratio, weight = z[kept], log_ratio[:, kept], np.exp(weight[:, kept] - peak[:, None])
    total = weight.sum(axis=1)
    base = peak + np.log(total) + math.log(lattice[0][1] - lattice[0][0]) - _LOG_SQRT_2PI
    weight /= total[:, None]
    loss = -log_ratio if add else log_ratio
    relative = fourier_sums(weight, loss, spacing, count) if count > 1 else np.ones((a.size, 1), complex)
    relative[:, 0] = 1.0
    tiny = np.abs(relative) < 1e-18
    log_moment = base[:, None] + np.log(np.where(tiny, 1e-18, relative))
    error = _rounding(q, a, z, log_ratio, weight, abs(beta) + spacing * count) + lattice[0].size * (
        UNIT + math.exp(-CUT)
    )
    error += TRANSFORM * UNIT
    if count == 1:
        # A single real point has no frequencies beyond it: nothing is known, and nothing is needed.
        unknown = np.zeros((a.size, _WINDOWS.size))
        return log_moment, error, unknown, unknown, np.full(a.size, np.inf)
    second, fourth = _spread(weight, loss, z, a, log_strip, height)
    return log_moment, error, second, fourth, _log_variation(q, a, beta + 1, base)


def _log_ratio(q: float, a: Floats, z: Floats) -> Floats:
    """``log(1 - q + q exp(a z - a^2 / 2))``, (b, p); z rising."""
    y = a[:, None] * z - (a * a / 2)[:, None]
    u = q * np.expm1(np.minimum(y, 30.0))
    result = np.log1p(np.maximum(u, -0.5))
    if q > 0.5:
        # Where 1 + u cancels it is the sum of its two parts.
        low = np.log(np.maximum((1 - q) + q * np.exp(np.minimum(y, 0.0)), 1e-300))
        result = np.where(u < -0.5, low, result)
    first = int(np.searchsorted(y.max(axis=0), 30.0, side="right"))
    if first < z.size:
        tail = y[:, first:]
        high = tail + math.log(q) + np.log1p((1 - q) / q * np.exp(-np.maximum(tail, 0.0)))
        result[:, first:] = np.where(tail > 30, high, result[:, first:])
    return result


def _rounding(q: float, a: Floats, z: Floats, log_ratio: Floats, weight: Floats, power: float) -> Floats:
    """(b,) bound of the rounding error of the sums for phi relative to ``phi(c)``: the mean, under the
    normalised ``weight`` (b, p), of the relative errors of the terms."""
    y = np.abs(a[:, None] * z) + (a * a)[:, None]
    exponent = a[:, None] * z - (a * a / 2)[:, None] - log_ratio
    # d log r / dy, the share of the density that comes from the instance.
    share = np.minimum(q * np.exp(np.minimum(exponent, 700.0)), 1.0)
    coarse = np.where((y > 30) | (q > 0.5), 1 - math.log(q), 0.0)
    each = 8 + z * z + power * (np.abs(log_ratio) + share * y + coarse)
    return np.asarray(4 * UNIT * (weight * each).sum(axis=1) * (1 + 1e-9))


def fourier_sums(weight: Floats, loss: Floats, spacing: float, count: int) -> NDArray[np.complex128]:
    """``sum weight exp(i spacing m loss)``, m = 0 .. count - 1, (b, count): losses on a ring of bins,
    powers of the distances from their centres, one Fourier transform for each power."""
    size = 2 ** math.ceil(math.log2(2 * count))
    position = loss * (spacing * size / (2 * math.pi))
    centre = np.rint(position)
    # In half widths of a bin; m half widths are at most pi / 2.
    distance = 2 * (position - centre)
    ring = centre.astype(np.int64) & (size - 1)
    ring += size * np.arange(len(weight))[:, None]
    step = 1j * math.pi / size * np.arange(count)
    total = np.zeros((len(weight), count), dtype=np.complex128)
    term, factor = weight, np.ones(count, dtype=np.complex128)
    for k in range(1, _POWERS + 1):
        sums = np.bincount(ring.ravel(), term.ravel(), len(weight) * size).reshape(-1, size)
        total += np.fft.rfft(sums)[:, :count].conj() * factor
        term, factor = term * distance, factor * (step / k)
    return total


def _spread(
    weight: Floats, loss: Floats, z: Floats, a: Floats, log_strip: Floats, height: Floats
) -> tuple[Floats, Floats]:
    """Lower bound of ``E[g g' Y^2]`` and upper bound of ``E[g g' Y^4]``, each (b, v)."""
    centre = z[None, :] - (weight @ z)[:, None]
    distance = loss - (weight * loss).sum(axis=1)[:, None]
    window = weight[:, None, :] * np.exp(-0.5 * _WINDOWS[:, None] * (centre * centre)[:, None, :])
    power = distance[:, None, :]
    m0, m1, m2, m3, m4 = ((window * power**i).sum(axis=2) for i in range(5))
    error = np.exp(log_strip) + z.size * (UNIT * 64 + math.exp(-CUT))
    reach = np.abs(distance).max(axis=1)[:, None] + 2 * a[:, None] * height
    second = 2 * (m2 * m0 - m1 * m1) - 8 * error * reach**2
    fourth = 2 * m4 * m0 - 8 * m3 * m1 + 6 * m2 * m2 + 32 * error * reach**4
    return np.maximum(second, 0.0), fourth


def _log_variation(q: float, a: Floats, power: float, base: Floats) -> Floats:
    """Upper bound of the log total variation of the density of the tilted loss, (b,).

    The density at ``X(z)`` is ``phi(z) r^beta / (phi(c) |dX/dz|)``, its logarithm up to constants
    ``power log r - z^2 / 2 - a z`` with ``power = beta + 1``; stationary points lie between -a and
    (power - 1) a, at most two of them are maxima, and only one if ``power a^2 <= 4``.
    """
    z = -a[:, None] + (power * a)[:, None] * np.linspace(0, 1, 129)
    y = a[:, None] * z - (a * a / 2)[:, None]
    log_ratio = np.logaddexp(math.log1p(-q), math.log(q) + y)
    log_density = power * log_ratio - z * z / 2 - y - math.log(q) - np.log(a)[:, None] - _LOG_SQRT_2PI
    gap = abs(power) * a / 128
    peak = log_density.max(axis=1) + gap * gap / 8 * (1 + max(0.0, -power) * a * a / 4)
    modes = np.where(power * a * a <= 4, 1.0, 2.0)
    return np.asarray(np.log(2 * modes) + peak - base + 1e-9)
