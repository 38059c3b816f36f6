"""The table of guards in the docs names tests that exist."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "opacus_guards.md"


def load():
    spec = importlib.util.spec_from_file_location("guard_table", HERE / "guard_table.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


guard_table = load()


def test_every_guard_has_its_test():
    assert len(guard_table.guards()) > 30
    assert guard_table.missing() == []


def test_a_guard_without_a_test_is_noticed(monkeypatch):
    monkeypatch.setattr(guard_table, "TABLE", "a loop | stock | here | guards: nobody_wrote_this")
    assert guard_table.missing() == ["guards: nobody_wrote_this"]


def test_the_page_is_the_table():
    text = guard_table.table()
    if os.environ.get("WRITE_TABLES"):
        PAGE.write_text(text, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == text, "run with WRITE_TABLES=1 to write it again"
