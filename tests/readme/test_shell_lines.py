"""The checks of shell blocks must reject what a reader could not run."""

from __future__ import annotations

import re

import pytest

from tests.readme.shell_lines import ROOT, check, commands_in


@pytest.mark.parametrize(
    "line",
    [
        "pia audit runs/a --by label --delta 1e-6 --top 5 --budget 8 --charging worst-case --format json",
        "pia plan runs/a --ids 1,2 --target-epsilon 0.1 --order 8 --output plan.json",
        "pia verify certificate.json --ledger runs/a --checkpoint after.pt",
        "pia explain PIA012   # a comment",
        'make demo ARGS="--seed 1"',
        'pip install -c constraints.txt -e ".[demo]"',
        "python -m benchmarks.import_time --quick",
        "cd somewhere && make test",
    ],
)
def test_real_commands_pass(line: str) -> None:
    for words in commands_in(line):
        check(words)


@pytest.mark.parametrize(
    "line",
    [
        "pia audit runs/a --bye label",
        "pia audit runs/a --charging free",
        "pia audit",
        "pia plan runs/a --ids 1,2 --order 8",
        "pia forgive runs/a",
        "pia explain PIA999",
        "make everything",
        'pip install "per-instance-accountant[nothing]"',
        "pip install -c missing.txt -e .",
        "python -m benchmarks.missing",
        "python train.py",
        "curl example",
        "cd somewhere && make everything",
    ],
)
def test_false_commands_fail(line: str) -> None:
    *harmless, last = commands_in(line)
    for words in harmless:
        check(words)
    with pytest.raises(AssertionError):
        check(last)


def test_readme_starts_with_two_commands() -> None:
    block = re.search(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    assert len(commands_in(block.group(1))) == 2
