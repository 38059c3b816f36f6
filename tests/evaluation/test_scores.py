"""Difficulty scores against closed forms and other libraries; barriers with running statistics and groups."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from captum.influence import TracInCP
from torch import nn

from per_instance_accountant.divergence import gaussian_rdp
from per_instance_accountant.errors import UsageError
from per_instance_accountant.evaluation import difficulty, loss_barrier, memorisation
from per_instance_accountant.evaluation.scores import (
    boundary_distance,
    expansion,
    gradient_norms,
    self_influence,
    stein_scores,
)
from per_instance_accountant.evaluation.scores.stein import stein_kernel
from per_instance_accountant.finetuning.methods import Instances, ensemble_of

torch.set_num_threads(1)


def data(count: int = 12, inputs: int = 3) -> Instances:
    generator = torch.Generator().manual_seed(0)
    return Instances(
        inputs=torch.randn(count, inputs, generator=generator),
        labels=torch.randint(0, 3, (count,), generator=generator),
    )


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3))


def test_gradient_norms_are_those_of_autograd_one_by_one() -> None:
    models, some = [network(0), network(1)], data()
    found = gradient_norms(ensemble_of(models), some)
    for number, model in enumerate(models):
        for row in range(len(some)):
            loss = nn.functional.cross_entropy(model(some.inputs[row : row + 1]), some.labels[row : row + 1])
            slopes = torch.autograd.grad(loss, list(model.parameters()))
            norm = math.sqrt(sum(float(slope.square().sum()) for slope in slopes))
            assert math.isclose(found[number, row], norm, rel_tol=1e-5)


def test_self_influence_is_captums_and_the_privacy_loss_up_to_constants() -> None:
    rate, some, noise = 0.3, data(), 2.0
    models = [network(seed) for seed in range(3)]
    ours = self_influence([ensemble_of([model]) for model in models], [rate] * 3, some)[0]
    states = {str(number): model.state_dict() for number, model in enumerate(models)}
    shell = network(9)

    def load(module: nn.Module, name: str) -> float:
        module.load_state_dict(states[name])
        return rate

    tracer = TracInCP(
        shell,
        torch.utils.data.TensorDataset(some.inputs, some.labels),
        list(states),
        checkpoints_load_func=load,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=4,
        sample_wise_grads_per_batch=True,
    )
    np.testing.assert_allclose(tracer.self_influence().numpy(), ours, rtol=1e-4)
    norms = np.stack([gradient_norms(ensemble_of([model]), some)[0] for model in models])
    losses = sum(gaussian_rdp(row / noise, [2.0])[:, 0] for row in norms)
    np.testing.assert_allclose(losses, ours / rate / noise**2, rtol=1e-9)
    # A wrong power (norms instead of squares) breaks the identity.
    assert not np.allclose(norms.sum(0) * rate, ours, rtol=0.05)
    with pytest.raises(UsageError, match="PIA071"):
        self_influence([ensemble_of(models)], [1.0, 2.0], some)


def test_the_boundary_of_a_linear_model_is_known() -> None:
    torch.manual_seed(3)
    model, some = nn.Linear(3, 3), data(40)
    found = boundary_distance(ensemble_of([model]), some)[0]
    with torch.no_grad():
        logits, weight = model(some.inputs), model.weight
    for row, label in enumerate(some.labels.tolist()):
        others = [c for c in range(3) if c != label]
        exact = min(
            float((logits[row, label] - logits[row, c]) / (weight[label] - weight[c]).norm()) for c in others
        )
        assert found[row] == 0 if exact < 0 else exact * 0.999 <= found[row] <= exact * 1.03 + 1e-3


def test_expansion_is_the_sum_over_last_layer_gradients() -> None:
    model, some = network(4), data(6)
    hidden = torch.relu(model[0](some.inputs))
    errors = torch.softmax(model(some.inputs), 1) - nn.functional.one_hot(some.labels, 3)
    rows = [torch.cat([torch.outer(e, h).flatten(), e]) for e, h in zip(errors, hidden, strict=True)]
    kernel = torch.stack(rows) @ torch.stack(rows).T
    wanted = kernel.clamp_min(0).sum(1) - kernel.diagonal()
    np.testing.assert_allclose(
        expansion(ensemble_of([model]), some), wanted.detach().numpy(), rtol=1e-4, atol=1e-6
    )


def test_the_stein_kernel_is_its_formula() -> None:
    rng = np.random.default_rng(0)
    z, s, w = rng.normal(size=(5, 4)), rng.normal(size=(5, 4)), 3.0
    found = stein_kernel(z, s, w)
    for i in range(5):
        for j in range(5):
            d = z[i] - z[j]
            u = s[i] @ s[j] + (s[i] - s[j]) @ d / w + (4 - d @ d / w) / w
            assert math.isclose(found[i, j], math.exp(-(d @ d) / 2 / w) * u, rel_tol=1e-9)
    assert np.linalg.eigvalsh(found).min() > -1e-9
    scores = stein_scores(ensemble_of([network(0)]), data())
    assert scores.own.shape == (12,) and (scores.own > 0).all()


def test_memorisation_by_hand_and_with_few_models() -> None:
    member = np.array([[1, 0]] * 4 + [[0, 1]] * 4)
    right = np.array([[1, 1]] * 4 + [[1, 1]] * 2 + [[0, 1]] * 2)
    found = memorisation(right, member)
    assert found.value.tolist() == [0.5, 0.0] and found.consistency.tolist() == [0.5, 1.0]
    assert found.low[0] < 0.5 < found.high[0]
    with pytest.raises(UsageError, match="PIA125"):
        memorisation(right, np.ones_like(member))


def test_difficulty_gives_every_score_its_orientation() -> None:
    """A mislabelled point in clean clusters is the hardest by every score that looks at its label."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 2
    inputs = 0.3 * torch.randn(30, 2, generator=generator) + 2 * labels[:, None] - 1
    labels[0] = 1 - labels[0]
    some = Instances(inputs=inputs, labels=labels)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    course = [ensemble_of([model])]
    for _ in range(6):
        for _ in range(10):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        course.append(ensemble_of([model]))
    found = difficulty(course, some)
    for name in (
        "el2n",
        "grand",
        "mean_confidence",
        "gradient_sum",
        "final_loss",
        "final_margin",
        "boundary",
    ):
        assert int(found.scores[name].argmax()) == 0, name
    assert found.scores["forgetting_events"][0] == found.scores["forgetting_events"].max() > 0
    against = found.against(found.scores["final_loss"], draws=50)
    assert against["final_loss"].value == pytest.approx(1)
    with pytest.raises(UsageError, match="PIA125"):
        difficulty(course[:2], some)
    with pytest.raises(UsageError, match="PIA071"):
        difficulty([*course, network(0)], some)


