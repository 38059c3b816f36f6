"""Bars: on terminals only, on stderr only, with the time left, without colour."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from per_instance_accountant.cli import watching
from per_instance_accountant.ledger import Ledger

AT_ONCE = "from per_instance_accountant.cli import main, watching; watching.DELAY_S = 0; main()"


def on_terminal(*args: object) -> tuple[bytes, bytes]:
    """stdout, and what a terminal behind stderr received, of ``pia`` whose bars do not wait."""
    receiver, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (30, 100))
    command = [sys.executable, "-c", AT_ONCE, *map(str, args)]
    environment = os.environ | {"NO_COLOR": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, env=environment) as process:
        os.close(terminal)
        assert process.stdout is not None
        printed, shown = process.stdout.read(), b""
        # Reading from a terminal that nobody holds any more fails: that is its end.
        try:
            while chunk := os.read(receiver, 4096):
                shown += chunk
        except OSError:
            pass
        finally:
            os.close(receiver)
    assert process.returncode == 0, shown
    return printed, shown


@pytest.mark.parametrize("command", ["audit", "report"])
def test_a_terminal_sees_a_bar_and_stdout_does_not(command: str, ledger: Path, tmp_path: Path) -> None:
    more = ("--output", tmp_path / "page.html") if command == "report" else ()
    printed, shown = on_terminal(command, ledger, *more)
    assert b"reading the ledger" in shown and b"<" in shown, "the time left"
    assert b"reading the ledger" not in printed
    # Cursor movements are no colours, which end in "m".
    assert b"\x1b[3" not in shown


def test_what_is_no_terminal_sees_nothing(ledger: Path) -> None:
    command = [sys.executable, "-c", AT_ONCE, "audit", str(ledger)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "reading" not in done.stderr + done.stdout and "\r" not in done.stderr


def test_the_ledger_is_the_same(ledger: Path) -> None:
    watched, plain = watching.open_ledger(str(ledger)), Ledger.open(ledger)
    assert watched.anchor == plain.anchor and watched.path == plain.path
    assert len(list(watched.events())) == len(list(plain.events()))
