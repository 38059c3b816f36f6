"""The examples of frameworks and of several processes run as they stand, in an empty directory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAYS = {
    "lightning_digits": r"BudgetAudit\(1797 instances, 90 steps[\s\S]*OUTPUT_SPECIFIC",
    "hf_trainer": r"epsilon 2\.\d\d for threshold 1, 0\.\d\d for threshold 1/4: CERTIFIED",
    "accelerate_loop": r"BudgetAudit\(1797 instances, 60 steps[\s\S]*CERTIFIED",
    "two_ranks": r"BudgetAudit\(1797 instances, 60 steps[\s\S]*OUTPUT_SPECIFIC",
}
LAUNCHER = {"two_ranks": ["-m", "torch.distributed.run", "--nproc-per-node", "2"]}


@pytest.mark.parametrize("name", SAYS)
def test_the_example_runs(name: str, tmp_path: Path) -> None:
    offline = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *LAUNCHER.get(name, []), str(ROOT / "docs" / "examples" / f"{name}.py")]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **offline}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert re.search(SAYS[name], done.stdout)
