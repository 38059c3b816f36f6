"""``pia merge``: one ledger from the parts that the ranks of a run wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import typer

from per_instance_accountant.cli.application import FormatOption
from per_instance_accountant.cli.printing import Format, Page, Table, emit

if TYPE_CHECKING:
    from per_instance_accountant.ledger import Merge


def merge(
    parts: Annotated[list[str], typer.Argument(help="Directories of the parts.", show_default=False)],
    output: Annotated[str, typer.Option("-o", "--output", help="New directory for the whole ledger.")],
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Merge although parts are lost.")
    ] = False,
    output_format: FormatOption = Format.TABLE,
) -> None:
    """Merge the parts that the ranks of one run wrote. What was lost is charged, never dropped."""
    from per_instance_accountant.ledger import merge_parts

    ledger = merge_parts(parts, output, allow_missing=allow_missing)
    said = cast("Merge", ledger.merge)
    facts = {
        "ranks": len(said.ranks),
        "missing_ranks": len(said.missing_ranks),
        "steps": ledger.num_steps,
        "incomplete_steps": said.num_incomplete_steps,
        "instances": ledger.num_instances,
    }
    page = Page(
        head=["Merged ledger", f"written to {output}"],
        tables=[Table.of([facts])],
        document=facts
        | {
            "output": output,
            "lost": list(said.missing_ranks),
            "incomplete": [list(interval) for interval in said.incomplete],
            "confirmed": ledger.confirmed,
            "anchor": ledger.anchor.to_dict(),
            "statement": said.statement(),
        },
        notes=[said.statement(), "The parts are as they were. Keep them, or delete them with their keys."],
    )
    emit(page, output_format)


COMMANDS = (merge,)
