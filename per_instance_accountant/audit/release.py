"""Statistics of individual epsilons that may be published: differentially private, charged in the ledger.

What is protected, and why each value may depend on its own instance only: docs/math/private_statistics.md.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.accounting import account
from per_instance_accountant.divergence import DEFAULT_ORDERS, rdp_to_epsilon
from per_instance_accountant.errors import (
    GuaranteeError,
    MissingDependencyError,
    UnsupportedError,
    UsageError,
)
from per_instance_accountant.ledger import Anchor, Disclosure, Ledger, LedgerWriter, new_run_id

Array = NDArray[np.float64]

SUPPORTED: Final = ("worst_case", "fixed_thresholds", "sweep")
"""Rules under which an instance's loss is a function of its own row and of what was released."""
CHANGES: Final = 2
"""Bins that change by one, or elements that are taken out and put in, when one row becomes another."""
_BINS: Final = 40
_CANDIDATES: Final = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedHistogram:
    """counts: (B,) noisy, some may be negative; bin b holds the epsilons in ``(edges[b], edges[b + 1]]``, the
    first one also ``edges[0]``, the last one everything above. edges: (B + 1,). epsilon: what it cost
    everybody. delta: of the epsilons that were counted. anchor: the moment of the ledger that charges it, so
    that ``Ledger.open(path).holds(anchor)`` tells whether another copy of the ledger does."""

    counts: tuple[int, ...]
    edges: tuple[float, ...]
    epsilon: float
    delta: float
    anchor: Anchor


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedQuantiles:
    """values: (Q,) noisy estimates, rising, each one of the public candidates; they bound nothing. epsilon:
    what all of them together cost everybody. delta: of the epsilons whose quantiles these are. anchor: as of
    a :class:`PublishedHistogram`."""

    quantiles: tuple[float, ...]
    values: tuple[float, ...]
    epsilon: float
    delta: float
    anchor: Anchor


def release_histogram(
    ledger: str | os.PathLike[str],
    epsilon: float,
    *,
    delta: float = 1e-5,
    edges: Sequence[float] | None = None,
) -> PublishedHistogram:
    """A histogram of the individual epsilons that is ``epsilon``-differentially private, beside training.

    ledger: path of a ledger that nobody writes to. epsilon: the additional cost for every instance, whatever
    its row is replaced by; it is recorded in the ledger before the noise is drawn and charged from then on.
    delta: in (0, 1), of the individual epsilons. edges: (B + 1,) rising numbers from 0 on, chosen without
    looking at the individual values; None for 40 bins up to the worst case, which is public.

    Noise: discrete Laplace of OpenDP on the counts, of which one row changes at most two by one each.
    Raises GuaranteeError PIA118 for runs whose losses cannot be told apart, UsageError PIA070, PIA071,
    LedgerError as ``LedgerWriter.resume``, MissingDependencyError PIA061 without OpenDP; then nothing is
    charged.
    """
    dp = _opendp()
    space = dp.vector_domain(dp.atom_domain(T=int)), dp.l1_distance(T=int)
    mechanism = _within(lambda scale: dp.m.make_laplace(*space, scale=scale), epsilon)
    limits, values = _prepared(ledger, delta, edges, _BINS + 1)
    counts = np.bincount(np.searchsorted(limits[1:-1], values, side="left"), minlength=limits.size - 1)
    anchor = _charge(ledger, "histogram", epsilon)
    noisy = mechanism(counts.tolist())
    return PublishedHistogram(
        counts=tuple(map(int, noisy)),
        edges=tuple(limits.tolist()),
        epsilon=float(epsilon),
        delta=delta,
        anchor=anchor,
    )


def release_quantiles(
    ledger: str | os.PathLike[str],
    epsilon: float,
    quantiles: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    *,
    delta: float = 1e-5,
    candidates: Sequence[float] | None = None,
) -> PublishedQuantiles:
    """Quantiles of the individual epsilons that are ``epsilon``-differentially private together.

    As :func:`release_histogram`. quantiles: each in [0, 1]; the budget is shared equally among them.
    candidates: rising numbers from 0 on among which values are chosen, public; None for 400 up to the worst
    case.

    Each quantile is selected by OpenDP's noisy maximum over rank scores.
    """
    dp, wanted = _opendp(), [float(quantile) for quantile in quantiles]
    if not wanted or not all(0 <= quantile <= 1 for quantile in wanted):
        _refuse("quantiles", f"has {len(wanted)} entries, or one outside [0, 1]", "(0.25, 0.5, 0.75)")
    limits, values = _prepared(ledger, delta, candidates, _CANDIDATES)
    values = np.minimum(values, limits[-1])
    space = dp.vector_domain(dp.atom_domain(T=float, nan=False)), dp.symmetric_distance()

    def select(quantile: float) -> Any:
        def make(scale: float) -> Any:
            return dp.m.make_private_quantile(
                *space, dp.max_divergence(), candidates=limits.tolist(), alpha=quantile, scale=scale
            )

        return _within(make, epsilon / len(wanted))

    mechanisms = [select(quantile) for quantile in wanted]
    anchor = _charge(ledger, "quantiles", epsilon)
    chosen = [float(mechanism(values.tolist())) for mechanism in mechanisms]
    ranks = np.argsort(wanted, kind="stable")
    rising = np.empty(len(wanted))
    rising[ranks] = np.sort(chosen)
    return PublishedQuantiles(
        quantiles=tuple(wanted),
        values=tuple(rising.tolist()),
        epsilon=float(epsilon),
        delta=delta,
        anchor=anchor,
    )


