"""``pia audit``: individual privacy budgets."""

from __future__ import annotations

from typing import Annotated

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


def audit(
    ledger: LedgerArgument,
    by: Annotated[str | None, typer.Option("--by", metavar="GROUP", help="Summarise by this group.")] = None,
    delta: Annotated[float, typer.Option("--delta", help="Between 0 and 1.")] = 1e-5,
    top: Annotated[int, typer.Option("--top", min=0, metavar="K", help="List the K largest epsilons.")] = 0,
    budget: Annotated[
        float | None, typer.Option("--budget", metavar="EPS", help="Fail above this epsilon.")
    ] = None,
    charging: ChargingOption = Charging.AS_TRAINED,
    output_format: FormatOption = Format.TABLE,
) -> None:
    """Individual privacy budgets. CSV lists every instance, or the groups with --by."""
    from per_instance_accountant.audit import audit as judge
    from per_instance_accountant.cli.watching import open_ledger

    result = judge(open_ledger(ledger), delta, charging=rule_of(charging))
    count = top or len(result.ids) if output_format is Format.CSV and by is None else top
    within = None if budget is None else budget_verdict(result, budget)
    emit(audit_page(result, ledger, by, count, within), output_format)
    finish(within is None or within["certified"])


COMMANDS = (audit,)
