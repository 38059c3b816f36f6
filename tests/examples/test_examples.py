"""Every example runs as it stands, with bundled data, in an empty directory."""

from __future__ import annotations

import re
import runpy
import time
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
RUN_HERE = ("plain_loop", "ghost_clipping", "sgld", "filter", "deletion_service", "notebook")
SAYS = {
    "plain_loop": r"OUTPUT_SPECIFIC[\s\S]*read digits\.html",
    "ghost_clipping": r"CERTIFIED[\s\S]*no bound",
    "sgld": r"BudgetAudit\(569 instances, 60 steps[\s\S]*CERTIFIED",
    "filter": r"certified for everybody: epsilon at most [0-6]\.",
    "deletion_service": r"valid: True\nnames in the certificate: 0",
    "notebook": r"EveryoneSteps: 1797 instances",
}
LIMIT_CPU_S = 60.0


@pytest.mark.parametrize("name", RUN_HERE)
def test_the_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    before = time.process_time()
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert time.process_time() - before < LIMIT_CPU_S
    assert re.search(SAYS[name], capsys.readouterr().out)


def test_every_example_is_listed() -> None:
    listed = re.findall(r"^\| \[(\w+)\.py\]", (EXAMPLES / "index.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in EXAMPLES.glob("*.py"))
    assert set(RUN_HERE) <= set(listed)
