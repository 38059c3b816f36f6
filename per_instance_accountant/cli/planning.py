"""``pia plan``: noisy fine-tuning steps after which instances are forgotten."""

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
from per_instance_accountant.cli.pages import nothing_to_plan_page, plan_page
from per_instance_accountant.cli.printing import Format, emit


def plan(
    ledger: LedgerArgument,
    ids: Annotated[str, typer.Option("--ids", help="1,2,3 or @file or - for stdin.", show_default=False)],
    target_epsilon: Annotated[float, typer.Option("--target-epsilon", help="To reach.", show_default=False)],
    order: Annotated[float | None, typer.Option("--order", help="Renyi order of the target.")] = None,
    target_delta: Annotated[float | None, typer.Option("--target-delta", help="Instead of an order.")] = None,
    assumptions: Annotated[
        str | None, typer.Option("--assumptions", help="JSON file; default: the ledger's.")
    ] = None,
    charging: ChargingOption = Charging.AS_TRAINED,
    projection_radius: Annotated[
        float | None, typer.Option("--projection-radius", help="Project before each unlearning step.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write no file.")] = False,
    output: Annotated[str | None, typer.Option("--output", help="File for the plan.")] = None,
    output_format: FormatOption = Format.TABLE,
) -> None:
    """Noisy fine-tuning steps after which the given instances are forgotten.

    A file with the header request_id,id is a queue: requests recorded in the ledger are left out.
    """
    from per_instance_accountant.cli.inputs import read_assumptions, read_ids
    from per_instance_accountant.cli.requests import is_request_file, read_requests
    from per_instance_accountant.ledger import Ledger
    from per_instance_accountant.unlearning import plan as make_plan

    opened = Ledger.open(ledger)
    queue = read_requests(ids, opened) if is_request_file(ids) else None
    if queue is not None and not len(queue.ids):
        emit(nothing_to_plan_page(queue.statuses), output_format)
        return
    made = make_plan(
        opened,
        ids=read_ids(ids, opened.ids.dtype) if queue is None else queue.ids,
        target_epsilon=target_epsilon,
        order=order,
        target_delta=target_delta,
        assumptions=read_assumptions(assumptions) if assumptions else None,
        charging=rule_of(charging),
        projection_radius=projection_radius,
    )
    if output and not dry_run:
        made.save(output)
        typer.echo(f"written: {output} (owner-only; it names the instances)", err=True)
    emit(plan_page(made, None if queue is None else queue.statuses), output_format)
    finish(made.reachable)


COMMANDS = (plan,)
