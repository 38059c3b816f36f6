"""The picture is optional, and says so."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from per_instance_accountant.errors import MissingDependencyError, UsageError
from per_instance_accountant.evaluation.plots import plot_damage

ACCURACY, FORGOTTEN = [1.0, 0.9, 0.85], np.array([[1.0, 0.0], [0.5, 1.0]])


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match="PIA061"):
        plot_damage(ACCURACY, FORGOTTEN, tmp_path / "damage.svg")
    assert not (tmp_path / "damage.svg").exists()


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_with_matplotlib(tmp_path: Path) -> None:
    plot_damage(ACCURACY, FORGOTTEN, tmp_path / "damage.svg")
    assert (tmp_path / "damage.svg").stat().st_size > 1000


def test_wrong_shapes(tmp_path: Path) -> None:
    for accuracy, forgotten in (
        (ACCURACY[:2], FORGOTTEN),
        (ACCURACY, FORGOTTEN[0]),
        ([np.nan] * 3, FORGOTTEN),
    ):
        with pytest.raises(UsageError, match="PIA071"):
            plot_damage(accuracy, forgotten, tmp_path / "damage.svg")
