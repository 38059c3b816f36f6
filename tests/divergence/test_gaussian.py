"""Exact Gaussian differential privacy: on the safe side and close, over the whole float range."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath as mp
import numpy as np
import pytest

from per_instance_accountant.divergence import gaussian_delta, gaussian_epsilon, gaussian_mu
from per_instance_accountant.errors import UsageError


def _exact_delta(mu: float, epsilon: float) -> mp.mpf:
    with mp.workdps(80 + int(epsilon)):
        m, e = mp.mpf(mu), mp.mpf(epsilon)
        upper, lower = (e / m - m / 2) / mp.sqrt(2), (e / m + m / 2) / mp.sqrt(2)
        return (mp.erfc(upper) - mp.exp(e) * mp.erfc(lower)) / 2


def _textbook(mu: float, epsilon: float) -> float:
    """Seeded bug: the difference of two probabilities as it is printed in papers."""
    from scipy.stats import norm

    return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu))


def _points() -> list[tuple[float, float]]:
    rng = np.random.default_rng(7)
    points = [(1e-12, 0.0), (1e-12, 3e-11), (1e-3, 0.02), (8.0, 0.0), (20.0, 200.0), (20.0, 500.0)]
    for _ in range(150):
        mu = 10 ** rng.uniform(-12, 1.4)
        points.append((float(mu), float(abs(mu * rng.uniform(-1, 12) + mu * mu / 2 * rng.integers(0, 2)))))
    return points


def test_delta_is_never_below_the_truth_and_close() -> None:
    errors = []
    for mu, epsilon in _points():
        truth = _exact_delta(mu, epsilon)
        if truth > mp.mpf("1e-290"):
            errors.append(float(mp.mpf(gaussian_delta(mu, epsilon)) / truth - 1))
    assert len(errors) > 100
    assert min(errors) >= 0
    assert max(errors) <= 1e-10


def test_the_oracle_catches_the_textbook_difference() -> None:
    mu, epsilon = 1e-9, 6e-9
    truth = _exact_delta(mu, epsilon)
    assert abs(float(_textbook(mu, epsilon) / truth - 1)) > 1e-6
    assert 0 <= float(gaussian_delta(mu, epsilon) / truth - 1) <= 1e-10


def test_epsilon_is_above_and_mu_below_the_truth() -> None:
    rng = np.random.default_rng(11)
    for _ in range(60):
        mu, delta = float(10 ** rng.uniform(-6, 1.2)), float(10 ** rng.uniform(-20, -0.5))
        epsilon = gaussian_epsilon(mu, delta)
        assert _exact_delta(mu, epsilon) <= delta
        if epsilon > 0:
            assert _exact_delta(mu, epsilon * (1 - 1e-9)) > delta
        largest = gaussian_mu(epsilon, delta)
        assert _exact_delta(largest, epsilon) <= delta
        assert _exact_delta(largest * (1 + 1e-9), epsilon) > delta
        assert gaussian_epsilon(largest, delta) <= epsilon + 1e-9 * max(epsilon, mu)


def test_known_values() -> None:
    assert gaussian_epsilon(1.0, 1e-5) == pytest.approx(4.3771780957, rel=1e-10)
    assert gaussian_delta(1.0, 1.0) == pytest.approx(0.1269367375, rel=1e-9)
    assert gaussian_mu(1.0, 1e-5) == pytest.approx(0.2680511232, rel=1e-9)
    assert gaussian_delta(1.0, 0.0) == pytest.approx(math.erf(0.5 / math.sqrt(2)), rel=1e-11)


def test_limits() -> None:
    assert gaussian_delta([0.0, np.inf, 1.0, 1.0, 1e-300], [0.0, 1.0, np.inf, 1e300, 1.0]).tolist()[:3] == [
        0,
        1,
        0,
    ]
    assert gaussian_delta(1.0, 1e300) > 0
    assert gaussian_delta(1e-300, 1.0) > 0
    assert gaussian_delta(1e8, 1.0) == pytest.approx(1.0)
    assert gaussian_epsilon([0.0, 1.0, np.inf], 0.0).tolist() == [0.0, np.inf, np.inf]
    assert gaussian_epsilon([0.0, 1.0, np.inf], 1.0).tolist() == [0.0, 0.0, 0.0]
    assert gaussian_epsilon([0.0, np.inf], 1e-5).tolist() == [0.0, np.inf]
    assert gaussian_epsilon(1e-8, 1e-5) == 0.0
    assert isinstance(gaussian_epsilon(1.0, 1e-5), float)
    assert (gaussian_mu(1.0, 0.0), gaussian_mu(1.0, 1.0), gaussian_mu(math.inf, 0.1)) == (
        0.0,
        math.inf,
        math.inf,
    )
    mus = np.geomspace(1e-10, 1e3, 200)
    assert (np.diff(gaussian_epsilon(mus, 1e-5)) >= 0).all()
    assert gaussian_epsilon(mus, 1e-5)[::40].tolist() == [gaussian_epsilon(mu, 1e-5) for mu in mus[::40]]


@pytest.mark.parametrize(
    "bad",
    [
        lambda: gaussian_epsilon(math.nan, 1e-5),
        lambda: gaussian_epsilon(-1.0, 1e-5),
        lambda: gaussian_epsilon(1.0, math.nan),
        lambda: gaussian_epsilon(1.0, 2.0),
        lambda: gaussian_delta(math.nan, 1.0),
        lambda: gaussian_delta(1.0, -1.0),
        lambda: gaussian_mu(math.nan, 1e-5),
        lambda: gaussian_mu(-1.0, 1e-5),
        lambda: gaussian_mu(1.0, -1e-9),
    ],
)
def test_bad_arguments(bad: Callable[[], object]) -> None:
    with pytest.raises(UsageError):
        bad()
