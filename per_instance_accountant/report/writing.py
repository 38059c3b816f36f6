"""Which sections a page has, for whom."""

from __future__ import annotations

import datetime
import enum
import importlib.metadata
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from per_instance_accountant.errors import UsageError
from per_instance_accountant.report import sections
from per_instance_accountant.report.evidence import Evidence
from per_instance_accountant.report.page import Number, Page, render
from per_instance_accountant.report.released import Released, released_histogram
from per_instance_accountant.report.sections import Section
from per_instance_accountant.report.trajectories import trajectories
from per_instance_accountant.results.files import write_private
from per_instance_accountant.results.rounding import rounded_up

if TYPE_CHECKING:
    from per_instance_accountant.audit.budget import BudgetAudit
    from per_instance_accountant.unlearning import EveryoneSteps

_PROMISE: Final = {
    "CERTIFIED": (
        "Each individual epsilon bounds what everything released shows about that one instance: nobody who "
        "sees the released models can learn more than that about whether the instance took part. The bounds "
        "were enforced at every step and known before the run."
    ),
    "OUTPUT_SPECIFIC": (
        "The worst case bounds what everything released shows about any instance. Each individual epsilon "
        "is the loss that this run realised: a statement about the runs that stay under a budget fixed in "
        "advance, not a bound that was known before the run."
    ),
    "ESTIMATE": (
        "The worst case bounds what everything released shows about any instance. The individual epsilons "
        "are scores: they rank instances and bound nothing."
    ),
}
_PRIVATE: Final = (
    "Individual values depend on the data: they are themselves private. Share this page only with people "
    "who may see the training data."
)
_SHAREABLE: Final = (
    "This page is for readers who may not see the training data: it has no ids, no individual values and no "
    "group of fewer than 50 instances. Individual values were left out, because they depend on the data."
)
_WORST_PROMISE: Final = (
    "The worst-case epsilon bounds what everything released shows about any one instance, whatever its data: "
    "nobody who sees the released models can learn more than that about whether the instance took part. The "
    "bound was enforced at every step and known before the run."
)
_MOST_GROUPINGS: Final = 6


class Audience(enum.StrEnum):
    """Who will read the page: those who may see the training data, or anybody."""

    INTERNAL = "internal"
    SHAREABLE = "shareable"


def report_html(
    audit: BudgetAudit,
    *,
    audience: Audience | str = Audience.INTERNAL,
    budget: float | None = None,
    by: str | None = None,
    everyone: EveryoneSteps | None = None,
    evidence: Evidence | None = None,
    released: Released | None = None,
    title: str = "Individual privacy budgets",
    created: datetime.datetime | None = None,
) -> str:
    """The page as text: HTML in UTF-8, no scripts, nothing loaded from elsewhere.

    audience: ``internal`` (figures of individual values) or ``shareable`` (no ids, no individual values,
    groups of at least 50, and of one grouping only). budget: epsilon that instances are compared with. by:
    the grouping to show; None shows all of them to an internal reader and none to others. everyone: of
    ``plan_everyone``, for the steps to unlearn. evidence: what an evaluation measured. released: statistics
    with differential privacy, made before the audit; the only ones of individual values that a shareable page
    shows. created: the time to state, now for None.

    Raises UsageError PIA070 for an unknown audience or a budget below 0, PIA071 for an unknown grouping, or
    for steps of more instances than the audit has.

    >>> from per_instance_accountant import audit
    >>> from per_instance_accountant.ledger import LedgerWriter, Phase, Run, Step
    >>> import numpy as np
    >>> writer = LedgerWriter.create(None, Run(num_instances=2))
    >>> writer.append(Phase(
    ...     kind="train", sampling="poisson", sample_rate=0.5, noise_std=2.0, max_grad_norm=1.0,
    ...     charging="worst_case", denominator=1.0, learning_rate=0.1))
    >>> writer.append(Step(positions=np.array([1]), contributions=np.ones(1, np.float32)))
    >>> page = report_html(audit(writer.ledger()))
    >>> page.count("<figure"), "<script" in page
    (2, False)
    """
    readers = _checked(audit, audience, budget, by, everyone)
    internal = readers is Audience.INTERNAL
    if internal:
        shown = list(_internal(audit, budget, by, everyone))
    else:
        shown = list(_shareable(audit, by, released))
    shown += _measured(evidence)
    page = Page(
        title=title,
        subtitle=f"{len(audit.ids)} instances, {audit.num_steps} steps, delta {audit.delta:g}",
        audience=readers.value,
        numbers=_numbers(audit, budget) if internal else _public_numbers(audit),
        promise=_PROMISE[str(audit.basis)] if internal else _WORST_PROMISE,
        warning=_PRIVATE if internal else _SHAREABLE,
        sections=tuple(shown),
        absent=tuple(_absent(audit, internal, everyone, evidence)),
        statement=tuple(audit.statement().splitlines()),
        method=tuple(_method(audit).items()),
        created=created or datetime.datetime.now(datetime.UTC),
    )
    return render(page)


