"""Audits of whole simulated runs: never above a true claim, above a false one, and the auditor is audited."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from per_instance_accountant.errors import UsageError
from per_instance_accountant.testing import audits
from per_instance_accountant.testing.audits import CanaryRun, audit_run, epsilon_below, scores

RUN = CanaryRun(steps=20, sample_rate=0.2, noise_multiplier=1.0)
RUNS = 200
TIGHT = 0.05
"""A delta at which the best attack meets the exact epsilon, so that a careless bound lies above it."""


def lows(run: CanaryRun, runs: int, *, confidence: float, trials: int = 3000, delta: float = TIGHT):
    return np.array(
        [audit_run(run, delta, trials=trials, seed=s, confidence=confidence)[0] for s in range(runs)]
    )


def test_two_hundred_of_two_hundred_lower_bounds_lie_below_the_claim():
    found = lows(RUN, RUNS, confidence=1 - 1e-3 / RUNS)
    assert int((found <= RUN.claim(TIGHT)).sum()) == RUNS
    assert np.median(found) > 0.3 * RUN.claim(TIGHT)


def test_the_confidence_is_the_one_that_was_stated():
    """At a confidence of one half, at most half of the bounds lie above the exact epsilon."""
    found = lows(RUN, RUNS, confidence=0.5, trials=1000)
    above = int((found > RUN.claim(TIGHT)).sum())
    assert 0 < above <= binom.ppf(1 - 1e-4, RUNS, 0.5)


def test_an_auditor_without_intervals_accuses_correct_runs(monkeypatch):
    def careless(hits, trials, alarms, others, delta, error):
        return float(np.log(max(hits / trials - delta, 1e-9) / max(alarms / others, 1e-12)))

    monkeypatch.setattr(audits, "_bound", careless)
    found = lows(RUN, 40, confidence=1 - 1e-3 / RUNS)
    assert int((found > RUN.claim(TIGHT)).sum()) > 4


@pytest.mark.parametrize(
    ("mistake", "run"),
    [
        ({"noise_factor": 0.5}, RUN),
        ({"sensitivity_factor": 2.0}, RUN),
        ({"rate_factor": 2.5}, RUN),
        ({"noise_factor": 0.4}, CanaryRun(steps=1, sample_rate=1.0, noise_multiplier=1.0)),
    ],
)
def test_a_seeded_mistake_is_proved(mistake, run):
    low, claim = audit_run(replace(run, **mistake), TIGHT, trials=20_000, seed=0, confidence=1 - 1e-6)
    assert low > claim


def test_the_scores_have_the_law_that_is_claimed():
    """The likelihood ratio integrates to 1 without the canary."""
    ratio = np.exp(scores(RUN, 40_000, np.random.default_rng(0), member=False))
    assert ratio.mean() == pytest.approx(1.0, abs=5 * ratio.std() / 200)
    inside = scores(RUN, 40_000, np.random.default_rng(1), member=True)
    assert np.exp(-inside).mean() == pytest.approx(1.0, rel=0.05)


def test_nothing_is_found_where_nothing_is():
    same = np.random.default_rng(0).normal(size=(2, 2000))
    assert epsilon_below(*same, 1e-5) == 0.0
    constant = np.zeros(50)
    assert epsilon_below(constant, constant, 1e-5) == 0.0
    for bad in ([np.nan, 1, 2, 3], [1.0]):
        with pytest.raises(UsageError, match="No lower bound"):
            epsilon_below(bad, bad, 1e-5)


def test_the_other_auditor_of_the_package_agrees():
    pytest.importorskip("torch")
    from per_instance_accountant.evaluation import empirical_epsilon

    random = np.random.default_rng(5)
    x, y = random.normal(3, 1, 4000), random.normal(0, 1, 4000)
    mine, other = epsilon_below(x, y, 1e-5), empirical_epsilon(x, y, delta=1e-5).epsilon
    assert mine == pytest.approx(other, rel=0.15) and mine > 2
