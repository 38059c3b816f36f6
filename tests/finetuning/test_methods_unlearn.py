"""Methods do what their papers define; the known defects of released code would fail here."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from per_instance_accountant.accounting import Basis
from per_instance_accountant.errors import PiaError, UnsupportedError, UsageError
from per_instance_accountant.finetuning.methods import (
    METHODS,
    Attack,
    Ensemble,
    FineTune,
    GradientAscent,
    Instances,
    InstanceWise,
    Method,
    NegGradPlus,
    NoisyFineTune,
    RandomRelabel,
    Retrain,
    SalUn,
    Schedule,
    Scrub,
    SparseFineTune,
    ensemble_of,
    unlearn,
    unlearn_ensemble,
    unlearn_in_turn,
)
from per_instance_accountant.finetuning.methods import unlearning as loop
from per_instance_accountant.finetuning.methods.recipes import saliency_mask

CLASSES, KEPT = 3, 60
PLAIN = Schedule(steps=12, learning_rate=0.1, momentum=0.9, weight_decay=0.01, batch_size=64)


def network(seed: int = 0, normalised: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    middle: list[nn.Module] = [nn.BatchNorm1d(8), nn.Dropout(0.5)] if normalised else []
    return nn.Sequential(nn.Linear(4, 8), *middle, nn.ReLU(), nn.Linear(8, CLASSES))


def blobs(count: int, seed: int) -> Instances:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    centres = 2 * torch.eye(4)[:CLASSES]
    return Instances(inputs=centres[labels] + 0.4 * torch.randn(count, 4, generator=generator), labels=labels)


def trained(seed: int = 0, normalised: bool = False) -> nn.Module:
    model, part = network(seed, normalised), blobs(KEPT, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        functional.cross_entropy(model(part.inputs), part.labels).backward()
        optimizer.step()
    return model.eval()


RETAIN = blobs(KEPT, 1)
FORGET = RETAIN.select([0, 1, 2, 3])
EVERY: list[Method] = [
    InstanceWise(schedule=PLAIN),
    InstanceWise(schedule=PLAIN, goal="relabel", attack=Attack(radius=3.0, bounds=None), importance=0.1),
    FineTune(schedule=PLAIN),
    NoisyFineTune(schedule=PLAIN, noise_std=0.1),
    GradientAscent(schedule=PLAIN),
    NegGradPlus(schedule=PLAIN),
    RandomRelabel(schedule=PLAIN),
    SalUn(schedule=PLAIN),
    Scrub(schedule=PLAIN, retain_steps=2),
    SparseFineTune(schedule=PLAIN),
    Retrain(schedule=PLAIN),
]
each_method = pytest.mark.parametrize("method", EVERY, ids=lambda m: f"{m.name}-{getattr(m, 'goal', '')}")


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.detach().flatten() for value in model.parameters()])


def test_every_method_is_tested() -> None:
    assert {type(method) for method in EVERY} == set(METHODS.values())


@each_method
def test_state_is_safe(method: Method) -> None:
    """The given model stays as it is, statistics of batch normalisation never move, weights are finite, the
    seed decides, the basis is an estimate."""
    model = trained(normalised=True)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    global_state = torch.get_rng_state()
    done = unlearn(method, model, FORGET, RETAIN, seed=3)
    assert torch.equal(torch.get_rng_state(), global_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    after = done.model.state_dict()
    for name in (name for name in before if "running" in name or "num_batches" in name):
        if not isinstance(method, Retrain):
            assert torch.equal(after[name], before[name]), name
    assert bool(torch.isfinite(weights(done.model)).all())
    assert not torch.equal(weights(done.model), weights(model))
    assert (done.basis, done.certificate) == (Basis.ESTIMATE, None)
    assert "without a certificate" in done.statement()
    again = unlearn(method, model, FORGET, RETAIN, seed=3)
    assert torch.equal(weights(done.model), weights(again.model))


def test_batch_normalisation_in_training_mode_would_move() -> None:
    model = trained(normalised=True).train()
    before = copy.deepcopy(dict(model.named_buffers()))
    model(FORGET.inputs)
    assert any(not torch.equal(value, before[name]) for name, value in model.named_buffers())
    unlearn(InstanceWise(schedule=PLAIN), model, FORGET)


@each_method
def test_models_side_by_side_are_what_they_are_alone(method: Method) -> None:
    models = [trained(seed) for seed in (0, 1)]
    twice: list[Instances] = [
        Instances(inputs=part.inputs.expand(2, -1, -1), labels=part.labels.expand(2, -1))
        for part in (FORGET, RETAIN)
    ]
    many = unlearn_ensemble(method, ensemble_of(models), *twice, seeds=[7, 8])
    for number, model in enumerate(models):
        alone = unlearn(method, model, FORGET, RETAIN, seed=7 + number)
        torch.testing.assert_close(
            weights(many.models.member(number)), weights(alone.model), rtol=1e-3, atol=1e-4
        )
        assert many.traces[number].steps == alone.trace.steps
        assert many.traces[number].outcome == alone.trace.outcome


def test_the_step_is_that_of_torch() -> None:
    """With all retained instances in every batch the loop is deterministic: compare it with torch's SGD."""
    method = GradientAscent(schedule=replace(PLAIN, steps=5, learning_rate=0.01))
    model = trained()
    ours = unlearn(method, model, FORGET)
    theirs = copy.deepcopy(model)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
    for _ in range(ours.trace.steps):
        optimizer.zero_grad()
        (-functional.cross_entropy(theirs(FORGET.inputs), FORGET.labels)).backward()
        optimizer.step()
    assert ours.trace.steps > 0
    torch.testing.assert_close(weights(ours.model), weights(theirs), rtol=1e-5, atol=1e-7)


