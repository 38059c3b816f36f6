"""How many seeded privacy bugs the tests notice: each is put into a copy of the sources, and its tests run.

A bug counts as caught when pytest reports a failed test (exit code 1) that passes without it. Results are
kept in ``--cache`` and reused while the sources and tests stay the same, so that an interrupted run goes on;
``--write`` puts the table into docs/verification.md. The quick form tries the bugs of ``QUICK``, each with
its one test.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from benchmarks import Figure, report
from benchmarks.mutants import MUTANTS, Mutant, quick_mutants
from benchmarks.tables import markdown, put

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    "per_instance_accountant",
    "tests",
    "benchmarks",
    "docs",
    "conftest.py",
    "pyproject.toml",
    "README.md",
)
LIMIT_S = 300
TARGET = 29 / 30
QUICK_CPU_S = 60


class Stale(Exception):
    """A bug whose line no longer stands in the sources, or whose tests fail without it."""


def copy_of(root: Path, place: Path) -> Path:
    """A copy of what the tests need."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=ignore)
        elif source.exists():
            shutil.copy(source, place / name)
    return place


def mutated(source: str, mutant: Mutant) -> str:
    """The source with the bug. Raises Stale unless its line stands there exactly once."""
    if source.count(mutant.old) != 1:
        raise Stale(f"{mutant.name}: found {source.count(mutant.old)} times in {mutant.path}")
    return source.replace(mutant.old, mutant.new)


def run_tests(place: Path, tests: Iterable[str]) -> tuple[int, float, str]:
    """Exit code of pytest, CPU seconds, and the first failed test."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:xdist", "--no-header", "-rfE", "--tb=no"]
    command += [f"tests/{name}" for name in tests]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(place),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return 124, time.monotonic() - start, "time limit"
    lines = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    first = lines[0].partition(" - ")[0].partition(" ")[2] if lines else ""
    return process.returncode, time.monotonic() - start, first


def fingerprint(root: Path, mutant: Mutant | None, tests: tuple[str, ...]) -> str:
    """Changes with the bug, the package and the tests it is tried with."""
    state = hashlib.sha256(repr((mutant, tests)).encode())
    files = sorted((root / "per_instance_accountant").rglob("*.py"))
    for name in tests:
        tested = root / "tests" / name.partition("::")[0]
        files += [tested, *sorted(tested.parent.glob("conftest.py"))]
    for path in files:
        state.update(path.read_bytes() if path.exists() else b"missing")
    return state.hexdigest()[:24]


def try_one(root: Path, place: Path, mutant: Mutant) -> dict[str, object]:
    """Result of one bug: status caught, survived or stale, with the test that failed."""
    target = place / "per_instance_accountant" / mutant.path
    clean = target.read_text(encoding="utf-8")
    result: dict[str, object] = {"name": mutant.name, "area": mutant.area, "path": mutant.path}
    try:
        target.write_text(mutated(clean, mutant), encoding="utf-8")
        code, seconds, first = run_tests(place, mutant.tests)
    except Stale as stale:
        return result | {"status": "stale", "by": str(stale), "seconds": 0.0}
    finally:
        target.write_text(clean, encoding="utf-8")
    # A bug that makes the tests hang or end otherwise is noticed, too, but not by a law: it is not counted.
    status = "caught" if code == 1 else "survived"
    return result | {"status": status, "by": first, "seconds": round(seconds, 1)}


def failing(place: Path, tests: tuple[str, ...]) -> list[str]:
    """Those of the tests that fail without a bug; run together, and one by one if that fails."""
    if not tests or run_tests(place, tests)[0] == 0:
        return []
    return [test for test in tests if run_tests(place, (test,))[0] != 0]


def measure(
    root: Path, mutants: tuple[Mutant, ...], cache: Path | None, jobs: int
) -> list[dict[str, object]]:
    """Results in the order of the bugs."""
    known = json.loads(cache.read_text()) if cache and cache.exists() else {}
    copies: SimpleQueue[Path] = SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="pia-mutants-") as folder:
        for number in range(jobs):
            place = Path(folder) / str(number)
            place.mkdir()
            copies.put(copy_of(root, place))

        def cached(key: str, make: object) -> object:
            if key not in known:
                place = copies.get()
                try:
                    known[key] = make(place)  # type: ignore[operator]
                finally:
                    copies.put(place)
                if cache:
                    _save(cache, dict(known))
            return known[key]

        def judge(mutant: Mutant) -> dict[str, object]:
            found = cached(
                fingerprint(root, mutant, mutant.tests), lambda place: try_one(root, place, mutant)
            )
            print(f"  {found['status']:9} {found['seconds']:6} s  {mutant.name}", file=sys.stderr)  # type: ignore[index]
            return dict(found)  # type: ignore[call-overload, no-any-return]

        with ThreadPoolExecutor(jobs) as pool:
            results = list(pool.map(judge, mutants))
            blamed = tuple(dict.fromkeys(_test_of(r) for r in results if r["status"] == "caught"))
            unsound = cached(fingerprint(root, None, blamed), lambda place: failing(place, blamed))
    for result in results:
        if result["status"] == "caught" and _test_of(result) in unsound:  # type: ignore[operator]
            result.update(status="stale", by=f"{_test_of(result)} fails without the bug")
    return results


def _test_of(result: dict[str, object]) -> str:
    return str(result["by"]).removeprefix("tests/")


def _save(cache: Path, known: dict[str, object]) -> None:
    draft = cache.with_suffix(".part")
    draft.write_text(json.dumps(known))
    draft.replace(cache)


def table(results: list[dict[str, object]]) -> str:
    """Markdown rows by area."""
    rows = [
        (r["area"], r["name"], r["status"], f"`{r['by']}`" if r["by"] else "")
        for r in sorted(results, key=lambda r: str(r["area"]))
    ]
    caught = sum(r["status"] == "caught" for r in results)
    head = f"{caught} of {len(results)} seeded bugs are caught.\n\n"
    return head + markdown(("area", "bug", "outcome", "first test that failed"), rows)


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    """Run, print, write; exit code 0 unless a bug is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--quick", action="store_true", help=f"a few bugs, under {QUICK_CPU_S} s of CPU")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--cache", type=Path, help="file that keeps results between runs")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to test")
    parser.add_argument(
        "--write", action="store_true", help="put the table of all bugs into docs/verification.md"
    )
    options = parser.parse_args()
    mutants = quick_mutants() if options.quick else MUTANTS
    results = measure(options.root.resolve(), mutants, options.cache, options.jobs)
    counts = {name: sum(r["status"] == name for r in results) for name in ("caught", "survived", "stale")}
    figures = {
        "seeded_bugs": Figure(value=len(results), target=None if options.quick else 30, at_least=True),
        "caught": Figure(value=counts["caught"]),
        "survived": Figure(value=counts["survived"]),
        "stale": Figure(value=counts["stale"], target=0),
        "mutation_score": Figure(value=counts["caught"] / len(results), target=TARGET, at_least=True),
        "cpu_seconds": Figure(value=_cpu_of_children(), target=QUICK_CPU_S if options.quick else None),
    }
    report("mutation_score", figures, options.format)
    for result in results:
        if result["status"] != "caught":
            print(f"{result['status']}: {result['name']} ({result['by']})", file=sys.stderr)
    if options.write and not options.quick:
        put(ROOT / "docs" / "verification.md", "mutation-score", table(results))
    return 1 if counts["stale"] else 0


if __name__ == "__main__":
    sys.exit(main())
