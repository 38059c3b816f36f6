"""Paired runs: what they share, what they do not, and the laws a wrong pairing breaks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from per_instance_accountant.errors import GuaranteeError, UsageError
from per_instance_accountant.evaluation.measures import steps_to_oracle
from per_instance_accountant.evaluation.oracle import (
    PairedTraining,
    Training,
    checkpoints,
    unlearning_course,
)
from per_instance_accountant.evaluation.oracle.training import part
from per_instance_accountant.finetuning.methods import Ensemble, Instances
from per_instance_accountant.finetuning.methods.ensemble import fresh

torch.set_num_threads(1)
SEEDS = (3, 8)


def data(count: int = 20) -> Instances:
    generator = torch.Generator().manual_seed(0)
    return Instances(
        inputs=torch.randn(count, 3, generator=generator),
        labels=torch.randint(0, 2, (count,), generator=generator),
    )


def setting(steps: int = 6, noise_std: float = 0.5, sample_rate: float = 0.3) -> Training:
    return Training(
        steps=steps,
        learning_rate=0.3,
        sample_rate=sample_rate,
        denominator=6.0,
        weight_decay=0.1,
        noise_std=noise_std,
    )


def start() -> Ensemble:
    return fresh(nn.Linear(3, 2), SEEDS)


def weights(models: Ensemble) -> torch.Tensor:
    return torch.cat([value.flatten(1) for value in models.parameters.values()], 1)


def after(without: list[list[int]], training: Training, steps: int = 6) -> torch.Tensor:
    run = PairedTraining(start(), data(), training, seeds=SEEDS, without=without)
    run.advance(steps)
    return weights(run.models)


def test_one_full_batch_step_is_the_formula_with_the_instance_weighted_zero() -> None:
    training = setting(noise_std=0.0, sample_rate=1.0)
    moved = after([[], [4]], training, 1)
    some = data()
    for seed in range(2):
        for request, gone in enumerate(([], [4])):
            model = start().member(seed)
            kept = [row for row in range(20) if row not in gone]
            loss = nn.functional.cross_entropy(model(some.inputs[kept]), some.labels[kept], reduction="sum")
            slopes = torch.autograd.grad(loss / 6.0, list(model.parameters()))
            wanted = [p - 0.3 * (g + 0.1 * p) for p, g in zip(model.parameters(), slopes, strict=True)]
            expected = torch.cat([value.flatten() for value in wanted]).detach()
            torch.testing.assert_close(moved[2 * request + seed], expected, rtol=1e-5, atol=1e-7)


def test_a_run_depends_on_neither_other_requests_other_seeds_nor_how_it_is_divided() -> None:
    both = after([[], [4], [7]], setting())
    assert torch.equal(both[2:4], after([[4]], setting()))
    alone = PairedTraining(part(start(), [1]), data(), setting(), seeds=SEEDS[1:], without=[[4]])
    for steps in (1, 3, 2):
        alone.advance(steps)
    torch.testing.assert_close(weights(alone.models)[0], both[3], rtol=1e-6, atol=1e-7)


def test_pairing_makes_the_difference_small_and_other_batches_would_not() -> None:
    paired = after([[], [4]], setting(steps=40), 40)
    near = (paired[:2] - paired[2:]).norm(dim=1)
    other = PairedTraining(start(), data(), setting(), seeds=SEEDS, without=[[4]], stream=1)
    other.advance(40)
    far = (paired[:2] - weights(other.models)).norm(dim=1)
    assert bool((near > 0).all()) and bool((far > 2 * near).all())


def test_who_is_never_drawn_changes_nothing() -> None:
    rare = setting(sample_rate=1e-9)
    moved = after([[], [4]], rare)
    assert torch.equal(moved[:2], moved[2:])


def test_checkpoints_are_those_of_one_run_and_a_course_starts_from_its_end() -> None:
    found = checkpoints(start(), data(), setting(), seeds=SEEDS, at=[0, 2, 6])
    assert torch.equal(weights(found[0]), weights(start()))
    assert torch.equal(weights(found[2]), after([[]], setting()))
    course = unlearning_course(
        start(), data(), [[4], [7]], setting(), seeds=SEEDS, at=[0, 3, 9], test=data(5)
    )
    assert torch.equal(weights(course.base), weights(found[2]))
    assert torch.equal(weights(part(course.kept[0][0], [2, 3])), weights(course.base))
    # Matched budget: the oracle at the last look has taken the training's steps and nine more.
    oracle = after([[7]], setting(), 15)
    torch.testing.assert_close(weights(course.kept[1][2])[2:], oracle, rtol=1e-6, atol=1e-7)
    assert (
        course.unlearned.shape == (2, 2, 3, 1)
        and course.test is not None
        and course.test.shape == (2, 3, 2, 2)
    )


def test_contraction_brings_unlearned_and_oracle_together_and_without_it_nothing_does() -> None:
    """Full batch, weight decay, convex: the same noise on both leaves a contracting difference."""
    training, seeds = setting(steps=30, sample_rate=1.0), (3, 8, 5)
    models = fresh(nn.Linear(3, 2), seeds)
    course = unlearning_course(models, data(), [[4]], training, seeds=seeds, at=[0, 20, 200])
    gap = steps_to_oracle(course.unlearned, course.oracle, course.at, 1e-3).gap[0]
    assert abs(gap[0]) > 20 * abs(gap[2])
    biased = course.oracle + 1.0
    assert steps_to_oracle(course.unlearned, biased, course.at, 1e-3).settled[0] == 400


def test_faults() -> None:
    for requests in ([], [[]], [[1], [2, 3]], [list(range(20))]):
        with pytest.raises(UsageError, match="PIA126"):
            unlearning_course(start(), data(), requests, setting(), seeds=SEEDS, at=[0])
    with pytest.raises(UsageError, match="PIA071"):
        unlearning_course(start(), data(), [[20]], setting(), seeds=SEEDS, at=[0])
    with pytest.raises(UsageError, match="PIA070"):
        unlearning_course(start(), data(), [[2]], setting(), seeds=SEEDS, at=[5, 3])
    with pytest.raises(UsageError, match="PIA070"):
        checkpoints(start(), data(), setting(), seeds=SEEDS, at=[7])
    with pytest.raises(UsageError, match="PIA071"):
        PairedTraining(start(), data(), setting(), seeds=(1, 2, 3), without=[[]])
    with pytest.raises(UsageError, match="PIA071"):
        PairedTraining(start(), data(), setting(), seeds=SEEDS, without=[[1, 1]])
    for broken in ({"steps": 0}, {"sample_rate": 1.5}, {"noise_std": float("nan")}):
        numbers = {"steps": 1, "learning_rate": 1.0, "sample_rate": 0.5, "denominator": 1.0}
        with pytest.raises(UsageError, match="PIA070"):
            Training(**(numbers | broken))
    wild = Training(steps=3, learning_rate=1e30, sample_rate=1.0, denominator=1.0, weight_decay=1e30)
    with pytest.raises(GuaranteeError, match="PIA011"):
        PairedTraining(start(), data(), wild, seeds=SEEDS, without=[[]]).advance(50)


def test_steps_to_oracle_by_hand() -> None:
    at = np.array([0, 1, 2, 4])
    gaps = np.array(
        [
            [0.0, 0.0, 0.0, 0.0],
            [1.0, 0.4, 0.1, 0.0],
            [1.0, 0.1, 0.9, 0.9],
            [1.0, -1.0, -1.0, -1.0],
        ]
    )[:, None].repeat(3, 1)
    found = steps_to_oracle(gaps, np.zeros_like(gaps), at, 0.2)
    assert found.settled.tolist() == [0, 2, 8, 8]
    assert found.first.tolist() == [0, 2, 1, 1]
    assert found.over.tolist() == [False, False, False, True]
    assert (found.never, found.at_once) == (0.5, 0.25)
    # One-sided, as in "forgotten enough", the over-unlearned request would count as done.
    one_sided = (gaps[:, 0] <= 0.2)[:, -1]
    assert bool(one_sided[3]) and found.settled[3] > at[-1]
    with pytest.raises(UsageError, match="PIA125"):
        steps_to_oracle(gaps[:, :2], gaps[:, :2], at, 0.2)
    with pytest.raises(UsageError, match="PIA071"):
        steps_to_oracle(gaps[..., None][..., :0], gaps[..., None][..., :0], at, 0.2)


def walks(requests: int, seeds: int, looks: int, pull: float = 0.9) -> NDArray[np.float64]:
    """Noise with memory of one look to the next, as of models that are followed: standard normal at each."""
    generator = np.random.default_rng(1)
    values = [generator.normal(size=(requests, seeds))]
    for _ in range(looks - 1):
        fresh_noise = np.sqrt(1 - pull**2) * generator.normal(size=(requests, seeds))
        values.append(pull * values[-1] + fresh_noise)
    return np.stack(values, 2)


@pytest.mark.parametrize("pull", [0.0, 0.9])
def test_who_left_nothing_takes_no_steps_however_many_looks(pull: float) -> None:
    """A request within the tolerance takes a step in 5 % of the cases at most. Without the doubt, with a
    tolerance of twice the standard error, it is the rule."""
    noise, at = walks(2000, 8, 20, pull), np.arange(20)
    share = (steps_to_oracle(noise, np.zeros_like(noise), at, 1e-9).settled > 0).mean()
    assert share < 0.05
    at_the_edge = noise + 0.3
    assert (steps_to_oracle(at_the_edge, np.zeros_like(noise), at, 0.3).settled > 0).mean() < 0.05
    bare = (np.abs(noise.mean(1)) > 2 / np.sqrt(8)).any(1).mean()
    assert bare > 0.25 > 5 * share


def test_more_seeds_come_nearer_to_the_true_steps_from_below() -> None:
    at = np.arange(40)
    truth = 2 * np.exp(-at / 8)
    true_steps = int(at[(truth > 0.1).sum()])
    means = []
    for seeds in (4, 32, 1024):
        unlearned = truth + walks(50, seeds, 40)
        settled = steps_to_oracle(unlearned, np.zeros_like(unlearned), at, 0.1).settled
        assert (settled > true_steps).mean() < 0.05
        means.append(settled.mean())
    assert means[0] < means[1] < means[2] and means[2] > 0.7 * true_steps
