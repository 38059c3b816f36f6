"""Composition in expectation against a two-step chain whose divergence has a closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm

from per_instance_accountant.accounting import Basis, expectation, expectation_orders, expected_composition
from per_instance_accountant.errors import UsageError


def exact(order: float, first: float, low: float, high: float, share: float) -> float:
    """``D_order`` of: y ~ N(first, 1) or N(0, 1), then a Gaussian step of ratio ``high`` on the
    ``share`` of the runs WITH the instance whose y is largest, else ``low``."""
    cut = first + norm.isf(share)
    weight = order * (order - 1) / 2
    # Under the tilted law y is N(order first, 1).
    terms = [
        norm.logcdf(cut - order * first) + weight * low**2,
        norm.logsf(cut - order * first) + weight * high**2,
    ]
    return float((weight * first**2 + np.logaddexp(*terms)) / (order - 1))


def violations(seed: int = 0, draws: int = 400) -> int:
    """How often the right-hand side, its expectations exact, lies below the divergence."""
    rng, below = np.random.default_rng(seed), 0
    for _ in range(draws):
        order, holder = 1 + rng.exponential(2), 1 + rng.exponential(2)
        first, low, high = rng.uniform(0.05, 2), rng.uniform(0, 1), rng.uniform(0, 2)
        # One run in k has the high ratio, so the mean over k runs is the expectation itself.
        k = int(rng.integers(2, 9))
        ratios = [[first, high]] + [[first, low]] * (k - 1)
        bound = expected_composition(1.0, ratios, order, holder=holder).value
        below += bound < exact(order, first, low, high, 1 / k) * (1 - 1e-9)
    return below


def test_with_exact_expectations_it_is_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expectation, "_RESAMPLES", 2)
    monkeypatch.setattr(expectation, "MAX_ORDER", math.inf)
    monkeypatch.setattr(
        expectation, "sampled_gaussian_rdp", lambda q, r, a: np.asarray(a * np.square(r) / 2)[:, None]
    )
    assert violations() == 0


def test_law_catches_the_reversed_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = expectation.expectation_orders
    monkeypatch.setattr(expectation, "_RESAMPLES", 2)
    monkeypatch.setattr(
        expectation, "sampled_gaussian_rdp", lambda q, r, a: np.asarray(a * np.square(r) / 2)[:, None]
    )

    def reversed_schedule(ratios: np.ndarray, order: float, holder: float) -> float:
        orders = forwards(order, 2, holder)[::-1]
        exponents = holder * (orders - 1) * orders * np.square(ratios) / 2
        weights = ((holder - 1) / holder) ** np.arange(2) / (holder * (order - 1))
        return float(expectation._log_means(exponents) @ weights)

    rng, below = np.random.default_rng(0), 0
    for _ in range(400):
        order, holder = 1 + rng.exponential(2), 1 + rng.exponential(2)
        first, low, high = rng.uniform(0.05, 2), rng.uniform(0, 1), rng.uniform(0, 2)
        k = int(rng.integers(2, 9))
        ratios = np.array([[first, high]] + [[first, low]] * (k - 1))
        below += reversed_schedule(ratios, order, holder) < exact(order, first, low, high, 1 / k)
    assert below > 20


def test_equal_runs_give_the_sum_at_the_orders_of_the_schedule() -> None:
    loss = expected_composition(1.0, np.full((3, 4), 0.2), 3.0, holder=1e9)
    assert loss.value == pytest.approx(4 * 3.0 * 0.2**2 / 2, rel=1e-6)
    assert loss.low == pytest.approx(loss.high, rel=1e-12) and loss.basis is Basis.ESTIMATE
    np.testing.assert_allclose(loss.share_of_largest, 1 / 3, rtol=1e-6)
    assert (np.diff(loss.orders) < 0).all() and loss.orders[-1] == 3.0
    # Hoelder's step, once: a_(t-1) = (p a_t - 1) / (p - 1).
    assert expectation_orders(2.0, 2, 4.0)[0] == pytest.approx((4 * 2 - 1) / 3, rel=1e-15)


def test_few_runs_are_too_small_and_the_reported_bias_says_so() -> None:
    """The trap of the method: a mean of exponentials misses the rare runs that decide it."""
    rng = np.random.default_rng(1)
    first, low, high, share, order, holder = 0.1, 0.01, 2.0, 0.05, 4.0, 4.0
    truth = exact(order, first, low, high, share)
    losses = []
    for _ in range(100):
        rare = np.where(rng.random(5) < share, high, low)
        losses.append(
            expected_composition(1.0, np.column_stack([np.full(5, first), rare]), order, holder=holder)
        )
    assert np.mean([loss.value < truth for loss in losses]) > 0.6
    seen = [loss for loss in losses if loss.value >= truth]
    assert seen and all(loss.share_of_largest[-1] > 0.3 and loss.bias < 0 for loss in seen)
    assert all(loss.low <= loss.value <= loss.high * (1 + 1e-12) for loss in losses)


@pytest.mark.parametrize(
    "arguments",
    [
        {"ratios": [[0.1, 0.2]]},
        {"ratios": [0.1, 0.2]},
        {"ratios": [[0.1], [math.nan]]},
        {"ratios": [[0.1], [-0.1]]},
        {"ratios": [[0.1], [math.inf]]},
        {"order": 1.0},
        {"holder": 1.0},
        {"holder": 1.0001, "ratios": np.full((2, 9), 0.1)},
        {"sample_rate": 1.5},
    ],
)
def test_bad_input_is_refused(arguments: dict[str, object]) -> None:
    good: dict[str, object] = {"sample_rate": 0.1, "ratios": [[0.1], [0.2]], "order": 2.0}
    with pytest.raises(UsageError, match="PIA07"):
        expected_composition(**(good | arguments))  # type: ignore[arg-type]
