"""Runs as spans of equal steps, and the levels to which their ratios are rounded up for the tight
epsilon."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.divergence import sampled_gaussian_epsilon

Floats = NDArray[np.float64]

_LEVELS: Final = 256
_BINS: Final = 8192
_DECADES: Final = 4.0
"""Ratios below 10^-_DECADES of the largest share one level."""
_CHUNK: Final = 4096
_AT_ONCE: Final = 1 << 24
"""Levels of instances at spans held at once."""
_SPAN_BYTES: Final = 1 << 28
_SPAN_RATES: Final = 4
"""Runs whose spans need more than this keep no spans: their tight epsilon is that of their Renyi
curve."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Span:
    """``steps`` steps of one mechanism: sample rate, and the sensitivity ratio of every instance,
    (n,) float32."""

    steps: int
    sample_rate: float
    ratios: NDArray[np.float32]


def with_span(spans: list[Span] | None, steps: int, rate: float, ratios: Floats) -> list[Span] | None:
    """The spans and one more, which is joined to the last one if nothing changed; None if they
    became too many."""
    if spans is None:
        return None
    with np.errstate(over="ignore"):
        narrow = ratios.astype(np.float32)
    narrow = np.where(narrow < ratios, np.nextafter(narrow, np.float32(np.inf)), narrow)
    last = spans[-1] if spans else None
    if last is not None and last.sample_rate == rate and np.array_equal(last.ratios, narrow):
        return [*spans[:-1], Span(steps=last.steps + steps, sample_rate=rate, ratios=last.ratios)]
    spans.append(Span(steps=steps, sample_rate=rate, ratios=narrow))
    rates = {span.sample_rate for span in spans}
    return spans if len(rates) <= _SPAN_RATES and len(spans) * narrow.nbytes <= _SPAN_BYTES else None


def tight_epsilon(spans: tuple[Span, ...], delta: float) -> Floats:
    """(n,) upper bounds of epsilon of n instances whose bounds were all fixed before the run.

    Ratios are rounded UP to at most 256 levels per sample rate, chosen where ratios are dense.
    Bounds that were chosen during the run do not belong here (docs/math/tight_epsilon.md).

    >>> span = Span(steps=1000, sample_rate=0.02, ratios=np.array([0.0, 0.5, 1.0], np.float32))
    >>> tight_epsilon((span,), 1e-5).round(3).tolist()
    [0.0, 1.33, 3.899]
    """
    size = spans[0].ratios.size if spans else 0
    rates = sorted({span.sample_rate for span in spans})
    grids = [_levels([span for span in spans if span.sample_rate == rate]) for rate in rates]
    starts = np.cumsum([0, *(grid.size for grid in grids)])
    all_rates = np.repeat(rates, [grid.size for grid in grids])
    all_levels = np.concatenate(grids) if grids else np.empty(0)
    places = [rates.index(span.sample_rate) for span in spans]
    result = np.zeros(size)
    for part in np.array_split(np.arange(size), math.ceil(size * len(spans) / _AT_ONCE)) if size else ():
        columns = [
            starts[place] + _rounded_up(grids[place], span.ratios[part])
            for place, span in zip(places, spans, strict=True)
        ]
        # Instances with the same levels at all steps have the same epsilon.
        kinds, kind = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
        found = np.empty(len(kinds))
        for some in np.array_split(np.arange(len(kinds)), math.ceil(len(kinds) / _CHUNK)):
            counts, rows = np.zeros((some.size, all_levels.size)), np.arange(some.size)
            for span, column in zip(spans, kinds[some].T, strict=True):
                counts[rows, column] += span.steps
            found[some] = sampled_gaussian_epsilon(all_rates, all_levels, counts, delta)
        result[part] = found[kind.ravel()]
    return result


def _rounded_up(grid: Floats, ratios: NDArray[np.float32]) -> NDArray[np.intp]:
    """Index of the smallest level that is not below each ratio."""
    return np.searchsorted(grid, ratios)


def _levels(spans: list[Span]) -> Floats:
    """Rising levels that reach the largest ratio: all ratios if they are few, else spaced by their
    density.

    Rounding up costs about the local gap; for a given number of levels the mean relative cost is
    least where the density of the levels is the square root of the density of the ratios, both on
    the logarithmic scale.
    """
    distinct = np.unique(np.concatenate([np.unique(span.ratios) for span in spans])).astype(np.float64)
    finite = distinct[np.isfinite(distinct)]
    if finite.size <= _LEVELS or finite[-1] == 0:
        return distinct
    top = finite[-1]
    edges = top * 10.0 ** np.linspace(-_DECADES, 0, _BINS + 1)
    mass = np.zeros(_BINS)
    for span in spans:
        mass += span.steps * np.histogram(span.ratios[np.isfinite(span.ratios)], bins=edges)[0]
    # Smoothed, so that a lone value does not claim a level of its own.
    mass = np.convolve(mass, np.ones(65), mode="same")
    share = np.cumsum(np.sqrt(mass))
    wanted = share[-1] * np.arange(1, _LEVELS) / (_LEVELS - 1)
    inner = edges[1:][np.minimum(np.searchsorted(share, wanted), _BINS - 1)]
    grid = np.concatenate([distinct[:1], edges[:1], inner, [top]])
    # The largest ratio at or below a level serves the same ratios and costs less.
    lowered = finite[np.maximum(np.searchsorted(finite, grid, side="right") - 1, 0)]
    return np.unique(np.concatenate([lowered, distinct[finite.size :]]))