def write_report(audit: BudgetAudit, path: str | os.PathLike[str], **options: Any) -> None:
    """Write :func:`report_html` with these options to ``path``, readable by the owner only.

    Raises what :func:`report_html` raises, and UsageError PIA070 for a path that is no regular file.
    """
    write_private(path, report_html(audit, **options).encode("utf-8"))


def _checked(
    audit: BudgetAudit,
    audience: Audience | str,
    budget: float | None,
    by: str | None,
    everyone: EveryoneSteps | None,
) -> Audience:
    if audience not in tuple(Audience):
        raise _refused(
            "PIA070", f"audience is {str(audience)!r}", 'audience="internal" or audience="shareable"'
        )
    if budget is not None:
        audit.num_over(budget)
    if by is not None and by not in audit.groups:
        raise _refused(
            "PIA071", f"the ledger holds no group {by!r}; it holds {sorted(audit.groups)}", "by=None"
        )
    if everyone is not None and len(everyone.ids) > len(audit.ids):
        raise _refused(
            "PIA071",
            f"steps of {len(everyone.ids)} instances beside an audit of {len(audit.ids)}",
            "everyone=plan_everyone(the_same_ledger, ...)",
        )
    return Audience(audience)


def _refused(code: str, happened: str, fix: str) -> UsageError:
    return UsageError(code, happened, "No page was written", fix)


def _internal(
    audit: BudgetAudit, budget: float | None, by: str | None, everyone: EveryoneSteps | None
) -> Iterator[Section]:
    yield sections.epsilon_histogram(audit, budget)
    # One rule is that of the run or replaced it; several are the run's own.
    rule = audit.charging[0] if len(audit.charging) == 1 else None
    paths = None if audit.ledger is None else trajectories(audit.ledger, audit.epsilon, audit.delta, rule)
    if paths is not None:
        yield sections.epsilon_trajectories(audit, paths)
    for name in sorted(audit.groups)[:_MOST_GROUPINGS] if by is None else [by]:
        section = sections.group_ranges(audit, name)
        if section is not None:
            yield section
    if everyone is not None:
        yield sections.steps_to_unlearn(everyone)


def _shareable(audit: BudgetAudit, by: str | None, released: Released | None) -> Iterator[Section]:
    if released is not None:
        yield released_histogram(released)
    section = None if by is None else sections.group_means(audit, by)
    if section is not None:
        yield section


def _measured(evidence: Evidence | None) -> Iterator[Section]:
    if evidence is None:
        return
    yield from map(sections.loss_barrier, evidence.barriers)
    if evidence.claims:
        yield sections.claimed_and_measured(evidence)


