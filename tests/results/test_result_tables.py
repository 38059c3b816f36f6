"""Results as tables: the same rows in every library, files that are safe, fragments that run nothing."""

from __future__ import annotations

import csv
import importlib
import io
import stat
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from per_instance_accountant import account, audit, plan
from per_instance_accountant.errors import MissingDependencyError, UsageError
from per_instance_accountant.ledger import LedgerWriter
from per_instance_accountant.ledger.records import Phase, Run, Step, Thresholds
from per_instance_accountant.results import Tabular
from per_instance_accountant.results.files import FORMULA_STARTS, csv_bytes, inert, write_private
from per_instance_accountant.results.markup import Markup, element, join, plain
from per_instance_accountant.unlearning import plan_everyone

IDS = np.array(["=SUM(A1)", "+1", "@x", "ann", "<script>", "f"])


def _results() -> dict[str, Tabular]:
    known = {"smoothness": 1.0, "clipping_never_binds": True, "individual_thresholds": True}
    writer = LedgerWriter.create(None, Run(num_instances=6, ids=IDS, groups={"g": IDS}, assumptions=known))
    writer.append(Thresholds(values=np.linspace(0, 1, 6, dtype=np.float32), source="fixed"))
    writer.append(
        Phase(
            kind="train",
            sampling="poisson",
            sample_rate=1.0,
            noise_std=4.0,
            max_grad_norm=1.0,
            charging="fixed_thresholds",
            denominator=4.0,
            learning_rate=0.1,
            weight_decay=0.5,
        )
    )
    for _ in range(20):
        writer.append(Step(positions=np.empty(0, np.int64), contributions=np.empty(0, np.float32)))
    ledger = writer.ledger()
    return {
        "audit": audit(ledger),
        "loss": account(ledger, orders=[2.0, 8.0]),
        "plan": plan(ledger, ids=["ann", "=SUM(A1)"], target_epsilon=0.05, order=8),
        "everyone": plan_everyone(ledger, 0.05, order=8),
    }


RESULTS = _results()
every = pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)


@every
def test_every_library_reads_the_same_rows(result: Any) -> None:
    table = result.to_arrow()
    assert table.num_rows == (2 if result is RESULTS["plan"] else 6)
    assert pa.table(result) == table
    assert result.to_polars().equals(pl.from_arrow(table)) and pl.DataFrame(result).shape == table.shape
    pd.testing.assert_frame_equal(result.to_pandas(), table.to_pandas())
    assert duckdb.sql("select count(*) from result").fetchall() == [(table.num_rows,)]


@every
def test_files_are_private_and_exact(result: Any, tmp_path: Path) -> None:
    table = result.to_arrow()
    for name in ("rows.csv", "rows.parquet"):
        (tmp_path / name).write_text("old")
        (tmp_path / name).chmod(0o666)
    result.to_csv(tmp_path / "rows.csv")
    result.to_parquet(tmp_path / "rows.parquet")
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    assert pq.read_table(tmp_path / "rows.parquet") == table
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert not any(cell.startswith(FORMULA_STARTS) for row in rows for cell in row.values())
    assert [row["id"].removeprefix("'") for row in rows] == table["id"].to_pylist()
    number = next(name for name in table.column_names if name.startswith(("epsilon", "rdp_8")))
    assert [float(row[number]) for row in rows] == table[number].to_pylist()


@every
def test_fragments_hold_no_script_and_no_id(result: Any) -> None:
    fragment = result._repr_html_()
    assert fragment.startswith("<table><caption>") and fragment.endswith("</table>")
    for word in ("<script", "style=", "onclick", "http", "ann<", "SUM"):
        assert word not in fragment


@every
def test_pictures_are_figures(result: Any, tmp_path: Path) -> None:
    from matplotlib import figure

    picture = result.plot()
    assert isinstance(picture, figure.Figure) and len(picture.axes) == 1
    picture.savefig(tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").stat().st_size > 5_000


def test_unreachable_steps_are_null_and_not_a_number() -> None:
    everyone: Any = RESULTS["everyone"]
    steps = everyone.to_arrow()["steps"]
    assert [value is None for value in steps.to_pylist()] == (~np.isfinite(everyone.steps)).tolist()
    assert steps.type == pa.int64() and "EveryoneSteps: 6 instances" in repr(everyone)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, *rest: Any) -> Any:
        if name in ("pandas", "polars"):
            raise ModuleNotFoundError(name=name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    for call in (RESULTS["audit"].to_pandas, RESULTS["audit"].to_polars):
        with pytest.raises(MissingDependencyError, match="PIA061"):
            call()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.text(max_size=8), st.floats(allow_nan=False)), min_size=1, max_size=5))
def test_csv_cells_never_start_a_formula(rows: list[tuple[str, float]]) -> None:
    text = csv_bytes(["=name", "value"], rows).decode()
    read = list(csv.reader(io.StringIO(text, newline="")))
    assert read[0][0] == "'=name"
    for (name, value), (cell, number) in zip(rows, read[1:], strict=True):
        assert not cell.startswith(FORMULA_STARTS) and float(number) == value
        assert cell in (name, "'" + name)


def test_the_csv_law_sees_cells_that_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert inert("=1") == "'=1" and inert(-1) == -1
    monkeypatch.setattr("per_instance_accountant.results.files.inert", lambda cell: cell)
    assert csv_bytes(["a"], [["=1"]]).decode().splitlines()[1].startswith(FORMULA_STARTS)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=12), st.text(max_size=12))
def test_text_never_becomes_markup(text: str, value: str) -> None:
    inner = element("p", text, title=value)[len("<p title=") : -len("</p>")]
    assert inner.count('"') == 2 and inner.count("<") == 0 and inner.count(">") == 1
    assert join(Markup("<br/>"), text).startswith("<br/>") and plain(plain(text)) == plain(text)


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "kept"
    target.write_bytes(b"old")

    def broken(*_: object) -> None:
        raise OSError("full")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="full"):
        write_private(target, b"new")
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]
    monkeypatch.undo()
    link = tmp_path / "link"
    link.symlink_to(target)
    write_private(link, b"new")
    assert not link.is_symlink() and target.read_bytes() == b"old"
    with pytest.raises(UsageError, match="PIA070"):
        write_private("/dev/null", b"")
    with pytest.raises(FileNotFoundError):
        write_private(tmp_path / "missing" / "file", b"")
