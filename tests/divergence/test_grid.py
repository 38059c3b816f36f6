"""The sensitivity grid: exact weights, and a chord that is never below the value it replaces."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from per_instance_accountant.divergence import SensitivityGrid, sampled_gaussian_rdp
from per_instance_accountant.errors import UsageError

CHECKED = settings(max_examples=200, deadline=None, derandomize=True)
GRID = SensitivityGrid()
ORDERS = np.array([1.1, 1.5, 2.0, 3.7, 8.0, 63.0])
unit = st.one_of(
    st.floats(0, 1), st.floats(-60, 0).map(lambda x: 2.0**x), st.sampled_from(GRID.nodes.tolist())
)


def test_nodes() -> None:
    nodes = GRID.nodes
    expected = [0.0] + [2.0**-e * (1 + m / 16) for e in range(40, 0, -1) for m in range(16)] + [1.0]
    assert nodes.tolist() == expected
    assert SensitivityGrid(bits=0, octaves=2).nodes.tolist() == [0.0, 0.25, 0.5, 1.0]
    assert SensitivityGrid(bits=0, octaves=0).nodes.tolist() == [0.0, 1.0]


@CHECKED
@given(v=unit, bits=st.integers(0, 6), octaves=st.integers(0, 60))
def test_the_weight_reproduces_v_exactly(v: float, bits: int, octaves: int) -> None:
    grid = SensitivityGrid(bits=bits, octaves=octaves)
    lower, weight = grid.locate(v)
    low, high = Fraction(float(grid.nodes[lower])), Fraction(float(grid.nodes[lower + 1]))
    assert 0 <= weight <= 1
    assert low + Fraction(float(weight)) * (high - low) == Fraction(v)


Lookup = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]


def _chord(table: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
    lower, weight = GRID.locate(v)
    return (1 - weight)[:, None] * table[lower] + weight[:, None] * table[lower + 1]


def _nearest(table: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
    """Seeded bug: the value at the nearest node."""
    lower, weight = GRID.locate(v)
    return table[lower + (weight > 0.5)]


def _never_below(lookup: Lookup, q: float, noise: float) -> bool:
    table = sampled_gaussian_rdp(q, np.sqrt(GRID.nodes) / noise, ORDERS)
    rng = np.random.default_rng(3)
    v = np.concatenate([rng.uniform(0, 1, 200), 2 ** rng.uniform(-50, 0, 200)])
    return bool((lookup(table, v) >= sampled_gaussian_rdp(q, np.sqrt(v) / noise, ORDERS) * (1 - 3e-10)).all())


SETTINGS = [(0.001, 0.3), (0.02, 1.0), (0.5, 0.7), (0.99, 10.0), (1.0, 1.0)]


@pytest.mark.parametrize(("q", "noise"), SETTINGS)
def test_the_chord_is_an_upper_bound(q: float, noise: float) -> None:
    assert _never_below(_chord, q, noise)


def test_the_bound_catches_rounding_to_the_nearest_node() -> None:
    assert not any(_never_below(_nearest, q, noise) for q, noise in SETTINGS)


def test_the_chord_is_tight_and_exact_at_the_nodes() -> None:
    table = sampled_gaussian_rdp(0.02, np.sqrt(GRID.nodes), ORDERS)
    assert (_chord(table, GRID.nodes) == table).all()
    assert (_chord(table, np.array([1.0])) == sampled_gaussian_rdp(0.02, 1.0, ORDERS)).all()
    assert not _chord(table, np.array([0.0])).any()
    v = np.linspace(1e-3, 1, 500)
    excess = _chord(table, v) / sampled_gaussian_rdp(0.02, np.sqrt(v), ORDERS) - 1
    assert excess[:, ORDERS <= 8].max() < 0.05
    assert excess[:, ORDERS <= 8].mean() < 0.002


def test_shapes() -> None:
    lower, weight = GRID.locate(np.full((3, 2), 0.3, dtype=np.float32))
    assert lower.shape == weight.shape == (3, 2)
    assert lower.dtype == np.int64
    assert GRID.locate([])[0].shape == (0,)
    assert GRID.locate(-0.0)[0] == 0 and GRID.locate(-0.0)[1] == 0
    assert GRID.locate(np.asfortranarray([[0.0, 1.0], [0.5, 1.0]]))[0].tolist() == [[0, 640], [625, 640]]


@pytest.mark.parametrize("v", [math.nan, -1e-300, 1 + 2**-52, math.inf])
def test_bad_values(v: float) -> None:
    with pytest.raises(UsageError):
        GRID.locate([0.5, v])


@pytest.mark.parametrize("fields", [{"bits": -1}, {"bits": 1.5}, {"octaves": -1}, {"octaves": 2000}])
def test_bad_grids(fields: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        SensitivityGrid(**fields)
