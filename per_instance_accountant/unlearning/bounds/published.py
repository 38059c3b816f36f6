"""Published routes to a number of unlearning steps, as baselines. None of them feeds a plan or a certificate:
they compare with other reference laws, and rest on training that has converged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.unlearning.bounds.interface import MAX_STEPS, Measure, least_steps, require
from per_instance_accountant.unlearning.bounds.shifted_lsi import Curve

Array = NDArray[np.float64]
_ORDERS: Final = 1 + np.geomspace(1e-4, 1e6, 2000)

CONVERSIONS: Final[dict[str, Callable[[Array, float], Array]]] = {
    "mironov": lambda orders, delta: -math.log(delta) / (orders - 1),
    "improved": lambda orders, delta: (
        np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    ),
}
"""Added to the Renyi divergence: Mironov 2017, and Canonne, Kamath and Steinke 2020, Proposition 12."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Published:
    """One published route. reference: the law it compares with. irreducible: what no step removes, in nats,
    at the order of the measure (0: nothing; NaN: not applicable at a delta)."""

    name: str
    reference: str
    measure: Measure
    conversion: str
    curve: Callable[[int, Array], Array]
    irreducible: float = 0.0

    def value(self, steps: int) -> float:
        """Divergence or epsilon after ``steps`` by this route, not rounded to any side; never below 0."""
        if self.measure.order is not None:
            return float(self.curve(steps, np.array([self.measure.order]))[0])
        add, delta = CONVERSIONS[self.conversion], self.measure.delta or math.nan

        def least(orders: Array) -> tuple[float, int]:
            total = self.curve(steps, orders) + add(orders, delta)
            return float(total.min()), int(total.argmin())

        coarse, at = least(_ORDERS)
        fine, _ = least(np.linspace(_ORDERS[max(at - 1, 0)], _ORDERS[min(at + 1, len(_ORDERS) - 1)], 400))
        return max(0.0, min(coarse, fine))

    def steps(self, target: float, max_steps: int = MAX_STEPS) -> float:
        """Least number of steps with ``value <= target``; inf where there is none."""
        require(0 < target < math.inf, "target", target, "(0, inf)")
        return least_steps(lambda k: self.value(k) <= target, max_steps)


def langevin_unlearning(
    *,
    strong_convexity: float,
    step_size: float,
    temperature_std: float,
    gradient_norm: float,
    num_instances: int,
    replaced: int = 1,
    order: float | None = None,
    delta: float | None = None,
    conversion: str = "mironov",
) -> Published:
    """Chien et al. 2024 (Langevin unlearning), strongly convex, trained to stationarity: ``exp(-K m eta / a)
    4 a S^2 M^2 / (m sigma^2 n^2)``, noise ``sqrt(2 eta) sigma`` per step, S of n rows replaced. As their
    released code computes it.

    >>> m = 1e-6 * 11264
    >>> langevin_unlearning(strong_convexity=m, step_size=1 / (0.25 + m), temperature_std=0.03,
    ...     gradient_norm=1.0, num_instances=11264, delta=1 / 11264).steps(0.05)
    23094
    """
    start = 4 * (replaced * gradient_norm / num_instances) ** 2 / (strong_convexity * temperature_std**2)

    def curve(steps: int, orders: Array) -> Array:
        return np.exp(-steps * strong_convexity * step_size / orders) * start * orders

    return Published(
        name="Langevin unlearning (Chien et al. 2024 a)",
        reference="retrained, at stationarity",
        measure=Measure(order=order, delta=delta),
        conversion=conversion,
        curve=curve,
    )


def noisy_sgd_unlearning(
    *,
    strong_convexity: float,
    step_size: float,
    temperature_std: float,
    gradient_norm: float,
    num_instances: int,
    batch_size: int | None = None,
    replaced: int = 1,
    order: float | None = None,
    delta: float | None = None,
    conversion: str = "mironov",
) -> Published:
    """Chien et al. 2024 (certified unlearning by noisy SGD), cyclic batches, K in EPOCHS of n / b steps:
    ``a Z^2 / (2 eta sigma^2) c^(2 K n / b)``, ``c = 1 - eta m``, ``Z = 2 eta M S / (b (1 - c^(n/b)))``.
    As their released code computes it; batch_size None is full batch.

    >>> m = 1e-6 * 11264
    >>> noisy_sgd_unlearning(strong_convexity=m, step_size=1 / (0.25 + m), temperature_std=0.03,
    ...     gradient_norm=1.0, num_instances=11264, delta=1 / 11264).steps(0.05)
    72
    """
    batch = num_instances if batch_size is None else batch_size
    per_epoch = num_instances / batch
    log_c = math.log1p(-step_size * strong_convexity)
    distance = 2 * step_size * gradient_norm * replaced / (batch * -math.expm1(per_epoch * log_c))
    scale = distance**2 / (2 * step_size * temperature_std**2)

    def curve(steps: int, orders: Array) -> Array:
        return orders * scale * math.exp(2 * steps * per_epoch * log_c)

    return Published(
        name="noisy-SGD unlearning (Chien et al. 2024 b)",
        reference="retrained, at stationarity",
        measure=Measure(order=order, delta=delta),
        conversion=conversion,
        curve=curve,
    )


def weak_triangle_reconstruction(
    *, loss: Curve, distance: Curve, constant: float, step_size: float, temperature_std: float, order: float
) -> Published:
    """A reconstruction of the per-instance statement of Sepahvand et al. 2025 (order 4a, irreducible term).
    Not the paper's text: two weak triangle inequalities and fixed-order decay, docs/math.

    loss: P(orders), the instance's loss of training. distance: divergence between the retrained model and the
    stationary law. constant: log-Sobolev constant C of the latter. ``w(a) (exp(-K sigma^2 eta / (a C))
    w(2a) (P(4a) + distance(4a)) + distance(2a))`` with ``w(a) = (a - 1/2) / (a - 1)``; the last term does not
    fall with K.

    >>> route = weak_triangle_reconstruction(loss=lambda a: 0.1 * a, distance=lambda a: 0.01 * a,
    ...     constant=0.1, step_size=0.1, temperature_std=0.3, order=2.0)
    >>> round(route.irreducible, 6), route.steps(0.05), route.steps(0.1)
    (0.06, inf, 82)
    """
    require(1 < order < math.inf, "order", order, "(1, inf)")

    def weight(orders: Array) -> Array:
        return (orders - 0.5) / (orders - 1)

    def floor(orders: Array) -> Array:
        return weight(orders) * distance(2 * orders)

    def curve(steps: int, orders: Array) -> Array:
        decay = np.exp(-steps * temperature_std**2 * step_size / (orders * constant))
        far = weight(2 * orders) * (loss(4 * orders) + distance(4 * orders))
        return weight(orders) * decay * far + floor(orders)

    return Published(
        name="reconstruction of Sepahvand et al. 2025",
        reference="retrained, exactly as many steps as training",
        measure=Measure(order=order),
        conversion="mironov",
        curve=curve,
        irreducible=float(floor(np.array([order]))[0]),
    )
