"""Charts as SVG without scripts and inline styles.

Positions across are percentages and text has a fixed size, so that a chart fits a telephone and a printed
page with the same letters. Colours come from the style sheet of the page, for light, dark and print.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, Final

from per_instance_accountant.report.charts import Chart, Histogram, Lines, Ranges, finite, ticks
from per_instance_accountant.results.markup import Markup, element

HEIGHT: Final = 240
_TOP, _BOTTOM, _LINE = 12, 24, 14
_PLOT: Final = HEIGHT - _TOP - _BOTTOM
_NAMES: Final = 14
"""Letters of a name that fit beside the plot; the table has the whole name."""


def draw(chart: Chart, title: str) -> Markup:
    """The chart as one element with ``role="img"`` and the title as its name."""
    parts = _DRAW[type(chart)](chart)
    return element("div", *parts, class_="chart", role="img", aria_label=title)


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1e4 else f"{value:.4g}"


def _percent(value: float, low: float, high: float) -> str:
    return f"{100 * min(max((value - low) / (high - low), 0.0), 1.0):.3f}%"


def _down(value: float, low: float, high: float) -> float:
    return round(_TOP + _PLOT * (1 - (value - low) / (high - low)), 2)


def _axis(labels: list[tuple[float, str]], class_: str) -> Markup:
    """A column of right-aligned labels; ``labels`` are (y in pixels, text)."""
    texts = [
        element("text", text, x="100%", dx=-6, y=f"{y:.2f}", dy="0.35em", text_anchor="end")
        for y, text in labels
    ]
    return element("svg", *texts, class_=class_, height=HEIGHT, aria_hidden="true")


def _value_axis(values: list[float]) -> tuple[Markup, list[Markup]]:
    """The column of a vertical scale, and its grid lines."""
    low, high = values[0], values[-1]
    places = [(_down(value, low, high), _number(value)) for value in values]
    grid = [element("line", x1="0", x2="100%", y1=y, y2=y, class_="grid") for y, _ in places]
    return _axis(places, "axis"), grid


def _across(values: list[float], low: float, high: float) -> list[Markup]:
    """The horizontal scale from low to high, with marks at those of the values that are on it."""
    base = _TOP + _PLOT
    marks = []
    for value in values:
        if not low <= value <= high:
            continue
        x = _percent(value, low, high)
        marks.append(element("line", x1=x, x2=x, y1=base, y2=base + 4, class_="tick"))
        marks.append(element("text", _number(value), x=x, y=base + 18, text_anchor="middle"))
    return [element("line", x1="0", x2="100%", y1=base, y2=base, class_="tick"), *marks]


def _plot(*children: Markup) -> Markup:
    return element("svg", *children, class_="plot", height=HEIGHT, aria_hidden="true")


def _framed(plot: list[Markup], left: Markup, right: Markup | None, x_label: str) -> list[Markup]:
    row = element("div", left, _plot(*plot), *([right] if right is not None else []), class_="row")
    return [row, element("p", x_label, class_="axis-label")]


def _legend(names: list[tuple[str, str]]) -> Markup:
    """Swatches with their text, (class, text): above the plot, where nothing can run into them."""
    entries = [
        element(
            "li",
            element(
                "svg",
                element("line", x1=0, x2=24, y1=6, y2=6, class_=f"line {class_}"),
                width=24,
                height=12,
                aria_hidden="true",
            ),
            " ",
            text,
        )
        for class_, text in names
    ]
    return element("ul", *entries, class_="legend")


def _histogram(chart: Histogram) -> list[Markup]:
    marks = [(label, value) for label, value in chart.marks if math.isfinite(value)]
    scale = ticks(0.0, max([chart.edges[-1], *(value for _, value in marks)]))
    counts = [max(0.0, tick) for tick in ticks(0, max(chart.counts, default=1))]
    left, grid = _value_axis(counts)
    bars = []
    for low, high, count in zip(chart.edges[:-1], chart.edges[1:], chart.counts, strict=True):
        y = _down(count, 0, counts[-1])
        width = 100 * (high - low) / scale[-1]
        bars.append(
            element(
                "rect",
                x=_percent(low, 0, scale[-1]),
                width=f"{width:.3f}%",
                y=y,
                height=round(_TOP + _PLOT - y, 2),
                class_="bar",
            )
        )
    lines = []
    for place, (_, value) in enumerate(marks):
        x = _percent(value, 0, scale[-1])
        lines.append(element("line", x1=x, x2=x, y1=_TOP, y2=_TOP + _PLOT, class_=f"line s{place}"))
    legend = _legend([(f"s{place}", label) for place, (label, _) in enumerate(marks)])
    return [
        legend,
        element("p", chart.y_label, class_="axis-label start"),
        *_framed([*grid, *bars, *lines, *_across(scale, scale[0], scale[-1])], left, None, chart.x_label),
    ]


def _lines(chart: Lines) -> list[Markup]:
    values = finite([value for _, series in chart.series for value in series])
    heights = ticks(min([0.0, *values]), max(values, default=1.0))
    start, end = min(chart.x), max(chart.x)
    end = end if end > start else start + 1.0
    left, grid = _value_axis(heights)
    curves, ends = [], []
    first = 1 if len(chart.series) == 1 else 0
    for place, (name, series) in enumerate(chart.series, first):
        points = [
            (100 * (x - start) / (end - start), _down(y, heights[0], heights[-1]) - _TOP)
            for x, y in zip(chart.x, series, strict=True)
            if math.isfinite(y)
        ]
        curves.append(_curve(points, chart.step, f"line s{place}"))
        if points:
            ends.append((points[-1][1] + _TOP, name, f"s{place}"))
    inner = element(
        "svg",
        *curves,
        x=0,
        y=_TOP,
        width="100%",
        height=_PLOT,
        viewBox=f"0 0 100 {_PLOT}",
        preserveAspectRatio="none",
    )
    return [
        element("p", chart.y_label, class_="axis-label start"),
        *_framed(
            [*grid, inner, *_across(ticks(start, end), start, end)], left, _end_labels(ends), chart.x_label
        ),
    ]


def _curve(points: list[tuple[float, float]], step: bool, class_: str) -> Markup:
    if step and points:
        pairs = itertools.pairwise(points)
        points = [points[0], *(place for a, b in pairs for place in ((b[0], a[1]), b))]
    path = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
    return element("polyline", points=path, class_=class_, vector_effect="non-scaling-stroke")


def _end_labels(ends: list[tuple[float, str, str]]) -> Markup:
    """Names beside the ends of their lines, moved apart where they would touch, in the order of the ends."""
    places = spread([y for y, _, _ in ends], _LINE, _TOP, HEIGHT - _BOTTOM)
    texts = [
        element("text", name, x=8, y=f"{y:.2f}", dy="0.35em", class_=f"end {class_}")
        for y, (_, name, class_) in zip(places, ends, strict=True)
    ]
    return element("svg", *texts, class_="ends", height=HEIGHT, aria_hidden="true")


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near ``wanted``, in the same order along the axis, at least ``gap`` apart and inside
    [low, high] if they fit there.

    >>> spread([10.0, 11.0, 50.0], 14, 0, 60)
    [10.0, 24.0, 50.0]
    """
    order = sorted(range(len(wanted)), key=lambda k: wanted[k])
    places = [0.0] * len(wanted)
    least = low
    for k in order:
        places[k] = max(wanted[k], least)
        least = places[k] + gap
    most = high
    for k in reversed(order):
        places[k] = min(places[k], most)
        most = places[k] - gap
    return places


def _ranges(chart: Ranges) -> list[Markup]:
    rows = chart.rows[: chart.shown]
    scale = ticks(0.0, max(finite([v for _, *values in rows for v in values]), default=1.0))
    gap = _PLOT / max(len(rows), 1)
    marks, names = [], []
    for place, (name, low, point, high) in enumerate(rows):
        y = round(_TOP + gap * (place + 0.5), 2)
        left, middle, right = (_percent(value, 0, scale[-1]) for value in (low, point, high))
        marks.append(element("line", x1="0", x2="100%", y1=y, y2=y, class_="grid"))
        marks.append(element("line", x1=left, x2=right, y1=y, y2=y, class_="range"))
        marks.append(element("circle", cx=middle, cy=y, r=5, class_="point"))
        names.append((y, name if len(name) <= _NAMES else name[: _NAMES - 1] + "…"))
    return _framed(
        [*marks, *_across(scale, scale[0], scale[-1])], _axis(names, "axis names"), None, chart.x_label
    )


_DRAW: Final[dict[type[Chart], Callable[[Any], list[Markup]]]] = {
    Histogram: _histogram,
    Lines: _lines,
    Ranges: _ranges,
}