def test_salun_holds_masked_weights_under_momentum_and_weight_decay() -> None:
    """Released code masks the gradient only: momentum and weight decay then move the other weights."""
    model = trained()
    done = unlearn(SalUn(schedule=PLAIN, keep=0.3), model, FORGET, RETAIN)
    mask = saliency_mask(ensemble_of([model]), FORGET.stacked, 0.3)
    held = torch.cat([part.flatten() for part in mask.values()]) == 0
    moved = weights(done.model) != weights(model)
    assert not bool(moved[held].any())
    assert float(moved[~held].float().mean()) > 0.9
    released = copy.deepcopy(model)
    optimizer = torch.optim.SGD(released.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(released(RETAIN.inputs), RETAIN.labels).backward()
        for (name, value), part in zip(released.named_parameters(), mask.values(), strict=True):
            assert value.grad is not None, name
            value.grad.mul_(part[0])
        optimizer.step()
    assert bool((weights(released) != weights(model))[held].any())


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_the_mask_is_strict_by_rank(keep: float) -> None:
    """One instance: most gradients are exactly zero; a threshold at their quantile would keep them all."""
    model = trained()
    one = FORGET.select([0])
    mask = saliency_mask(ensemble_of([model]), one.stacked, keep)
    flat = torch.cat([part.flatten() for part in mask.values()])
    assert int(flat.sum()) == int(keep * len(flat))
    model.zero_grad()
    functional.cross_entropy(model(one.inputs), one.labels).backward()
    slopes = torch.cat([value.grad.abs().flatten() for value in model.parameters() if value.grad is not None])
    assert float(slopes[flat == 1].min()) >= (float(slopes[flat == 0].max()) if keep < 1 else 0) - 1e-7
    dead = float((slopes == 0).float().mean())
    assert dead > 0.2
    at_least_quantile = slopes >= slopes.quantile(min(dead, 0.99) / 2)
    assert bool(at_least_quantile.all())


def test_scrub_moves_the_student_away_from_its_teacher() -> None:
    """Released code optimises the teacher's parameters: nothing happens to the student."""
    model = trained()
    ascents = Scrub(
        schedule=replace(PLAIN, steps=40, learning_rate=0.1), rounds=20, forget_steps=1, retain_steps=1
    )
    assert [ascents.ascends(step) for step in range(4)] == [True, False, True, False]
    assert not Scrub(schedule=PLAIN, rounds=1, forget_steps=1, retain_steps=2).ascends(3)
    # At the teacher itself the divergence has no slope; a descent on the training loss comes first.
    started = unlearn(FineTune(schedule=replace(PLAIN, steps=3)), model, FORGET, RETAIN).model
    student = unlearn(ascents, started, FORGET, RETAIN).model

    def apart(other: nn.Module) -> float:
        p, q = (functional.log_softmax(m(FORGET.inputs), -1) for m in (started, other))
        return float((p.exp() * (p - q)).sum(-1).mean().detach())

    only_descents = unlearn(replace(ascents, rounds=1, retain_steps=99), started, FORGET, RETAIN).model
    assert not torch.equal(weights(student), weights(started))
    assert apart(student) > apart(only_descents) > 0


def test_retrain_owes_nothing_to_the_old_weights() -> None:
    results = [
        unlearn(Retrain(schedule=PLAIN), trained(seed), FORGET, RETAIN, seed=4).model for seed in (0, 1)
    ]
    assert torch.equal(weights(results[0]), weights(results[1]))
    holder = nn.Sequential(nn.Linear(4, CLASSES))
    holder.register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(UnsupportedError, match="PIA060"):
        unlearn(Retrain(schedule=PLAIN), holder, FORGET, RETAIN)


def test_sparse_fine_tuning_is_sparser_and_noise_is_noise() -> None:
    model = trained()
    steps = replace(PLAIN, steps=80)
    plain = unlearn(FineTune(schedule=steps), model, FORGET, RETAIN).model
    sparse = unlearn(SparseFineTune(schedule=steps, strength=0.05), model, FORGET, RETAIN).model
    assert float(weights(sparse).abs().sum()) < 0.7 * float(weights(plain).abs().sum())
    still = Schedule(steps=1, learning_rate=1.0, momentum=0.0)
    quiet, loud = (
        weights(unlearn(NoisyFineTune(schedule=still, noise_std=std), model, FORGET, RETAIN).model)
        for std in (0.0, 2.0)
    )
    # 67 weights: the standard deviation of the estimate is 2 / sqrt(134), six of them are 1.04.
    assert abs(float((loud - quiet).std()) - 2.0) < 1.04


def forgotten(method: Method, model: nn.Module) -> float:
    return float(unlearn(method, model, FORGET, RETAIN).trace.forgotten[-1])


def test_goals_and_stop_rule() -> None:
    model = trained()
    targets = (FORGET.labels + 1) % CLASSES
    wanted = replace(FORGET, targets=targets)
    schedule = replace(PLAIN, steps=400, learning_rate=0.05, weight_decay=0.0)
    relabelled = unlearn(InstanceWise(schedule=schedule, goal="relabel"), model, wanted)
    assert relabelled.trace.outcome == "reached"
    assert torch.equal(relabelled.model(wanted.inputs).argmax(1), targets)
    assert relabelled.trace.forgotten[-2] < 1
    assert relabelled.trace.steps == relabelled.trace.at[-1] < 400
    one = FORGET.select([0])
    gone = unlearn(InstanceWise(schedule=schedule), model, one)
    assert gone.trace.outcome == "reached"
    assert bool((gone.model(one.inputs).argmax(1) != one.labels).all())


def test_ascent_never_runs_to_nan() -> None:
    """Unbounded ascent at a step size that overflows ends at the last finite weights, and says so."""
    wild = Schedule(steps=400, learning_rate=1e18, momentum=0.99, observe_every=400)
    for method in (GradientAscent(schedule=wild), NegGradPlus(schedule=wild, retain_weight=0.0)):
        done = unlearn(method, trained(), FORGET, RETAIN)
        assert done.trace.outcome == "diverged"
        assert bool(torch.isfinite(weights(done.model)).all())
        assert np.isfinite(done.trace.loss).all()
    bounded = unlearn(InstanceWise(schedule=replace(wild, learning_rate=10.0)), trained(), FORGET)
    assert bool(torch.isfinite(weights(bounded.model)).all())


def test_one_diverging_model_does_not_touch_its_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    models = ensemble_of([trained(0), trained(1)])
    twice = Instances(inputs=FORGET.inputs.expand(2, -1, -1), labels=FORGET.labels.expand(2, -1))
    kept = Instances(inputs=RETAIN.inputs.expand(2, -1, -1), labels=RETAIN.labels.expand(2, -1))
    method = FineTune(schedule=PLAIN)
    sound = unlearn_ensemble(method, models, twice, kept, seeds=[1, 2])
    original = loop._moved

    def poisoned(*args: Any) -> dict[str, Tensor]:
        moved = original(*args)
        for value in moved.values():
            value[0] = math.nan
        return moved

    monkeypatch.setattr(loop, "_moved", poisoned)
    done = unlearn_ensemble(method, models, twice, kept, seeds=[1, 2])
    assert [trace.outcome for trace in done.traces] == ["diverged", "all steps"]
    for name, value in done.models.parameters.items():
        assert torch.equal(value[0], models.parameters[name][0])
        assert torch.equal(value[1], sound.models.parameters[name][1])


def test_both_regularisers_hold_the_rest() -> None:
    """The anchor keeps weights near, adversarial examples keep the other instances right."""
    model = trained()
    wanted = replace(FORGET, targets=(FORGET.labels + 1) % CLASSES)
    schedule = replace(PLAIN, steps=200, learning_rate=0.05, weight_decay=0.0)

    def right(method: Method) -> float:
        done = unlearn(method, model, wanted)
        return float((done.model(RETAIN.inputs).argmax(1) == RETAIN.labels).float().mean())

    plain = InstanceWise(schedule=schedule, goal="relabel")
    attack = Attack(radius=2.0, per_instance=20, bounds=None)
    assert right(replace(plain, attack=attack)) > right(plain)
    brief = replace(plain, schedule=replace(schedule, steps=10, learning_rate=0.01))
    near, far = (
        float((weights(unlearn(replace(brief, importance=i), model, wanted).model) - weights(model)).norm())
        for i in (5.0, 0.0)
    )
    assert near < far


def in_turn(keep: bool) -> tuple[Any, Ensemble]:
    models = ensemble_of([trained()])
    schedule = replace(PLAIN, steps=300, learning_rate=0.05, weight_decay=0.0)
    method = InstanceWise(schedule=schedule, goal="relabel", importance=0.01)
    parts = [RETAIN.select([2 * n, 2 * n + 1]) for n in range(3)]
    requests = [replace(part, targets=(part.labels + 1) % CLASSES).stacked for part in parts]
    return unlearn_in_turn(method, models, requests, seeds=[0], keep_earlier=keep), models


def test_earlier_requests_stay_forgotten() -> None:
    run, _ = in_turn(keep=True)
    assert run.forgotten.shape == (1, 3, 3)
    assert np.tril(run.forgotten[0]).sum() == 6
    dropping, _ = in_turn(keep=False)
    assert np.diag(dropping.forgotten[0]).tolist() == [1, 1, 1]
    assert np.isfinite(dropping.forgotten).all()
    with pytest.raises(UsageError, match="PIA071"):
        unlearn_in_turn(InstanceWise(schedule=PLAIN), ensemble_of([network()]), [], seeds=[0])


@pytest.mark.parametrize(
    "call",
    [
        lambda m: unlearn(FineTune(schedule=PLAIN), m, FORGET),
        lambda m: unlearn(InstanceWise(schedule=PLAIN), m, FORGET.stacked),
        lambda m: unlearn(InstanceWise(schedule=PLAIN), m, replace(FORGET, labels=FORGET.labels + CLASSES)),
        lambda m: unlearn(InstanceWise(schedule=PLAIN), m, replace(FORGET, inputs=FORGET.inputs * math.nan)),
        lambda m: unlearn(InstanceWise(schedule=PLAIN), m, replace(FORGET, targets=FORGET.labels)),
        lambda m: unlearn(InstanceWise(schedule=PLAIN), m.requires_grad_(False), FORGET),
        lambda m: unlearn_ensemble(FineTune(schedule=PLAIN), ensemble_of([m]), FORGET.stacked, seeds=[0, 1]),
        lambda m: Schedule(steps=0, learning_rate=0.1),
        lambda m: Schedule(steps=1, learning_rate=math.nan),
        lambda m: Attack(radius=math.inf),
        lambda m: InstanceWise(schedule=PLAIN, importance=-1.0),
        lambda m: SalUn(schedule=PLAIN, keep=0.0),
        lambda m: unlearn(
            InstanceWise(schedule=PLAIN, attack=Attack(radius=2.0, bounds=None)), m, FORGET, counts=[0] * 4
        ),
    ],
)
def test_bad_input_is_refused(call: Callable[[nn.Module], object]) -> None:
    with pytest.raises(PiaError, match="PIA07"):
        call(trained())


def test_frozen_parameters_stay() -> None:
    model = trained()
    first: Any = model[0]  # type: ignore[index]
    first.requires_grad_(False)
    done = unlearn(InstanceWise(schedule=PLAIN), model, FORGET)
    assert torch.equal(done.model[0].weight, first.weight)  # type: ignore[index]
    assert not torch.equal(weights(done.model), weights(model))


ONE_STEP = Schedule(steps=1, learning_rate=1.0, momentum=0.0, batch_size=4)
WANTED = replace(FORGET, targets=(FORGET.labels + 1) % CLASSES)
KEPT_ONE = RETAIN.select([9])


def loss_of(model: nn.Module, part: Instances, labels: Tensor | None = None) -> Tensor:
    return functional.cross_entropy(model(part.inputs), part.labels if labels is None else labels)


def still_right(model: nn.Module) -> Tensor:
    right = model(FORGET.inputs).argmax(1) == FORGET.labels
    return functional.cross_entropy(model(FORGET.inputs)[right], FORGET.labels[right])


BY_HAND: list[tuple[Method, Callable[[nn.Module], Tensor]]] = [
    (FineTune(schedule=ONE_STEP), lambda m: loss_of(m, KEPT_ONE)),
    (GradientAscent(schedule=ONE_STEP), lambda m: -loss_of(m, FORGET)),
    (
        NegGradPlus(schedule=ONE_STEP, retain_weight=0.7),
        lambda m: 0.7 * loss_of(m, KEPT_ONE) - 0.3 * loss_of(m, FORGET),
    ),
    (
        RandomRelabel(schedule=ONE_STEP),
        lambda m: (loss_of(m, KEPT_ONE) + loss_of(m, WANTED, WANTED.targets)) / 2,
    ),
    (
        SparseFineTune(schedule=ONE_STEP, strength=0.03),
        lambda m: loss_of(m, KEPT_ONE) + 0.03 * sum(v.abs().sum() for v in m.parameters()),
    ),
    (InstanceWise(schedule=ONE_STEP), lambda m: -still_right(m)),
    (
        InstanceWise(schedule=ONE_STEP, goal="relabel", replay=True, adversarial_batch=12),
        lambda m: 0.25 * loss_of(m, WANTED, WANTED.targets) + 0.75 * loss_of(m, KEPT_ONE),
    ),
]


@pytest.mark.parametrize(("method", "loss"), BY_HAND, ids=lambda v: getattr(v, "name", ""))
def test_one_step_is_that_of_the_definition(method: Method, loss: Callable[[nn.Module], Tensor]) -> None:
    """One retained instance, so that every batch of retained instances has the same mean loss."""
    model = trained()
    expected = copy.deepcopy(model)
    slopes = torch.autograd.grad(loss(expected), list(expected.parameters()))
    done = unlearn(method, model, WANTED, KEPT_ONE)
    flat = torch.cat([slope.flatten() for slope in slopes])
    torch.testing.assert_close(weights(model) - weights(done.model), flat, rtol=1e-3, atol=1e-6)
    assert float(flat.norm()) > 1e-4


def test_a_model_elsewhere_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="PIA060"):
        ensemble_of([network().to("meta")])