def individual_values(ledger: Ledger, delta: float) -> Array:
    """(N,) upper bounds on epsilon, no bit of which depends on another instance than its own.

    From Renyi divergences only: tighter ones are rounded to levels that occur among all instances.
    """
    loss = account(ledger, orders=DEFAULT_ORDERS, apart=True)
    return np.asarray(rdp_to_epsilon(loss.orders, loss.rdp, delta))


def _prepared(
    path: str | os.PathLike[str], delta: float, limits: Sequence[float] | None, count: int
) -> tuple[Array, Array]:
    """Public limits, and the individual values of those who were not forgotten."""
    if isinstance(path, Ledger):
        _refuse("ledger", "is an open view", 'release_histogram("runs/a", epsilon=0.1)', "PIA071")
    if not (isinstance(delta, float) and 0 < delta < 1):
        _refuse("delta", f"is {delta!r}", "1e-5")
    ledger = Ledger.open(path)
    _check_supported(ledger)
    if limits is None:
        worst = account(ledger, partition=(0, 1), apart=True).worst_case_epsilon(delta)
        if not 0 < worst < math.inf:
            _refuse("the worst case", f"is {worst}, so no public range is known", "edges=(0, 1, 2, 4, 8)")
        chosen = np.linspace(0, worst, count)
    else:
        chosen = np.asarray(limits, dtype=np.float64)
    rising = chosen.ndim == 1 and chosen.size >= 2 and bool((chosen[1:] > chosen[:-1]).all())
    if not (rising and chosen[0] >= 0 and chosen[-1] < math.inf):
        _refuse("edges or candidates", "are not at least two rising finite numbers from 0 on", "(0, 1, 2, 4)")
    return chosen, individual_values(ledger, delta)[~ledger.forgotten]


def _check_supported(ledger: Ledger) -> None:
    rules = {phase.charging for phase in ledger.phases}
    sampling = {phase.sampling for phase in ledger.phases}
    if ledger.num_steps and rules <= set(SUPPORTED) and sampling == {"poisson"}:
        return
    raise GuaranteeError(
        "PIA118",
        f"a statistic of a run with {ledger.num_steps} steps, rules {sorted(rules)}, {sorted(sampling)}",
        "Losses depend on who was drawn, which is hidden, so nobody can say what one row changes",
        "train with Poisson sampling and charging=Sweep(every=50), FixedThresholds(...) or WorstCase()",
    )


def _within(make: Callable[[float], Any], epsilon: float) -> Any:
    """The mechanism whose proven cost for one row that becomes another is at most ``epsilon``."""
    if not (isinstance(epsilon, int | float) and not isinstance(epsilon, bool) and 0 < epsilon <= 10):
        _refuse("epsilon", f"is {epsilon!r}", "0.1, a number in (0, 10]")
    scale = CHANGES / epsilon
    # The cost is proportional to 1 / scale, up to directed rounding.
    for _ in range(8):
        mechanism = make(scale)
        if (cost := mechanism.map(CHANGES)) <= epsilon:
            return mechanism
        scale *= cost / epsilon * (1 + 1e-12)
    raise UnsupportedError(
        "PIA060",
        f"OpenDP proves no cost of at most {epsilon} for this mechanism",
        "Nothing was published, and nothing was charged",
        "a larger epsilon",
    )


def _charge(path: str | os.PathLike[str], kind: str, epsilon: float) -> Anchor:
    """Recorded and on the device before any noise exists."""
    with LedgerWriter.resume(path, fsync="step") as writer:
        writer.append(Disclosure(kind=kind, epsilon=float(epsilon), identity=new_run_id()))
        return writer.anchor


def _opendp() -> Any:
    try:
        import opendp.prelude as dp
    except ModuleNotFoundError:
        raise MissingDependencyError(
            "PIA061",
            "opendp is not installed",
            "Nothing was published, and nothing was charged",
            'pip install "per-instance-accountant[release]"',
        ) from None
    dp.enable_features("contrib")
    return dp


def _refuse(name: str, happened: str, fix: str, code: str = "PIA070") -> None:
    raise UsageError(code, f"{name} {happened}", "Nothing was published, and nothing was charged", fix)
