"""R1 against exact ridge laws and fixtures; published routes reproduce their numbers and never certify."""

from __future__ import annotations

import math

import numpy as np
import pytest

from per_instance_accountant.unlearning import bounds
from per_instance_accountant.unlearning.applicable import ROWS
from tests.unlearning.test_shifted_lsi_bound import Ridge, gaussian_renyi, random_ridge

RIDGE = {(2, 1): 0.1716213682, (2, 5): 0.1035213934, (2, 20): 0.01672194796, (8, 20): 0.2302143948}


def fixed(ridge, first, second, order):
    return bounds.fixed_lsi(
        curve=lambda orders: np.array([gaussian_renyi(first, second, a) for a in orders.tolist()]),
        noise_std=np.zeros(1),
        contraction=np.ones(1),
        initial_constant=float(np.linalg.eigvalsh(second[1])[-1]),
        unlearning_noise_std=ridge.noise,
        unlearning_contraction=ridge.factor(ridge.retain[0]),
        order=order,
    )


@pytest.mark.parametrize(("order", "steps"), list(RIDGE))
def test_fixed_order_fixture(order, steps):
    x, y = np.array([[1.0, 0], [0, 1], [1, 1]]), np.array([1.0, 0, 2])
    ridge, start = Ridge(x, y, 0.1, 0.5, 0.1), (np.zeros(2), np.zeros((2, 2)))
    p, q = ridge.run(ridge.full, start, 10), ridge.run(ridge.retain, start, 10)
    assert fixed(ridge, p, q, order).value(steps) == pytest.approx(RIDGE[order, steps], rel=1e-8)


def test_fixed_order_is_never_below_exact_ridge_and_the_missing_order_is_caught():
    rng = np.random.default_rng(77)
    checked = wrong = 0
    for _ in range(80):
        ridge, origin = random_ridge(rng)
        start = (origin, float(rng.choice([0, 0.1, 1.0])) * np.eye(len(origin)))
        training = int(rng.integers(1, 80))
        p, q = ridge.run(ridge.full, start, training), ridge.run(ridge.retain, start, training)
        for order in (1.5, 4, 10):
            for first, second in ((p, q), (q, p)):
                bound = fixed(ridge, first, second, order)
                for steps in (1, 3, 20):
                    exact = gaussian_renyi(
                        ridge.run(ridge.retain, first, steps), ridge.run(ridge.retain, second, steps), order
                    )
                    if 1e-9 < exact < math.inf:
                        checked += 1
                        assert bound.value(steps) >= exact * (1 - 1e-7)
                        left = bound.constant / (bound.constant + bound.tail.inverse_noise(steps))
                        wrong += bound.value(0) * left < exact * (1 - 1e-6)
    assert checked > 800 and wrong > 30


SETTING = {
    "strong_convexity": 1e-6 * 11264,
    "step_size": 1 / (0.25 + 1e-6 * 11264),
    "temperature_std": 0.03,
    "gradient_norm": 1.0,
    "num_instances": 11264,
    "delta": 1 / 11264,
}
TABLE = [(1, 0.05, 23094, 7480, 72, 60), (10, 0.5, 2425, 1351, 72, 66), (100, 1.0, 2154, 1447, 109, 104)]


@pytest.mark.parametrize(("replaced", "epsilon", "langevin", "improved", "sgd", "sgd_improved"), TABLE)
def test_the_published_table_is_reproduced(replaced, epsilon, langevin, improved, sgd, sgd_improved):
    routes = (bounds.langevin_unlearning, bounds.noisy_sgd_unlearning)
    found = [
        route(**SETTING, replaced=replaced, conversion=conversion).steps(epsilon)
        for route in routes
        for conversion in ("mironov", "improved")
    ]
    assert found == [langevin, improved, sgd, sgd_improved]


def test_the_published_initial_loss_is_at_least_twice_the_exact_one():
    setting = {k: v for k, v in SETTING.items() if k != "delta"}
    published = bounds.langevin_unlearning(**setting, order=4).value(0)
    eta, m = SETTING["step_size"], SETTING["strong_convexity"]
    exact = bounds.contractive(
        sensitivity=2 * eta / 11264,
        noise_std=math.sqrt(2 * eta) * 0.03,
        contraction=1 - eta * m,
        training_steps=100_000,
        order=4,
    ).value(0)
    assert published >= 2 * exact > 0


def test_the_reconstruction_has_an_irreducible_term():
    route = bounds.weak_triangle_reconstruction(
        loss=lambda a: 0.1 * a,
        distance=lambda a: 0.01 * a,
        constant=0.1,
        step_size=0.1,
        temperature_std=0.3,
        order=2.0,
    )
    assert route.irreducible == pytest.approx(1.5 * 0.04, rel=1e-12)
    assert route.value(10**6) == pytest.approx(route.irreducible, rel=1e-12)
    assert route.steps(route.irreducible * 0.99) == math.inf
    enough = route.steps(0.1)
    factor = 1.5 * (3.5 / 3) * (0.8 + 0.08)
    closed = 2 * 0.1 / (0.09 * 0.1) * math.log(factor / (0.1 - route.irreducible))
    assert enough == math.ceil(closed)


def test_no_published_route_can_plan_or_certify():
    assert not any("unlearning" in row.name or "Sepahvand" in row.name for row in ROWS)
    assert not issubclass(bounds.Published, bounds.Bound)
