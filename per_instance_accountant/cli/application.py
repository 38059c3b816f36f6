"""What the commands of ``pia`` share: options, exit codes. Loads neither torch nor opacus nor numpy."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated

import typer

from per_instance_accountant.cli.printing import Format

if TYPE_CHECKING:
    from per_instance_accountant.accounting import ChargingRule

CHECK_FAILED, USAGE, DAMAGED = 1, 2, 3
"""Exit codes beside 0. An interrupted command ends with 130."""


class Charging(enum.StrEnum):
    """Where the bound on one instance's contribution comes from."""

    WORST_CASE = "worst-case"
    AS_TRAINED = "as-trained"
    LAST_SEEN = "last-seen"
    UNAMPLIFIED = "unamplified"


FormatOption = Annotated[Format, typer.Option("--format", help="How the result is written to stdout.")]
ChargingOption = Annotated[Charging, typer.Option("--charging", help="Rule that the numbers rest on.")]
LedgerArgument = Annotated[str, typer.Argument(help="Directory of the ledger.", show_default=False)]
LedgerOption = Annotated[str, typer.Option("--ledger", help="Directory of the ledger.", show_default=False)]


def rule_of(charging: Charging) -> ChargingRule | None:
    """The charging rule that the option names; None is the rule the run was trained under."""
    from per_instance_accountant.accounting import LastSeen, Unamplified, WorstCase

    rules: dict[Charging, ChargingRule | None] = {
        Charging.WORST_CASE: WorstCase(),
        Charging.AS_TRAINED: None,
        Charging.LAST_SEEN: LastSeen(),
        Charging.UNAMPLIFIED: Unamplified(),
    }
    return rules[charging]


def finish(ok: bool) -> None:
    """End the command with exit code 1 if its check failed."""
    if not ok:
        raise typer.Exit(CHECK_FAILED)
