"""The discrete pair of one step: it dominates the step, coarse dots dominate fine ones, little is lost."""

from __future__ import annotations

import mpmath as mp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from per_instance_accountant.divergence import dots
from per_instance_accountant.divergence.jump_tables import RUNGS, Part, log_moments

STEPS = {
    "rate": st.floats(-7, -0.05).map(lambda power: 10.0**power),
    "ratio": st.floats(-2, 1).map(lambda power: 10.0**power),
    "share": st.floats(0.02, 0.98),
}


def exact(rate: float, ratio: float, epsilon: float, *, add: bool) -> float:
    """delta of one step in one direction, at 40 digits, by the one point where the hockey stick is cut."""
    with mp.workdps(40):
        q, a, e = mp.mpf(rate), mp.mpf(ratio), mp.mpf(epsilon)
        z = mp.log1p(mp.expm1(-e if add else e) / q) / a + a / 2
        plain, moved = (mp.ncdf(z), mp.ncdf(z - a)) if add else (mp.ncdf(-z), mp.ncdf(a - z))
        mixed = (1 - q) * plain + q * moved
        return float(plain - mp.exp(e) * mixed if add else mixed - mp.exp(e) * plain)


def hockey_stick(found: dots.Dots, epsilon: float) -> float:
    loss, mass = found.part(0, found.masses.shape[1])
    return float(mass @ np.maximum(-np.expm1(epsilon - loss), 0.0)) + found.beyond


def made(rate: float, ratio: float, top: float, cells: int, *, add: bool) -> dots.Dots:
    return dots.addition(rate, ratio, cells) if add else dots.removal(rate, ratio, top, cells)


def assert_dominates(rate: float, ratio: float, share: float) -> None:
    for add in (False, True):
        epsilon = share * float(-np.log1p(-rate) if add else np.log1p(rate * np.expm1(4 * ratio)))
        truth = exact(rate, ratio, epsilon, add=add)
        for cells in (1, dots.COARSE):
            found = made(rate, ratio, 8 * epsilon, cells, add=add)
            assert hockey_stick(found, epsilon) >= truth * (1 - 1e-13), "below the truth"
            assert (np.diff(found.losses) >= -1e-14).all() and (found.masses >= 0).all()


@settings(max_examples=60, phases=[Phase.generate], deadline=None, derandomize=True)
@given(**STEPS)
def test_dots_dominate_the_step(rate: float, ratio: float, share: float) -> None:
    assert_dominates(rate, ratio, share)


@pytest.mark.parametrize("end", [0, 1])
def test_law_catches_mass_at_one_end_only(monkeypatch: pytest.MonkeyPatch, end: int) -> None:
    """All of it at the lower end is below the truth; all of it at the upper end is a poor bound."""

    def shared(upper: np.ndarray, total: np.ndarray) -> np.ndarray:
        return np.stack([total, 0 * total] if end == 0 else [0 * total, total])

    monkeypatch.setattr(dots, "_shared", shared)
    case = 1e-3, 1.0, 0.3
    for cached in (dots.removal, dots.addition):
        cached.cache_clear()
    try:
        if end == 0:
            with pytest.raises(AssertionError, match="below the truth"):
                assert_dominates(*case)
        else:
            assert_dominates(*case)
            poor = hockey_stick(dots.removal(1e-3, 1.0, 0.5, 1), 0.05)
            assert poor > exact(1e-3, 1.0, 0.05, add=False) * 1.01
    finally:
        for cached in (dots.removal, dots.addition):
            cached.cache_clear()


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("case", [(1e-4, 0.5), (1e-3, 2.0), (0.2, 1.0), (1e-5, 0.05)])
def test_both_laws_keep_their_mass(case: tuple[float, float], add: bool) -> None:
    found = made(*case, 40.0, 1, add=add)
    loss, mass = found.part(0, found.masses.shape[1])
    assert 1 <= mass.sum() + found.beyond <= 1 + 1e-11
    # Raised losses take a little from the other law.
    assert 1 - 1e-6 <= mass @ np.exp(-loss) <= 1 + 1e-11


def test_little_is_lost() -> None:
    for rate, ratio, epsilon in [(1e-3, 1.0, 0.004), (0.1, 0.5, 0.1), (1e-2, 3.0, 2.0)]:
        truth = exact(rate, ratio, epsilon, add=False)
        ours = hockey_stick(dots.removal(rate, ratio, 20.0, 1), epsilon)
        assert truth <= ours <= truth * (1 + 3e-4)


@settings(max_examples=20, phases=[Phase.generate], deadline=None, derandomize=True)
@given(**STEPS)
def test_coarse_moments_are_above_those_of_the_fine_parts(rate: float, ratio: float, share: float) -> None:
    low = float(np.log1p(rate * np.expm1(4 * ratio))) * share
    for jumps in (False, True):
        part = Part(rate=rate, ratio=ratio, low=low, top=8 * low, add=False, jumps=jumps)
        loss, mass = part.dots(1)
        value = RUNGS[:, None] * loss[mass > 0] + np.log(mass[mass > 0])
        fine = np.logaddexp.reduce(value, axis=1) if value.size else np.full(RUNGS.size, -np.inf)
        assert (log_moments(part) >= fine - 1e-12 * np.abs(fine)).all()


def test_the_cells_of_both_parts_are_all_cells() -> None:
    rest, jumps = (
        Part(rate=1e-3, ratio=1.0, low=0.01, top=1.0, add=False, jumps=which).dots(1)
        for which in (False, True)
    )
    whole = dots.removal(1e-3, 1.0, 1.0, 1)
    loss, mass = whole.part(0, whole.masses.shape[1])
    assert rest[0][-1] == jumps[0][0] and 0.01 <= rest[0][-1] <= 0.02
    np.testing.assert_array_equal(np.concatenate([rest[0], jumps[0][1:]]), loss)
    np.testing.assert_allclose(rest[1].sum() + jumps[1].sum(), mass.sum(), rtol=1e-14)
