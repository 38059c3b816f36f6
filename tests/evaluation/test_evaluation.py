"""Accuracy, margin, attack and barrier against closed forms and counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu
from torch import nn

from per_instance_accountant.errors import GuaranteeError, UsageError
from per_instance_accountant.evaluation import (
    accuracies,
    loss_barrier,
    margins,
    mean_loss,
    membership_attack,
)
from per_instance_accountant.evaluation.membership import area, null_interval
from per_instance_accountant.finetuning.methods import Ensemble, Instances, ensemble_of


def linear(*matrices: list[list[float]]) -> Ensemble:
    models = []
    for matrix in matrices:
        model = nn.Linear(2, 2, bias=False)
        model.load_state_dict({"weight": torch.tensor(matrix)})
        models.append(model)
    return ensemble_of(models)


def points(count: int, seed: int, models: int = 1) -> Instances:
    generator = torch.Generator().manual_seed(seed)
    return Instances(
        inputs=torch.randn(models, count, 2, generator=generator),
        labels=torch.randint(0, 2, (models, count), generator=generator),
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_the_margin_is_the_log_odds_of_the_label(seed: int) -> None:
    part = points(20, seed, 2)
    models = linear([[1.0, 0.5], [-0.3, 2.0]], [[0.0, 1.0], [2.0, 0.0]])
    shares = torch.softmax(models.logits(part.inputs).double(), -1).gather(-1, part.labels[..., None])[..., 0]
    np.testing.assert_allclose(margins(models, part), torch.log(shares / (1 - shares)).numpy(), rtol=1e-6)
    np.testing.assert_allclose(mean_loss(models, part), -torch.log(shares).mean(1).numpy(), rtol=1e-9)
    np.testing.assert_allclose(accuracies(models, part), (shares > 0.5).double().mean(1).numpy(), rtol=0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    first=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    second=st.lists(st.integers(0, 5), min_size=1, max_size=12),
)
def test_the_area_is_that_of_counting_and_of_scipy(first: list[int], second: list[int]) -> None:
    a, b = np.array(first, dtype=float), np.array(second, dtype=float)
    pairs = np.sign(a[:, None] - b[None, :])
    counted = float(((pairs + 1) / 2).mean())
    assert math.isclose(area(a, b), counted, rel_tol=1e-12)
    assert math.isclose(
        area(a, b) * a.size * b.size, mannwhitneyu(a, b).statistic, rel_tol=1e-9, abs_tol=1e-9
    )


def test_the_null_covers_unseen_instances_and_not_remembered_ones() -> None:
    low, high = null_interval(10, 100, 4000, 0)
    deviation = math.sqrt((10 + 100 + 1) / (12 * 10 * 100))
    assert math.isclose(high - low, 2 * 1.96 * deviation, rel_tol=0.05)
    rng = np.random.default_rng(1)
    scores = np.array([area(rng.normal(size=10), rng.normal(size=100)) for _ in range(400)])
    inside = ((scores >= low) & (scores <= high)).mean()
    assert 0.91 < inside < 0.99
    remembered = np.array([area(rng.normal(1.5, size=10), rng.normal(size=100)) for _ in range(50)])
    assert (remembered > high).mean() > 0.9


def test_a_model_that_knows_its_instances_is_seen_and_one_that_forgot_too_hard_as_well() -> None:
    models = linear([[3.0, 0.0], [0.0, 3.0]])
    inputs = torch.eye(2).repeat(10, 1)
    known = Instances(inputs=inputs, labels=inputs.argmax(1))
    wide = points(200, 3)
    unseen = Instances(inputs=0.2 * wide.inputs, labels=wide.labels)
    assert membership_attack(models, known, unseen)[0].auc > 0.9
    over = Instances(inputs=inputs, labels=1 - inputs.argmax(1))
    score = membership_attack(models, over, unseen)[0]
    assert score.auc < score.null_low and not score.within_null
    with pytest.raises(UsageError, match="PIA070"):
        membership_attack(models, known, unseen.select([0]))


def test_the_barrier_of_a_convex_loss_is_none() -> None:
    first, second = linear([[2.0, 0.0], [0.0, 1.0]]), linear([[-1.0, 1.0], [0.5, 0.0]])
    part = points(50, 0)
    barrier = loss_barrier(first, second, part)
    assert float(barrier.above_ends[0]) == 0
    assert float(barrier.above_chord[0]) <= 1e-7
    ends = barrier.path[[0, -1], 0]
    assert math.isclose(barrier.above_mean[0], abs(ends[0] - ends[1]) / 2, rel_tol=1e-6)
    assert np.allclose(ends, [mean_loss(first, part)[0], mean_loss(second, part)[0]], rtol=1e-9)


def hidden(sign: float) -> nn.Module:
    """f(x) = relu(x) + relu(-x) with the two hidden units in either order: one function, far apart."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    head = torch.tensor([[4.0, 4.0], [-4.0, -4.0]])
    model.load_state_dict({"0.weight": torch.tensor([[sign], [-sign]]), "2.weight": head})
    return model


def test_permuted_twins_have_a_barrier_of_known_height() -> None:
    part = Instances(inputs=torch.tensor([[1.0], [-2.0]]), labels=torch.tensor([0, 0]))
    barrier = loss_barrier(ensemble_of([hidden(1.0)]), ensemble_of([hidden(-1.0)]), part)
    ends = (math.log1p(math.exp(-8)) + math.log1p(math.exp(-16))) / 2
    for values in (barrier.above_mean, barrier.above_chord, barrier.above_ends):
        assert math.isclose(values[0], math.log(2) - ends, rel_tol=1e-5)


def test_faults() -> None:
    models = linear([[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(UsageError, match="PIA071"):
        loss_barrier(models, ensemble_of([nn.Linear(2, 3, bias=False)]), points(3, 0))
    with pytest.raises(UsageError, match="PIA070"):
        loss_barrier(models, models, points(3, 0), points=2)
    huge = linear([[3e38, 3e38], [0.0, 1.0]])
    with pytest.raises(GuaranteeError, match="PIA011"):
        accuracies(huge, Instances(inputs=torch.full((1, 2), 9.0), labels=torch.tensor([0])))
