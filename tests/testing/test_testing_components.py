"""Component checks: quiet on correct parts as often as promised, and each notices its seeded mistake."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from per_instance_accountant.errors import UsageError
from per_instance_accountant.testing.components import (
    ComponentFault,
    check_clipping,
    check_loading_runs_no_code,
    check_neighbours_release_alike,
    check_noise,
    check_noise_is_fresh,
    check_norms_agree,
    check_ranks_draw_apart,
    draws_for,
)


def random(seed=0):
    return np.random.default_rng(seed)


def accused(check, *arguments, **options):
    try:
        check(*arguments, **options)
    except ComponentFault:
        return True
    return False


# ------------------------------------------------------------------------------------ noise


def test_a_deficit_of_one_percent_is_found():
    draws = draws_for(0.01)
    rows = random().normal(0, 0.99 * 1.7, (20, draws))
    assert all(accused(check_noise, row, 1.7) for row in rows)
    with pytest.raises(ComponentFault, match=r"0\.99\d\d of the one claimed \(p = .*e-"):
        check_noise(rows[0], 1.7)


def test_the_power_is_the_one_that_was_asked_for():
    """At a looser level the misses are frequent enough to be counted."""
    draws = draws_for(0.1, level=0.01 / 3, power=0.8)
    missed = sum(
        not accused(check_noise, random(s).normal(0, 0.9, draws), 1.0, level=0.01) for s in range(400)
    )
    assert binom.ppf(1e-4, 400, 0.2) <= missed <= binom.ppf(1 - 1e-4, 400, 0.2)


def test_correct_noise_is_accused_as_often_as_the_level_says():
    level, trials = 0.05, 2000
    alarms = sum(accused(check_noise, random(s).normal(0, 3, 400), 3.0, level=level) for s in range(trials))
    assert 0.3 * level * trials <= alarms <= binom.ppf(1 - 1e-5, trials, level)
    assert not any(accused(check_noise, random(s).normal(0, 3, 20_000), 3.0) for s in range(50))


@pytest.mark.parametrize(
    "draws",
    [
        lambda r, n: r.choice([-1.0, 1.0], n),
        lambda r, n: r.uniform(-math.sqrt(3), math.sqrt(3), n),
        lambda r, n: r.normal(0.05, 1, n),
        lambda r, n: np.where(r.random(n) < 0.5, 0.0, r.normal(0, math.sqrt(2), n)),
        lambda r, n: np.where(np.arange(n) == 7, np.nan, r.normal(size=n)),
        lambda r, n: np.zeros(n),
    ],
    ids=["signs", "uniform", "shifted", "half without noise", "a NaN", "none"],
)
def test_other_laws_of_the_same_std_are_found(draws):
    with pytest.raises(ComponentFault):
        check_noise(draws(random(), 50_000), 1.0)


def test_more_noise_than_claimed_is_no_fault():
    assert check_noise(random().normal(0, 1.5, 10_000), 1.0) > 1e-6


def test_noise_that_was_drawn_twice_is_found():
    rows = random().normal(size=(6, 2000))
    assert check_noise_is_fresh(rows) > 1e-3
    for bad in (
        np.vstack([rows, rows[2]]),
        np.vstack([rows, -rows[0]]),
        np.vstack([rows, 0.2 * rows[1] + math.sqrt(0.96) * random(1).normal(size=2000)]),
    ):
        with pytest.raises(ComponentFault, match="correlation"):
            check_noise_is_fresh(bad)
    alarms = sum(
        accused(check_noise_is_fresh, random(s).normal(size=(4, 150)), level=0.05) for s in range(1000)
    )
    assert alarms <= binom.ppf(1 - 1e-5, 1000, 0.05)


def test_a_seed_that_a_resume_sets_again_is_found():
    before, after = random(3).normal(size=(3, 500)), random(3).normal(size=(3, 500))
    with pytest.raises(ComponentFault):
        check_noise_is_fresh(np.vstack([before, after]))


# ------------------------------------------------------------------------------------ clipping and norms


def test_norms_are_taken_in_float64():
    """In bfloat16 a clipped gradient exceeds its threshold by 3e-3, and sums of float32 hide it."""
    torch = pytest.importorskip("torch")
    gradient = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    low = gradient.bfloat16()
    clipped = low * (1.0 / low.norm(dim=1, keepdim=True))
    with pytest.raises(ComponentFault, match="norms exceed"):
        check_clipping(clipped.double().numpy(), 1.0)
    exact = gradient.double() / gradient.double().norm(dim=1, keepdim=True)
    assert check_clipping(exact.numpy(), 1.0) == pytest.approx(1.0, rel=1e-12)


def test_clipping_faults():
    rows = np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert check_clipping(rows, [5.0, 1.0, 0.0]) == 1.0
    for bad, limits in [(rows, 4.99), (rows, [5.0, 0.4, 0.0]), (rows + np.nan, 9.0), (rows, [5.0, 0.0, 0.0])]:
        with pytest.raises(ComponentFault):
            check_clipping(bad, limits)
    with pytest.raises(ComponentFault, match="1 of 3 norms exceed"):
        check_clipping(rows, [5.0 * (1 - 2e-6), 1.0, 1.0])


def test_norms_that_disagree():
    exact = np.array([1.0, 2.0, 0.5])
    assert check_norms_agree(exact * (1 + 5e-5), exact) == pytest.approx(5e-5, rel=1e-6)
    for bad in (exact * 0.999, exact[:2], np.array([1.0, np.nan, 0.5]), exact[:0]):
        with pytest.raises(ComponentFault):
            check_norms_agree(bad, exact)


# ------------------------------------------------------------------------------------ neighbours and files


def test_a_scale_that_counts_the_data_is_found():
    def counted(size):
        return {"denominator": float(int(size * 0.1)), "sample_rate": 1 / math.ceil(size / 10)}

    check_neighbours_release_alike(lambda size: {"denominator": 10.0, "sample_rate": 0.1}, 99)
    for size in (99, 100, 101):
        with pytest.raises(ComponentFault, match="instances and"):
            check_neighbours_release_alike(counted, size)
    with pytest.raises(ComponentFault, match="nan"):
        check_neighbours_release_alike(lambda size: {"noise": math.nan}, 10)
    with pytest.raises(ComponentFault, match="None"):
        check_neighbours_release_alike(lambda size: {"a": 1.0} if size > 9 else {}, 10)


def test_ranks_of_one_seed_are_found():
    apart = np.stack([random(rank).random(3000) < 0.05 for rank in range(4)])
    assert check_ranks_draw_apart(apart) > 1e-3
    with pytest.raises(ComponentFault, match=r"correlation 1\.000"):
        check_ranks_draw_apart(np.stack([apart[0], apart[1], apart[0]]))
    with pytest.raises(UsageError):
        check_ranks_draw_apart(np.zeros((2, 500), dtype=bool))


def test_code_in_files():
    def careless(path: Path):
        with path.open("rb") as file:
            return pickle.load(file)

    with pytest.raises(ComponentFault, match=r"code of the file was run$"):
        check_loading_runs_no_code(careless)

    def late(path: Path):
        careless(path)
        raise ValueError("this is no checkpoint")

    with pytest.raises(ComponentFault, match="before it raised ValueError"):
        check_loading_runs_no_code(late)

    def careful(path: Path):
        raise ValueError("no file of this kind is read")

    check_loading_runs_no_code(careful)


@pytest.mark.parametrize(
    ("check", "arguments"),
    [
        (check_noise, ([1.0], 1.0)),
        (check_noise, ([1.0, 2.0], math.nan)),
        (check_noise_is_fresh, (np.ones(200),)),
        (check_noise_is_fresh, (np.ones((2, 5)),)),
        (draws_for, (0.0,)),
    ],
)
def test_nothing_is_checked_in_silence(check, arguments):
    with pytest.raises(UsageError, match="Nothing was checked"):
        check(*arguments)
