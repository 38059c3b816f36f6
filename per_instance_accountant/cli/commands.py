"""The application ``pia``, put together from its groups of commands, and its exit codes.

Importing this module loads neither torch nor opacus nor numpy: a command imports what it needs when it runs.
"""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, NoReturn

import typer

from per_instance_accountant.cli.application import DAMAGED, USAGE
from per_instance_accountant.errors import (
    CertificateError,
    LedgerError,
    MissingDependencyError,
    PiaError,
    UsageError,
)

GROUPS = (
    "starting",
    "auditing",
    "reporting",
    "planning",
    "forgetting",
    "certifying",
    "merging",
    "checking",
)
"""Modules of this package, in the order of ``pia --help``; each names its functions in ``COMMANDS``. To add
a command, write its module beside this one and name it here."""
_EXTRA_OF = {"torch": "opacus", "opacus": "opacus", "sklearn": "demo"}

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Per-instance privacy accounting: audit budgets, plan and certify unlearning.",
    epilog="Exit codes: 0 ok, 1 a check failed, 2 usage, 3 damaged or missing input.",
)


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


def _register() -> None:
    for group in GROUPS:
        for command in importlib.import_module(f"{__package__}.{group}").COMMANDS:
            app.command()(command)


_register()


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
