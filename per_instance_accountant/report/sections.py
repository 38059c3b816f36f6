"""From results to sections: a chart, the sentence it says, and its numbers as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.accounting import Basis
from per_instance_accountant.report.charts import Chart, Histogram, Lines, Ranges
from per_instance_accountant.report.trajectories import Trajectories
from per_instance_accountant.results.markup import plain
from per_instance_accountant.results.rounding import rounded_down, rounded_up

if TYPE_CHECKING:
    from per_instance_accountant.audit.budget import BudgetAudit
    from per_instance_accountant.report.evidence import BarrierEvidence, ClaimEvidence, Evidence
    from per_instance_accountant.unlearning import EveryoneSteps

SMALLEST_GROUP: Final = 50
"""Groups below this size are not shown on a page that leaves the house."""
_BINS: Final = 30
_MOST_GROUPS: Final = 100
_MOST_LABELS: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """title; finding: one sentence computed from the data; chart; basis: what the values rest on; note: how
    to read it; ok: False if the finding is that something does not hold."""

    title: str
    finding: str
    chart: Chart
    basis: str
    note: str = ""
    ok: bool = True


def percent(share: float) -> str:
    r"""A share as a percentage that does not claim to be all or none when it is not.

    >>> percent(0.25), percent(0.99999), percent(0.00001), percent(1.0)
    ('25\xa0%', 'more than 99.9\xa0%', 'less than 0.1\xa0%', '100\xa0%')
    """
    if 0 < share < 0.001:
        return "less than 0.1\u00a0%"
    if 0.999 < share < 1:
        return "more than 99.9\u00a0%"
    return f"{100 * share:.3g}\u00a0%"


def counted(values: NDArray[np.float64], top: float) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Edges and counts of bins from 0 to at least the largest finite value."""
    known = values[np.isfinite(values)]
    reach = max(float(known.max(initial=0.0)), top if math.isfinite(top) else 0.0) or 1.0
    counts, edges = np.histogram(known, bins=_BINS, range=(0.0, reach * (1 + 1e-9)))
    return tuple(edges.tolist()), tuple(int(count) for count in counts)


def for_everybody(audit: BudgetAudit) -> float:
    """CERTIFIED epsilon of everybody: the tight worst case, or the largest budget that a filter enforced."""
    if audit.certified_budget is None:
        return audit.worst_case_tight
    return min(audit.worst_case_tight, float(audit.certified_budget.max()))


def comparable_worst(audit: BudgetAudit) -> float:
    """CERTIFIED epsilon of everybody by the method of the individual values, which then never exceed it."""
    if audit.basis is Basis.CERTIFIED:
        return for_everybody(audit)
    budget = np.inf if audit.certified_budget is None else float(audit.certified_budget.max())
    return min(audit.worst_case, budget)


def epsilon_histogram(audit: BudgetAudit, budget: float | None) -> Section:
    """Individual epsilons with the worst case, the median and the budget."""
    worst = comparable_worst(audit)
    edges, counts = counted(audit.epsilon, 0.0)
    median, most = audit.quantiles([0.5, 0.99]).tolist()
    marks = [(f"worst case {rounded_up(worst)}", worst)]
    marks.append((f"median {rounded_up(median)}", median))
    if budget is not None:
        marks.append((f"budget {budget:g}", budget))
    below = float(np.mean(audit.epsilon <= worst / 2))
    finding = (
        f"Half of the instances spent at most {rounded_up(median)} and 99\u00a0% at most {rounded_up(most)}; "
        f"{percent(below)} spent at most half of the worst case, {rounded_up(worst)}."
    )
    if budget is not None:
        over = audit.num_over(budget)
        finding += f" {over} of {len(audit.ids)} are above the budget of {budget:g}"
        certified = over > 0 and for_everybody(audit) <= budget
        finding += ", though the tight worst case certifies it for all." if certified else "."
    infinite = int(np.sum(~np.isfinite(audit.epsilon)))
    note = f"{infinite} instances without a finite bound are not drawn." if infinite else ""
    chart = Histogram(edges=edges, counts=counts, marks=tuple(marks), x_label=f"epsilon at {_at(audit)}")
    return Section(title="Individual epsilon", finding=finding, chart=chart, basis=_basis(audit), note=note)


