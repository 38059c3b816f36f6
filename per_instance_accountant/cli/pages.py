"""From the result of a room to the page that is printed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from per_instance_accountant.cli.printing import SENSITIVE, Page, Table, rounded_up

if TYPE_CHECKING:
    from per_instance_accountant.audit.budget import BudgetAudit
    from per_instance_accountant.unlearning import UnlearningPlan, VerificationReport


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
        notes=[*result.statement().splitlines(), SENSITIVE],
    )


def plan_page(made: UnlearningPlan) -> Page:
    """Steps of the group and of each requested instance alone, or the best value that can be reached."""
    document: dict[str, Any] = made.to_dict()
    rows = [
        {
            "id": row["id"],
            "steps alone": row["steps"],
            "decides": "<-" if row["id"] == made.deciding_id else "",
            "basis": "CERTIFIED",
        }
        for row in document["per_instance"]
    ]
    measure = f"Renyi order {made.order:g}" if made.order is not None else f"delta {made.target_delta:g}"
    value = f"epsilon {rounded_up(made.value)} at {measure} (target {made.target_epsilon}, {made.bound})"
    if made.reachable:
        head = [
            f"Plan: {made.steps} noisy fine-tuning steps without the {len(rows)} requested instances",
            f"after them: {value}",
            f"training took {made.training_steps} steps",
        ]
    else:
        head = [
            "Plan: the target is unreachable under the stated assumptions; retrain",
            f"best reached: {value}",
        ]
    return Page(
        head=head, tables=[Table.of(rows)], document=document | {"notice": SENSITIVE}, notes=[SENSITIVE]
    )


def verification_page(report: VerificationReport) -> Page:
    """Every check with its status, and the verdict."""
    rows = [{"check": check.name, "status": check.status, "detail": check.detail} for check in report.checks]
    counts = {status: sum(row["status"] == status for row in rows) for status in ("ok", "skipped", "failed")}
    verdict = "VALID" if report.valid else "NOT VALID"
    summary = f"{verdict} ({', '.join(f'{count} {status}' for status, count in counts.items())})"
    document = {"valid": bool(report.valid), "checks": rows, "counts": counts}
    return Page(head=[], tables=[Table.of(rows)], document=document, notes=[summary])
