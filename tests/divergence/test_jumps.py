"""Rare sampling: the runs with a jump apart from the others, never below the truth, and close."""

from __future__ import annotations

import math

import mpmath as mp
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld

from per_instance_accountant.divergence import (
    contour,
    jump_tables,
    jumps,
    sampled_gaussian_delta,
    sampled_gaussian_epsilon,
)

RARE = [
    (1e-3, [1.0], [100], 1e-9),
    (1e-3, [1.0, 0.5], [200, 200], 1e-8),
    (1e-3, [2.0], [400], 1e-8),
    (1e-4, [4.0], [100], 1e-8),
    (2e-3, [0.7], [200], 1e-5),
]
"""Expected draws from 0.01 to 0.6."""
ONE_STEP = [
    (1e-3, 1.0, 0.5),
    (0.02, 2.0, 1.5),
    (0.3, 1.3, 0.4),
    (1e-4, 3.0, 4.0),
    (0.05, 0.8, 0.3),
    (1e-5, 5.0, 9.0),
]


def by_pld(case: tuple[float, list[float], list[int], float], *, above: bool) -> float:
    rate, ratios, counts, delta = case
    total = None
    for ratio, count in zip(ratios, counts, strict=True):
        part = pld.from_gaussian_mechanism(
            1 / ratio,
            sampling_prob=rate,
            value_discretization_interval=1e-4,
            use_connect_dots=above,
            pessimistic_estimate=above,
        ).self_compose(count)
        total = part if total is None else total.compose(part)
    return float(total.get_epsilon_for_delta(delta))


def one_step(rate: float, ratio: float, epsilon: float) -> float:
    """Exact delta of "remove" at 40 digits."""
    with mp.workdps(40):
        q, a, e = mp.mpf(rate), mp.mpf(ratio), mp.exp(mp.mpf(epsilon))
        z = mp.log((e - 1) / q + 1) / a + a / 2
        p0, p1 = mp.erfc(z / mp.sqrt(2)) / 2, mp.erfc((z - a) / mp.sqrt(2)) / 2
        return float((1 - q) * p0 + q * p1 - e * p0)


def solved(rate: float, ratio: float, epsilon: float) -> tuple[float, bool]:
    value, tight = jumps.jump_deltas(np.ones((1, 1)), (np.array([rate]), np.array([ratio])), epsilon)
    return float(value[0]), bool(tight[0])


@pytest.mark.parametrize("case", RARE)
def test_lies_inside_the_error_bars_of_dp_accounting(
    case: tuple[float, list[float], list[int], float],
) -> None:
    rate, ratios, counts, delta = case
    ours = sampled_gaussian_epsilon(rate, ratios, counts, delta)
    assert by_pld(case, above=False) * (1 - 1e-9) <= ours <= by_pld(case, above=True) + 2e-4
    assert sampled_gaussian_delta(rate, ratios, counts, ours * 0.99) > delta


@pytest.mark.parametrize("case", ONE_STEP)
def test_one_step_against_its_closed_form(case: tuple[float, float, float]) -> None:
    exact = one_step(*case)
    ours, tight = solved(*case)
    assert exact * (1 - 1e-12) <= ours <= exact * (1 + 1e-3)
    assert tight


def assert_never_below_one_step() -> None:
    for case in ONE_STEP:
        assert solved(*case)[0] >= one_step(*case) * (1 - 1e-12), "below the truth"


def test_law_catches_a_truncation_that_is_not_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jumps, "_NODES", (16, 16, 16, 16))
    jump_tables.tabulate_parts.cache_clear()
    assert_never_below_one_step()
    bound = jump_tables._beyond
    monkeypatch.setattr(jump_tables, "_beyond", lambda *given: np.full_like(bound(*given), -np.inf))
    jump_tables.tabulate_parts.cache_clear()
    try:
        with pytest.raises(AssertionError, match="below the truth"):
            assert_never_below_one_step()
    finally:
        jump_tables.tabulate_parts.cache_clear()


def test_both_parts_add_up_to_the_whole_law() -> None:
    q, a, c, spacing = np.array([1e-3, 0.1]), np.array([1.5, 0.9]), 2.0, 0.3
    parts = jump_tables.tabulate_parts(q.tobytes(), a.tobytes(), 1.0, c, spacing, 1024)
    line = contour.tabulate(q, a, c, spacing, 1024, add=False)
    ours = np.exp(parts.rest + parts.base[:, None]) * (1 + parts.quotient)
    theirs = np.exp(line.log_moment)
    room = (parts.error + line.error) * theirs[:, 0].real
    assert (np.abs(ours - theirs) <= room[:, None]).all()
    assert parts.error.max() < 1e-10 and (np.abs(parts.quotient[:, 0]) > 1e-9).all()


def test_the_jumps_decay_as_stated() -> None:
    q, a, c, spacing = np.array([1e-3, 0.1]), np.array([1.5, 0.9]), 2.0, 0.3
    few = jump_tables.tabulate_parts(q.tobytes(), a.tobytes(), 1.0, c, spacing, 64)
    many = jump_tables.tabulate_parts(q.tobytes(), a.tobytes(), 1.0, c, spacing, 4096)
    jump = np.abs(np.exp(many.rest) * many.quotient)
    edges = 64 * jump_tables.EDGES[:9]
    for j, edge in enumerate(edges):
        beyond = jump[:, math.ceil(edge) :].max(axis=1)
        assert (beyond <= few.beyond[:, j] + many.error * jump[:, 0]).all()
    assert (few.beyond[:, 8] < 1e-9).all() and (few.beyond[:, 0] < jump[:, 0]).all()