def epsilon_trajectories(audit: BudgetAudit, paths: Trajectories) -> Section:
    """Quantiles of the individual epsilons against the number of steps."""
    middle = paths.quantiles["p50"]
    half = next((k for k, value in enumerate(middle) if value >= middle[-1] / 2), len(middle) - 1)
    share = paths.steps[half] / paths.steps[-1]
    spent = f"The median instance had spent half of its final epsilon after {percent(share)} of the steps"
    if middle[-1] == 0:
        spent = "The median instance spent nothing"
    if not math.isfinite(middle[-1]):
        spent = "The median instance has no finite bound"
    finding = f"{spent}; over all of the run the worst case grew to {rounded_up(paths.worst[-1])}."
    chart = Lines(
        x=tuple(map(float, paths.steps)),
        series=(
            ("worst case", paths.worst),
            *((n, paths.quantiles[n]) for n in ("p99", "p90", "p50", "p10")),
        ),
        x_label="steps",
        y_label=f"epsilon at {_at(audit)}",
    )
    note = (
        "From Rényi divergences, so the ends may lie a few per cent above the values of the audit. "
        f"Quantiles of {paths.followed} instances spread evenly over the final ranking."
    )
    return Section(
        title="Epsilon while training", finding=finding, chart=chart, basis=_basis(audit), note=note
    )


def group_ranges(audit: BudgetAudit, name: str) -> Section | None:
    """Median, 95 % quantile and maximum by group; None for labels that are nearly as many as instances."""
    if not _summarises(audit, name):
        return None
    rows = audit.by_group(name)
    first, last = rows[0], rows[-1]
    finding = (
        f"Group {_group(first)} has the largest median, {rounded_up(first['median'])}; "
        f"group {_group(last)} the smallest, {rounded_up(last['median'])}."
    )
    if len(rows) == 1:
        finding = (
            f"All instances are in group {_group(first)}; their median is {rounded_up(first['median'])}."
        )
    drawn = tuple(
        (f"{_group(row)} ({row['instances']})", row["median"], row["p95"], row["max"])
        for row in rows[:_MOST_GROUPS]
    )
    chart = Ranges(
        rows=drawn,
        x_label="epsilon: from the median over the 95 % quantile (point) to the largest",
        columns=(f"{plain(name)} (instances)", "median", "95 % quantile", "largest"),
    )
    return Section(
        title=f"Groups by {plain(name)}",
        finding=finding,
        chart=chart,
        basis=_basis(audit),
        note=_cut(len(rows), chart.shown),
    )


def group_means(audit: BudgetAudit, name: str) -> Section | None:
    """Mean epsilon of groups of at least 50; None if there is none. No total is shown, from which a hidden
    group could be computed."""
    labels, index, sizes = np.unique(audit.groups[name], return_inverse=True, return_counts=True)
    means = np.bincount(index, weights=audit.epsilon) / sizes
    large = np.flatnonzero(sizes >= SMALLEST_GROUP)
    if not len(large):
        return None
    rows = [(plain(labels[k].item()), two_digits_up(float(means[k]))) for k in large.tolist()]
    rows.sort(key=lambda row: (-row[1], row[0]))
    finding = f"{len(rows)} groups have at least {SMALLEST_GROUP} instances; their means lie between "
    finding += f"{rows[-1][1]:g} and {rows[0][1]:g}."
    chart = Ranges(
        rows=tuple((group, 0.0, mean, mean) for group, mean in rows[:_MOST_GROUPS]),
        x_label="mean epsilon, rounded up to two digits",
        columns=(plain(name), "from", "mean", "to"),
    )
    note = "Means over the data without added noise: not differentially private. " + _cut(
        len(rows), chart.shown
    )
    return Section(
        title=f"Groups by {plain(name)}", finding=finding, chart=chart, basis=_basis(audit), note=note
    )


def two_digits_up(value: float) -> float:
    """``value`` rounded up to two significant digits.

    >>> two_digits_up(1.301), two_digits_up(0.0)
    (1.4, 0.0)
    """
    if value <= 0 or not math.isfinite(value):
        return value
    power = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / power * (1 - 1e-12)) * power:.2g}")


def steps_to_unlearn(everyone: EveryoneSteps) -> Section:
    """Share of the instances that are forgotten, each alone, after a number of steps."""
    known = np.sort(everyone.steps[np.isfinite(everyone.steps)])
    unreachable = len(everyone.steps) - len(known)
    measure = everyone.measure
    target = f"epsilon {everyone.target:g} at " + (
        f"order {measure.order:g}" if measure.order is not None else f"delta {measure.delta:g}"
    )
    median, most = (everyone.quantile([0.5, 1.0])).tolist()
    if math.isfinite(median):
        finding = f"To reach {target}, half of the instances need at most {median:.0f} steps each"
        finding += f" and every one at most {most:.0f}" if math.isfinite(most) else ""
        finding += f"; training took {everyone.training_steps}."
    else:
        finding = f"More than half of the instances cannot reach {target} by any number of steps."
    if unreachable:
        finding += f" {unreachable} of {len(everyone.steps)} cannot reach it."
    points = np.unique(np.quantile(known, np.linspace(0, 1, 33), method="higher")) if len(known) else known
    shares = np.searchsorted(known, points, side="right") / len(everyone.steps)
    chart = Lines(
        x=(0.0, *(float(x) for x in points if x > 0)),
        series=(
            (
                "instances",
                (
                    100 * float(np.mean(everyone.steps <= 0)),
                    *(100 * float(s) for s, x in zip(shares, points, strict=True) if x > 0),
                ),
            ),
        ),
        x_label="noisy fine-tuning steps",
        y_label="forgotten, each alone (%)",
        step=True,
    )
    return Section(
        title="Steps to unlearn",
        finding=finding,
        chart=chart,
        basis="CERTIFIED",
        note="Each instance alone; several together need a plan of their own: pia plan.",
    )


