"""Slow and simple: values to hold an implementation against, by other ways than the package's own.

High precision by mpmath, closed forms, and loops that say what they mean. Nothing here is fast, and
nothing here calls the code that it is meant to judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import mpmath as mp
import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

Floats = NDArray[np.float64]

_DIGITS: Final = 40
_REACH: Final = 12
"""Standard deviations of which integrals take account; what lies beyond has a share below 1e-30."""
_CELLS: Final = 1 << 18
_WINDOW_BELOW: Final = 40.0
_WINDOW_ABOVE: Final = 60.0
"""Sums of privacy losses are resolved from minus the one to the other, in nats."""
_FFT_ERROR: Final = 1e-12


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Exact delta of ``N(0, 1)`` against ``N(mu, 1)`` at ``epsilon`` (Balle and Wang 2018, Theorem 8).

    >>> round(gaussian_delta(1.0, 1.0), 10)
    0.1269367375
    """
    with mp.workdps(_DIGITS):
        m, e = mp.mpf(mu), mp.mpf(epsilon)
        # Both terms have the size of delta times 1 / mu^2, so 40 digits leave enough.
        return float(mp.ncdf(m / 2 - e / m) - mp.exp(e) * mp.ncdf(-m / 2 - e / m))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Smallest epsilon >= 0 at which :func:`gaussian_delta` is at most ``delta``, rounded down by 1e-12.

    >>> round(gaussian_epsilon(1.0, 1e-5), 6)
    4.377178
    """
    return _smallest_epsilon(lambda epsilon: gaussian_delta(mu, epsilon), delta, 1.0 + mu * mu / 2)


def _smallest_epsilon(delta_at: Callable[[float], float], delta: float, high: float) -> float:
    """By bisection on a nonincreasing curve; the lower end, so that it is never above the exact value."""
    if delta_at(0.0) <= delta:
        return 0.0
    low = 0.0
    while delta_at(high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if delta_at(middle) > delta else (low, middle)
    return low * (1 - 1e-12)


def sampled_gaussian_rdp(sample_rate: float, ratio: float, order: float) -> float:
    """``D_order((1 - q) N(0, 1) + q N(ratio, 1) || N(0, 1))`` in nats (Mironov, Talwar and Zhang 2019).

    Integer orders up to 512 by the binomial sum, others by quadrature, both in 40 digits and more.

    >>> round(sampled_gaussian_rdp(0.01, 1.0, 2.0), 12), round(sampled_gaussian_rdp(0.01, 1.0, 1.5), 12)
    (0.000171813422, 0.000127253743)
    """
    if sample_rate == 0 or ratio == 0:
        return 0.0
    if sample_rate == 1:
        return order * ratio * ratio / 2
    with mp.workdps(_DIGITS):
        q, r, a = mp.mpf(sample_rate), mp.mpf(ratio), mp.mpf(order)
        moment = _binomial_sum if order == int(order) and order <= 512 else _quadrature
        return float(mp.log1p(moment(q, r, a)) / (a - 1))


def _binomial_sum(q: Any, r: Any, a: Any) -> Any:
    """``A - 1`` for integer a, without cancellation."""
    n, term, total = int(a), (1 - q) ** int(a), mp.mpf(0)
    for k in range(n + 1):
        total += term * mp.expm1(k * (k - 1) * r * r / 2)
        term = term * (n - k) / (k + 1) * q / (1 - q)
    return total


def _quadrature(q: Any, r: Any, a: Any) -> Any:
    """``A - 1 = E[(1 + u)^a - 1 - a u]`` with ``u = q (exp(r x - r^2 / 2) - 1)``, x standard normal.

    The trapezoidal rule errs by ``exp(-2 pi d / h)``, d = pi / r being the distance of the nearest
    singularity from the real axis; where that needs too many points, Gauss and Legendre's rule
    between the bumps of the integrand.
    """

    def integrand(x: Any) -> Any:
        u = q * mp.expm1(r * x - r * r / 2)
        return mp.exp(-x * x / 2) * (mp.expm1(a * mp.log1p(u)) - a * u)

    low, high = -_REACH - r, a * r + _REACH
    step = min(0.2, 0.3 / r)
    if (high - low) / step <= 4000:
        first = mp.mpf(low)
        count = int((high - low) / step) + 1
        total = step * mp.fsum(integrand(first + i * step) for i in range(count))
    else:
        turn = mp.log((1 - q) / q) / r + r / 2
        marks = {c + w for c in (mp.mpf(0), r, a * r, turn) for w in (-_REACH, -3, 0, 3, _REACH)}
        points = [low, *sorted(m for m in marks if low < m < high), high]
        total = mp.quad(integrand, points, method="gauss-legendre")
    return total / mp.sqrt(2 * mp.pi)


def step_delta(sample_rate: float, ratio: float, epsilon: float) -> float:
    """Exact delta of one Poisson-sampled Gaussian step at ``epsilon``, the larger of both directions.

    One threshold decides either test, because the likelihood ratio ``1 - q + q exp(ratio x - ratio^2 /
    2)`` rises with x (our derivation).

    >>> round(step_delta(1.0, 1.0, 1.0), 10)
    0.1269367375
    """
    with mp.workdps(_DIGITS):
        q, r, e = mp.mpf(sample_rate), mp.mpf(ratio), mp.mpf(epsilon)

        def mixed(x: Any) -> Any:
            """Tail of the mixture above x."""
            return (1 - q) * mp.ncdf(-x) + q * mp.ncdf(r - x)

        def threshold(level: Any) -> Any:
            """Where the likelihood ratio reaches ``level``."""
            return mp.log((level - (1 - q)) / q) / r + r / 2

        up = threshold(mp.exp(e))
        removed = mixed(up) - mp.exp(e) * mp.ncdf(-up)
        added = mp.mpf(0)
        if mp.exp(-e) > 1 - q:
            down = threshold(mp.exp(-e))
            added = mp.ncdf(down) - mp.exp(e) * ((1 - q) * mp.ncdf(down) + q * mp.ncdf(down - r))
        return float(max(removed, added, 0))


def step_epsilon(sample_rate: float, ratio: float, delta: float) -> float:
    """Smallest epsilon >= 0 at which :func:`step_delta` is at most ``delta``, rounded down by 1e-12.

    >>> round(step_epsilon(0.02, 1.0, 1e-5), 4)
    0.4389
    """
    return _smallest_epsilon(lambda epsilon: step_delta(sample_rate, ratio, epsilon), delta, 1.0)


def run_epsilon_below(sample_rate: float, ratio: float, steps: int, delta: float) -> float:
    """LOWER bound of epsilon at ``delta`` after equal Poisson-sampled Gaussian steps, remove direction.

    delta: in [1e-10, 1). The outputs of every step are put into cells, which can only hide something, and
    the privacy loss of a cell is rounded down; the sum over steps is a circular convolution (our
    derivation). Sums above the window wrap to its bottom, which is safe. Those below -40 wrap to its
    top: at most ``exp(steps * gap - 40)`` of the mass, which is added to ``delta`` with what the
    transforms may err.

    >>> round(run_epsilon_below(0.01, 1 / 0.6, 200, 1e-8), 1)
    7.4
    """
    window = _WINDOW_BELOW + _WINDOW_ABOVE
    gap = window / _CELLS
    total = np.fft.irfft(np.fft.rfft(_loss_masses(sample_rate, ratio, gap)) ** steps, n=_CELLS)
    loss = np.arange(_CELLS) * gap
    loss = np.where(loss < _WINDOW_ABOVE, loss, loss - window)
    order = np.argsort(loss)[_CELLS - int(_WINDOW_ABOVE / gap) :]
    loss, mass = loss[order], np.maximum(total[order], 0.0)
    target = delta + math.exp(min(steps * gap - _WINDOW_BELOW, 0.0)) + _FFT_ERROR

    def delta_at(epsilon: float) -> float:
        start = int(np.searchsorted(loss, epsilon))
        return float(mass[start:] @ -np.expm1(epsilon - loss[start:]))

    return _smallest_epsilon(delta_at, target, 1.0) if delta_at(0.0) > target else 0.0


def _loss_masses(q: float, r: float, gap: float) -> Floats:
    """Mass under the mixture of each privacy loss of one step, rounded down to the grid; (cells,).

    Entry j holds the loss ``j gap``, those from the middle of the window on the negative ones. Outputs
    beyond 9 standard deviations are left out, losses above the window are counted as its largest.
    """
    low, high = -9.0, r + 9.0

    def loss_at(x: float) -> float:
        return math.log1p(q * math.expm1(r * x - r * r / 2))

    first = math.ceil(loss_at(low) / gap)
    last = min(math.floor(loss_at(high) / gap), int(_WINDOW_ABOVE / gap) - 1)
    levels = np.arange(first, last + 1) * gap
    inner = (np.log(np.expm1(levels) / q + 1)) / r + r / 2
    edges = np.concatenate([[low], np.clip(inner, low, high), [high]])
    masses = np.zeros(_CELLS)
    np.add.at(
        masses, np.arange(first - 1, last + 1) % _CELLS, (1 - q) * _between(edges) + q * _between(edges - r)
    )
    return masses


def _between(edges: Floats) -> Floats:
    """Standard normal mass of the cells between rising edges, with relative accuracy in both tails."""
    below, above = np.exp(log_ndtr(edges)), np.exp(log_ndtr(-edges))
    return np.where(edges[:-1] > 0, above[:-1] - above[1:], below[1:] - below[:-1])


def individual_rdp(sample_rate: float, ratios: Floats, orders: Floats) -> Floats:
    """Sum over steps, instance by instance: (N, m) nats for ratios (T, N), by plain loops.

    >>> individual_rdp(1.0, np.array([[0.5, 1.0], [0.5, 0.0]]), np.array([2.0])).tolist()
    [[0.5], [1.0]]
    """
    steps, instances = ratios.shape
    total = np.zeros((instances, len(orders)))
    known: dict[tuple[float, float], float] = {}
    for instance in range(instances):
        for column, order in enumerate(orders):
            for step in range(steps):
                key = (float(ratios[step, instance]), float(order))
                if key not in known:
                    known[key] = sampled_gaussian_rdp(sample_rate, *key)
                total[instance, column] += known[key]
    return total


def ridge_divergence(
    *,
    instances: int,
    dimension: int,
    regularisation: float,
    noise_std: float,
    learning_rate: float,
    training_steps: int,
    unlearning_steps: int,
    order: float,
    seed: int,
) -> dict[str, float]:
    """Exact Renyi divergence of noisy gradient descent on a ridge regression, and what bounds need.

    Training uses the target of the first instance, retraining and the unlearning steps of both do not; the
    Hessian H is that of all features. Both laws are Gaussian with one covariance, so the divergence is
    ``order / 2 shift' cov^-1 shift`` in the eigenbasis of H (our derivation). Steps move by
    ``-rate (H theta - b) + N(0, noise_std^2 I)`` with ``rate = learning_rate / largest eigenvalue``.
    Returns divergence, sensitivity of one step, contraction.

    >>> problem = ridge_divergence(
    ...     instances=4, dimension=1, regularisation=1.0, noise_std=1.0, learning_rate=0.5,
    ...     training_steps=3, unlearning_steps=2, order=2.0, seed=0)
    >>> {name: round(value, 5) for name, value in problem.items()}
    {'divergence': 1e-05, 'sensitivity': 0.00756, 'contraction': 0.5}
    """
    random = np.random.default_rng(seed)
    x, y = random.normal(size=(instances, dimension)), random.normal(size=instances)
    values, basis = np.linalg.eigh(x.T @ x / instances + regularisation * np.eye(dimension))
    rate = learning_rate / values.max()
    push = rate * basis.T @ (x[0] * y[0] / instances)
    factors = 1 - rate * values
    shift, variance = np.zeros(dimension), np.zeros(dimension)
    for step in range(training_steps + unlearning_steps):
        shift = factors * shift + (push if step < training_steps else 0.0)
        variance = factors**2 * variance + noise_std**2
    return {
        "divergence": float(order / 2 * (shift**2 / variance).sum()),
        "sensitivity": float(np.linalg.norm(push)),
        "contraction": float(np.abs(factors).max()),
    }
