"""``pia doctor`` finds what it is there to find."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from typing import Any

import pytest

import per_instance_accountant.divergence as divergence
from per_instance_accountant.cli.doctor import examine
from tests.cli.conftest import Pia


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def status_of(check: str, findings: list[dict[str, str]]) -> tuple[str, str]:
    [found] = [finding for finding in findings if finding["check"] == check]
    return found["status"], found["detail"]


def test_a_sound_installation_passes_quickly(pia: Pia) -> None:
    started = time.process_time()
    done = pia("doctor", "--format", "json")
    assert time.process_time() - started < 2
    document = json.loads(done.out)
    assert done.code == 0, done.out
    assert document["ok"] is True
    assert {row["status"] for row in document["checks"]} == {"ok"}


@pytest.mark.parametrize("factor", [1 - 1e-9, 1 + 1e-5])
@pytest.mark.parametrize("name", ["sampled_gaussian_rdp", "rdp_to_epsilon", "gaussian_delta"])
def test_numbers_off_the_closed_form_fail(
    pia: Pia, monkeypatch: pytest.MonkeyPatch, name: str, factor: float
) -> None:
    """Seeded bug: a bound below the truth by a billionth, or needlessly far above it."""
    true = getattr(divergence, name)
    monkeypatch.setattr(divergence, name, lambda *args: true(*args) * factor)
    done = pia("doctor", "--format", "json")
    assert done.code == 1
    assert status_of("known numbers", json.loads(done.out)["checks"])[0] == "failed"


def test_a_file_system_that_opens_files_to_others_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    true_open = os.open

    def open_to_all(path: Any, flags: int, mode: int = 0o777, **rest: Any) -> int:
        descriptor = true_open(path, flags, mode, **rest)
        if str(path).endswith("probe"):
            os.fchmod(descriptor, 0o644)
        return descriptor

    monkeypatch.setattr(os, "open", open_to_all)
    assert status_of("owner-only files", examine()) == (
        "failed",
        "RuntimeError: mode 600 becomes 644; keep ledgers on another file system",
    )


def test_absent_extras_are_named_with_their_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    true_find = importlib.util.find_spec
    absent = ("torch", "scipy")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else true_find(name))
    findings = examine()
    assert status_of("torch (optional)", findings) == (
        "missing",
        'pip install "per-instance-accountant[opacus]"',
    )
    assert status_of("scipy", findings) == ("failed", "pip install scipy")


@pytest.mark.parametrize(("factor", "status"), [(1.0, "ok"), (1.0001, "failed")])
def test_training_is_compared_with_opacus(
    monkeypatch: pytest.MonkeyPatch, factor: float, status: str
) -> None:
    """Seeded bug: an accountant that differs from Opacus in the fourth digit."""
    import torch
    from opacus.accountants import RDPAccountant

    torch.set_num_threads(1)
    true = RDPAccountant.get_epsilon
    monkeypatch.setattr(RDPAccountant, "get_epsilon", lambda *args, **rest: true(*args, **rest) * factor)
    found, detail = status_of("training with Opacus", examine(train=True))
    assert found == status, detail
