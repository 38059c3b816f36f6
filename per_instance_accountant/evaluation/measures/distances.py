"""How far unlearned models are from retrained ones, in what they say of an instance: distributions over
seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from per_instance_accountant.errors import UsageError
from per_instance_accountant.evaluation.measures.intervals import model_pairs, permuted

Reals = NDArray[np.float64]
_CLIP: Final = 100.0
_FLOOR: Final = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Distance:
    """value: (n,) per instance. null: (n,) its mean, null_high: (n,) its 95 % quantile, when chance
    decides which model is called unlearned: neither is 0. Estimates; no upper bound on anything."""

    value: Reals
    null: Reals
    null_high: Reals

    @property
    def beyond_chance(self) -> float:
        """Share of the instances above their null's 95 % quantile; about 0.05 when nothing is
        different."""
        return float((self.value > self.null_high).mean())


def _with_null(statistic: object, first: Reals, second: Reals, draws: int, seed: int) -> Distance:
    nulls = permuted(statistic, first, second, draws=draws, seed=seed)  # type: ignore[arg-type]
    value = statistic(first, second)  # type: ignore[operator]
    return Distance(value=value, null=nulls.mean(0), null_high=np.quantile(nulls, 0.95, axis=0))


def klom(
    unlearned: ArrayLike, oracle: ArrayLike, *, bins: int = 20, draws: int = 100, seed: int = 0
) -> Distance:
    """KL divergence of margins, KL(unlearned || oracle) per instance, in nats, from histograms over
    models.

    unlearned, oracle: (K, n) margins. Both histograms share ``bins`` equal bins from the smallest to
    the largest value, that value included; margins are clipped to [-100, 100], empty bins get 1e-5.
    With few models the null is large: 3 nats at K = 20, 0.3 at 100. Raises UsageError PIA071 for other
    shapes, PIA125 for fewer than 8 models, GuaranteeError PIA011.

    >>> same = np.linspace(0, 1, 40)[:, None]
    >>> float(klom(same, same).value[0])
    0.0
    """
    first, second = model_pairs(unlearned, oracle, call="klom", seeds=100)

    def divergence(a: Reals, b: Reals) -> Reals:
        return histogram_divergence(a, b, bins)

    return _with_null(divergence, first, second, draws, seed)


def histogram_divergence(first: Reals, second: Reals, bins: int) -> Reals:
    """(n,) KL(first || second) of histograms with common bins, in nats."""
    a, b = np.clip(first, -_CLIP, _CLIP), np.clip(second, -_CLIP, _CLIP)
    low = np.minimum(a.min(0), b.min(0))
    width = np.maximum(np.maximum(a.max(0), b.max(0)) - low, 1e-12)

    def shares(values: Reals) -> Reals:
        # The largest value belongs to the last bin, not to one beyond it.
        place = np.minimum((bins * (values - low) / width).astype(np.int64), bins - 1)
        columns = np.broadcast_to(np.arange(values.shape[1]), values.shape)
        counts = np.zeros((bins, values.shape[1]))
        np.add.at(counts, (place, columns), 1.0)
        raised = np.maximum(counts / len(values), _FLOOR)
        shares_: Reals = raised / raised.sum(0)
        return shares_

    p, q = shares(a), shares(b)
    total: Reals = (p * np.log(p / q)).sum(0)
    return total


def gaussian_renyi(unlearned: ArrayLike, oracle: ArrayLike, order: float) -> Reals:
    """(n,) Renyi divergence of two normal laws fitted to the margins, in nats; inf where it does not
    exist (``order s2^2 + (1 - order) s1^2 <= 0``, which chance alone brings about with few models).

    A plug-in estimate: it is right only as far as margins are normal, and biased upwards with few models
    (Gil, Alajaji and Linder 2013 for the closed form). Raises as :func:`klom`.

    >>> a = np.linspace(-1, 1, 9)[:, None]
    >>> round(float(gaussian_renyi(a, a + 1.0, 2.0)[0]), 4)
    2.1333
    """
    first, second = model_pairs(unlearned, oracle, call="gaussian_renyi", seeds=100)
    if not order > 1:
        raise UsageError(
            "PIA070", f"order is {order}", "No divergence has it", "gaussian_renyi(u, o, order=2.0)"
        )
    return normal_renyi(first.mean(0), first.var(0, ddof=1), second.mean(0), second.var(0, ddof=1), order)


def normal_renyi(mean1: Reals, var1: Reals, mean2: Reals, var2: Reals, order: float) -> Reals:
    """Renyi divergence of N(mean1, var1) from N(mean2, var2), in nats."""
    mixed = order * var2 + (1 - order) * var1
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = order * (mean1 - mean2) ** 2 / (2 * mixed)
        spread = (np.log(mixed) - (1 - order) * np.log(var1) - order * np.log(var2)) / (2 * (1 - order))
        value = shift + spread
    return np.where((mixed > 0) & (var1 > 0) & (var2 > 0), value, np.inf)


def variational_renyi(
    unlearned: ArrayLike, oracle: ArrayLike, order: float, *, draws: int = 50, seed: int = 0
) -> Distance:
    """Estimate of a lower bound on the Renyi divergence of the margins, in nats, without assuming
    normality.

    ``order / (order - 1) log E_P exp((order - 1) g) - log E_Q exp(order g)`` is at most the divergence
    for every critic g (Birrell et al. 2021). Here g is the log ratio of two kernel density estimates
    made on one half of the models, clipped to plus and minus log K, and the expectations are means over
    the other half; both ways, averaged. Unclipped, the estimate is dominated by single models and grows
    without limit. With 16 models it moves by 1 nat from draw to draw: read it against its null. Raises
    as :func:`klom`.
    """
    first, second = model_pairs(unlearned, oracle, call="variational_renyi", seeds=100)
    if not order > 1:
        raise UsageError(
            "PIA070", f"order is {order}", "No divergence has it", "variational_renyi(u, o, order=2.0)"
        )

    def estimate(a: Reals, b: Reals) -> Reals:
        return (
            _one_way(a[::2], b[::2], a[1::2], b[1::2], order)
            + _one_way(a[1::2], b[1::2], a[::2], b[::2], order)
        ) / 2

    return _with_null(estimate, first, second, draws, seed)


def _one_way(fit1: Reals, fit2: Reals, held1: Reals, held2: Reals, order: float) -> Reals:
    """Fitted on one half of the models, evaluated on the other."""
    bound = float(np.log(len(fit1) + len(held1)))

    def critic(at: Reals) -> Reals:
        return np.clip(_log_density(fit1, at) - _log_density(fit2, at), -bound, bound)

    moments = [
        np.log(np.mean(np.exp(factor * critic(at)), 0)) for factor, at in ((order - 1, held1), (order, held2))
    ]
    value: Reals = order / (order - 1) * moments[0] - moments[1]
    return value


def _log_density(sample: Reals, at: Reals) -> Reals:
    """(m, n) log of a kernel density estimate with Scott's bandwidth, instance by instance."""
    width = np.maximum(sample.std(0, ddof=1) * len(sample) ** -0.2, 1e-9)
    scaled = (at[:, None] - sample[None]) / width
    top = -0.5 * np.min(scaled**2, axis=1)
    density: Reals = top + np.log(np.mean(np.exp(-0.5 * scaled**2 - top[:, None]), 1)) - np.log(width)
    return density
