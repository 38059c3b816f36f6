"""The site: pages are reachable, what they name exists, nothing is loaded from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from per_instance_accountant.cli.commands import app
from tests.documentation.error_catalogue import PAGE, catalogue

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}


def _leaves(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [leaf for part in parts for leaf in _leaves(part)]


def _navigation() -> list[str]:
    return _leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])


def test_every_page_is_in_the_navigation_once() -> None:
    listed = _navigation()
    assert len(listed) == len(set(listed))
    assert set(listed) == PAGES, "name each page of docs/ once under nav in mkdocs.yml"


def broken_links(text: str, page: Path) -> list[str]:
    """Relative targets of a page that are not there."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [link for link in targets if "://" not in link and not (page.parent / link).exists()]


@pytest.mark.parametrize("name", ["README.md", *sorted(f"docs/{page}" for page in PAGES)])
def test_links_lead_somewhere(name: str) -> None:
    assert broken_links((ROOT / name).read_text(encoding="utf-8"), ROOT / name) == []


def test_a_broken_link_is_seen() -> None:
    text = "[a](index.md) [b](missing.md#part) [c](https://example.org)\n```\n[d](shown.md)\n```\n"
    assert broken_links(text, DOCS / "index.md") == ["missing.md"]


def test_the_error_catalogue_is_current() -> None:
    current = PAGE.read_text(encoding="utf-8") == catalogue()
    assert current, "python -m tests.documentation.error_catalogue"


def test_every_command_is_on_the_command_page() -> None:
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    shown = set(re.findall(r"^\| `pia ([a-z]+)", (DOCS / "reference/commands.md").read_text(), re.MULTILINE))
    assert shown == commands


def test_every_code_of_the_documents_exists() -> None:
    known = catalogue()
    named = {
        code for page in PAGES for code in re.findall(r"PIA\d{3}", (DOCS / page).read_text(encoding="utf-8"))
    }
    assert [code for code in sorted(named) if code not in known] == []


def test_examples_of_docstrings_become_code() -> None:
    sys.path.insert(0, str(ROOT / ".ci"))
    try:
        from doctest_blocks import fenced, plain_names
    finally:
        sys.path.pop(0)
    text = "Title.\n\n>>> f(1,\n...   2)\n3\n>>> g()\n\nMore text."
    assert plain_names("See :func:`~package.name`, `code` and :class:`One`.") == (
        "See `package.name`, `code` and `One`."
    )
    assert fenced(text) == "Title.\n\n```pycon\n>>> f(1,\n...   2)\n3\n>>> g()\n```\n\nMore text."


@pytest.mark.skipif(
    not os.environ.get("CI"), reason="make docs builds the site; in CI it is looked at as well"
)
def test_the_built_site_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(".venv", ".git", "site", ".*_cache")
    )
    command = [str(Path(sys.executable).with_name("zensical")), "build", "--strict"]
    subprocess.run(command, cwd=tmp_path / "copy", check=True, capture_output=True)
    pages = sorted((tmp_path / "copy" / "site").rglob("*.html"))
    assert len(pages) >= len(PAGES)
    loaded = re.compile(
        r"<(?:script|img|iframe)[^>]+src=\"(https?:)?//|<link[^>]+stylesheet[^>]+href=\"(https?:)?//"
    )
    assert [page.name for page in pages if loaded.search(page.read_text(encoding="utf-8"))] == []