def _absent(
    audit: BudgetAudit, internal: bool, everyone: EveryoneSteps | None, evidence: Evidence | None
) -> Iterator[str]:
    if not internal:
        yield (
            "Exact histogram, quantiles and trajectories of individual epsilons, and steps to unlearn: they "
            "show individual values. A noisy histogram can be bought: pia report --release-epsilon EPS."
        )
    elif everyone is None:
        yield "Steps to unlearn: no target was given (pia report --target-epsilon 0.1 --order 8)."
    if evidence is None or not evidence.barriers:
        yield "Loss barrier: no evaluation was given (pia report --evidence FILE)."
    if evidence is None or not evidence.claims:
        yield "Claimed against measured: no evaluation was given (pia report --evidence FILE)."


def _numbers(audit: BudgetAudit, budget: float | None) -> tuple[Number, ...]:
    basis = str(audit.basis)
    median, most = audit.quantiles([0.5, 0.99]).tolist()
    last = Number("largest individual epsilon", rounded_up(float(audit.epsilon.max())), basis)
    if budget is not None:
        over = audit.num_over(budget)
        within = sections.for_everybody(audit) <= budget
        note = f"{basis}; CERTIFIED within it for everybody" if within and over else basis
        alert = over > 0 and not within
        last = Number(f"instances above the budget of {budget:g}", str(over), note, alert=alert)
    return (
        _worst(audit, sections.comparable_worst(audit)),
        Number("median individual epsilon", rounded_up(median), basis),
        Number("99th percentile", rounded_up(most), basis),
        last,
    )


def _public_numbers(audit: BudgetAudit) -> tuple[Number, ...]:
    return (
        _worst(audit, sections.for_everybody(audit)),
        Number("delta", f"{audit.delta:g}", "chosen"),
        Number("instances", str(len(audit.ids)), "recorded"),
        Number("noisy steps", str(audit.num_steps), "recorded"),
    )


def _worst(audit: BudgetAudit, shown: float) -> Number:
    """The worst case by the method of the other numbers, and what else is certified."""
    best, tight, renyi = sections.for_everybody(audit), audit.worst_case_tight, audit.worst_case
    note = "CERTIFIED"
    if best < tight:
        note = f"CERTIFIED by the privacy filter; the clip norm alone allows {rounded_up(tight)}"
    elif shown < renyi:
        note = f"CERTIFIED; {rounded_up(renyi)} by Rényi divergences, as Opacus computes it"
    elif tight < shown:
        note = f"CERTIFIED by Rényi divergences; {rounded_up(tight)} by the law of the loss itself"
    return Number("worst-case epsilon", rounded_up(shown), note)


def _method(audit: BudgetAudit) -> Mapping[str, str]:
    """What was done, for the table of the page."""
    rows = {"Charging rule": " + ".join(audit.charging), "Basis of individual values": str(audit.basis)}
    for place, phase in enumerate(audit.phases[:8], 1):
        sampling = (
            f"Poisson sampling, rate {phase.sample_rate:g}"
            if phase.sampling == "poisson"
            else "fixed-size batches"
        )
        multiplier = phase.noise_std / phase.max_grad_norm
        rows[f"Phase {place} ({phase.kind})"] = (
            f"{sampling}; noise multiplier {multiplier:.6g}; clip norm {phase.max_grad_norm:g}; "
            f"{phase.optimizer}, learning rate {phase.learning_rate:g}, weight decay {phase.weight_decay:g}"
        )
    if len(audit.phases) > 8:
        rows["Further phases"] = str(len(audit.phases) - 8)
    if audit.num_abandoned_steps:
        rows["Abandoned steps"] = f"{audit.num_abandoned_steps}, charged as well"
    recorded = {} if audit.ledger is None else audit.ledger.run.software
    written = importlib.metadata.version("per-instance-accountant")
    rows["Ledger"] = audit.digest
    rows["Recorded with"] = (
        ", ".join(f"{name} {version}" for name, version in sorted(recorded.items())) or "not stated"
    )
    rows["Computed with"] = f"per-instance-accountant {written}"
    return rows
