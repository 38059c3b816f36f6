"""Unlearning steps with a learning rate and noise of their own, as after a schedule that ended at 0."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from per_instance_accountant.errors import PlanError, UsageError
from per_instance_accountant.ledger import LedgerWriter, Phase, Run, Step
from per_instance_accountant.unlearning import issue, plan, plan_everyone, plan_once, verify

N, STEPS, DECAY, CLIP, BATCH = 6, 40, 0.5, 1.0, 4.0
NOBODY = Step(positions=np.empty(0, np.int64), contributions=np.empty(0, np.float32))
FLAT = {"smoothness": 0.0, "clipping_never_binds": True}


def trained(rate=0.2, noise=4.0, silent=5):
    """Full-batch training of losses without curvature, whose learning rate then fell to 0."""
    writer = LedgerWriter.create(None, Run(num_instances=N))
    phase = Phase(
        kind="train",
        sampling="poisson",
        sample_rate=1.0,
        noise_std=noise,
        max_grad_norm=CLIP,
        charging="worst_case",
        denominator=BATCH,
        learning_rate=rate,
        weight_decay=DECAY,
    )
    for count, learning_rate in ((STEPS, rate), (silent, 0.0)):
        writer.append(dataclasses.replace(phase, learning_rate=learning_rate))
        for _ in range(count):
            writer.append(NOBODY)
    return writer


def exact(steps, rate, noise, train_rate=0.2, train_noise=4.0):
    """mu of the final model: an affine chain that i shifts by the clip norm in each of the moving steps."""
    c, late = 1 - train_rate * DECAY, 1 - rate * DECAY
    age = np.arange(STEPS)
    shift = train_rate * CLIP / BATCH * (c**age).sum() * late**steps
    variance = (train_rate * train_noise / BATCH) ** 2 * (c ** (2 * age)).sum() * late ** (2 * steps)
    variance += (rate * noise / BATCH) ** 2 * (late ** (2 * np.arange(steps))).sum()
    return shift / np.sqrt(variance)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(rate=st.floats(0.01, 1.5), multiplier=st.floats(0.5, 20.0), steps=st.integers(1, 60))
def test_the_value_is_that_of_the_steps_as_they_are_taken(rate, multiplier, steps):
    ask = {"order": 8, "assumptions": FLAT, "learning_rate": rate, "noise_multiplier": multiplier}
    made = plan(trained().ledger(), [0], 1e-9, max_steps=steps, **ask)
    value, taken = made.value, steps if made.steps is None else made.steps
    truth = 8 * exact(taken, rate, multiplier * CLIP) ** 2 / 2
    assert truth * (1 - 1e-9) <= value <= truth * (1 + 1e-6)


def test_the_noise_of_training_would_be_caught():
    """Seeded bug: steps that are weaker than those of training, counted as if they were the same."""
    weak = 8 * exact(20, 0.05, 1.0) ** 2 / 2
    ask = {"order": 8, "assumptions": FLAT, "max_steps": 20}
    as_trained = plan(trained(silent=0).ledger(), [0], 1e-9, **ask).value
    assert as_trained < weak * 0.5


def test_a_schedule_that_ended_at_0_says_what_is_missing():
    ledger = trained().ledger()
    stuck = plan(ledger, [0], 0.01, order=8, assumptions=FLAT)
    assert stuck.steps is None
    assert [row.bound for row in stuck.not_applicable if "learning_rate=..." in row.reason] == ["noisy steps"]
    ask = {"order": 8, "assumptions": FLAT, "learning_rate": 0.2}
    made = plan(ledger, [0], 0.01, **ask)
    assert 8 * exact(made.steps, 0.2, 4.0) ** 2 / 2 <= 0.01 < 8 * exact(made.steps - 1, 0.2, 4.0) ** 2 / 2
    assert plan_everyone(ledger, 0.01, **ask).steps.tolist() == [made.steps] * N
    for name in ("learning_rate", "noise_multiplier"):
        for bad in (0.0, -1.0, np.nan, np.inf):
            with pytest.raises(UsageError, match="PIA070"):
                plan(ledger, [0], 0.01, order=8, **{name: bad})


def test_it_is_certified_as_planned_and_only_so(course, tmp_path):
    (tmp_path / "before").write_bytes(b"before")
    (tmp_path / "after").write_bytes(b"after")
    ask = {"order": 8, "learning_rate": 0.1, "noise_multiplier": 5.0}

    def run(**changes):
        started = course(assumptions=course().known.to_dict()).train(60).train(5, learning_rate=0.0)
        made = plan(started.ledger, [3], 0.1, **ask)
        started.unlearn(made, **changes)
        return made, started.ledger, issue(made, started.ledger, tmp_path / "before", tmp_path / "after")

    made, ledger, certificate = run()
    assert made.steps > 0 and certificate.predicate.mechanism.noise_std == 7.5
    assert verify(certificate, ledger=ledger, checkpoint=tmp_path / "after").valid
    for other in ({"learning_rate": 0.2}, {"noise_std": 6.0}):
        with pytest.raises(PlanError, match="PIA033"):
            run(**other)


def test_one_request_has_one_mechanism(tmp_path):
    ledger, file = trained().ledger(), tmp_path / "plan.json"
    ask = {"order": 8, "assumptions": FLAT, "request_id": "r-1"}
    first = plan_once(file, ledger, [0], 0.01, learning_rate=0.1, noise_multiplier=3.0, **ask)
    again = plan_once(file, ledger, [0], 0.01, learning_rate=0.1, noise_multiplier=3.0, **ask)
    assert again.digest == first.digest
    for other in (
        {"learning_rate": 0.1},
        {"noise_multiplier": 3.0},
        {"learning_rate": 0.2, "noise_multiplier": 3.0},
    ):
        with pytest.raises(PlanError, match="PIA085"):
            plan_once(file, ledger, [0], 0.01, **other, **ask)
