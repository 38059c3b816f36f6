"""The commands of ``pia``. Importing this module loads neither torch nor opacus nor numpy."""

from __future__ import annotations

import enum
import sys
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from per_instance_accountant.cli.pages import (
    audit_page,
    budget_verdict,
    nothing_to_plan_page,
    plan_page,
    verification_page,
)
from per_instance_accountant.cli.printing import Format, Page, Table, emit
from per_instance_accountant.cli.signing import sign
from per_instance_accountant.errors import (
    CODES,
    CertificateError,
    LedgerError,
    MissingDependencyError,
    PiaError,
    UsageError,
)

if TYPE_CHECKING:
    from per_instance_accountant.accounting import ChargingRule

CHECK_FAILED, USAGE, DAMAGED = 1, 2, 3
"""Exit codes beside 0. An interrupted command ends with 130."""
_EXTRA_OF = {"torch": "opacus", "opacus": "opacus", "sklearn": "demo"}

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Per-instance privacy accounting: audit budgets, plan and certify unlearning.",
    epilog="Exit codes: 0 ok, 1 a check failed, 2 usage, 3 damaged or missing input.",
)


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


def _rule(charging: Charging) -> ChargingRule | None:
    from per_instance_accountant.accounting import LastSeen, Unamplified, WorstCase

    rules: dict[Charging, ChargingRule | None] = {
        Charging.WORST_CASE: WorstCase(),
        Charging.AS_TRAINED: None,
        Charging.LAST_SEEN: LastSeen(),
        Charging.UNAMPLIFIED: Unamplified(),
    }
    return rules[charging]


def _finish(ok: bool) -> None:
    if not ok:
        raise typer.Exit(CHECK_FAILED)


def _version(wanted: bool) -> None:
    if wanted:
        from per_instance_accountant import __version__

        typer.echo(f"pia {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
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
    _finish(ok)


@app.command()
def demo(
    seed: Annotated[int, typer.Option("--seed", help="Seed of data, model and noise.")] = 0,
    output: Annotated[
        str, typer.Option("--output", help="Directory for what the demonstration writes.")
    ] = "pia-demo",
    output_format: FormatOption = Format.TABLE,
) -> None:
    """Train, audit, plan, unlearn and verify on a small data set."""
    from per_instance_accountant.cli.demo import run as run_demo

    _finish(run_demo(seed=seed, output=output, output_format=output_format))


@app.command()
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

    result = judge(ledger, delta, charging=_rule(charging))
    count = top or len(result.ids) if output_format is Format.CSV and by is None else top
    within = None if budget is None else budget_verdict(result, budget)
    emit(audit_page(result, ledger, by, count, within), output_format)
    _finish(within is None or within["certified"])


@app.command()
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
        charging=_rule(charging),
        projection_radius=projection_radius,
    )
    if output and not dry_run:
        made.save(output)
        typer.echo(f"written: {output} (owner-only; it names the instances)", err=True)
    emit(plan_page(made, None if queue is None else queue.statuses), output_format)
    _finish(made.reachable)


@app.command()
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
        progress=True,
    )
    document = {"certificate": str(run.certificate), "model": str(run.checkpoint), "steps": run.steps}
    emit(Page(head=[], tables=[Table.of([document])], document=document), output_format)


@app.command()
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


@app.command()
def verify(
    certificate: Annotated[str, typer.Argument(help="Certificate file.", show_default=False)],
    ledger: Annotated[
        str | None, typer.Option("--ledger", help="Without it the claim is not established.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="Model file after unlearning.")
    ] = None,
    signature: Annotated[str | None, typer.Option("--signature", help="File that pia sign wrote.")] = None,
    public_key: Annotated[str | None, typer.Option("--public-key", help="PEM file of the signer.")] = None,
    require_signature: Annotated[
        bool, typer.Option("--require-signature", help="Without a signature it is not valid.")
    ] = False,
    output_format: FormatOption = Format.TABLE,
) -> None:
    """Recompute a certificate's claim from the evidence."""
    from per_instance_accountant.unlearning import verify as recompute

    report = recompute(
        certificate,
        ledger=ledger,
        checkpoint=checkpoint,
        signature=signature,
        public_key=public_key,
        require_signature=require_signature,
    )
    emit(verification_page(report), output_format)
    _finish(report.valid)


app.command()(sign)


@app.command()
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


def _needs_extra(missing: str) -> MissingDependencyError:
    return MissingDependencyError(
        "PIA061",
        f"{missing} is not installed",
        "Training, unlearning and the demonstration need it; audit, plan and verify do not",
        f'pip install "per-instance-accountant[{_EXTRA_OF[missing]}]"',
    )


def _file_refused(error: OSError) -> UsageError:
    return UsageError(
        "PIA070",
        f"{error.filename or 'a file'} was refused by the system ({error.strerror})",
        "What the command would have written there does not exist",
        "name files that exist and directories that can be written",
    )


def run() -> None:
    """Run the command line; an error of the package becomes its message on stderr and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    try:
        app(prog_name="pia")
    except PiaError as error:
        _fail(error)
    except OSError as error:
        _fail(_file_refused(error))
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA_OF:
            raise
        _fail(_needs_extra(error.name))


def _fail(error: PiaError) -> NoReturn:
    typer.echo(f"error: {error}", err=True)
    sys.exit(DAMAGED if isinstance(error, (LedgerError, CertificateError)) else USAGE)
