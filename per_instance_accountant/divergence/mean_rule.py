"""Renyi divergence of a step that releases the MEAN of the drawn instances' clipped gradients."""

from __future__ import annotations

import itertools
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp

from per_instance_accountant.divergence.orders import as_float_array, bad_argument

_MOST_TUPLES: Final = 5_000_000


def mean_rule_rdp(
    probabilities: ArrayLike,
    means: ArrayLike,
    other_probabilities: ArrayLike,
    other_means: ArrayLike,
    order: int,
    noise_std: float,
) -> float:
    """Upper bound, in nats, of ``D_order(P || Q)`` for releases ``U(B) + N(0, noise_std^2 I)``, B
    random.

    P takes the value ``means[j]`` (j, d) with ``probabilities`` (j,), Q ``other_means`` (k, d) with
    ``other_probabilities`` (k,): the mean over the drawn batch for every batch that can be drawn,
    with and without the instance. noise_std is in the units of the MEAN. Both directions take two
    calls. Order: an integer from 2 on.

        1 / (a - 1) E_{B ~ Q} log E_{B_1 .. B_a ~ P} exp(-[sum |U_j|^2 - (a - 1) |U|^2 - |sum U_j -
        (a - 1) U|^2]
                                                         / (2 noise_std^2))

    Convexity of the divergence in its second argument takes E_B outside (Thudi et al. 2024; derived in
    docs/math/tight_epsilon.md). Sums are over every batch: a sample mean in their place would be too
    small. Raises UsageError PIA070 or PIA071, also when there are more than 5,000,000 tuples of batches.

    >>> round(mean_rule_rdp([0.5, 0.5], [[0.0], [1.0]], [1.0], [[0.0]], 2, 1.0), 6)
    0.357374
    """
    p, q = (_distribution(values) for values in (probabilities, other_probabilities))
    u = _points("means", means, p.size)
    v = _points("other_means", other_means, q.size)
    if not (int(order) == order and order >= 2):
        raise bad_argument("order", f"is {order}", "integers from 2 on")
    if not 0 < noise_std < np.inf:
        raise bad_argument("noise_std", f"is {noise_std}", "(0, inf)")
    if u.shape[1] != v.shape[1] or p.size ** int(order) > _MOST_TUPLES:
        allowed = f"equal dimensions and at most {_MOST_TUPLES} tuples"
        raise bad_argument(
            "means", f"have shapes {u.shape}, {v.shape} at order {order}", allowed, code="PIA071"
        )
    tuples = np.array(list(itertools.product(range(p.size), repeat=int(order))))
    weight = np.log(np.maximum(p, 1e-300))[tuples].sum(axis=1)
    square, total = (u * u).sum(axis=1)[tuples].sum(axis=1), u[tuples].sum(axis=1)
    terms = []
    for centre in v:
        rest = total - (order - 1) * centre
        exponent = square - (order - 1) * (centre @ centre) - (rest * rest).sum(axis=1)
        terms.append(float(logsumexp(weight - exponent / (2 * noise_std**2))))
    return max(float(q @ np.array(terms)), 0.0) / (order - 1) * (1 + 1e-12) + 1e-15


def _distribution(values: ArrayLike) -> NDArray[np.float64]:
    p = np.atleast_1d(as_float_array("probabilities", values, 1))
    if not ((p >= 0).all() and abs(p.sum() - 1) <= 1e-9):
        raise bad_argument("probabilities", f"sum to {p.sum()}", "non-negative numbers that sum to 1")
    return np.asarray(p / p.sum())


def _points(name: str, values: ArrayLike, size: int) -> NDArray[np.float64]:
    points = as_float_array(name, values, 2)
    if points.ndim != 2 or len(points) != size or not np.isfinite(points).all():
        raise bad_argument(name, f"has shape {points.shape}", f"a finite ({size}, d) array", code="PIA071")
    return points
