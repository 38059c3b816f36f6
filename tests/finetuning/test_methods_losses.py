"""Losses against gradients by hand, importance against a loop, the attack inside its ball."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from per_instance_accountant.errors import UsageError
from per_instance_accountant.finetuning.methods import Attack, Ensemble, Instances, ensemble_of
from per_instance_accountant.finetuning.methods.losses import (
    absolute_sum,
    anchor_loss,
    distillation_loss,
    misclassify_loss,
    relabel_loss,
    training_loss,
)
from per_instance_accountant.finetuning.methods.regularisers import (
    adversarial_examples,
    importance,
    projected_descent,
    reversed_importance,
)
from per_instance_accountant.finetuning.methods.sampling import Draws

MODELS, COUNT, CLASSES = 2, 5, 4


def network(seed: int, inputs: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def ensemble() -> Ensemble:
    return ensemble_of([network(seed) for seed in range(MODELS)])


def instances(models: Ensemble, seed: int = 0) -> Instances:
    """In [0, 1], labelled as the models see them, so that there is something to forget."""
    inputs = torch.rand(MODELS, COUNT, 6, generator=torch.Generator().manual_seed(seed))
    return Instances(inputs=inputs, labels=models.logits(inputs).argmax(-1))


def slopes(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    return slope


def by_hand(logits: Tensor, labels: Tensor) -> Tensor:
    """softmax - onehot, over the number of instances."""
    return (logits.softmax(-1) - functional.one_hot(labels, logits.shape[-1])) / logits.shape[1]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 20))
def test_gradients_by_hand(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(MODELS, COUNT, CLASSES, generator=generator, dtype=torch.float64)
    teacher = torch.randn(MODELS, COUNT, CLASSES, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (MODELS, COUNT), generator=generator)
    expected = by_hand(logits, labels)
    torch.testing.assert_close(
        slopes(lambda z: training_loss(z, labels), logits), expected, rtol=1e-9, atol=0
    )
    torch.testing.assert_close(slopes(lambda z: relabel_loss(z, labels), logits), expected, rtol=1e-9, atol=0)
    still = (logits.argmax(-1) == labels)[..., None]
    each = -expected * still * COUNT / still.sum(1, keepdim=True).clamp_min(1)
    torch.testing.assert_close(slopes(lambda z: misclassify_loss(z, labels), logits), each, rtol=1e-9, atol=0)
    # d/dz of T^2 KL(softmax(t/T) || softmax(z/T)) is T (softmax(z/T) - softmax(t/T)).
    apart = 3.0 * ((logits / 3).softmax(-1) - (teacher / 3).softmax(-1)) / COUNT
    found = slopes(lambda z: distillation_loss(z, teacher, 3.0), logits)
    torch.testing.assert_close(found, apart, rtol=1e-7, atol=1e-15)


def test_gradients_of_the_penalties_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    start, now, weight = (
        {"w": torch.rand(2, 3, 4, generator=generator, dtype=torch.float64) - 0.5} for _ in range(3)
    )
    leaf = {"w": now["w"].clone().requires_grad_(True)}
    (slope,) = torch.autograd.grad(anchor_loss(leaf, start, weight).sum(), leaf["w"])
    torch.testing.assert_close(slope, weight["w"] * (now["w"] - start["w"]), rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(absolute_sum(leaf).sum(), leaf["w"])
    torch.testing.assert_close(slope, now["w"].sign(), rtol=0, atol=0)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 1e4))
def test_misclassification_is_bounded(seed: int, scale: float) -> None:
    logits = scale * torch.randn(1, COUNT, CLASSES, generator=torch.Generator().manual_seed(seed))
    labels = torch.randint(0, CLASSES, (1, COUNT), generator=torch.Generator().manual_seed(seed + 1))
    bound = -torch.log(torch.tensor(float(CLASSES))) * (1 + 1e-6)
    assert float(misclassify_loss(logits, labels)) >= float(bound)


def test_the_unmasked_ascent_breaks_that_bound() -> None:
    logits, labels = torch.tensor([[[0.0, 50.0]]]), torch.tensor([[0]])
    assert float(-training_loss(logits, labels)) < -40
    assert float(misclassify_loss(logits, labels)) == 0


def test_importance_is_that_of_a_loop() -> None:
    models = ensemble()
    part = instances(models)
    found = importance(models, part.inputs)
    for number in range(MODELS):
        module = models.member(number)
        sums = {name: torch.zeros_like(value) for name, value in module.named_parameters()}
        for x in part.inputs[number]:
            module.zero_grad()
            module(x[None]).norm().backward()
            for name, value in module.named_parameters():
                assert value.grad is not None
                sums[name] += value.grad.abs() / COUNT
        for name, value in sums.items():
            torch.testing.assert_close(found[name][number], value, rtol=1e-4, atol=1e-7)


def test_importance_does_not_accumulate() -> None:
    """Released code clears the gradients of another model, so every call adds to the one before."""
    models = ensemble()
    inputs = instances(models).inputs
    first, second = importance(models, inputs), importance(models, inputs)
    twice = importance(models, torch.cat([inputs, inputs], 1))
    for name, value in first.items():
        assert torch.equal(value, second[name])
        torch.testing.assert_close(value, twice[name], rtol=1e-5, atol=1e-8)


def test_reversed_importance_per_tensor() -> None:
    weights = importance(ensemble(), instances(ensemble()).inputs)
    for name, value in reversed_importance(weights).items():
        flat, raw = value.flatten(1), weights[name].flatten(1)
        assert flat.amin(1).tolist() == [0, 0] and flat.amax(1).tolist() == [1, 1]
        assert torch.equal(flat.argmin(1), raw.argmax(1))
    same = reversed_importance({"w": torch.zeros(1, 3)})["w"]
    assert same.tolist() == [[1, 1, 1]]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), radius=st.floats(0.01, 3), step=st.floats(0.01, 5), bounded=st.booleans())
def test_the_attack_stays_in_its_ball_and_bounds(
    seed: int, radius: float, step: float, bounded: bool
) -> None:
    models = ensemble()
    part, draws = instances(models, seed), Draws([seed, seed + 1])
    attack = Attack(radius=radius, step_size=step, iterations=7, bounds=(0.0, 1.0) if bounded else None)
    targets = draws.other_classes(part.labels, CLASSES)
    found = projected_descent(models, part.inputs, targets, attack, draws)
    moved = (found.double() - part.inputs.double()).norm(dim=2)
    assert float(moved.max()) <= radius
    assert not bounded or (float(found.min()) >= 0 and float(found.max()) <= 1)


def test_the_attack_lowers_the_loss_and_keeps_successes_only() -> None:
    models = ensemble()
    part = instances(models)
    attack = Attack(radius=1.0, per_instance=6, iterations=30, bounds=None)
    made = adversarial_examples(models, part, attack, Draws([0, 1]))
    assert made.tried == 6 * COUNT
    assert torch.equal(models.logits(made.inputs).argmax(-1), made.labels)
    assert float(made.success.min()) > 0
    weak = adversarial_examples(models, part, Attack(radius=0.9, per_instance=40, bounds=None), Draws([0, 1]))
    assert float(weak.success.max()) < 1
    assert torch.equal(models.logits(weak.inputs).argmax(-1), weak.labels)


def test_no_success_is_an_error_and_inputs_must_lie_in_the_bounds() -> None:
    models = ensemble()
    part = instances(models)
    with pytest.raises(UsageError, match="PIA070: none of"):
        adversarial_examples(models, part, Attack(radius=1e-6, iterations=1), Draws([0, 1]))
    with pytest.raises(UsageError, match="PIA070: some inputs lie outside"):
        adversarial_examples(models, part, Attack(radius=1.0, bounds=(0.0, 0.5)), Draws([0, 1]))


def test_targets_are_uniform_over_the_other_classes() -> None:
    """Released code draws ``(rand.long() * C + C) // 2``, which is C // 2 for every collision."""
    labels = torch.full((1, 90_000), 5)
    ours = Draws([0]).other_classes(labels, 10)
    counts = torch.bincount(ours[0], minlength=10)

    def fair(counts: Tensor) -> bool:
        others = torch.cat([counts[:5], counts[6:]])
        # Standard deviation of a count is 94; six of them.
        return int(counts[5]) == 0 and bool((others - 10_000).abs().max() < 570)

    assert fair(counts)
    drawn = torch.randint(0, 10, labels.shape, generator=torch.Generator().manual_seed(0))
    collided = (torch.rand(labels.shape).long() * 10 + 10) // 2
    released = torch.where(drawn == labels, collided, drawn)
    assert not fair(torch.bincount(released[0], minlength=10))


def test_the_attack_agrees_with_a_library() -> None:
    """Foolbox where it is installed: the same ball, a loss at least as low up to its own random start."""
    foolbox = pytest.importorskip("foolbox")
    models = ensemble_of([network(0)])
    inputs = torch.rand(1, 40, 6, generator=torch.Generator().manual_seed(1))
    part = Instances(inputs=inputs, labels=models.logits(inputs).argmax(-1))
    targets = (part.labels + 1) % CLASSES
    attack = Attack(radius=0.8, step_size=0.1, iterations=100)
    ours = projected_descent(models, part.inputs, targets, attack, Draws([0]))
    wrapped = foolbox.PyTorchModel(models.member(0), bounds=(0, 1))
    other = foolbox.attacks.L2PGD(abs_stepsize=0.1, steps=100)
    criterion = foolbox.criteria.TargetedMisclassification(targets[0])
    found = other(wrapped, part.inputs[0], criterion, epsilons=0.8)[1]
    mine, theirs = (relabel_loss(models.logits(x), targets) for x in (ours, found[None]))
    assert float(mine) <= float(theirs) * 1.02
