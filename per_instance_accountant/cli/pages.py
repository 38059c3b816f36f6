"""From the result of a room to the page that is printed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from per_instance_accountant.audit.rounding import rounded_up
from per_instance_accountant.cli.printing import SENSITIVE, Page, Table

if TYPE_CHECKING:
    from per_instance_accountant.audit.budget import BudgetAudit
    from per_instance_accountant.unlearning import EveryoneSteps, UnlearningPlan, VerificationReport


def budget_verdict(result: BudgetAudit, budget: float) -> dict[str, Any]:
    """Only CERTIFIED numbers establish a budget: the individual ones if they are, else the worst case."""
    over = result.num_over(budget)
    certified = (result.basis == "CERTIFIED" and over == 0) or result.worst_case <= budget
    return {"budget": budget, "over": over, "instances": len(result.ids), "certified": certified}


def audit_page(
    result: BudgetAudit, ledger: str, by: str | None, top: int, within: dict[str, Any] | None
) -> Page:
    """Worst case, quantiles, the ``top`` largest values and the groups of ``by``, each with its basis."""
    summary: dict[str, Any] = result.to_dict()
    quantiles = {f"p{round(100 * float(q))}": value for q, value in summary["epsilon_quantiles"].items()}
    rows = [{"of": "worst case", "epsilon": result.worst_case, "basis": "CERTIFIED"}]
    rows += [
        {"of": name, "epsilon": value, "basis": str(result.basis)}
        for name, value in (quantiles | {"max": summary["epsilon_max"]}).items()
    ]
    groups, individuals = (result.by_group(by) if by else []), result.top(top)
    head = [
        "Individual privacy budgets",
        f"{len(result.ids)} instances, {result.num_steps} steps, delta {result.delta:g}, ledger {ledger}",
    ]
    if within:
        verdict = "yes" if within["certified"] else "no"
        head.append(
            f"above {within['budget']}: {within['over']} of {within['instances']} ({result.basis} values)"
        )
        head.append(f"certified within {within['budget']} for every instance: {verdict}")
    document = summary | {"budget": within, "groups": groups, "top": individuals, "notice": SENSITIVE}
    return Page(
        head=head,
        tables=[Table.of(table) for table in (rows, individuals, groups) if table],
        document=document | {"statement": result.statement().splitlines()},
        notes=result.statement().splitlines(),
    )


def nothing_to_plan_page(statuses: dict[str, str]) -> Page:
    """Every request of the queue was recorded before."""
    rows = [{"request": request, "status": status} for request, status in statuses.items()]
    return Page(
        head=["Plan: nothing to do, the ledger records all requests"],
        tables=[Table.of(rows)],
        document={"requests": statuses, "steps": None, "reachable": None, "notice": SENSITIVE},
        notes=["A recorded request is certified only once its run is finished: pia verify", SENSITIVE],
    )


def everyone_page(table: EveryoneSteps, individuals: bool) -> Page:
    """Quantiles of the steps that each instance needs alone; ``individuals``: a row for everyone as well."""
    shares = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
    steps = table.quantile(shares).tolist()
    unreachable = int((table.steps == math.inf).sum())
    counted = [{"share": f"{share:.0%}", "steps at most": k} for share, k in zip(shares, steps, strict=True)]
    order, delta = table.measure.order, table.measure.delta
    measure = f"Renyi order {order}" if order is not None else f"delta {delta}"
    head = [
        f"Steps that each of {len(table.ids)} instances would need alone; {unreachable} are unreachable",
        f"Target epsilon {table.target} at {measure}, direction {table.direction}; "
        f"training took {table.training_steps} steps",
    ]
    document = {
        "instances": len(table.ids),
        "unreachable": unreachable,
        "quantiles": {f"p{round(100 * share)}": k for share, k in zip(shares, steps, strict=True)},
        "target": table.target,
        "order": order,
        "delta": delta,
        "direction": table.direction,
        "training_steps": table.training_steps,
        "bounds": {name: int((table.bound_index == k).sum()) for k, name in enumerate(table.bound_names)},
        "notice": SENSITIVE,
    }
    rows: list[tuple[object, ...]] = []
    if individuals:
        columns = (table.ids.tolist(), table.steps.tolist(), table.value.tolist(), table.bound.tolist())
        rows = list(zip(*columns, strict=True))
    everyone = Table(columns=("id", "steps", "epsilon", "by"), rows=rows)
    return Page(
        head=head,
        tables=[Table.of(counted), *([everyone] if individuals else [])],
        document=document,
        notes=["Never add up steps or values: a forget set needs pia plan --ids", SENSITIVE],
    )


def plan_page(made: UnlearningPlan, statuses: dict[str, str] | None = None, status: str = "planned") -> Page:
    """Steps of the request and of each instance alone, the bound that gave them and what it assumes."""
    from per_instance_accountant.unlearning import CONDITIONS

    order, delta = made.measure.order, made.measure.delta
    measure = f"Renyi order {order}" if order is not None else f"delta {delta}"
    claim = (
        f"at most epsilon {rounded_up(made.value)} at {measure} ({made.basis}), target {made.target}, "
        f"direction {made.direction}, against {made.reference}, by {made.bound}"
    )
    if made.reachable:
        head = [
            f"Plan: {made.steps} noisy fine-tuning steps without the {len(made.ids)} requested instances",
            f"After them: {claim}",
            f"Training took {made.training_steps} steps; ratio {rounded_up(made.cost_ratio or 0.0)}",
        ]
    else:
        head = [f"Plan: unreachable for the {len(made.ids)} requested instances", f"Best reached: {claim}"]
    if made.request_id is not None:
        head.append(f"Request {made.request_id}: {status}")
    rows = [
        {
            "id": row.id,
            "steps alone": row.steps,
            "epsilon": row.value,
            "basis": made.basis,
            "by": row.bound,
            "decides": "<-" if row.id == made.deciding_id else "",
        }
        for row in made.per_instance
    ]
    assumed = [
        f"Assumes: {name} = {entry['value']} ({entry['source']})" for name, entry in made.assumptions.items()
    ]
    queue = [Table.of([{"request": k, "status": v} for k, v in statuses.items()])] if statuses else []
    unused = [f"Not applicable: {refused.bound}, {refused.reason}" for refused in made.not_applicable]
    return Page(
        head=head,
        tables=[*queue, Table.of(rows)],
        document=made.to_dict()
        | ({} if statuses is None else {"requests": statuses})
        | {"status": status}
        | {"conditions": list(CONDITIONS), "notice": SENSITIVE},
        notes=[*assumed, *unused, *(f"Condition: {one}" for one in CONDITIONS), SENSITIVE],
    )


def verification_page(report: VerificationReport) -> Page:
    """Every check with its status, and the verdict."""
    rows = [{"check": check.name, "status": check.status, "detail": check.detail} for check in report.checks]
    counts = {status: sum(row["status"] == status for row in rows) for status in ("ok", "skipped", "failed")}
    verdict = "VALID" if report.valid else "NOT VALID"
    summary = f"{verdict} ({', '.join(f'{count} {status}' for status, count in counts.items())})"
    document = {"valid": bool(report.valid), "checks": rows, "counts": counts}
    return Page(head=[], tables=[Table.of(rows)], document=document, notes=[summary])