def loss_barrier(barrier: BarrierEvidence) -> Section:
    """Mean loss on the straight line between two models."""
    points = len(barrier.mean)
    share = [k / (points - 1) for k in range(points)]
    chord = [(1 - s) * barrier.mean[0] + s * barrier.mean[-1] for s in share]
    excess = max(value - line for value, line in zip(barrier.mean, chord, strict=True))
    rises = f"rises at most {excess:.3g} nats" if excess > 1e-9 else "never rises"
    pairs = "1 pair" if barrier.pairs == 1 else f"mean of {barrier.pairs} pairs"
    finding = (
        f"On the way from one to the other the mean loss on {plain(barrier.on)} {rises} above the "
        f"straight line between its ends ({pairs})."
    )
    chart = Lines(
        x=tuple(share),
        series=(("highest", barrier.highest), ("mean", barrier.mean), ("lowest", barrier.lowest)),
        x_label="share of the way",
        y_label=f"mean loss on {plain(barrier.on)} (nats)",
    )
    title = f"Loss barrier between {plain(barrier.between)}"
    return Section(title=title, finding=finding, chart=chart, basis="ESTIMATE")


def claimed_and_measured(evidence: Evidence) -> Section:
    """Claims beside the empirical epsilons that attacks reached."""
    broken = [plain(claim.name) for claim in evidence.claims if not claim.holds]
    count = len(evidence.claims)
    claims = "the claim" if count == 1 else f"all {count} claims"
    nearest = min(evidence.claims, key=_distance)
    finding = (
        f"What the attacks measured is compatible with {claims}: closest is {plain(nearest.name)}, with at "
        f"least {rounded_down(nearest.lower)} measured and at most {rounded_up(nearest.claimed)} claimed."
    )
    if broken:
        finding = (
            f"{len(broken)} of {count} claims are refuted: {', '.join(broken[:5])}. "
            "A measured lower bound lies above the claimed epsilon."
        )
    chart = Ranges(
        rows=tuple(_measured_range(claim) for claim in evidence.claims),
        x_label="epsilon: measured (bar) and claimed (point)",
        columns=("claim", "measured, at least", "claimed", "measured, at most"),
        texts=tuple(
            (
                plain(claim.name),
                rounded_down(claim.lower),
                rounded_up(claim.claimed),
                "not known" if claim.upper is None else rounded_up(claim.upper),
            )
            for claim in evidence.claims
        ),
    )
    attack = f"{plain(evidence.attack)} " if evidence.attack else ""
    note = f"{attack}Measured at confidence {evidence.confidence:g}. {_cut(count, chart.shown)}"
    return Section(
        title="Claimed against measured",
        finding=finding,
        chart=chart,
        basis="ESTIMATE (measured), as stated (claimed)",
        note=note,
        ok=not broken,
    )


def _summarises(audit: BudgetAudit, name: str) -> bool:
    count = len(np.unique(audit.groups[name])) if name in audit.groups else 0
    return count <= min(_MOST_LABELS, max(len(audit.ids) // 2, 1))


def _distance(claim: ClaimEvidence) -> float:
    """Share of a claim that was not reached."""
    if claim.claimed == 0:
        return 0.0
    return (claim.claimed - claim.lower) / claim.claimed if claim.claimed < math.inf else 1.0


def _measured_range(claim: ClaimEvidence) -> tuple[str, float, float, float]:
    """The bar: from 0 to what was demonstrated, or the interval that was measured."""
    low, high = (0.0, claim.lower) if claim.upper is None else (claim.lower, claim.upper)
    return plain(claim.name), low, claim.claimed, high


def _group(row: dict[str, Any]) -> str:
    return plain(row["group"])


def _cut(rows: int, shown: int) -> str:
    if rows <= shown:
        return ""
    listed = f", the table lists {min(rows, _MOST_GROUPS)}"
    return f"The figure shows {shown} of {rows}{listed}."


def _at(audit: BudgetAudit) -> str:
    return f"delta {audit.delta:g}"


def _basis(audit: BudgetAudit) -> str:
    return str(audit.basis)
