"""A ledger on disk, and ``pia`` as a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from per_instance_accountant.cli import main
from per_instance_accountant.ledger import LedgerWriter, Phase, Run, Step, Thresholds

NUM_INSTANCES, NUM_STEPS = 12, 6
IDS = np.array(["=SUM(A1)", "+1", "-1", "@x", "\tt", "ann", "b\x1b[31m", "çé", "d,e", 'f"g', "h", "i"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one call of ``pia`` left behind."""

    code: int
    out: str
    err: str


Pia = Callable[..., Outcome]


@pytest.fixture
def pia(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Pia:
    def call(*args: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["pia", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert "\x1b" not in captured.err + ("" if "csv" in args else captured.out)
        return Outcome(code=int(stopped.value.code or 0), out=captured.out, err=captured.err)

    return call


def write_ledger(path: Path, charging: str = "fixed_thresholds") -> Path:
    """Six steps, twelve instances with odd business ids, thresholds from 0 to the clip norm, two groups."""
    rng = np.random.default_rng(0)
    groups = {"label": np.arange(NUM_INSTANCES) % 2}
    phase = Phase(
        kind="train",
        sampling="poisson",
        sample_rate=0.25,
        noise_std=1.5,
        max_grad_norm=1.0,
        charging=charging,
        denominator=3.0,
        learning_rate=0.1,
    )
    values = np.linspace(0, 1, NUM_INSTANCES, dtype=np.float32)
    with LedgerWriter.create(path, Run(num_instances=NUM_INSTANCES, ids=IDS, groups=groups)) as writer:
        writer.append(phase)
        writer.append(Thresholds(values=values, source="fixed"))
        for _ in range(NUM_STEPS):
            drawn = np.flatnonzero(rng.random(NUM_INSTANCES) < 0.25)
            writer.append(Step(positions=drawn, contributions=values[drawn]))
    return path


@pytest.fixture(scope="session")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ledger(tmp_path_factory.mktemp("runs") / "a")
