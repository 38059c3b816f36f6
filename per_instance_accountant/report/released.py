"""What a page for everybody may show of individual epsilons: statistics with differential privacy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from per_instance_accountant.report.charts import Histogram
from per_instance_accountant.report.sections import Section, percent

if TYPE_CHECKING:
    from per_instance_accountant.audit.release import PublishedHistogram, PublishedQuantiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """Statistics that were released and charged in the ledger before the audit that the page shows."""

    histogram: PublishedHistogram
    quantiles: PublishedQuantiles | None = None

    @property
    def cost(self) -> float:
        """Epsilon that the releases together cost everybody."""
        return self.histogram.epsilon + (0.0 if self.quantiles is None else self.quantiles.epsilon)


def released_histogram(released: Released) -> Section:
    """The noisy histogram with the noisy median."""
    counts = [max(count, 0) for count in released.histogram.counts]
    edges = released.histogram.edges
    known = (
        {}
        if released.quantiles is None
        else dict(zip(released.quantiles.quantiles, released.quantiles.values, strict=True))
    )
    lower = sum(count for count, edge in zip(counts, edges[1:], strict=True) if edge <= edges[-1] / 2)
    share = percent(lower / max(sum(counts), 1))
    finding = f"By noisy counts, {share} of the instances spent at most half of {edges[-1]:.4g}."
    if 0.5 in known:
        finding += f" The noisy median is {known[0.5]:.4g}."
    marks = tuple(
        (f"{100 * level:g} % quantile {value:.4g}", value) for level, value in known.items() if level == 0.5
    )
    note = (
        f"Released with differential privacy for epsilon {released.cost:g}, which the ledger records and "
        "the worst case includes. Counts and quantiles are noisy and bound nothing; counts below 0 are drawn "
        "as 0."
    )
    chart = Histogram(
        edges=edges,
        counts=tuple(counts),
        marks=marks,
        x_label=f"epsilon at delta {released.histogram.delta:g}",
        y_label="instances, noisy",
    )
    return Section(
        title="Individual epsilon, noisy", finding=finding, chart=chart, basis="ESTIMATE", note=note
    )
