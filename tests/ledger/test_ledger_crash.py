"""kill -9 of a writing process loses no acknowledged step. PIA_KILLS sets the number of kills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_killed_writers_lose_no_acknowledged_step() -> None:
    kills = int(os.environ.get("PIA_KILLS", "20"))
    script = Path(__file__).with_name("crash_loop.py")
    done = subprocess.run(
        [sys.executable, str(script), str(kills), "3"], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    assert result.pop("steps") > kills
    assert result == {"rounds": kills, "lost": 0, "altered": 0, "surplus": 0}
