"""Charts as data: drawn as SVG on the page, as a matplotlib figure on request, listed as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from per_instance_accountant.results.rounding import not_nan, rounded_up


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Counts of instances per bin. edges: (b + 1,) rising. counts: (b,). marks: label -> value, drawn as
    vertical lines."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    marks: tuple[tuple[str, float], ...]
    x_label: str
    y_label: str = "instances"

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and one row per bin."""
        bins = zip(self.edges[:-1], self.edges[1:], self.counts, strict=True)
        rows: list[tuple[str, ...]] = [(f"{low:.3g}", f"{high:.3g}", str(count)) for low, high, count in bins]
        header: tuple[str, ...] = ("from", "to", self.y_label)
        return header, rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """Curves over one x axis. x: (k,). series: name -> (k,) values. step: constant between points. A value
    that is not finite interrupts its curve."""

    x: tuple[float, ...]
    series: tuple[tuple[str, tuple[float, ...]], ...]
    x_label: str
    y_label: str
    step: bool = False

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and one row per point."""
        names = tuple(name for name, _ in self.series)
        columns = zip(*(values for _, values in self.series), strict=True)
        rows = [
            (f"{x:.4g}", *(rounded_up(value) for value in values))
            for x, values in zip(self.x, columns, strict=True)
        ]
        return (self.x_label, *names), rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranges:
    """One row per name: a range with a point in it. rows: (name, low, point, high), low <= point <= high
    unless the point is a claim that may lie outside of what was measured."""

    rows: tuple[tuple[str, float, float, float], ...]
    x_label: str
    columns: tuple[str, str, str, str]
    shown: int = 10
    """How many rows are drawn; the table has all."""
    texts: tuple[tuple[str, ...], ...] | None = None
    """Rows of the table where they are not the drawn numbers rounded up."""

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and one row per name."""
        if self.texts is not None:
            return self.columns, list(self.texts)
        return self.columns, [(name, *map(rounded_up, values)) for name, *values in self.rows]


Chart = Histogram | Lines | Ranges


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """At most ``most`` + 2 round numbers from at or below ``low`` to at or above ``high``.

    >>> ticks(0, 7.3)
    [0.0, 2.0, 4.0, 6.0, 8.0]
    >>> ticks(0.0, 0.0)
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if not (math.isfinite(not_nan(low)) and math.isfinite(not_nan(high))) or high <= low:
        low, high = (low, low + 1.0) if math.isfinite(low) else (0.0, 1.0)
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if raw <= factor * power * (1 + 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def finite(values: Sequence[float]) -> list[float]:
    """The finite ones."""
    return [value for value in values if math.isfinite(value)]
