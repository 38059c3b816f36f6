"""Lower bounds on epsilon from canaries: what an attacker demonstrably learns, against what is
claimed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import beta, binom

from per_instance_accountant.errors import UsageError
from per_instance_accountant.evaluation.measures.intervals import finite, require

Reals = NDArray[np.float64]
_LARGEST = 50.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EmpiricalEpsilon:
    """epsilon: lower bound, at least 0, that holds with probability ``confidence`` over the runs if the
    claim is (epsilon, delta)-indistinguishability. runs: of each kind. An attack that is too weak gives
    0, which proves nothing."""

    epsilon: float
    delta: float
    confidence: float
    runs: int


def empirical_epsilon(
    with_instance: ArrayLike, without: ArrayLike, *, delta: float = 0.0, confidence: float = 0.95
) -> EmpiricalEpsilon:
    """Lower bound from repeated runs by Clopper and Pearson, in both directions.

    with_instance, without: (m,) one score per independent run, larger for more memory of the instance.
    The first half of the runs chooses the threshold, the second half tests it once, so that nothing is
    chosen by looking at what is tested. Raises UsageError PIA070, PIA125 for fewer than 20 runs of each
    kind, GuaranteeError PIA011.

    >>> half = np.repeat([0.0, 1.0], 200)
    >>> empirical_epsilon(half, half).epsilon
    0.0
    """
    first, second = finite(with_instance, "scores").ravel(), finite(without, "scores").ravel()
    if not (0 <= delta < 1 and 0 < confidence < 1):
        raise UsageError(
            "PIA070",
            f"delta {delta} or confidence {confidence} is outside its range",
            "No bound has them",
            "empirical_epsilon(scores_with, scores_without, delta=1e-5, confidence=0.95)",
        )
    runs = min(first.size, second.size)
    require(runs, 20, "runs of each kind", "scores of 500 runs with and 500 without")
    above, threshold = _best_threshold(first[::2], second[::2], delta)
    kinds = (first, second) if above else (-second, -first)
    hits, alarms = (values[1::2] > (threshold if above else -threshold) for values in kinds)
    # Two one-sided bounds share the error.
    level = (1 - confidence) / 2
    found, other = int(hits.sum()), int(alarms.sum())
    low = 0.0 if found == 0 else float(beta.ppf(level, found, hits.size - found + 1))
    high = 1.0 if other == alarms.size else float(beta.ppf(1 - level, other + 1, alarms.size - other))
    epsilon = np.log((low - delta) / high) if low > delta else 0.0
    return EmpiricalEpsilon(epsilon=max(0.0, float(epsilon)), delta=delta, confidence=confidence, runs=runs)


def _best_threshold(first: Reals, second: Reals, delta: float) -> tuple[bool, float]:
    """Whether to guess "with" above or "without" below, and the threshold, by the largest ratio of
    rates."""
    points = np.unique(np.concatenate([first, second]))
    candidates = (points[1:] + points[:-1]) / 2 if points.size > 1 else points
    best = (-np.inf, True, float(candidates[0]))
    for above in (True, False):
        right, wrong = (first, second) if above else (-second, -first)
        cut = candidates if above else -candidates
        hits = (right[None] > cut[:, None]).mean(1)
        alarms = ((wrong[None] > cut[:, None]).sum(1) + 1.0) / (wrong.size + 1.0)
        ratio = np.log(np.maximum(hits - delta, 1e-12) / alarms)
        place = int(ratio.argmax())
        best = max(best, (float(ratio[place]), above, float(candidates[place])))
    return best[1], best[2]


def one_run_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Upper bound on the chance of at least ``correct`` right guesses of ``guesses``, for any mechanism
    with (epsilon, delta) and ``canaries`` coins (Steinke, Nasr and Jagielski 2023).

    >>> round(one_run_p_value(100, 100, 50, 0.0, 0.0), 4)
    0.5398
    """
    share = 1 / (1 + np.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, share))
    masses = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, share))
    worst = float((masses / np.arange(1, correct + 1)).max()) if correct > 0 and delta > 0 else 0.0
    return min(1.0, tail + 2 * canaries * delta * worst)


def one_run_epsilon(
    scores: ArrayLike,
    included: ArrayLike,
    *,
    guesses: int | None = None,
    delta: float = 0.0,
    confidence: float = 0.95,
) -> EmpiricalEpsilon:
    """Lower bound from one run with m canaries, each included by an independent fair coin.

    scores: (m,) larger for "included". included: (m,) the coins. guesses: half of them on the largest
    scores, half on the smallest, the rest abstain; fixed beforehand, default m / 2. The bound holds for
    the mechanism that takes all canaries together, each of which the claim must cover. Raises
    UsageError PIA070, PIA071, PIA125 for fewer than 20 canaries, GuaranteeError PIA011.
    """
    values, coins = finite(scores, "scores").ravel(), np.asarray(included, dtype=np.bool_).ravel()
    if values.shape != coins.shape:
        raise UsageError(
            "PIA071",
            f"{values.size} scores and {coins.size} coins",
            "No guess can be checked",
            "one_run_epsilon(scores, included)",
        )
    require(values.size, 20, "canaries", "1000 canaries")
    half = (values.size // 2 if guesses is None else int(guesses)) // 2
    if not (0 < 2 * half <= values.size and 0 <= delta < 1 and 0 < confidence < 1):
        raise UsageError(
            "PIA070",
            f"{guesses} guesses, delta {delta}, confidence {confidence}",
            "No bound has them",
            f"one_run_epsilon(scores, included, guesses={values.size // 2})",
        )
    order = np.argsort(values, kind="stable")
    correct = int(coins[order[-half:]].sum() + (~coins[order[:half]]).sum())

    def excess(epsilon: float) -> float:
        return one_run_p_value(values.size, 2 * half, correct, epsilon, delta) - (1 - confidence)

    if excess(0.0) >= 0:
        bound = 0.0
    elif excess(_LARGEST) < 0:
        bound = _LARGEST
    else:
        bound = float(brentq(excess, 0.0, _LARGEST, xtol=1e-9)) - 1e-8
    return EmpiricalEpsilon(epsilon=max(0.0, bound), delta=delta, confidence=confidence, runs=values.size)
