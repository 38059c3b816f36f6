"""Assumptions: derived constants against numeric Hessians, contraction against random quadratics, faults."""

from __future__ import annotations

import math

import numpy as np
import pytest

from per_instance_accountant.errors import PlanError
from per_instance_accountant.unlearning import Assumptions, logistic_regression, softmax_regression
from per_instance_accountant.unlearning.assumptions import contraction_factors


def factors(known, lr, wd=0.0, denominator=1.0, empty=False):
    one = np.ones(1)
    return float(
        contraction_factors(
            known,
            learning_rate=lr * one,
            weight_decay=wd * one,
            denominator=denominator * one,
            batch_may_be_empty=np.array([empty]),
        )[0]
    )


def softmax_hessian(logits, x):
    p = np.exp(logits - logits.max())
    p /= p.sum()
    return np.kron(np.diag(p) - np.outer(p, p), np.outer(x, x)), p


def test_softmax_constants_hold_and_are_attained():
    rng = np.random.default_rng(0)
    worst_curvature = worst_gradient = 0.0
    for _ in range(300):
        classes, d = int(rng.integers(2, 6)), int(rng.integers(1, 4))
        x = rng.normal(size=d)
        x *= 2.0 / np.linalg.norm(x)
        hessian, p = softmax_hessian(rng.normal(size=classes) * rng.choice([0.0, 1, 30]), x)
        gradient = np.outer(p - np.eye(classes)[rng.integers(classes)], x)
        worst_curvature = max(worst_curvature, np.linalg.eigvalsh(hessian)[-1])
        worst_gradient = max(worst_gradient, np.linalg.norm(gradient))
        assert np.linalg.eigvalsh(hessian)[0] >= -1e-12
    known = softmax_regression(feature_norm=2.0, num_instances=1, denominator=1.0)
    # Attained by two classes with probability 1/2 each, up to the rounding of the eigenvalues.
    assert 1 + 1e-12 >= worst_curvature / known.smoothness >= 0.99
    assert known.gradient_norm >= worst_gradient >= 0.99 * known.gradient_norm
    assert known.sources["smoothness"] == "derived" and known.convexity == 0


def test_logistic_constants_hold_and_are_attained():
    margins = np.linspace(-40, 40, 20001)
    p = 1 / (1 + np.exp(-margins))
    known = logistic_regression(feature_norm=3.0, num_instances=1, denominator=1.0)
    assert known.smoothness >= 9 * (p * (1 - p)).max() >= known.smoothness * (1 - 1e-9)
    assert known.gradient_norm >= 3 * p.max() >= known.gradient_norm * (1 - 1e-9)


def test_smoothness_covers_every_batch_including_the_whole_data_set():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(30, 3))
    x /= np.maximum(np.linalg.norm(x, axis=1), 1)[:, None]
    known = softmax_regression(feature_norm=1.0, num_instances=30, denominator=5.0)
    logits = rng.normal(size=(30, 4))
    for size in (1, 10, 30):
        batch = rng.choice(30, size, replace=False)
        total = sum(softmax_hessian(logits[i], x[i])[0] for i in batch) / 5.0
        assert np.linalg.eigvalsh(total)[-1] <= known.smoothness


def test_contraction_is_the_norm_of_the_map_and_never_below_it():
    rng = np.random.default_rng(2)
    for _ in range(200):
        low, high = np.sort(rng.uniform(0, 3, 2))
        lr, wd = rng.uniform(0, 1.2), rng.uniform(0, 0.5)
        spectrum = np.append(rng.uniform(low, high, 4), [low, high])
        exact = np.abs(1 - lr * (spectrum + wd)).max()
        found = factors(Assumptions(smoothness=high, convexity=low), lr, wd)
        assert exact <= found <= exact * (1 + 1e-12) + 1e-14


def test_an_empty_batch_has_no_curvature():
    known = Assumptions(smoothness=1.0, convexity=0.5)
    assert factors(known, 0.1) == pytest.approx(0.95)
    assert factors(known, 0.1, empty=True) == pytest.approx(1.0) and factors(known, 0.1, empty=True) >= 1.0


def test_smoothness_is_rescaled_to_the_denominator_in_the_ledger():
    known = softmax_regression(feature_norm=1.0, num_instances=100, denominator=50.0)
    assert factors(known, 1.0, denominator=10.0) == pytest.approx(
        4.0, rel=1e-5
    )  # L = 1 becomes 5, and |1 - 5| = 4
    assert factors(Assumptions(), 1.0) == math.inf


@pytest.mark.parametrize(
    "wrong",
    [
        {"smoothness": -1.0},
        {"smoothness": math.nan},
        {"smoothness": "1"},
        {"smoothness": True},
        {"convexity": math.inf},
        {"smoothness": 1.0, "convexity": 2.0},
        {"denominator": 0.0},
        {"num_instances": 0},
        {"num_instances": 2.0},
        {"clipping_never_binds": 1},
        {"smoothness": {"value": 1.0}},
        {"smoothness": {"value": 1.0, "source": "a friend"}},
        {"smothness": 1.0},
    ],
)
def test_malformed_assumptions_are_refused(wrong):
    with pytest.raises(PlanError, match="PIA031"):
        Assumptions.from_dict(wrong)


@pytest.mark.parametrize("wrong", [{"feature_norm": 0.0}, {"num_instances": 0}, {"denominator": math.nan}])
def test_helpers_refuse_nonsense(wrong):
    good = {"feature_norm": 1.0, "num_instances": 10, "denominator": 2.0}
    for helper in (softmax_regression, logistic_regression):
        with pytest.raises(PlanError, match="PIA031"):
            helper(**(good | wrong))


def test_round_trip_keeps_values_and_sources():
    known = softmax_regression(
        feature_norm=1.5, num_instances=10, denominator=2.0, individual_thresholds=True
    )
    assert Assumptions.from_dict(known.to_dict(), source="run").to_dict() == known.to_dict()
    assert Assumptions.from_dict({"radius": 2.0}, source="run").to_dict() == {
        "radius": {"value": 2.0, "source": "run"}
    }
    assert Assumptions().to_dict() == {}


@pytest.mark.parametrize("change", [{"smoothness": 1e-6}, {"gradient_norm": 0.1}, {"feature_norm": None}])
def test_what_is_called_derived_must_follow(change):
    """Provenance cannot be invented: the constructor derives again."""
    honest = softmax_regression(feature_norm=1.0, num_instances=100, denominator=10.0)
    stated = {name: entry["value"] for name, entry in honest.to_dict().items()}
    with pytest.raises(PlanError, match="PIA031"):
        Assumptions(**{**stated, **change}, sources=honest.sources)
    assert Assumptions(**{**stated, **change}).sources == {}
    assert Assumptions.from_dict(honest.to_dict()).to_dict() == honest.to_dict()
    assert {honest.sources[name] for name in ("smoothness", "gradient_norm")} == {"derived"}
    assert {honest.sources[name] for name in ("feature_norm", "num_instances", "denominator")} == {"user"}
