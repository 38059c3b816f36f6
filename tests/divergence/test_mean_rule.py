"""The mean rule against numerical integration of the two mixtures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from per_instance_accountant.divergence import mean_rule_rdp, sampled_gaussian_rdp
from per_instance_accountant.errors import UsageError


def integrated(p: np.ndarray, u: np.ndarray, q: np.ndarray, v: np.ndarray, order: int, std: float) -> float:
    x, step = np.linspace(-15, 15, 60_001, retstep=True)
    above = sum(w * norm.pdf(x, m, std) for w, m in zip(p, u, strict=True))
    below = sum(w * norm.pdf(x, m, std) for w, m in zip(q, v, strict=True))
    return float(np.log(np.sum(above**order * below ** (1.0 - order)) * step) / (order - 1))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), order=st.sampled_from([2, 3, 5]))
def test_never_below_the_divergence_in_either_direction(seed: int, order: int) -> None:
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(2))
    u, v = rng.uniform(-1, 1, 3), rng.uniform(-1, 1, 2)
    std = float(rng.uniform(0.8, 2))
    forth = mean_rule_rdp(p, u[:, None], q, v[:, None], order, std)
    back = mean_rule_rdp(q, v[:, None], p, u[:, None], order, std)
    assert forth >= integrated(p, u, q, v, order, std) * (1 - 1e-9)
    assert back >= integrated(q, v, p, u, order, std) * (1 - 1e-9)


def test_one_reference_batch_is_the_exact_sampled_gaussian() -> None:
    for order in (2, 4, 8):
        value = mean_rule_rdp([0.9, 0.1], [[0.0], [0.7]], [1.0], [[0.0]], order, 1.4)
        assert value == pytest.approx(sampled_gaussian_rdp(0.1, 0.5, order)[0, 0], rel=1e-9)


def test_law_catches_a_monte_carlo_mean_in_place_of_the_sum() -> None:
    rng = np.random.default_rng(0)
    draws = rng.choice([0.0, 4.0], p=[0.99, 0.01], size=(200, 3, 8))
    exponent = -((draws**2).sum(axis=2) - draws.sum(axis=2) ** 2) / 2
    sampled = np.log(np.exp(exponent).mean(axis=1)) / 7
    exact = mean_rule_rdp([0.99, 0.01], [[0.0], [4.0]], [1.0], [[0.0]], 8, 1.0)
    assert (sampled < exact).mean() > 0.9


@pytest.mark.parametrize(
    "change",
    [{"order": 1}, {"order": 2.5}, {"noise_std": 0.0}, {"probabilities": [0.5, 0.6]}, {"means": [0.0]}],
)
def test_bad_arguments_are_refused(change: dict[str, object]) -> None:
    good = {
        "probabilities": [0.5, 0.5],
        "means": [[0.0], [1.0]],
        "other_probabilities": [1.0],
        "other_means": [[0.0]],
        "order": 2,
        "noise_std": 1.0,
    }
    with pytest.raises(UsageError, match="PIA07"):
        mean_rule_rdp(**(good | change))  # type: ignore[arg-type]
