"""``pia report`` and ``pia export``: an audit as a page, as files, as a block for a model card."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated

import typer

from per_instance_accountant.cli.application import (
    Charging,
    ChargingOption,
    FormatOption,
    LedgerArgument,
    rule_of,
)
from per_instance_accountant.cli.printing import Format, Page, Table, emit
from per_instance_accountant.errors import UsageError

if TYPE_CHECKING:
    from per_instance_accountant.audit.budget import BudgetAudit
    from per_instance_accountant.report import Released
    from per_instance_accountant.unlearning import EveryoneSteps

DeltaOption = Annotated[float, typer.Option("--delta", help="Between 0 and 1.")]


class Readers(enum.StrEnum):
    """Who will read the page."""

    INTERNAL = "internal"
    SHAREABLE = "shareable"


class Kind(enum.StrEnum):
    """What is exported."""

    PARQUET = "parquet"
    CSV = "csv"
    MODEL_CARD = "model-card"
    LEDGER = "ledger"


def report(
    ledger: LedgerArgument,
    output: Annotated[str, typer.Option("--output", "-o", help="File for the page.")] = "report.html",
    audience: Annotated[
        Readers, typer.Option("--audience", help="shareable: no ids, no individual values.")
    ] = Readers.INTERNAL,
    by: Annotated[str | None, typer.Option("--by", metavar="GROUP", help="Show this grouping.")] = None,
    delta: DeltaOption = 1e-5,
    budget: Annotated[
        float | None, typer.Option("--budget", metavar="EPS", help="Compare with this epsilon.")
    ] = None,
    target_epsilon: Annotated[
        float | None, typer.Option("--target-epsilon", help="Show the steps to unlearn to it.")
    ] = None,
    order: Annotated[float | None, typer.Option("--order", help="Renyi order of the target.")] = None,
    target_delta: Annotated[float | None, typer.Option("--target-delta", help="Instead of an order.")] = None,
    evidence: Annotated[
        str | None, typer.Option("--evidence", metavar="FILE", help="JSON of what an evaluation measured.")
    ] = None,
    release_epsilon: Annotated[
        float | None,
        typer.Option("--release-epsilon", metavar="EPS", help="shareable: spend this on a noisy histogram."),
    ] = None,
    charging: ChargingOption = Charging.AS_TRAINED,
    output_format: FormatOption = Format.TABLE,
) -> None:
    """One static page: no scripts, no network, prints well. Readable by its owner only."""
    from per_instance_accountant.audit import audit
    from per_instance_accountant.cli.watching import open_ledger
    from per_instance_accountant.report import Evidence, report_html
    from per_instance_accountant.results.files import write_private

    measured = None if evidence is None else Evidence.load(evidence)
    released = _release(ledger, release_epsilon, delta, audience)
    result = audit(open_ledger(ledger), delta, charging=rule_of(charging))
    page = report_html(
        result,
        audience=audience.value,
        budget=budget,
        by=by,
        everyone=_everyone(result, target_epsilon, order, target_delta, charging),
        evidence=measured,
        released=released,
    ).encode()
    write_private(output, page)
    written = {"report": output, "audience": audience.value, "bytes": len(page)}
    emit(Page(head=[], tables=[Table.of([written])], document=written), output_format)


def _release(ledger: str, epsilon: float | None, delta: float, audience: Readers) -> Released | None:
    """Half of epsilon for the histogram, half for the median; charged in the ledger before anything is
    shown."""
    if epsilon is None:
        return None
    if audience is not Readers.SHAREABLE:
        raise UsageError(
            "PIA070",
            "--release-epsilon was given for an internal page, which shows exact values",
            "Nothing was released and nothing was charged",
            "--audience shareable --release-epsilon 0.5",
        )
    from per_instance_accountant.audit.release import release_histogram, release_quantiles
    from per_instance_accountant.report import Released

    counts = release_histogram(ledger, epsilon / 2, delta=delta)
    return Released(histogram=counts, quantiles=release_quantiles(ledger, epsilon / 2, [0.5], delta=delta))


def _everyone(
    result: BudgetAudit, target: float | None, order: float | None, delta: float | None, charging: Charging
) -> EveryoneSteps | None:
    if target is None:
        if order is not None or delta is not None:
            raise UsageError(
                "PIA070",
                "--order or --target-delta was given without --target-epsilon",
                "No page was written",
                "--target-epsilon 0.1 --order 8",
            )
        return None
    from per_instance_accountant.ledger import Ledger
    from per_instance_accountant.unlearning import plan_everyone

    source = result.ledger
    if not isinstance(source, Ledger):
        return None
    return plan_everyone(source, target, order=order, target_delta=delta, charging=rule_of(charging))


def export(
    ledger: LedgerArgument,
    kind: Annotated[
        Kind, typer.Option("--as", help="parquet and csv: one row per instance; ledger: its tables.")
    ] = Kind.PARQUET,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="File; a directory for ledger.")
    ] = None,
    delta: DeltaOption = 1e-5,
    charging: ChargingOption = Charging.AS_TRAINED,
    output_format: FormatOption = Format.TABLE,
) -> None:
    """Individual epsilons or the ledger for other programs, owner-only; a block for a model card.

    The model card holds no individual values and goes to stdout without --output.
    """
    from per_instance_accountant.audit import audit
    from per_instance_accountant.cli.watching import open_ledger

    if kind is Kind.MODEL_CARD:
        card = audit(open_ledger(ledger), delta, charging=rule_of(charging)).model_card()
        if output is None:
            typer.echo(card, nl=False)
            return
        _write_text(output, card)
    elif output is None:
        raise UsageError(
            "PIA070", "--output is missing", "Nothing was exported", f"--as {kind.value} --output export"
        )
    elif kind is Kind.LEDGER:
        open_ledger(ledger).export(output)
    else:
        result = audit(open_ledger(ledger), delta, charging=rule_of(charging))
        {Kind.PARQUET: result.to_parquet, Kind.CSV: result.to_csv}[kind](output)
    document = {"exported": output, "as": kind.value}
    emit(Page(head=[], tables=[Table.of([document])], document=document), output_format)


def _write_text(path: str, text: str) -> None:
    from per_instance_accountant.results.files import write_private

    write_private(path, text.encode("utf-8"))


COMMANDS = (report, export)
