"""Checks of the shell lines in README.md and docs: every command exists with the options that are shown."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import typer

from per_instance_accountant.cli.commands import app

ROOT = Path(__file__).resolve().parents[2]
EXECUTED = ("audit", "doctor", "explain", "plan", "verify")
"""Commands cheap enough to run; a command that reads a file runs if the page has written that file before."""
HARMLESS = ("cd", "git", ".", "source")


def commands_in(source: str) -> list[list[str]]:
    """Words of each command: continuation lines joined, comments dropped, split at ``&&``."""
    joined = source.replace("\\\n", " ")
    parts = [part for line in joined.splitlines() for part in line.split(" && ")]
    return [words for words in (shlex.split(part, comments=True) for part in parts) if words]


def check(words: list[str]) -> None:
    """Raises AssertionError for a command that a reader could not run as shown."""
    name = Path(words[0]).name
    checker = _CHECKERS.get("python" if re.fullmatch(r"python[\d.]*", name) else name)
    assert checker or name in HARMLESS, f"unknown command in a shell block: {shlex.join(words)}"
    if checker:
        checker(words[1:])


def _check_pia(args: list[str]) -> None:
    group = typer.main.get_command(app)
    known = getattr(group, "commands", {})
    assert args and (args[0] in known or args == ["--help"]), f"pia has no command {args[:1]}"
    if args == ["--help"]:
        return
    try:
        known[args[0]].make_context(args[0], args[1:])
    except Exception as error:
        raise AssertionError(f"pia {shlex.join(args)}: {type(error).__name__} {error}") from error
    needs_file = args[0] in ("audit", "plan", "verify")
    if args[0] in EXECUTED and (not needs_file or Path(args[1]).exists()):
        _run_pia(args)


def _run_pia(args: list[str]) -> None:
    command = [sys.executable, "-m", "per_instance_accountant", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (
        f"pia {shlex.join(args)} exits with {done.returncode}: {done.stdout}{done.stderr}"
    )


def _check_make(args: list[str]) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    missing = [arg for arg in args if "=" not in arg and arg not in targets]
    assert not missing, f"the Makefile has no target {missing}"


def _check_pip(args: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {
        extra for arg in args for group in re.findall(r"\[([\w,-]+)\]", arg) for extra in group.split(",")
    }
    unknown = extras - set(project["optional-dependencies"])
    assert args[:1] == ["install"] and not unknown, (
        f"pip {shlex.join(args)}: unknown extras {sorted(unknown)}"
    )
    for position, arg in enumerate(args):
        assert arg != "-c" or (ROOT / args[position + 1]).exists(), f"no file {args[position + 1]}"


def _check_python(args: list[str]) -> None:
    assert args[:1] == ["-m"] and len(args) > 1, f"python {shlex.join(args)} is not checked"
    module = args[1]
    local = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    assert module in ("venv", "pytest", "per_instance_accountant") or local.exists(), f"no module {module}"


_CHECKERS = {"pia": _check_pia, "make": _check_make, "pip": _check_pip, "python": _check_python}
