"""``pia check``: the laws of privacy accounting, asked of anybody's accountant."""

from __future__ import annotations

from typing import Annotated

import typer

from per_instance_accountant.cli.application import CHECK_FAILED, USAGE, FormatOption
from per_instance_accountant.cli.printing import Format, Page, Table, emit


def check(
    accountant: Annotated[
        str | None, typer.Argument(metavar="MODULE:ACCOUNTANT", help="Class, factory or instance.")
    ] = None,
    law: Annotated[list[str] | None, typer.Option("--law", help="Only this law; repeatable.")] = None,
    examples: Annotated[int | None, typer.Option("--examples", min=1, help="Inputs per law.")] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="CPU time of one call.")] = 5.0,
    law_seconds: Annotated[float, typer.Option("--law-seconds", min=1, help="Time of one law.")] = 120.0,
    list_laws: Annotated[bool, typer.Option("--list", help="Name the laws and ask none.")] = False,
    output_format: FormatOption = Format.TABLE,
) -> None:
    """Check an accountant against laws. Exit code 0 only if laws ran and all hold; 2 if none ran."""
    from tqdm.auto import tqdm

    from per_instance_accountant.errors import UsageError
    from per_instance_accountant.testing import CHECKS, watch_checks

    if list_laws:
        rows = [{"law": c.law.name, "statement": _first_sentence(c.__doc__)} for c in CHECKS]
        emit(Page(head=[], tables=[Table.of(rows)], document={"laws": rows}), output_format)
        return
    if accountant is None:
        raise UsageError(
            "PIA071", "no accountant was named", "Nothing was checked", "pia check my_module:MyAccountant"
        )
    with tqdm(total=len(law or CHECKS), desc="laws", disable=None, leave=False, delay=1.0) as bar:
        report = watch_checks(
            accountant,
            laws=law or (),
            examples=examples,
            seconds=seconds,
            law_seconds=law_seconds,
            follow=lambda verdict: bar.update(),
        )
    outcomes = [
        {
            "law": v.law,
            "status": v.status,
            "examples": v.examples,
            "refused": v.refused,
            "what": v.what,
        }
        for v in report.verdicts
    ]
    failures = [f"{v.law}: {v.what}\n  smallest input: {v.smallest}" for v in report.broken]
    failures += [f"{v.law}: {v.what} (--law-seconds, --examples)" for v in report.unfinished]
    summary = (
        f"{len(report.ran)} laws run, {len(report.broken)} broken, "
        f"{len(report.verdicts) - len(report.ran)} not applicable, {report.examples} examples"
    )
    closing = [summary] if report.ran else [summary, "Nothing was checked: no law concerns this accountant."]
    page = Page(
        head=[f"pia check {report.accountant}"],
        tables=[Table.of(outcomes)],
        document=report.as_dict(),
        notes=[*failures, *closing],
    )
    emit(page, output_format)
    if not report.ran or not report.examples:
        raise typer.Exit(USAGE)
    if not report.ok:
        raise typer.Exit(CHECK_FAILED)


def _first_sentence(docstring: str | None) -> str:
    text = " ".join((docstring or "").split("\n\n")[0].split())
    return text.partition(". ")[0].rstrip(".")


COMMANDS = (check,)
