"""Laws of what is printed: bounds stay bounds, NaN is never printed, cells are inert."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from per_instance_accountant.audit.rounding import rounded_up
from per_instance_accountant.cli.printing import Format, Page, Table, as_csv_cell, emit
from per_instance_accountant.errors import GuaranteeError

POSITIVE = st.floats(min_value=1e-300, max_value=1e300)
LAWS = settings(max_examples=300, deadline=None, derandomize=True)


def shown_bound_is_a_bound(show: Callable[[float], str], value: float) -> bool:
    return value <= float(show(value)) <= value * 1.0011


@LAWS
@given(POSITIVE)
def test_a_shown_bound_is_a_bound(value: float) -> None:
    assert shown_bound_is_a_bound(rounded_up, value)


def test_the_law_catches_rounding_to_nearest() -> None:
    """Seeded bug: the ordinary format shows a smaller number than the bound."""
    assert not shown_bound_is_a_bound(lambda value: f"{value:.4g}", 8.0263)


@pytest.mark.parametrize(("value", "shown"), [(0.0, "0"), (math.inf, "inf"), (1e-5, "1e-05"), (8.0, "8")])
def test_exact_values_stay(value: float, shown: str) -> None:
    assert rounded_up(value) == shown


@LAWS
@given(st.text())
def test_no_text_cell_starts_a_formula(text: str) -> None:
    cell = as_csv_cell(text)
    assert isinstance(cell, str)
    assert cell.endswith(text)
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))


@pytest.mark.parametrize("output_format", Format)
def test_nan_is_refused_and_nothing_is_written(
    output_format: Format, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"id": 1, "epsilon": 1.0}, {"id": 2, "epsilon": math.nan}]
    page = Page(head=["head"], tables=[Table.of(records)], document={"rows": records}, notes=["note"])
    with pytest.raises(GuaranteeError, match="PIA011"):
        emit(page, output_format)
    assert capsys.readouterr() == ("", "")


def test_infinity_is_valid_json(capsys: pytest.CaptureFixture[str]) -> None:
    emit(Page(head=[], tables=[], document={"epsilon": [1.5, math.inf]}), Format.JSON)
    assert json.loads(capsys.readouterr().out) == {"epsilon": [1.5, "inf"]}


def test_an_id_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    emit(Page(head=[], tables=[Table.of([{"id": "a\x1b[2J\r\nb"}])], document={}), Format.TABLE)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.count("\n") == 3
