"""Nulls cover chance, attacks see what is there, and the known defects of published code fail these
laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import binom, norm, spearmanr

from per_instance_accountant.errors import GuaranteeError, UsageError
from per_instance_accountant.evaluation.measures import (
    attack_statistics,
    empirical_epsilon,
    forgetting,
    gaussian_renyi,
    harmonic_score,
    klom,
    mean_interval,
    one_run_epsilon,
    rank_correlation,
    relearn_steps,
    simple_attacks,
    u_lira,
    variational_renyi,
)
from per_instance_accountant.evaluation.measures.distances import histogram_divergence, normal_renyi
from per_instance_accountant.evaluation.measures.empirical import one_run_p_value
from per_instance_accountant.finetuning.methods import Instances, Schedule, ensemble_of

torch.set_num_threads(1)


def normal(shape: tuple[int, ...], seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1.0, shape)


def test_intervals_cover_and_refuse_too_few() -> None:
    inside = [not mean_interval(normal((5,), seed)).excludes(0.0) for seed in range(400)]
    assert 0.92 < np.mean(inside) < 0.98
    with pytest.raises(UsageError, match="PIA125"):
        mean_interval([1.0, 2.0])
    with pytest.raises(GuaranteeError, match="PIA011"):
        mean_interval([1.0, 2.0, math.nan])
    with pytest.raises(UsageError, match="PIA125"):
        rank_correlation(np.arange(9), np.arange(9))
    with pytest.raises(UsageError, match="PIA125"):
        rank_correlation(np.arange(20), np.arange(20) > 10)


def test_rank_correlation_is_scipys_and_widens_with_the_noise_of_seeds() -> None:
    a = normal((40,), 0)
    b = np.round(a + normal((40,), 1), 1)
    plain = rank_correlation(a, b)
    assert math.isclose(plain.value, spearmanr(a, b).statistic, rel_tol=1e-12)
    noisy = rank_correlation(a, b, redraw=lambda rng: b + 2 * rng.normal(size=40))
    assert noisy.high - noisy.low > plain.high - plain.low


def test_klom_counts_the_largest_value_and_its_direction_matters() -> None:
    first = np.array([[0.0]] * 9 + [[1.0]])
    second = np.array([[0.0]] * 5 + [[1.0]] * 5)
    found = histogram_divergence(first, second, 20)[0]
    wanted = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert math.isclose(found, wanted, rel_tol=2e-3)
    # Published code swaps the sides, and drops the largest value.
    assert not math.isclose(histogram_divergence(second, first, 20)[0], wanted, rel_tol=0.1)


def test_the_null_of_klom_is_not_zero_and_covers_chance() -> None:
    same = klom(normal((30, 200), 0), normal((30, 200), 1), draws=60)
    assert same.value.mean() > 1 and abs(same.value.mean() - same.null.mean()) < 0.25
    assert same.beyond_chance < 0.12
    assert klom(normal((30, 50), 0, 3.0), normal((30, 50), 1), draws=60).beyond_chance > 0.8


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    shift=st.floats(-2, 2),
    scale=st.floats(0.7, 1.3),
    order=st.sampled_from([1.5, 2.0, 3.0]),
)
def test_the_normal_renyi_divergence_is_that_of_quadrature(shift: float, scale: float, order: float) -> None:
    p, q = norm(shift, scale), norm(0, 1)
    value = normal_renyi(*(np.array([x]) for x in (shift, scale**2, 0.0, 1.0)), order)[0]
    if order + (1 - order) * scale**2 <= 0:
        assert math.isinf(value)
        return
    log_moment = quad(
        lambda x: math.exp(order * p.logpdf(x) - (order - 1) * q.logpdf(x)),
        -40,
        40,
        points=[0, shift * order],
    )[0]
    assert math.isclose(value, math.log(log_moment) / (order - 1), rel_tol=1e-6, abs_tol=1e-9)


def test_variational_estimates_stay_bounded_and_see_a_shift() -> None:
    far = variational_renyi(normal((60, 30), 0, 2.0), normal((60, 30), 1), 2.0, draws=40)
    assert far.beyond_chance > 0.8 and far.value.max() <= 2 * 2 * math.log(60) * 2
    assert variational_renyi(normal((60, 30), 0), normal((60, 30), 1), 2.0, draws=40).beyond_chance < 0.2
    # Of the right size, but no bound: clipping and few models move it either way.
    assert 0.5 < np.median(far.value) / (2.0 * 2.0**2 / 2) < 2
    assert np.isfinite(gaussian_renyi(normal((60, 30), 0), normal((60, 30), 1), 1.5)).all()


def test_u_lira_is_calibrated_and_has_power() -> None:
    inside = [
        u_lira(normal((16, 5), 2 * seed), normal((16, 5), 2 * seed + 1), draws=60).within_null
        for seed in range(40)
    ]
    assert np.mean(inside) > 0.85
    seen = u_lira(normal((16, 20), 0, 1.5), normal((16, 20), 1), draws=60)
    assert seen.auc > 0.75 and not seen.within_null and seen.low > 0.5
    with pytest.raises(UsageError, match="PIA125"):
        u_lira(normal((4, 5), 0), normal((4, 5), 1))
    with pytest.raises(UsageError, match="PIA071"):
        klom(normal((8, 5), 0), normal((8, 6), 1))
    for measure in (u_lira, klom):
        with pytest.raises(UsageError, match="PIA071"):
            measure(np.empty((9, 0)), np.empty((9, 0)))


def test_modified_entropy_is_its_definition_and_a_row_depends_on_itself_only() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(30, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (30,), generator=generator)
    found = attack_statistics(logits, labels)["modified_entropy"]
    p = torch.softmax(logits, 1).numpy()
    for row, label in enumerate(labels.tolist()):
        others = [c for c in range(4) if c != label]
        value = -(1 - p[row, label]) * math.log(p[row, label])
        value -= sum(p[row, c] * math.log1p(-p[row, c]) for c in others)
        assert math.isclose(found[row], -value, rel_tol=1e-9)
    alone = attack_statistics(logits[:1], labels[:1])["modified_entropy"]
    assert math.isclose(alone[0], found[0], rel_tol=1e-12)

    # A published implementation indexes whole columns: then a row changes with its neighbours.
    def defective(scores: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q = torch.softmax(scores, 1)
        reverse, modified, modified_reverse = 1 - q, q.clone(), 1 - q
        modified[:, y], modified_reverse[:, y] = reverse[:, y], q[:, y]
        return -(modified * modified_reverse.clamp_min(1e-30).log()).sum(1)

    assert not math.isclose(float(defective(logits, labels)[0]), float(defective(logits[:1], labels[:1])[0]))
    sure = attack_statistics(torch.tensor([[800.0, 0.0]]), torch.tensor([0]))
    assert all(np.isfinite(value).all() for value in sure.values())


def linear(*slopes: float) -> object:
    models = []
    for slope in slopes:
        model = torch.nn.Linear(1, 2, bias=False)
        model.load_state_dict({"weight": torch.tensor([[slope], [-slope]])})
        models.append(model)
    return ensemble_of(models)


def some(count: int, label: int | None = None, models: int = 3) -> Instances:
    inputs = torch.linspace(-1, 1, count)[:, None]
    labels = (inputs[:, 0] < 0).long() if label is None else torch.full((count,), label)
    return Instances(inputs=inputs.expand(models, count, 1), labels=labels.expand(models, count))


def test_forgetting_is_two_sided() -> None:
    keep = some(10)
    one_class = Instances(inputs=keep.inputs.abs() + 0.1, labels=torch.zeros_like(keep.labels))
    oracle = linear(1.0, 1.1, 0.9)
    assert forgetting(linear(2.0, 2.1, 1.9), oracle, one_class, keep, keep).verdict == "remembers"
    assert forgetting(linear(0.1, 0.2, 0.0), oracle, one_class, keep, keep).verdict == "over-unlearned"
    found = forgetting(
        linear(1.1, 0.9, 1.0), oracle, one_class, keep, keep, other_oracle=linear(0.9, 1.0, 1.1)
    )
    assert found.verdict == "no difference seen" and found.null is not None
    assert found.retain.value == 0
    with pytest.raises(UsageError, match="PIA071"):
        forgetting(linear(1.0, 1.0), oracle, one_class, keep, keep)
    assert harmonic_score([0.3], [1.0]) == harmonic_score([-0.3], [1.0]) < harmonic_score([0.0], [1.0])


def test_a_forget_set_of_one_class_is_not_compared_with_others() -> None:
    models = linear(1.0, 1.0, 1.0)
    with pytest.raises(UsageError, match="PIA126"):
        simple_attacks(models, some(4, 1), some(10))
    scores = simple_attacks(models, some(6), some(10))
    assert set(scores) == {"correctness", "confidence", "loss", "entropy", "modified_entropy"}
    with pytest.raises(UsageError, match="PIA070"):
        simple_attacks(models, some(6), some(1))


def test_relearning_takes_longer_from_farther_away() -> None:
    forget = some(10, models=2)
    schedule = Schedule(steps=50, learning_rate=0.5, momentum=0.0)
    steps = relearn_steps(linear(0.5, -1.0), forget, 0.4, schedule, seeds=[0, 1])
    assert 0 < steps[0] < steps[1] <= 50
    assert relearn_steps(linear(2.0, -1.0), forget, 0.4, schedule, seeds=[0, 1])[0] == 0
    assert relearn_steps(linear(-1.0, -1.0), forget, -1.0, schedule, seeds=[0, 1]).tolist() == [100, 100]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_lower_bound_holds_and_choosing_on_the_tested_runs_breaks_it(sign: int) -> None:
    """Randomised response with known epsilon: the bound may exceed it in at most 5 % of experiments."""
    epsilon = 1.0
    right = 1 / (1 + math.exp(-epsilon))
    over = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        with_it = sign * (rng.random(400) < right).astype(float)
        without = sign * (rng.random(400) < 1 - right).astype(float)
        pair = (with_it, without) if sign > 0 else (without, with_it)
        over += empirical_epsilon(*pair).epsilon > epsilon
    assert over <= 0.05 * 200 + 6
    far = empirical_epsilon(normal((4000,), 0, 3.0), normal((4000,), 1)).epsilon
    assert far > 3
    null = [empirical_epsilon(normal((200,), 2 * s), normal((200,), 2 * s + 1)).epsilon for s in range(100)]
    assert np.mean(np.array(null) > 0) <= 0.05

    def greedy(a: np.ndarray, b: np.ndarray) -> float:
        cuts = np.unique(b)
        ratios = [(a > c).mean() / max((b > c).mean(), 1 / b.size) for c in cuts]
        return math.log(max(ratios))

    assert np.mean([greedy(normal((200,), 2 * s), normal((200,), 2 * s + 1)) > 0 for s in range(50)]) > 0.9


def test_the_one_run_audit() -> None:
    assert math.isclose(one_run_p_value(50, 30, 20, 0.7, 0.0), binom.sf(19, 30, 1 / (1 + math.exp(-0.7))))
    assert one_run_p_value(50, 30, 20, 0.7, 1e-3) > one_run_p_value(50, 30, 20, 0.7, 0.0)
    over = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        coins = rng.random(300) < 0.5
        told = np.where(rng.random(300) < 1 / (1 + math.exp(-1.0)), coins, ~coins)
        over += one_run_epsilon(told + 0.01 * rng.random(300), coins).epsilon > 1.0
    assert over <= 12
    coins = np.arange(200) % 2 == 0
    assert one_run_epsilon(coins.astype(float), coins).epsilon > 2
    assert one_run_epsilon(normal((200,), 0), coins).epsilon < 0.5
    with pytest.raises(UsageError, match="PIA125"):
        one_run_epsilon(np.arange(5), np.ones(5))
    with pytest.raises(UsageError, match="PIA071"):
        one_run_epsilon(np.arange(30), np.ones(20))
    with pytest.raises(UsageError, match="PIA125"):
        empirical_epsilon(np.arange(5), np.arange(5))
    with pytest.raises(UsageError, match="PIA070"):
        empirical_epsilon(np.arange(50), np.arange(50), delta=1.0)
