"""Exit codes, error messages, and what each command hands to its room."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import per_instance_accountant.finetuning
import per_instance_accountant.unlearning
from per_instance_accountant import __version__
from per_instance_accountant.cli.inputs import load_reference, read_assumptions, read_ids
from per_instance_accountant.errors import (
    CODES,
    CertificateError,
    LedgerError,
    PiaError,
    PlanError,
    UsageError,
)
from tests.cli.conftest import Pia


@pytest.mark.parametrize(
    "args",
    [
        ("audit", "LEDGER", "--delta", "2"),
        ("audit", "LEDGER", "--delta", "nan"),
        ("audit", "LEDGER", "--budget", "nan"),
        ("audit", "LEDGER", "--by", "nothing"),
        ("plan", "LEDGER", "--ids", "@missing", "--target-epsilon", "1", "--order", "8"),
        ("plan", "LEDGER", "--ids", " , ", "--target-epsilon", "1", "--order", "8"),
        ("explain", "PIA999"),
    ],
)
def test_usage_errors_exit_with_2(pia: Pia, ledger: Path, args: tuple[str, ...]) -> None:
    done = pia(*(str(ledger) if arg == "LEDGER" else arg for arg in args))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: PIA07")


@pytest.mark.parametrize(
    "args", [("audit",), ("audit", "x", "--delta", "many"), ("nothing",), ("audit", "x", "-z")]
)
def test_unparsable_command_lines_exit_with_2(pia: Pia, args: tuple[str, ...]) -> None:
    done = pia(*args)
    assert (done.code, done.out) == (2, "")
    assert "Error" in done.err


def test_missing_and_damaged_ledgers_exit_with_3(pia: Pia, ledger: Path, tmp_path: Path) -> None:
    missing = pia("audit", tmp_path / "nothing")
    assert (missing.code, missing.out) == (3, "")
    assert "PIA041" in missing.err
    damaged = tmp_path / "damaged"
    shutil.copytree(ledger, damaged)
    log = max(damaged.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(log.read_bytes())
    content[len(content) // 2] ^= 1
    log.write_bytes(content)
    broken = pia("audit", damaged, "--format", "json")
    assert (broken.code, broken.out) == (3, "")
    assert "PIA042" in broken.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LedgerError("PIA040", "a", "b", "c"), 3),
        (CertificateError("PIA051", "a", "b", "c"), 3),
        (PlanError("PIA032", "a", "b", "c"), 2),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2),
    ],
)
def test_errors_become_exit_codes(
    pia: Pia, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(per_instance_accountant.unlearning, "verify", fail, raising=False)
    done = pia("verify", "certificate.json")
    assert (done.code, done.out) == (code, "")
    expected = str(error) if isinstance(error, PiaError) else 'pip install "per-instance-accountant[opacus]"'
    assert expected in done.err


def test_explain_one_and_all(pia: Pia) -> None:
    assert json.loads(pia("explain", "pia012", "--format", "json").out)["codes"] == {
        "PIA012": CODES["PIA012"]
    }
    assert all(meaning in pia("explain").out for meaning in list(CODES.values())[:3])
    assert len(pia("explain", "--format", "csv").out.splitlines()) == len(CODES) + 1


def test_version_and_help(pia: Pia) -> None:
    assert pia("--version").out == f"pia {__version__}\n"
    shown = pia("--help").out
    assert all(name in shown for name in ("doctor", "demo", "audit", "plan", "unlearn", "verify", "explain"))


def test_ids_from_text_file_and_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    integers, strings = np.dtype(np.int64), np.dtype("<U9")
    assert read_ids("3,17", integers).tolist() == [3, 17]
    assert read_ids("3,17", integers).dtype == integers
    path = tmp_path / "ids"
    path.write_text("a,b\n\n c \r\n", encoding="utf-8")
    assert read_ids(f"@{path}", strings).tolist() == ["a,b", " c "]
    monkeypatch.setattr(sys, "stdin", io.StringIO("5\n4\n"))
    assert read_ids("-", integers).tolist() == [5, 4]


@pytest.mark.parametrize(
    "text", ["secret-person", "1,2,secret-person", "1.5", "9" * 23, "1_000", "\u0661", "", ","]
)
def test_unreadable_ids_are_refused_without_repeating_them(text: str) -> None:
    with pytest.raises(UsageError, match="PIA071") as refused:
        read_ids(text, np.dtype(np.int64))
    assert not any(part and part in str(refused.value) for part in text.replace("1,2,", "").split(","))


@pytest.mark.parametrize("text", ["[1]", "{", "null", '"x"'])
def test_assumptions_must_be_an_object(tmp_path: Path, text: str) -> None:
    path = tmp_path / "assumptions.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match="PIA071"):
        read_assumptions(str(path))


@pytest.mark.parametrize(
    "reference", ["collections", "collections:", "no_such_module:x", "collections:nope", ":x", ""]
)
def test_unknown_references_are_refused(reference: str) -> None:
    with pytest.raises(UsageError, match="--data"):
        load_reference(reference, "--data")


def test_unlearn_hands_everything_to_the_room(
    pia: Pia, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}

    def run_plan(plan: object, **rest: object) -> object:
        seen.update(rest, plan=plan)
        return SimpleNamespace(certificate=Path("out/c.json"), checkpoint=Path("out/model.pt"), steps=7)

    loader = SimpleNamespace(load=lambda path: f"plan at {path}")
    monkeypatch.setattr(per_instance_accountant.finetuning, "run_plan", run_plan, raising=False)
    monkeypatch.setattr(per_instance_accountant.unlearning, "UnlearningPlan", loader, raising=False)
    (tmp_path / "cli_fixture_module.py").write_text("rows = [1, 2]\ndef model():\n    return 'model'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    done = pia(
        *("unlearn", "plan.json", "--ledger", "runs/a", "--checkpoint", "model.pt", "--output", "out"),
        *("--data", "cli_fixture_module:rows", "--model", "cli_fixture_module:model"),
        *("--criterion", "collections:OrderedDict", "--format", "json"),
        *("--frozen", "body.weight", "--frozen", "body.bias"),
    )
    assert done.code == 0
    assert json.loads(done.out) == {"certificate": "out/c.json", "model": "out/model.pt", "steps": 7}
    assert seen == {
        "plan": "plan at plan.json",
        "ledger": "runs/a",
        "checkpoint": "model.pt",
        "output": "out",
        "dataset": [1, 2],
        "module": "model",
        "criterion": {},
        "frozen": ["body.weight", "body.bias"],
        "progress": True,
    }


@pytest.mark.parametrize(("held", "code"), [(True, 0), (False, 1)])
def test_demo_delegates(pia: Pia, monkeypatch: pytest.MonkeyPatch, held: bool, code: int) -> None:
    seen: dict[str, Any] = {}
    fake: Any = ModuleType("per_instance_accountant.cli.demo")
    fake.run = lambda **options: seen.update(options) or held
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    assert pia("demo", "--seed", "3", "--output", "there", "--format", "json").code == code
    assert seen == {"seed": 3, "output": "there", "output_format": "json"}
