"""``pia audit``: individual privacy budgets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from per_instance_accountant.cli.application import (
    Charging,
    ChargingOption,
    FormatOption,
    LedgerArgument,
    finish,
    rule_of,
)
from per_instance_accountant.cli.pages import audit_page, budget_verdict
from per_instance_accountant.cli.printing import Format, emit
from per_instance_accountant.errors import UsageError

if TYPE_CHECKING:
    from per_instance_accountant.audit.budget import BudgetAudit


def audit(
    ledger: LedgerArgument,
    by: Annotated[str | None, typer.Option("--by", metavar="GROUP", help="Summarise by this group.")] = None,
    delta: Annotated[float, typer.Option("--delta", help="Between 0 and 1.")] = 1e-5,
    top: Annotated[int, typer.Option("--top", min=0, metavar="K", help="List the K largest epsilons.")] = 0,
    budget: Annotated[
        float | None, typer.Option("--budget", metavar="EPS", help="Fail above this epsilon.")
    ] = None,
    charging: ChargingOption = Charging.AS_TRAINED,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the numbers beside the ledger.")] = False,
    kept: Annotated[bool, typer.Option("--kept", help="Show the kept numbers: fast.")] = False,
    output_format: FormatOption = Format.TABLE,
) -> None:
    """Individual privacy budgets. CSV lists every instance, or the groups with --by."""
    result = _kept(ledger, delta, charging) if kept else _computed(ledger, delta, charging)
    if keep:
        result.keep()
    count = top or len(result.ids) if output_format is Format.CSV and by is None else top
    within = None if budget is None else budget_verdict(result, budget)
    emit(audit_page(result, ledger, by, count, within), output_format)
    finish(within is None or within["certified"])


def _computed(ledger: str, delta: float, charging: Charging) -> BudgetAudit:
    from per_instance_accountant.audit import audit as judge
    from per_instance_accountant.cli.watching import open_ledger

    return judge(open_ledger(ledger), delta, charging=rule_of(charging))


def _kept(ledger: str, delta: float, charging: Charging) -> BudgetAudit:
    from per_instance_accountant.audit.kept import kept_audit

    result, rule = kept_audit(ledger), rule_of(charging)
    other = rule is not None and result.charging != (rule.name,)
    if other or result.delta != delta:
        raise UsageError(
            "PIA070",
            f"the kept audit is at delta {result.delta:g} by {'+'.join(result.charging)}",
            "Its numbers answer another question",
            f"pia audit {ledger} --kept --delta {result.delta:g}, or without --kept",
        )
    return result


COMMANDS = (audit,)
