"""``pia plan``: noisy fine-tuning steps after which instances are forgotten."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from per_instance_accountant.cli.application import (
    Charging,
    ChargingOption,
    FormatOption,
    LedgerArgument,
    finish,
    rule_of,
)
from per_instance_accountant.cli.pages import everyone_page, nothing_to_plan_page, plan_page
from per_instance_accountant.cli.printing import Format, emit
from per_instance_accountant.errors import UsageError

if TYPE_CHECKING:
    from per_instance_accountant.ledger import Ledger


class Direction(enum.StrEnum):
    """Which divergences the target is for."""

    BOTH = "both"
    REMOVE = "remove"


def plan(
    ledger: LedgerArgument,
    target_epsilon: Annotated[float, typer.Option("--target-epsilon", help="To reach.", show_default=False)],
    ids: Annotated[str | None, typer.Option("--ids", help="1,2,3 or @file or - for stdin.")] = None,
    everyone: Annotated[
        bool, typer.Option("--everyone", help="Instead of --ids: each instance alone.")
    ] = False,
    order: Annotated[float | None, typer.Option("--order", help="Renyi order of the target.")] = None,
    target_delta: Annotated[float | None, typer.Option("--target-delta", help="Instead of an order.")] = None,
    assumptions: Annotated[
        str | None, typer.Option("--assumptions", help="JSON file; default: the ledger's.")
    ] = None,
    charging: ChargingOption = Charging.AS_TRAINED,
    direction: Annotated[
        Direction, typer.Option("--direction", help="remove: D(trained || retrained) only.")
    ] = Direction.BOTH,
    max_steps: Annotated[int | None, typer.Option("--max-steps", min=0, help="Consider no more.")] = None,
    step_grid: Annotated[
        str | None,
        typer.Option("--step-grid", help="0,10,100 or geometric or geometric:RATIO; public, steps round up."),
    ] = None,
    projection_radius: Annotated[
        float | None, typer.Option("--projection-radius", help="Project before each unlearning step.")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", help="Of the unlearning steps; default: that training ended with."),
    ] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option("--noise-multiplier", help="Likewise, noise std over clip norm.")
    ] = None,
    levels: Annotated[
        int, typer.Option("--levels", min=1, help="With --everyone: thresholds per factor of two.")
    ] = 8,
    request_id: Annotated[
        str | None, typer.Option("--request-id", help="One plan per request; needs --output.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write no file.")] = False,
    output: Annotated[
        str | None, typer.Option("--output", help="File for the plan; .csv or .parquet with --everyone.")
    ] = None,
    output_format: FormatOption = Format.TABLE,
) -> None:
    """Noisy fine-tuning steps after which the given instances are forgotten.

    A file with the header request_id,id is a queue: requests recorded in the ledger are left out.
    With --request-id a request that arrives again gets the plan that it has; other content is refused.
    Exit codes: 0 reachable or nothing to do, 1 unreachable, 2 usage or refused, 3 damaged input.
    """
    from per_instance_accountant.cli.inputs import read_assumptions, read_step_grid
    from per_instance_accountant.ledger import Ledger

    opened = Ledger.open(ledger)
    options: dict[str, Any] = {
        "order": order,
        "target_delta": target_delta,
        "assumptions": read_assumptions(assumptions) if assumptions else None,
        "charging": rule_of(charging),
        "direction": direction.value,
        "max_steps": max_steps,
        "step_grid": None if step_grid is None else read_step_grid(step_grid, max_steps),
        "projection_radius": projection_radius,
        "learning_rate": learning_rate,
        "noise_multiplier": noise_multiplier,
    }
    if everyone == (ids is not None) or (everyone and request_id is not None):
        raise UsageError(
            "PIA070",
            "--ids and --everyone exclude each other, and one of them is needed; a request id needs --ids",
            "Nothing was planned",
            "pia plan LEDGER --ids 1,2,3 ... or pia plan LEDGER --everyone ...",
        )
    where = None if dry_run else output
    if ids is None:
        _plan_everyone(opened, target_epsilon, options | {"levels": levels}, where, output_format)
    else:
        _plan_request(opened, ids, target_epsilon, options, request_id, where, dry_run, output_format)


def _plan_everyone(
    opened: Ledger, target: float, options: dict[str, Any], output: str | None, output_format: Format
) -> None:
    from per_instance_accountant.unlearning import plan_everyone

    writer = _table_writer(output)
    table = plan_everyone(opened, target, **options)
    if output and writer:
        getattr(table, writer)(output)
        typer.echo(f"written: {output} (owner-only; one row per instance)", err=True)
    emit(everyone_page(table, individuals=output_format is Format.CSV), output_format)


def _table_writer(output: str | None) -> str | None:
    """Name of the method of EveryoneSteps that writes this kind of file."""
    if output is None:
        return None
    for suffix, method in ((".csv", "to_csv"), (".parquet", "to_parquet")):
        if output.endswith(suffix):
            return method
    raise UsageError(
        "PIA070",
        "--output of --everyone is neither a .csv nor a .parquet file",
        "Nothing was planned or written",
        "--output steps.parquet",
    )


def _plan_request(
    opened: Ledger,
    ids: str,
    target: float,
    options: dict[str, Any],
    request_id: str | None,
    output: str | None,
    dry_run: bool,
    output_format: Format,
) -> None:
    from pathlib import Path

    from per_instance_accountant.cli.inputs import read_ids
    from per_instance_accountant.cli.requests import is_request_file, read_requests
    from per_instance_accountant.unlearning import UnlearningPlan, plan_once, request_status
    from per_instance_accountant.unlearning import plan as make_plan

    if request_id is not None and output is None and not dry_run:
        raise UsageError(
            "PIA070",
            "--request-id was given without --output",
            "The file of the plan is what tells a request that arrives again from a new one",
            f"--request-id {request_id} --output plans/{request_id}.json",
        )
    repeated = request_id is not None and output is not None and Path(output).exists()
    queue = read_requests(ids, opened) if is_request_file(ids) else None
    if queue is not None and repeated:
        # What the request asked for when it was planned is recorded as forgotten once its run began.
        stored = set(UnlearningPlan.load(str(output)).ids) | set(queue.ids.tolist())
        wanted = [one for one in queue.all_ids.tolist() if one in stored]
    elif queue is not None and not len(queue.ids):
        emit(nothing_to_plan_page(queue.statuses), output_format)
        return
    else:
        wanted = (read_ids(ids, opened.ids.dtype) if queue is None else queue.ids).tolist()
    if request_id is not None and output is not None:
        made = plan_once(output, opened, wanted, target, request_id=request_id, **options)
    else:
        made = make_plan(opened, wanted, target, request_id=request_id, **options)
        if output:
            made.save(output)
    if output:
        done = "unchanged" if repeated else "written"
        typer.echo(f"{done}: {output} (owner-only; it names the instances)", err=True)
    page = plan_page(made, None if queue is None else queue.statuses, request_status(made, opened))
    emit(page, output_format)
    finish(made.reachable)


COMMANDS = (plan,)
