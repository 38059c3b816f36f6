"""Rare sampling: small losses and jumps on lines of their own, never below the truth, and close to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mpmath as mp
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld

from per_instance_accountant.divergence import (
    jump_tables,
    jumps,
    parted,
    sampled_gaussian_delta,
    sampled_gaussian_epsilon,
)

RARE = [
    (1e-3, [1.0], [100], 1e-9),
    (1e-3, [1.0, 0.5], [200, 200], 1e-8),
    (1e-3, [2.0], [400], 1e-8),
    (1e-4, [4.0], [100], 1e-8),
    (2e-3, [0.7], [200], 1e-5),
    (1e-4, [0.5], [400], 1e-9),
    (1e-4, [1.0, 0.2], [20, 300], 1e-7),
    (1e-5, [1.0], [2000], 1e-9),
    (1e-3, [0.25], [2], 1e-9),
    (1e-3, [1.0], [1600], 1e-8),
]
"""Expected draws from 0.002 to 1.6; epsilons from 1e-3 to 20."""
ONE_STEP = [
    (1e-3, 1.0, 0.5),
    (0.02, 2.0, 1.5),
    (0.3, 1.3, 0.4),
    (1e-4, 3.0, 4.0),
    (0.05, 0.8, 0.3),
    (1e-5, 5.0, 9.0),
    (1e-4, 0.5, 5e-4),
]
NOTHING = np.zeros(1)


def by_pld(case: tuple[float, list[float], list[int], float], ours: float, *, above: bool) -> float:
    rate, ratios, counts, delta = case
    total = None
    for ratio, count in zip(ratios, counts, strict=True):
        part = pld.from_gaussian_mechanism(
            1 / ratio,
            sampling_prob=rate,
            value_discretization_interval=min(1e-4, ours / 300),
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
    levels = np.array([rate]), np.array([ratio])
    value, tight = jumps.parted_deltas(np.ones((1, 1)), levels, epsilon, NOTHING, add=False)
    return float(value[0]), bool(tight[0])


@pytest.mark.parametrize("case", RARE)
def test_lies_inside_the_error_bars_of_dp_accounting(
    case: tuple[float, list[float], list[int], float],
) -> None:
    rate, ratios, counts, delta = case
    ours = sampled_gaussian_epsilon(rate, ratios, counts, delta)
    room = 5e-5 + 1e-6 * ours
    assert by_pld(case, ours, above=False) * (1 - 1e-9) <= ours <= by_pld(case, ours, above=True) + room
    assert sampled_gaussian_delta(rate, ratios, counts, ours * 0.99) > delta


@pytest.mark.parametrize("add", [False, True])
def test_both_directions_against_dp_accounting(add: bool) -> None:
    """Small ratios: both directions are about as large, and each has a value of its own."""
    rate, ratio, count, delta = 1e-3, 0.25, 200, 1e-6
    levels = np.array([rate]), np.array([ratio])
    ours, tight = jumps.parted_epsilons(np.array([[count]]), levels, math.log(delta), NOTHING, add=add)
    reference = []
    for above in (False, True):
        one = pld.from_gaussian_mechanism(
            1 / ratio,
            sampling_prob=rate,
            value_discretization_interval=1e-5,
            use_connect_dots=above,
            pessimistic_estimate=above,
        ).self_compose(count)
        side = one._pmf_add if add else one._pmf_remove
        reference.append(float(side.get_epsilon_for_delta(delta)))
    assert reference[0] <= ours[0] <= reference[1] + 3e-5 and tight[0]


@pytest.mark.parametrize("case", ONE_STEP)
def test_one_step_against_its_closed_form(case: tuple[float, float, float]) -> None:
    exact = one_step(*case)
    ours, tight = solved(*case)
    assert exact * (1 - 1e-12) <= ours <= exact * (1 + (3e-3 if case[2] > 0.1 else 0.02))
    assert tight


def forget() -> None:
    """Nothing that was made before."""
    jump_tables._recent.clear()
    jump_tables.beyond.cache_clear()


def assert_never_below_one_step() -> None:
    forget()
    for case in ONE_STEP:
        assert solved(*case)[0] >= one_step(*case) * (1 - 1e-12), "below the truth"


def without_truncation(patch: pytest.MonkeyPatch) -> None:
    """Few nodes, no Gaussian step, and what lies beyond the nodes is forgotten."""
    patch.setattr(parted, "_NODES", np.full(10, 16))
    patch.setattr(parted, "_blur", lambda *given: np.float64(0.0))
    patch.setattr(parted, "_truncated", lambda *given: 0.0)


def without_the_mass_beyond(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(parted, "beyond", lambda part: 0.0)
    patch.setattr(jumps, "_BEYOND_TOP", 1.0)


def without_jumps(patch: pytest.MonkeyPatch) -> None:
    def rest_only(self: parted.Runs, *given: Any, total: Any = parted.Runs.total) -> parted.Total:
        found = total(self, *given)
        return replace(found, tails=found.tails[:-1], moments=found.moments[:-1])

    patch.setattr(parted.Runs, "total", rest_only)


@pytest.mark.parametrize("bug", [without_truncation, without_the_mass_beyond, without_jumps])
def test_law_catches_what_is_not_added(bug: Callable[[pytest.MonkeyPatch], None]) -> None:
    assert_never_below_one_step()
    with pytest.MonkeyPatch.context() as patch:
        bug(patch)
        with pytest.raises(AssertionError, match="below the truth"):
            assert_never_below_one_step()
    forget()


def test_few_nodes_cost_tightness_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parted, "_NODES", np.full(10, 16))
    assert_never_below_one_step()
    forget()


@pytest.mark.parametrize("jump", [False, True])
def test_transforms_equal_their_sums(jump: bool) -> None:
    part = jump_tables.Part(rate=1e-3, ratio=1.5, low=0.01, top=4.0, add=False, jumps=jump)
    c, spacing, count = 2.0, 0.7, 64
    line = jump_tables.tabulate_parts(part, c, spacing, count)
    s = c + 1j * spacing * np.arange(count)

    def exactly(one: jump_tables.Part) -> np.ndarray:
        loss, mass = one.dots(1)
        with mp.workdps(30):
            pairs = [(mp.mpf(x), mp.mpf(p)) for x, p in zip(loss, mass, strict=True) if p > 0]
            terms = [sum(p * mp.exp(mp.mpc(v.real, v.imag) * x) for x, p in pairs) for v in s[::21]]
        return np.array([complex(term) for term in terms])

    rest = exactly(jump_tables.Part(rate=1e-3, ratio=1.5, low=0.01, top=4.0, add=False, jumps=False))
    ours = np.exp(line.rest[::21] + line.base)
    assert (np.abs(ours - rest) <= line.error_rest * np.exp(line.base)).all() and line.error_rest < 1e-11
    if jump:
        assert line.jumps is not None
        jumped = exactly(part)
        assert (np.abs(ours * np.expm1(line.jumps[::21]) - jumped) <= 1e-11 * abs(jumped[0])).all()


@pytest.mark.parametrize(
    ("rate", "ratio", "count", "delta", "exact"),
    [
        # The first guess is far from epsilon, where other lines hold: by the whole law, or exact.
        (1e-3, 24.58, 100, 1e-6, 1531.9),
        (0.01, 0.3, 2, 1e-5, 0.0145001),
        # So small a ratio that no step loses 1.
        (1e-4, 0.0125, 2000, 1e-7, 1.4e-4),
    ],
)
def test_no_bound_is_called_tight_for_a_line_that_does_not_fit(
    rate: float, ratio: float, count: int, delta: float, exact: float
) -> None:
    ours = sampled_gaussian_epsilon(rate, [ratio], [count], delta)
    assert 0.99 * exact <= ours <= exact * 1.02


def test_other_runs_do_not_loosen_a_run() -> None:
    """A level without tables, a ratio beyond all contours, other cuts: the business of who uses them."""
    alone = sampled_gaussian_epsilon([1.07e-4, 1.77e-6], [0.18, 10.0], [[0, 1]], 1.5e-6)
    beside = sampled_gaussian_epsilon([1.07e-4, 1.77e-6], [0.18, 10.0], [[1, 1], [0, 1]], 1.5e-6)
    assert beside[1] == pytest.approx(alone[0], rel=1e-5) and 20 < alone[0] < 30
    one = sampled_gaussian_epsilon(1e-3, [1.0], [100], 1e-5)
    both = sampled_gaussian_epsilon(1e-3, [1.0, 61.0], [[100, 0], [0, 1]], 1e-5)
    assert both[0] == pytest.approx(one, rel=1e-5)


def test_many_levels_of_rare_sampling_are_tight() -> None:
    """Forty levels at an expected half a draw: no run keeps the conversion of its Renyi curve."""
    ratios = np.geomspace(0.05, 2.0, 40)
    counts = np.random.default_rng(0).multinomial(500, np.full(40, 1 / 40), 12).astype(float)
    levels = np.full(40, 1e-3), ratios
    for log_delta in (math.log(1e-5), math.log(1e-9)):
        value, tight = jumps.parted_epsilons(counts, levels, log_delta, np.zeros(12), add=False)
        assert tight.all() and np.isfinite(value).all()
