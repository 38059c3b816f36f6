"""The script that seeds bugs: a bug that no test notices survives, one that no longer applies is stale."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.mutants import MUTANTS, QUICK, Mutant, quick_mutants
from benchmarks.mutation_score import ROOT, Stale, measure, mutated, table

PACKAGE = ROOT / "per_instance_accountant"


def seeded(new, old="return 1 + 1"):
    return Mutant(
        name=f"{old} to {new}", area="sums", path="sums.py", old=old, new=new, tests=("test_sums.py",)
    )


@pytest.fixture
def project(tmp_path):
    (tmp_path / "per_instance_accountant").mkdir()
    (tmp_path / "per_instance_accountant" / "__init__.py").touch()
    (tmp_path / "per_instance_accountant" / "sums.py").write_text("def two():\n    return 1 + 1\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_sums.py").write_text(
        "import sys, pathlib\nsys.path.insert(0, str(pathlib.Path(__file__).parents[1]))\n"
        "from per_instance_accountant.sums import two\n\n\ndef test_two():\n    assert two() == 2\n"
    )
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    return tmp_path


def test_bugs_are_caught_survive_or_are_stale(project, tmp_path):
    bugs = (seeded("return 3"), seeded("return 2 * 1"), seeded("return 4", old="no such line"))
    cache = tmp_path / "cache.json"
    results = measure(project, bugs, cache, 1)
    assert [r["status"] for r in results] == ["caught", "survived", "stale"]
    assert results[0]["by"] == "tests/test_sums.py::test_two"
    assert "1 of 3 seeded bugs are caught" in table(results)
    before = cache.read_text()
    assert measure(project, bugs, cache, 1) == results and cache.read_text() == before
    source = project / "per_instance_accountant" / "sums.py"
    assert source.read_text() == "def two():\n    return 1 + 1\n"


def test_a_bug_is_not_caught_by_a_test_that_fails_anyway(project):
    (project / "tests" / "test_sums.py").write_text("def test_two():\n    assert False\n")
    (result,) = measure(project, (seeded("return 3"),), None, 1)
    assert result["status"] == "stale" and "fails without the bug" in result["by"]


def test_a_line_must_stand_there_once():
    with pytest.raises(Stale, match="found 2 times"):
        mutated("a a", seeded("b", old="a"))
    assert mutated("x = 1", seeded("2", old="1")) == "x = 2"


def test_the_seeded_bugs_apply_to_these_sources():
    """A refactoring may move a line; the script reports such bugs as stale, and too many are an error."""
    stale = [m.name for m in MUTANTS if (PACKAGE / m.path).read_text(encoding="utf-8").count(m.old) != 1]
    missing = [t for m in MUTANTS for t in m.tests if not (ROOT / "tests" / t).exists()]
    assert len(MUTANTS) >= 40 and len({m.name + m.area for m in MUTANTS}) == len(MUTANTS)
    assert {m.area for m in MUTANTS} == {"accounting", "capture", "ledger", "planner", "certificate"}
    assert missing == [] and len(stale) <= 4, stale
    assert Path(ROOT / "docs" / "verification.md").exists()


def test_the_quick_form_tries_every_area_with_a_test_that_exists():
    chosen = quick_mutants()
    assert len(chosen) == len(QUICK) and {m.area for m in chosen} == {m.area for m in MUTANTS}
    for mutant in chosen:
        (node,) = mutant.tests
        path, _, function = node.partition("::")
        assert f"def {function}(" in (ROOT / "tests" / path).read_text(encoding="utf-8")