def normalised(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model(torch.randn(64, 3))
    return model.eval()


def test_running_statistics_are_refused_or_estimated_again() -> None:
    first, second, some = normalised(0), normalised(1), data(40)
    with pytest.raises(UsageError, match="PIA127"):
        loss_barrier(first, second, some)
    renewed = loss_barrier(first, second, some, points=3, statistics=some)
    half = normalised(0)
    with torch.no_grad():
        for p, a, b in zip(half.parameters(), first.parameters(), second.parameters(), strict=True):
            p.copy_((a + b) / 2)
        half.train()
        middle = float(nn.functional.cross_entropy(half(some.inputs), some.labels))
    # Running statistics take the unbiased variance, the training pass the biased one.
    assert math.isclose(renewed.path[1, 0], middle, rel_tol=0.05)
    assert loss_barrier(first, first, some, points=3).above_ends[0] == 0


def test_barriers_per_instance_and_per_group() -> None:
    some = data(10)
    barrier = loss_barrier(network(0), network(1), some, points=5)
    single = barrier.per_instance()
    assert single.above_ends.shape == (1, 10)
    alone = loss_barrier(network(0), network(1), some.select([3]), points=5)
    assert math.isclose(single.above_chord[0, 3], alone.above_chord[0], rel_tol=1e-6, abs_tol=1e-9)
    groups = barrier.per_group(["a"] * 4 + ["b"] * 6)
    part = loss_barrier(network(0), network(1), some.select(range(4)), points=5)
    np.testing.assert_allclose(groups["a"].path, part.path, rtol=1e-6)
    with pytest.raises(UsageError, match="PIA071"):
        barrier.per_group(["a"] * 3)
