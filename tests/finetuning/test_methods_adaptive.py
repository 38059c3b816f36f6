"""Work divided by privacy loss: sums and order are kept, nothing is read off where nothing was measured."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from per_instance_accountant.errors import UsageError
from per_instance_accountant.finetuning.methods import (
    adversarial_counts,
    calibrate,
    requests_by_loss,
    steps_for,
)

LOSSES = st.lists(st.floats(0, 1e12), min_size=1, max_size=30)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(losses=LOSSES, spare=st.integers(0, 500), least=st.integers(0, 3))
def test_counts_add_up_and_follow_the_loss(losses: list[float], spare: int, least: int) -> None:
    total = least * len(losses) + spare
    counts = adversarial_counts(losses, total, least)
    assert counts.sum() == total and counts.min() >= least
    order = np.argsort(losses, kind="stable")
    assert (np.diff(counts[order]) >= -1).all()
    assert np.array_equal(counts, adversarial_counts(np.array(losses) * 2, total, least))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(losses=LOSSES, share=st.floats(0.01, 1))
def test_requests_cover_everybody_once_in_order(losses: list[float], share: float) -> None:
    number = max(1, int(share * len(losses)))
    for first, sign in (("low", 1), ("high", -1)):
        parts = requests_by_loss(losses, number, first)  # type: ignore[arg-type]
        order = np.concatenate(parts)
        assert len(parts) == number and sorted(order) == list(range(len(losses)))
        assert (np.diff(sign * np.array(losses)[order]) >= 0).all()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), tolerance=st.floats(0.05, 0.5))
def test_calibrated_steps_hold_where_they_were_measured(seed: int, tolerance: float) -> None:
    rng = np.random.default_rng(seed)
    at = np.array([0, 5, 20, 80])
    gaps = rng.random((6, 4)) * np.array([1, 1, 1, 0.0])
    losses = np.sort(rng.random(6)) + np.arange(6)
    steps = steps_for(losses, calibrate(losses, gaps, at, tolerance))
    assert (np.diff(steps) >= 0).all()
    for row, chosen in zip(gaps, steps, strict=True):
        assert (row[at >= chosen] <= tolerance).all()
    between = (losses[:-1] + losses[1:]) / 2
    assert np.array_equal(steps_for(between, calibrate(losses, gaps, at, tolerance)), steps[1:])


def test_nothing_is_invented() -> None:
    calibration = calibrate([1.0, 2.0], [[0.0, 0.0], [1.0, 0.0]], [0, 10], 0.1)
    with pytest.raises(UsageError, match="1 losses lie above"):
        steps_for([1.0, 2.1], calibration)
    with pytest.raises(UsageError, match="1 requests are not within"):
        calibrate([1.0, 2.0], [[0.0, 0.0], [1.0, 0.2]], [0, 10], 0.1)
    with pytest.raises(UsageError, match="PIA070"):
        calibrate([1.0], [[math.nan]], [0], 0.1)
    for losses in ([math.nan], [-1.0], [math.inf], []):
        with pytest.raises(UsageError, match="PIA070"):
            adversarial_counts(losses, 20)
    with pytest.raises(UsageError, match="fewer than"):
        adversarial_counts([1.0, 2.0], 1)
