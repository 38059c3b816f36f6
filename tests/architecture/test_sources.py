"""Rules that every source file of the package keeps, each checked on a file that breaks it as well."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "per_instance_accountant"
MODULES = sorted(PACKAGE.rglob("*.py"))
LINES_GATE, LINES_AIM, FILES_AIM, FUNCTION_AIM = 400, 300, 7, 40
UNWANTED_NAMES = {"utils", "common", "misc", "helpers", "base", "manager", "handler", "data", "info"}
UNPICKLERS = {
    f"{module}.{name}" for module in ("pickle", "cloudpickle") for name in ("load", "loads", "Unpickler")
}
FOLDERS = ("home", "root", "Users", "work", "mnt", "tmp", "opt")
ABSOLUTE_PATH = re.compile(rf"(?<![\w./~$}}>])/({'|'.join(FOLDERS)})/[\w.]")


def no_bare_assert(source: str) -> list[str]:
    return [
        f"assert at line {node.lineno}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assert)
    ]


def no_print(source: str) -> list[str]:
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [f"print at line {node.lineno}" for node in calls if getattr(node.func, "id", "") == "print"]


def has_docstring(source: str) -> list[str]:
    return [] if ast.get_docstring(ast.parse(source)) else ["no module docstring"]


def within_gate(source: str) -> list[str]:
    lines = source.count("\n")
    return [f"{lines} lines, at most {LINES_GATE} are allowed"] if lines > LINES_GATE else []


def no_unpickling(source: str) -> list[str]:
    """Files from elsewhere must not run code: no pickle is loaded, and torch.load says weights_only=True."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        called = ast.unparse(node.func)
        words = [ast.unparse(word) for word in node.keywords]
        safe = any(word == "weights_only=True" or word.endswith("'weights_only': True}") for word in words)
        if called in UNPICKLERS or (called == "torch.load" and not safe):
            found.append(f"{called} at line {node.lineno}")
    return found


def no_absolute_path(source: str) -> list[str]:
    return [
        f"line {number}" for number, line in enumerate(source.splitlines(), 1) if ABSOLUTE_PATH.search(line)
    ]


RULES: dict[Callable[[str], list[str]], str] = {
    no_bare_assert: '"""Doc."""\ndef f(x):\n    assert x\n',
    no_print: '"""Doc."""\nprint(1)\n',
    has_docstring: "x = 1\n",
    within_gate: '"""Doc."""\n' * (LINES_GATE + 1),
    no_unpickling: '"""Doc."""\nimport torch\nx = torch.load("model.pt", weights_only=False)\n',
    no_absolute_path: '"""Doc."""\nwhere = "/' + 'home/someone/model.pt"\n',
}
"""Rule -> a file that breaks it."""


def breaches(rule: Callable[[str], list[str]], modules: list[Path]) -> dict[str, list[str]]:
    found = {str(path.relative_to(ROOT)): rule(path.read_text(encoding="utf-8")) for path in modules}
    return {path: lines for path, lines in found.items() if lines}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_module_keeps_the_rule(rule: Callable[[str], list[str]]) -> None:
    modules = [path for path in MODULES if rule is not no_print or path.parent.name != "cli"]
    assert len(modules) > 10
    assert breaches(rule, modules) == {}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_rejects_its_seeded_breach(rule: Callable[[str], list[str]]) -> None:
    assert rule(RULES[rule])
    assert not rule('"""Doc."""\n\nx = 1\n')


def test_no_module_is_named_after_nothing() -> None:
    assert [path.name for path in MODULES if path.stem.strip("_") in UNWANTED_NAMES] == []


def test_tracked_files_name_no_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    texts = [
        path for path in paths if path.is_file() and path.suffix in {".py", ".md", ".toml", ".txt", ".sh", ""}
    ]
    assert len(texts) > 20
    assert breaches(no_absolute_path, [path for path in texts if path.name != "LICENSE"]) == {}


def test_size_aims_are_reported(record_property: Callable[[str, object], None]) -> None:
    """Aims are not gates: what misses them is written into the test report."""
    long_modules = [path.name for path in MODULES if path.read_text(encoding="utf-8").count("\n") > LINES_AIM]
    functions = [
        f"{path.name}:{node.name}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_AIM
    ]
    full_rooms = [
        folder.name
        for folder in PACKAGE.iterdir()
        if folder.is_dir() and len(list(folder.glob("[!_]*.py"))) > FILES_AIM
    ]
    for aim, misses in {"lines": long_modules, "functions": functions, "files": full_rooms}.items():
        record_property(aim, misses)
    assert len(long_modules) <= len(MODULES) // 5
