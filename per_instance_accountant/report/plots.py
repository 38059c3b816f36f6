"""The same charts as matplotlib figures, to restyle or to save in any format."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from per_instance_accountant.accounting import IndividualLoss
from per_instance_accountant.audit.budget import BudgetAudit
from per_instance_accountant.errors import MissingDependencyError, UsageError
from per_instance_accountant.report import sections
from per_instance_accountant.report.charts import Chart, Histogram, Lines, Ranges
from per_instance_accountant.results import Tabular
from per_instance_accountant.unlearning import EveryoneSteps, UnlearningPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES: Final = ("--", "-", ":", "-.", (0, (5, 2)), (0, (1, 4)))
_COLOURS: Final = ("#b34700", "#1a1a1a", "#0072b2", "#007a5a", "#8a3d6f", "#5a5a5a")


def figure(result: Tabular) -> Figure:
    """A matplotlib Figure, 6.4 by 3.4 inches, of a result: an audit, losses, steps
    for everyone, or a plan.

    Raises MissingDependencyError PIA061 without matplotlib, UsageError PIA071 for another result.
    """
    charts = _CHART.get(type(result))
    if charts is None:
        raise UsageError(
            "PIA071", f"a {type(result).__name__} has no picture", "Nothing was drawn", "audit(ledger).plot()"
        )
    return drawn(*charts(result))


def drawn(title: str, chart: Chart) -> Figure:
    """The chart as a Figure; no global state of matplotlib is used or changed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "PIA061",
            "matplotlib is not installed",
            "Nothing was drawn; pia report and to_arrow() need no matplotlib",
            'pip install "per-instance-accountant[plots]"',
        ) from error
    picture = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = picture.add_subplot()
    axes.set_title(title, loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    _DRAW[type(chart)](axes, chart)
    return picture


def _histogram(axes: Axes, chart: Histogram) -> None:
    widths = np.diff(chart.edges)
    axes.bar(chart.edges[:-1], chart.counts, width=widths, align="edge", color="#5b9bc8")
    for place, (label, value) in enumerate(chart.marks):
        if np.isfinite(value):
            axes.axvline(value, color=_COLOURS[place], linestyle=_STYLES[place], label=label)
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label, xlim=(0, None))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=3, frameon=False, fontsize="small")


def _lines(axes: Axes, chart: Lines) -> None:
    for place, (name, values) in enumerate(chart.series):
        way = "steps-post" if chart.step else "default"
        axes.plot(chart.x, values, drawstyle=way, label=name, color=_COLOURS[place], linestyle=_STYLES[place])
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
    if len(chart.series) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")


def _ranges(axes: Axes, chart: Ranges) -> None:
    rows = chart.rows[: chart.shown]
    places = range(len(rows), 0, -1)
    for place, (_, low, point, high) in zip(places, rows, strict=True):
        axes.hlines(place, low, high, color="#0072b2", linewidth=3)
        axes.plot(point, place, "o", color="#b34700")
    axes.set_yticks(list(places), [name for name, *_ in rows])
    axes.set(xlabel=chart.x_label, xlim=(0, None))


_DRAW: Final[dict[type[Chart], Callable[[Axes, Any], None]]] = {
    Histogram: _histogram,
    Lines: _lines,
    Ranges: _ranges,
}


def _of_audit(audit: BudgetAudit) -> tuple[str, Chart]:
    section = sections.epsilon_histogram(audit, None)
    return f"Individual epsilon ({audit.basis})", section.chart


def _of_loss(loss: IndividualLoss) -> tuple[str, Chart]:
    """Quantiles over the instances of the curves, by order."""
    orders = tuple(map(float, loss.orders))
    shares = {"p99": 0.99, "p90": 0.9, "p50": 0.5, "p10": 0.1}
    levels = np.quantile(loss.rdp, list(shares.values()), axis=0, method="higher")
    series = tuple(
        (name, tuple(map(float, values)))
        for name, values in [("worst case", loss.worst_case_rdp), *zip(shares, levels, strict=True)]
    )
    chart = Lines(x=orders, series=series, x_label="order", y_label="Rényi divergence (nats)")
    return f"Individual Rényi divergences ({loss.basis})", chart


def _of_everyone(everyone: EveryoneSteps) -> tuple[str, Chart]:
    return "Steps to unlearn (CERTIFIED)", sections.steps_to_unlearn(everyone).chart


def _of_plan(plan: UnlearningPlan) -> tuple[str, Chart]:
    rows = sorted(plan.per_instance, key=lambda row: -(np.inf if row.steps is None else row.steps))
    chart = Ranges(
        rows=tuple(
            (f"instance {row.id}", 0.0, float(row.steps), float(row.steps))
            for row in rows
            if row.steps is not None
        ),
        x_label="noisy fine-tuning steps, each alone",
        columns=("instance", "from", "steps", "to"),
    )
    return f"Plan: {plan.steps} steps together ({plan.basis})", chart


_CHART: Final[dict[type[Tabular], Callable[[Any], tuple[str, Chart]]]] = {
    BudgetAudit: _of_audit,
    IndividualLoss: _of_loss,
    EveryoneSteps: _of_everyone,
    UnlearningPlan: _of_plan,
}
