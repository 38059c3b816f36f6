"""Statistical audits of whole runs: what an attacker provably achieves, by Clopper and Pearson's intervals.

A lower bound above the claimed epsilon proves the claim wrong, up to the error probability of the interval;
one below it proves nothing. The simulation is the strongest attack on a Poisson-sampled Gaussian run: a
canary whose gradient has the clip norm and is known, and the likelihood ratio of the claimed mechanism.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta

from per_instance_accountant.divergence import sampled_gaussian_epsilon
from per_instance_accountant.errors import UsageError

Floats = NDArray[np.float64]

_CHUNK: Final = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryRun:
    """A run as the accounting is told, and the mistakes of the one that really happens.

    steps, sample_rate, noise_multiplier: the claim. Factors of what happens instead: noise, sensitivity,
    rate. reused_noise: one noise vector for all steps.
    """

    steps: int
    sample_rate: float
    noise_multiplier: float
    noise_factor: float = 1.0
    sensitivity_factor: float = 1.0
    rate_factor: float = 1.0
    reused_noise: bool = False

    def claim(self, delta: float) -> float:
        """Epsilon at ``delta`` that the package states for this run.

        >>> round(CanaryRun(steps=100, sample_rate=0.1, noise_multiplier=1.0).claim(1e-5), 3)
        7.047
        """
        return float(
            sampled_gaussian_epsilon(self.sample_rate, [1 / self.noise_multiplier], [self.steps], delta)
        )


def scores(run: CanaryRun, trials: int, random: np.random.Generator, *, member: bool) -> Floats:
    """(trials,) log likelihood ratios of the claimed run, of runs with or without the canary."""
    q, std = run.sample_rate, run.noise_multiplier
    actual = std * run.noise_factor
    parts = []
    for size in _sizes(trials, run.steps):
        shape = (size, 1 if run.reused_noise else run.steps)
        x = np.broadcast_to(random.normal(0.0, actual, shape), (size, run.steps)).copy()
        if member:
            drawn = random.random((size, run.steps)) < min(q * run.rate_factor, 1.0)
            x += run.sensitivity_factor * drawn
        parts.append(np.log1p(q * np.expm1((2 * x - 1) / (2 * std * std))).sum(axis=1))
    return np.concatenate(parts)


def _sizes(trials: int, steps: int) -> list[int]:
    most = max(1, _CHUNK // steps)
    return [most] * (trials // most) + ([trials % most] if trials % most else [])


def epsilon_below(
    with_canary: ArrayLike,
    without: ArrayLike,
    delta: float,
    *,
    confidence: float = 0.95,
    thresholds: int = 40,
) -> float:
    """LOWER bound of epsilon at ``delta`` from scores of runs with and without the canary; both directions.

    The first half of the scores chooses threshold and direction, the second half is counted once, so
    that the confidence needs no correction (our derivation). 0 where nothing is found.

    >>> random = np.random.default_rng(0)
    >>> apart = epsilon_below(random.normal(4, 1, 4000), random.normal(0, 1, 4000), 1e-5)
    >>> 4 < apart < 6.5, epsilon_below(random.normal(size=100), random.normal(size=100), 1e-5)
    (True, 0.0)
    """
    x, y = np.asarray(with_canary, dtype=np.float64), np.asarray(without, dtype=np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all() and min(x.size, y.size) >= 4):
        raise UsageError(
            "PIA070",
            f"{x.size} and {y.size} scores, or scores that are not finite",
            "No lower bound follows from them",
            "epsilon_below(scores_of_members, scores_of_others, 1e-5)",
        )
    pilot = np.concatenate([x[::2], y[::2]])
    cuts = np.quantile(pilot, np.linspace(0.002, 0.998, thresholds))
    best, choice = -math.inf, (0.0, 1)
    for sign in (1, -1):
        for cut in cuts:
            guess = _bound(*_counts(x[::2], y[::2], float(cut), sign), delta, 1 - confidence)
            if guess > best:
                best, choice = guess, (float(cut), sign)
    return max(_bound(*_counts(x[1::2], y[1::2], *choice), delta, 1 - confidence), 0.0)


def _counts(x: Floats, y: Floats, cut: float, sign: int) -> tuple[int, int, int, int]:
    """Hits, trials, false alarms, trials of the attack "above the cut", or "below" in the other direction."""
    if sign > 0:
        return int((x > cut).sum()), x.size, int((y > cut).sum()), y.size
    return int((y < cut).sum()), y.size, int((x < cut).sum()), x.size


def _bound(hits: int, trials: int, alarms: int, others: int, delta: float, error: float) -> float:
    """``log((p - delta) / f)`` with p a lower and f an upper confidence limit, each at error / 2."""
    p = float(beta.ppf(error / 2, hits, trials - hits + 1)) if hits else 0.0
    f = float(beta.ppf(1 - error / 2, alarms + 1, others - alarms)) if alarms < others else 1.0
    return math.log((p - delta) / f) if p > delta else -math.inf


def audit_run(
    run: CanaryRun, delta: float, *, trials: int, seed: int, confidence: float = 0.95
) -> tuple[float, float]:
    """(lower bound, claim) of one simulated run with ``trials`` canaries in and as many out.

    >>> halved = CanaryRun(steps=100, sample_rate=0.1, noise_multiplier=1.0, noise_factor=0.5)
    >>> low, claim = audit_run(halved, 1e-5, trials=4000, seed=0)
    >>> bool(low < claim)
    True
    """
    random = np.random.default_rng(seed)
    low = epsilon_below(
        scores(run, trials, random, member=True),
        scores(run, trials, random, member=False),
        delta,
        confidence=confidence,
    )
    return low, run.claim(delta)
