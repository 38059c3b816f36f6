"""The command ``pia``: load, call, print. Each command imports only the room it needs."""

from __future__ import annotations


def main() -> None:
    """Run ``pia``; exits with 0 (ok), 1 (a check failed), 2 (usage) or 3 (damaged or missing input)."""
    from per_instance_accountant.cli.commands import run

    run()
