"""Every example runs as it stands, with bundled data, in an empty directory."""

from __future__ import annotations

import re
import runpy
import time
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
RUN_HERE = ("plain_loop", "ghost_clipping", "sgld", "filter", "deletion_service")
SAYS = {
    "plain_loop": r"OUTPUT_SPECIFIC[\s\S]*read digits\.html",
    "ghost_clipping": r"CERTIFIED[\s\S]*no bound",
    "sgld": r"BudgetAudit\(569 instances, 60 steps[\s\S]*CERTIFIED",
    "filter": r"certified for everybody: epsilon at most [0-6]\.",
    "deletion_service": r"valid: True\nnames in the certificate: 0",
}
LIMIT_CPU_S = 60.0
NOTEBOOK = EXAMPLES / "explore_a_ledger.ipynb"
LIMIT_NOTEBOOK_S = 60.0


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


def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    before = time.monotonic()
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert time.monotonic() - before < LIMIT_NOTEBOOK_S
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = "".join(output.get("text", "") for output in outputs)
    assert re.search(r"CERTIFIED[\s\S]*EveryoneSteps: 1797 instances", shown)
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert kinds.count("image/png") == 2 and "text/html" in kinds
    assert (tmp_path / "digits.html").stat().st_mode & 0o777 == 0o600


def test_the_notebook_is_stored_without_outputs() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert len(cells) >= 5
    assert [cell.outputs for cell in cells if cell.outputs or cell.execution_count] == []


def test_every_example_is_listed() -> None:
    listed = re.findall(r"^\| \[(\w+\.(?:py|ipynb))\]", (EXAMPLES / "index.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(
        path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")
    )
    assert {f"{name}.py" for name in RUN_HERE} <= set(listed)
