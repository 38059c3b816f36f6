"""``pia doctor``, ``pia demo``, ``pia explain``: what needs no ledger."""

from __future__ import annotations

from typing import Annotated

import typer

from per_instance_accountant.cli.application import FormatOption, finish
from per_instance_accountant.cli.printing import Format, Page, Table, emit
from per_instance_accountant.errors import CODES, UsageError


def doctor(
    train: Annotated[bool, typer.Option("--train", help="Also train a small model with Opacus.")] = False,
    output_format: FormatOption = Format.TABLE,
) -> None:
    """Check this installation: versions, extras, file permissions, numbers with known values."""
    from per_instance_accountant.cli.doctor import examine

    findings = examine(train=train)
    ok = all(finding["status"] != "failed" for finding in findings)
    document = {"ok": ok, "checks": findings}
    emit(Page(head=["pia doctor"], tables=[Table.of(findings)], document=document), output_format)
    finish(ok)


def demo(
    seed: Annotated[int, typer.Option("--seed", help="Seed of data, model and noise.")] = 0,
    output: Annotated[
        str, typer.Option("--output", help="Directory for what the demonstration writes.")
    ] = "pia-demo",
    output_format: FormatOption = Format.TABLE,
) -> None:
    """Train, audit, plan, unlearn and verify on a small data set."""
    from per_instance_accountant.cli.demo import run as run_demo

    finish(run_demo(seed=seed, output=output, output_format=output_format))


def explain(
    code: Annotated[str | None, typer.Argument(help="Such as PIA012; all codes without it.")] = None,
    output_format: FormatOption = Format.TABLE,
) -> None:
    """What an error code means, without a network."""
    if code is not None and code.upper() not in CODES:
        raise UsageError(
            "PIA070",
            f"there is no error code {code!r}",
            "Nothing was explained",
            "pia explain, which lists all codes",
        )
    wanted = CODES if code is None else {code.upper(): CODES[code.upper()]}
    rows = [{"code": name, "meaning": meaning} for name, meaning in wanted.items()]
    emit(Page(head=[], tables=[Table.of(rows)], document={"codes": wanted}), output_format)


COMMANDS = (
    doctor,
    demo,
    explain,
)
