"""What may import what, and what importing the package may load."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "opacus", "matplotlib", "sklearn", "scipy", "pyarrow", "pandas")


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running the code."""
    program = (
        f"{code}\nimport sys, json\nprint(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import per_instance_accountant",
        "import per_instance_accountant as pia; dir(pia); pia.__version__",
        "from per_instance_accountant import audit",
        "import per_instance_accountant.cli.commands",
    ],
)
def test_front_door_is_light(code: str) -> None:
    assert loaded_after(code).isdisjoint(HEAVY)


def test_rooms_below_the_adapter_do_without_torch() -> None:
    rooms = ("errors", "divergence", "ledger", "accounting", "audit", "unlearning")
    code = "; ".join(f"import per_instance_accountant.{room}" for room in rooms)
    code += "; from per_instance_accountant import Ledger, account, audit, plan, verify"
    assert loaded_after(code).isdisjoint({"torch", "opacus", "sklearn", "matplotlib"})


def test_a_loaded_module_is_seen() -> None:
    assert "torch" in loaded_after("import sys, types; sys.modules['torch'] = types.ModuleType('torch')")


def test_public_names_resolve() -> None:
    import per_instance_accountant as pia

    assert set(pia.__all__) <= set(dir(pia))
    assert {name: getattr(pia, name).__name__ for name in pia.__all__} == {name: name for name in pia.__all__}
    with pytest.raises(AttributeError):
        _ = pia.no_such_name


def import_contracts(root: Path) -> subprocess.CompletedProcess[str]:
    command = [
        str(Path(sys.executable).with_name("lint-imports")),
        "--no-cache",
        "--config",
        "pyproject.toml",
    ]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_import_contracts_hold() -> None:
    done = import_contracts(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("utils/__init__.py", '"""A room that the layers do not name."""\n'),
        ("audit/seeded.py", '"""Audit must not reach the model."""\nimport torch\n'),
        (
            "ledger/seeded.py",
            '"""Facts know no conclusion."""\nimport per_instance_accountant.audit\n',
        ),
    ],
)
def test_import_contracts_reject_a_breach(tmp_path: Path, path: str, text: str) -> None:
    shutil.copytree(ROOT / "per_instance_accountant", tmp_path / "per_instance_accountant")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    target = tmp_path / "per_instance_accountant" / path
    target.parent.mkdir(exist_ok=True)
    target.write_text(text, encoding="utf-8")
    done = import_contracts(tmp_path)
    assert done.returncode == 1
    assert Path(path).parts[0] in done.stdout
    assert "broken" in done.stdout
