"""Every way of training with Opacus is either recorded exactly or refused with a code; the table in the docs
is made of the cells that pass here."""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from per_instance_accountant.opacus_adapter import optimizers

HERE = Path(__file__).parent
TABLE = HERE.parents[1] / "docs" / "opacus_modes.md"


def load_cells():
    spec = importlib.util.spec_from_file_location("mode_cells", HERE / "mode_cells.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


cells = load_cells()
REFUSED = {
    **{("ghost", clipping, name): "PIA060" for clipping in cells.CLIPPINGS[1:] for name in cells.FEATURES},
    **{(mode, "adaptive", name): "PIA060" for mode in cells.MODES for name in ("thresholds", "sweep")},
    **{("no_op", clipping, "sweep"): "PIA060" for clipping in cells.CLIPPINGS},
    **{
        ("ew", clipping, name): "PIA060" for clipping in cells.CLIPPINGS for name in ("unwrapped", "autocast")
    },
    ("ghost", "flat", "autocast"): "PIA060",
}
COMPAT = ("plain", "virtual", "empty", "sum", "epsilon", "thresholds", "sweep")
"""Columns that are also run with older versions of Opacus."""
UNKNOWN_BEFORE_1_6 = {("functorch", "autocast"), *((mode, "unwrapped") for mode in cells.MODES)}
PASSED = {}


@pytest.mark.parametrize("mode", cells.MODES)
@pytest.mark.parametrize("clipping", cells.CLIPPINGS)
@pytest.mark.parametrize(
    "feature",
    [pytest.param(name, marks=[pytest.mark.compat] * (name in COMPAT)) for name in cells.FEATURES],
)
def test_a_way_of_training(mode, clipping, feature):
    cell = (mode, clipping, feature)
    if optimizers.OLD and (mode, feature) in UNKNOWN_BEFORE_1_6:
        pytest.skip("Opacus before 1.6 has no such way of training")
    found = cells.outcome(*cell)
    assert found == REFUSED.get(cell, "exact")
    PASSED[cell] = found


def test_the_table_in_the_docs_is_what_passed():
    missing = set(itertools.product(cells.MODES, cells.CLIPPINGS, cells.FEATURES)) - set(PASSED)
    if missing:
        pytest.skip("the table needs every cell of this file")
    text = cells.table(PASSED)
    if os.environ.get("WRITE_TABLES"):
        TABLE.write_text(text, encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8") == text, "run with WRITE_TABLES=1 to write it again"


@pytest.mark.parametrize("cell", [("hooks", "per_layer", "plain"), ("ew", "adaptive", "plain")])
def test_seeded_bug_norms_that_ignore_the_clipping_are_caught(cell, monkeypatch):
    """Per layer: clipped flat. Adaptive: the count for free."""
    monkeypatch.setattr(optimizers.TrackedPerLayerOptimizer, "factors", optimizers.TrackedOptimizer.factors)
    monkeypatch.setattr(optimizers.TrackedPerLayerOptimizer, "measure", optimizers.TrackedOptimizer.measure)
    monkeypatch.setattr(optimizers.TrackedAdaptiveOptimizer, "charged", lambda self, found, limits: found)
    assert cells.outcome(*cell).startswith("off by")


@pytest.mark.parametrize("mode", ["hooks", "ew"])
def test_seeded_bug_positions_of_another_batch_are_caught(mode, monkeypatch):
    from per_instance_accountant.opacus_adapter.capture import Tracker

    begin = Tracker.begin

    def shifted(self, batch):
        object.__setattr__(batch, "rows", (batch.rows + 1) % cells.COUNT)
        begin(self, batch)

    monkeypatch.setattr(Tracker, "begin", shifted)
    assert cells.outcome(mode, "flat", "plain") != "exact"


def test_a_cell_that_records_too_little_is_not_exact():
    loop = cells.Loop("hooks", "flat", cells.FEATURES["plain"])
    loop.train(1)
    honest = cells.worst_error(loop)
    assert honest <= cells.EXACT
    loop.taken = [{name: p * 1.001 for name, p in taken.items()} for taken in loop.taken]
    assert cells.worst_error(loop) > cells.EXACT
    assert np.isfinite(honest)
