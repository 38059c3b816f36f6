"""Composition in expectation over training runs (Thudi et al. 2024): what repeated training suggests,
an ESTIMATE."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp

from per_instance_accountant.accounting.rules import Basis
from per_instance_accountant.divergence import sampled_gaussian_rdp
from per_instance_accountant.divergence.orders import (
    MAX_ORDER,
    as_float_array,
    as_nonnegative,
    as_orders,
    bad_argument,
)
from per_instance_accountant.errors import UsageError

Floats = NDArray[np.float64]

_RESAMPLES: Final = 400


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpectedLoss:
    """Composition in expectation of one instance, in nats; ``basis`` is always ESTIMATE.

    value: the right-hand side with means over the runs in place of expectations. low, high: 95 %
    bootstrap interval of ``value`` over the runs. bias: bootstrap estimate of mean(value) minus the
    right-hand side; below 0, because the logarithm of a mean of large numbers is too small on
    average. share_of_largest: (T,) share of the largest run in each mean; near 1, one run decides and
    neither interval nor bias means anything. orders: (T,) at which each step was charged.
    """

    value: float
    low: float
    high: float
    bias: float
    share_of_largest: Floats
    orders: Floats
    order: float
    num_runs: int
    basis: Basis = Basis.ESTIMATE


def expectation_orders(order: float, steps: int, holder: float) -> Floats:
    """(steps,) orders at which the steps are charged: ``order`` at the LAST step, rising to the first.

    ``a_(t-1) = (holder a_t - 1) / (holder - 1)``, holder above 1 (docs/math/expectation.md). Raises
    UsageError PIA070.

    >>> expectation_orders(2.0, 3, 5.0).tolist()
    [2.5625, 2.25, 2.0]
    """
    last = float(as_orders(order)[0])
    p = float(as_float_array("holder", holder, 0))
    if not 1 < p < math.inf:
        raise bad_argument("holder", f"is {p}", "(1, inf)")
    if not (int(steps) == steps and steps >= 1):
        raise bad_argument("steps", f"is {steps}", "whole numbers from 1 on")
    growth = (p / (p - 1)) ** np.arange(int(steps) - 1, -1, -1.0)
    return np.asarray(1 + (last - 1) * growth)


def expected_composition(
    sample_rate: float, ratios: ArrayLike, order: float, *, holder: float | None = None, seed: int = 0
) -> ExpectedLoss:
    """Estimate of ``D_order`` of T adaptive steps from R independent training runs WITH the instance.

    ratios: (R, T) norm of the instance's clipped gradient over the noise std at step t of run r,
    whether or not it was drawn. sample_rate in [0, 1]. holder: the exponent p > 1 of Hoelder's
    inequality, fixed before looking at the runs; None takes ``3 T``.

        D_order <= 1 / (order - 1) sum_t (p - 1)^(T - t) / p^(T - t + 1) log E exp(p (a_t - 1) D_t(a_t))

    with a_T = order and the orders of :func:`expectation_orders`. The inequality is a fact about
    expectations; means of a few runs take their place here, so the result bounds nothing. Source:
    Thudi et al. 2024 for the method; the schedule is derived in docs/math/expectation.md. Raises
    UsageError PIA070, PIA071; also when an order of the schedule exceeds 16384.

    >>> loss = expected_composition(1.0, [[0.1, 0.2], [0.1, 0.3], [0.1, 0.1]], 2.0, holder=8.0)
    >>> round(loss.value, 4), str(loss.basis), loss.num_runs
    (0.0618, 'ESTIMATE', 3)
    """
    r = as_nonnegative("ratios", ratios, 2)
    if r.ndim != 2 or r.shape[0] < 2 or r.shape[1] < 1:
        _refuse_shape(r.shape)
    if not np.isfinite(r).all():
        raise bad_argument("ratios", f"has {int(np.isinf(r).sum())} infinite entries", "[0, inf)")
    runs, steps = r.shape
    p = float(3 * steps if holder is None else holder)
    orders = expectation_orders(order, steps, p)
    if orders[0] > MAX_ORDER:
        raise bad_argument("holder", f"is {p}, whose orders reach {orders[0]:.3g}", "larger numbers")
    exponents = np.empty((runs, steps))
    for t, a in enumerate(orders):
        exponents[:, t] = p * (a - 1) * sampled_gaussian_rdp(sample_rate, r[:, t], a)[:, 0]
    weights = ((p - 1) / p) ** np.arange(steps - 1, -1, -1.0) / (p * (orders[-1] - 1))
    value = float(_log_means(exponents) @ weights)
    rng = np.random.default_rng(seed)
    again = np.array(
        [_log_means(exponents[rng.integers(0, runs, runs)]) @ weights for _ in range(_RESAMPLES)]
    )
    low, high = np.quantile(again, [0.025, 0.975])
    return ExpectedLoss(
        value=value,
        low=float(low),
        high=float(high),
        bias=float(again.mean() - value),
        share_of_largest=np.exp(exponents.max(axis=0) - logsumexp(exponents, axis=0)),
        orders=orders,
        order=float(orders[-1]),
        num_runs=runs,
    )


def _log_means(exponents: Floats) -> Floats:
    return np.asarray(logsumexp(exponents, axis=0) - math.log(len(exponents)))


def _refuse_shape(shape: tuple[int, ...]) -> NoReturn:
    raise UsageError(
        "PIA071",
        f"ratios has shape {shape}, allowed is (runs, steps) with two runs at least",
        "No expectation over runs can be estimated from it, nor its error",
        "expected_composition(0.01, np.stack([ratios_of_run_1, ratios_of_run_2]), order=8)",
    )
