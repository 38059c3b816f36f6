"""The fold on other mechanisms: shuffled and full batches, schedules of noise, clip norm and rate."""

from __future__ import annotations

import numpy as np
import pytest

from per_instance_accountant import account
from per_instance_accountant.divergence import gaussian_epsilon, sampled_gaussian_rdp
from per_instance_accountant.ledger import LedgerWriter, Phase, Run, Step, Thresholds

N, ORDERS = 12, np.array([1.5, 4.0, 16.0])


def phase(**changes):
    values = {
        "kind": "train",
        "sampling": "poisson",
        "sample_rate": 0.25,
        "noise_std": 2.0,
        "max_grad_norm": 1.0,
        "charging": "fixed_thresholds",
        "denominator": 1.0,
        "learning_rate": 0.1,
    }
    return Phase(**(values | changes))


def recorded(*events):
    writer = LedgerWriter.create(None, Run(num_instances=N))
    for event in events:
        writer.append(event)
    return writer.ledger()


def step(positions=(), value=0.0):
    return Step(
        positions=np.array(positions, np.int64), contributions=np.full(len(positions), value, np.float32)
    )


THRESHOLDS = np.linspace(0.1, 1.5, N).astype(np.float32)


def test_schedules_of_noise_clip_norm_and_rate():
    """Each step at its own mechanism: never below the naive sum or 1 % above; a frozen one is caught."""
    draw = np.random.default_rng(0)
    mechanisms = [
        phase(
            noise_std=float(draw.uniform(1, 4)),
            max_grad_norm=float(draw.uniform(0.4, 1.2)),
            sample_rate=float(draw.choice([0.01, 0.25, 1.0])),
        )
        for _ in range(25)
    ]
    events = [Thresholds(values=THRESHOLDS, source="fixed")]
    for mechanism in mechanisms:
        events += [mechanism, step()]
    exact, frozen = np.zeros((N, 3)), np.zeros((N, 3))
    for mechanism in mechanisms:
        for sums, used in ((exact, mechanism), (frozen, mechanisms[0])):
            bounds = np.minimum(THRESHOLDS.astype(np.float64), used.max_grad_norm)
            sums += sampled_gaussian_rdp(used.sample_rate, bounds / used.noise_std, ORDERS)
    loss = account(recorded(*events), orders=ORDERS)
    assert (loss.rdp >= exact * (1 - 1e-12)).all() and (loss.rdp <= exact * 1.01).all()
    assert not ((loss.rdp >= frozen * (1 - 1e-12)) & (loss.rdp <= frozen * 1.01)).all()
    worst = sum(
        sampled_gaussian_rdp(m.sample_rate, [m.max_grad_norm / m.noise_std], ORDERS)[0] for m in mechanisms
    )
    assert (loss.worst_case_rdp >= worst * (1 - 1e-12)).all()
    assert np.allclose(loss.worst_case_rdp, worst, rtol=1e-6, atol=0)


def test_full_batch_is_gaussian():
    events = [Thresholds(values=THRESHOLDS, source="fixed"), phase(sample_rate=1.0)]
    loss = account(recorded(*events, *[step(range(N), 0.1)] * 9), orders=ORDERS)
    mu = 3 * np.minimum(THRESHOLDS.astype(np.float64), 1.0) / 2.0
    assert np.allclose(loss.mu, mu, rtol=1e-6, atol=0) and (loss.mu >= mu * (1 - 1e-12)).all()
    assert (loss.epsilon(1e-5) <= gaussian_epsilon(mu, 1e-5) * (1 + 1e-6)).all()


@pytest.mark.parametrize("rate", [0.25, 1.0])
def test_shuffled_batches_are_never_amplified(rate):
    """One pass over the data in batches of three: everybody is charged what each entered with, once."""
    order = np.random.default_rng(1).permutation(N)
    batches = [step(order[i : i + 3], 0.8) for i in range(0, N, 3)]
    mechanism = phase(sampling="shuffled", charging="unamplified", sample_rate=rate)
    loss = account(recorded(mechanism, *batches), orders=ORDERS)
    once = ORDERS / 2 * (np.float64(np.float32(0.8)) / 2.0) ** 2
    assert np.allclose(loss.rdp, once, rtol=1e-6, atol=0) and (loss.rdp >= once * (1 - 1e-12)).all()
    # Seeded bug: the amplified loss of four steps, which shuffling does not earn.
    amplified = len(batches) * sampled_gaussian_rdp(0.25, [0.4], ORDERS)[0]
    assert not (amplified >= once).all()
    charged = account(recorded(phase(sampling="shuffled", charging="worst_case"), *batches), orders=ORDERS)
    assert np.allclose(charged.rdp, 4 * ORDERS / 2 * 0.25, rtol=1e-6, atol=0)
