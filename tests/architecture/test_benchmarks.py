"""The shared part of the benchmarks: verdicts, the printed object, CPU time of a child."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks
from benchmarks import Figure, report
from benchmarks.import_time import COMMANDS, cpu_seconds

ROOT = Path(__file__).resolve().parents[2]


def test_the_folder_of_this_repository_is_imported() -> None:
    """Opacus installs a top-level package of the same name."""
    assert Path(str(benchmarks.__file__)).parent == ROOT / "benchmarks"
    command = [sys.executable, "-m", "benchmarks.import_time", "--help"]
    assert (
        "CPU seconds" in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.parametrize(
    ("figure", "holds"),
    [
        (Figure(value=1.0, target=1.0), True),
        (Figure(value=1.1, target=1.0), False),
        (Figure(value=0.9, target=1.0, at_least=True), False),
        (Figure(value=1.1, target=1.0, at_least=True), True),
        (Figure(value=math.nan, target=1.0), False),
        (Figure(value=math.nan, target=1.0, at_least=True), False),
        (Figure(value=1.0), None),
    ],
)
def test_verdicts(figure: Figure, holds: bool | None) -> None:
    assert figure.as_dict()["holds"] is holds


def test_the_printed_object(capsys: pytest.CaptureFixture[str]) -> None:
    report("name", {"cost": Figure(value=0.5, target=1.0)}, "json")
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"name", "machine", "figures"}
    assert document["figures"] == {"cost": {"value": 0.5, "target": 1.0, "holds": True}}
    with pytest.raises(ValueError, match="JSON"):
        report("name", {"cost": Figure(value=math.nan)}, "json")


def test_cpu_time_is_that_of_the_child() -> None:
    idle = cpu_seconds(["-c", "import time; time.sleep(0.3)"])
    busy = cpu_seconds(["-c", "import time\nwhile time.process_time() < 0.3: pass"])
    assert idle < 0.2 < 0.3 <= busy
    with pytest.raises(subprocess.CalledProcessError):
        cpu_seconds(["-c", "raise SystemExit(3)"])


@pytest.mark.parametrize("name", ["import_per_instance_accountant_cpu_s", "pia_help_cpu_s"])
def test_start_up_meets_its_target(name: str) -> None:
    args, target = COMMANDS[name]
    assert target is not None
    assert min(cpu_seconds(args) for _ in range(3)) <= target
