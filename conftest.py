"""Runs the code blocks of README.md and docs as tests: each page from top to bottom in its own directory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from tests.canary import nothing_about_a_person_is_said
from tests.readme.shell_lines import check, commands_in

__all__ = ["nothing_about_a_person_is_said"]

# Scripts that run when they are imported; tests/examples runs them where they may write.
collect_ignore_glob = ["docs/examples/*.py"]


def _evaluate_shell(example: Example) -> None:
    """README's audit and plan must find the ledger of its Python block, or they would only be parsed."""
    for words in commands_in(example.parsed):
        check(words)
        if Path(example.path).name == "README.md" and words[:2] in (["pia", "audit"], ["pia", "plan"]):
            assert Path(words[2]).exists()


def _enter(namespace: dict[str, Any]) -> None:
    folder = tempfile.TemporaryDirectory(prefix="pia-docs-")
    namespace["_page"] = (folder, os.getcwd())
    os.chdir(folder.name)


def _leave(namespace: dict[str, Any]) -> None:
    folder, before = namespace["_page"]
    os.chdir(before)
    folder.cleanup()


pytest_collect_file = Sybil(
    parsers=[
        PythonCodeBlockParser(),
        CodeBlockParser(language="bash", evaluator=_evaluate_shell),
        SkipParser(),
    ],
    patterns=["README.md", "docs/*.md", "docs/**/*.md"],
    setup=_enter,
    teardown=_leave,
).pytest()
