"""``pia unlearn`` and ``pia forget``: change a model so that it forgets."""

from __future__ import annotations

from typing import Annotated

import typer

from per_instance_accountant.cli.application import FormatOption, LedgerOption
from per_instance_accountant.cli.printing import Format, Page, Table, emit
from per_instance_accountant.errors import UsageError


def unlearn(
    plan_file: Annotated[
        str, typer.Argument(metavar="PLAN", help="File that pia plan wrote.", show_default=False)
    ],
    ledger: LedgerOption,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="Trained model.", show_default=False)],
    dataset: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="MODULE:ATTR",
            help="Retained instances, a torch Subset of the training set.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="MODULE:ATTR",
            help="Architecture; weights come from --checkpoint.",
            show_default=False,
        ),
    ],
    output: Annotated[str, typer.Option("--output", help="Directory for the results.", show_default=False)],
    criterion: Annotated[
        str, typer.Option("--criterion", metavar="MODULE:ATTR", help="Training loss, mean reduction.")
    ] = "torch.nn:CrossEntropyLoss",
    frozen: Annotated[
        list[str] | None,
        typer.Option("--frozen", metavar="NAME", help="Parameter that training did not move either; repeat."),
    ] = None,
    output_format: FormatOption = Format.TABLE,
) -> None:
    """Run a plan and write the certificate. MODULE:ATTR is an object, or a class or function to call."""
    from per_instance_accountant.cli.inputs import load_reference
    from per_instance_accountant.finetuning import run_plan
    from per_instance_accountant.unlearning import UnlearningPlan

    run = run_plan(
        UnlearningPlan.load(plan_file),
        ledger=ledger,
        module=load_reference(model, "--model"),
        dataset=load_reference(dataset, "--data"),
        criterion=load_reference(criterion, "--criterion"),
        checkpoint=checkpoint,
        output=output,
        frozen=frozen or (),
        progress=True,
    )
    document = {"certificate": str(run.certificate), "model": str(run.checkpoint), "steps": run.steps}
    emit(Page(head=[], tables=[Table.of([document])], document=document), output_format)


def forget(
    model: Annotated[
        str,
        typer.Option("--model", metavar="MODULE:ATTR", help="Architecture.", show_default=False),
    ],
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="Trained model.", show_default=False)],
    ids: Annotated[str, typer.Option("--ids", help="1,2,3 or @file or - for stdin.", show_default=False)],
    dataset: Annotated[
        str, typer.Option("--data", metavar="MODULE:ATTR", help="Training set.", show_default=False)
    ],
    output: Annotated[str, typer.Option("--output", help="Directory for the results.", show_default=False)],
    method: Annotated[
        str, typer.Option("--method", help="instance-wise, fine-tune, salun, scrub, retrain, ...")
    ] = "instance-wise",
    test: Annotated[
        str | None, typer.Option("--test", metavar="MODULE:ATTR", help="Instances never trained on.")
    ] = None,
    ledger: Annotated[
        str | None, typer.Option("--ledger", help="Business ids, and work divided by privacy loss.")
    ] = None,
    plan_file: Annotated[str | None, typer.Option("--plan", help="With noisy-fine-tune: certified.")] = None,
    goal: Annotated[str, typer.Option("--goal", help="relabel or misclassify.")] = "relabel",
    steps: Annotated[int, typer.Option("--steps", min=1, help="At most.")] = 600,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Of every step.")] = 0.01,
    radius: Annotated[
        float | None, typer.Option("--radius", help="Of adversarial examples (L2); none without it.")
    ] = None,
    importance: Annotated[float, typer.Option("--importance", help="Weight of the anchor.")] = 0.0,
    noise_std: Annotated[float, typer.Option("--noise-std", help="Of noisy-fine-tune.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of every random draw.")] = 0,
    output_format: FormatOption = Format.TABLE,
) -> None:
    """Make a trained classifier forget instances, and measure it before and after; no certificate."""
    from per_instance_accountant.cli.forget import Goal, Request
    from per_instance_accountant.cli.forget import run as run_forget

    if goal not in tuple(Goal):
        raise UsageError(
            "PIA070",
            f"--goal is {goal!r}, allowed is relabel or misclassify",
            "Nothing was unlearned",
            "--goal relabel",
        )
    request = Request(
        model=model,
        checkpoint=checkpoint,
        dataset=dataset,
        ids=ids,
        method=method,
        output=output,
        test=test,
        ledger=ledger,
        plan=plan_file,
        goal=Goal(goal),
        steps=steps,
        learning_rate=learning_rate,
        radius=radius,
        importance=importance,
        noise_std=noise_std,
        seed=seed,
    )
    emit(run_forget(request), output_format)


COMMANDS = (
    unlearn,
    forget,
)
