"""``pia`` as a process: what it loads, and terminals that can show little."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPORT = """
import sys
from per_instance_accountant.cli import main
sys.argv = ["pia", *sys.argv[1:]]
try:
    main()
finally:
    heavy = [name for name in ("torch", "opacus", "sklearn", "matplotlib", "rich") if name in sys.modules]
    print("loaded:", *heavy, file=sys.stderr)
"""


def run(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", REPORT, *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, check=False, encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("audit", "LEDGER", "--by", "label"), 0),
        (("plan", "LEDGER", "--ids", "ann,h", "--target-epsilon", "0.1", "--order", "8"), 1),
        (("verify", "missing.json"), 3),
        (("doctor",), 0),
        (("explain",), 0),
        (("--help",), 0),
    ],
)
def test_no_command_for_auditors_loads_torch(ledger: Path, args: tuple[str, ...], code: int) -> None:
    done = run(*(str(ledger) if arg == "LEDGER" else arg for arg in args))
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1] == "loaded:"


def test_plain_terminals_get_plain_text(ledger: Path) -> None:
    shown = run("audit", ledger, "--top", "12", PYTHONIOENCODING="ascii", NO_COLOR="1", TERM="dumb")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.isascii()
    assert "\x1b" not in shown.stdout


def test_colour_is_never_forced(ledger: Path) -> None:
    shown = run("audit", ledger, "--nothing", FORCE_COLOR="1", TERM="xterm-256color")
    assert shown.returncode == 2
    assert "\x1b" not in shown.stdout + shown.stderr


def test_a_closed_pipe_ends_quietly(ledger: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "per_instance_accountant", "audit", str(ledger)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert "Traceback" not in done.stderr
