"""Privacy filters: budgets that no instance can exceed, turned into the sums that are watched while
training.

The promise and its proof: docs/math/filters.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from per_instance_accountant.accounting.chords import clip_ratio
from per_instance_accountant.divergence import DEFAULT_ORDERS, gaussian_mu, sampled_gaussian_rdp
from per_instance_accountant.errors import GuaranteeError, UsageError
from per_instance_accountant.ledger.records import Filter, Phase

Array = NDArray[np.float64]

_SLACK: Final = 1e-12
"""Relative; budgets are rounded down by more than their own rounding errors."""
_ROWS: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrivacyFilter:
    """Every instance leaves training before the step that would exceed its budget: CERTIFIED at the
    budget.

    budget: one number, (N,) numbers, or label -> number with ``group`` naming the labels of the run; all
    above 0. With ``delta`` it is an epsilon at this delta, watched at one Renyi order per instance that
    is chosen before the first step: the one that affords most steps at the clip norm, or ``order``. With
    ``order`` alone it is a Renyi divergence in nats (Feldman and Zrnic 2021). ``family="gaussian"``
    watches squared sensitivity ratios instead, exact for steps without amplification: full batch and
    ``Unamplified`` (Koskela, Tobaben and Honkela 2023); the budget is an epsilon at ``delta``, or mu
    without it.

    on_spent: ``"drop"`` lets everybody else train on, with the same rates and normalisers; ``"stop"``
    ends the loop over the loader before the first step that would exceed any budget, and ``"raise"``
    raises BudgetExceeded there; both only with ``WorstCase`` and one budget, because the end of a
    run is released. Raises UsageError PIA070, PIA071.

    >>> PrivacyFilter(budget=8.0, delta=1e-5).on_spent
    'drop'
    """

    budget: ArrayLike | Mapping[Any, float]
    delta: float | None = None
    order: float | None = None
    group: str | None = None
    family: Literal["renyi", "gaussian"] = "renyi"
    on_spent: Literal["drop", "stop", "raise"] = "drop"

    def __post_init__(self) -> None:
        if self.on_spent not in ("drop", "stop", "raise"):
            _refuse(f"on_spent={self.on_spent!r}", 'on_spent="drop", "stop" or "raise"')
        if self.family not in ("renyi", "gaussian"):
            _refuse(f"family={self.family!r}", 'family="renyi" or "gaussian"')
        if self.delta is not None and not 0 < self.delta < 1:
            _refuse(f"delta={self.delta!r}", "delta=1e-5")
        if self.order is not None and not 1 < self.order < np.inf:
            _refuse(f"order={self.order!r}", "order=8.0")
        if self.family == "renyi" and self.delta is None and self.order is None:
            _refuse("neither delta nor order", "PrivacyFilter(budget=8.0, delta=1e-5)", "PIA071")
        if self.family == "gaussian" and self.order is not None:
            fix = 'PrivacyFilter(budget=1.0, family="gaussian")'
            _refuse("an order for a Gaussian filter", fix, "PIA071")
        if isinstance(self.budget, Mapping) != (self.group is not None):
            _refuse("a budget by label without group=, or the reverse", _BY_LABEL, "PIA071")
        _numbers(list(self.budget.values()) if isinstance(self.budget, Mapping) else self.budget)

    def per_instance(self, num_instances: int, groups: Mapping[str, NDArray[Any]]) -> Array:
        """(N,) budgets in the unit in which they were given. Raises UsageError PIA071 for wrong lengths
        or labels."""
        if not isinstance(self.budget, Mapping):
            budgets = _numbers(self.budget)
            if budgets.ndim and budgets.shape != (num_instances,):
                happened = f"budgets with shape {budgets.shape} for {num_instances} instances"
                _refuse(happened, "one budget, or one per dataset position", "PIA071")
            return np.broadcast_to(budgets, (num_instances,))
        labels = groups.get(str(self.group))
        if labels is None:
            _refuse(f"group={self.group!r}, which the run does not hold", _BY_LABEL, "PIA071")
        names, which = np.unique(labels, return_inverse=True)
        missing = sum(name not in self.budget for name in names.tolist())
        unknown = len(self.budget) + missing - len(names)
        if missing or unknown:
            happened = f"{missing} labels without a budget and {unknown} budgets without an instance"
            _refuse(happened, _BY_LABEL, "PIA071")
        return _numbers([self.budget[name] for name in names.tolist()])[which]

    def stated(self, budgets: Array, phase: Phase, *, orders: NDArray[np.float64] | None = None) -> Filter:
        """What the ledger records before training under ``phase``.

        budgets: (N,) from :meth:`per_instance`. orders: (N,) those of a filter recorded before, when
        resuming. Raises UsageError PIA070 for budgets too small for any order, GuaranteeError PIA012 for
        a rule whose losses are estimates, PIA010 for a Gaussian filter under amplification.
        """
        check_filterable(phase, self.family)
        distinct, which = np.unique(budgets, return_inverse=True)
        if self.family == "gaussian":
            mu = distinct if self.delta is None else np.array([gaussian_mu(e, self.delta) for e in distinct])
            watched = np.full(len(budgets), 2.0)
            return Filter(family="gaussian", orders=watched, budgets=(mu**2 * (1 - _SLACK))[which])
        if orders is None:
            orders = self._orders(distinct, phase)[which]
        sums = budgets * (1 - _SLACK) if self.delta is None else renyi_budgets(budgets, orders, self.delta)
        short = int((~(sums > 0)).sum())
        if short:
            happened = f"{short} budgets too small for any loss at their order and delta"
            _refuse(happened, "PrivacyFilter(budget=8.0, delta=1e-5)")
        return Filter(family="renyi", orders=np.asarray(orders), budgets=sums)

    def _orders(self, budgets: Array, phase: Phase) -> Array:
        if self.order is not None or self.delta is None:
            return np.full(len(budgets), float(self.order or 0))
        grid = np.array(DEFAULT_ORDERS)
        step = sampled_gaussian_rdp(phase.amplification_rate, [clip_ratio(phase)], grid)[0]
        step = np.where(np.isfinite(step), step, 1e300)
        chosen = np.empty(len(budgets))
        for start in range(0, len(budgets), _ROWS):
            rows = budgets[start : start + _ROWS, None]
            steps = renyi_budgets(rows, grid, self.delta) / np.maximum(step, 1e-300)
            chosen[start : start + _ROWS] = grid[np.argmax(steps, axis=1)]
        return chosen


_BY_LABEL: Final = 'PrivacyFilter(budget={"a": 8.0, "b": 2.0}, group="label", delta=1e-5)'


def check_filterable(phase: Phase, family: str) -> None:
    """Raise GuaranteeError PIA012 or PIA010 for a mechanism whose losses a filter of this family cannot
    bound."""
    if phase.charging == "last_seen":
        raise GuaranteeError(
            "PIA012",
            "a privacy filter with the rule 'last_seen', whose losses are estimates",
            "A budget on estimates bounds nothing",
            "PrivacyEngine(charging=Sweep(every=50), filter=...)",
        )
    if family == "gaussian" and phase.amplification_rate < 1 and phase.charging != "unamplified":
        raise GuaranteeError(
            "PIA010",
            "a Gaussian filter for a run that is charged with amplification by sampling",
            "Sampled steps are not Gaussian, so a mu for them would be wrong or ignore the sampling",
            'PrivacyFilter(budget=8.0, delta=1e-5, family="renyi"), or charging=Unamplified()',
        )


def renyi_budgets(epsilons: ArrayLike, orders: ArrayLike, delta: float) -> Array:
    """Largest Renyi divergences, rounded DOWN, that imply epsilon at ``delta``; below 0 where none does.

    epsilons, orders: broadcast against each other. Canonne, Kamath and Steinke 2020, Prop. 12, solved
    for the divergence.

    >>> renyi_budgets([1.0, 8.0], [16.0, 4.0], 1e-5).round(4).tolist()
    [0.4818, 4.9121]
    """
    epsilon, order = np.asarray(epsilons, dtype=np.float64), np.asarray(orders, dtype=np.float64)
    penalty = np.log1p(-1 / order) - (np.log(delta) + np.log(order)) / (order - 1)
    size = epsilon + np.abs(np.log1p(-1 / order)) + (np.log(order) - np.log(delta)) / (order - 1)
    return np.asarray(epsilon - penalty - _SLACK * size)


def _numbers(budget: Any) -> Array:
    try:
        values = np.asarray(budget, dtype=np.float64)
    except (TypeError, ValueError):
        _refuse("a budget that is not numeric", "PrivacyFilter(budget=8.0, delta=1e-5)", "PIA071")
    bad = int((~(np.isfinite(values) & (values > 0))).sum())
    if bad or values.ndim > 1 or not values.size:
        happened = f"{bad} of {values.size} budgets not positive and finite, shape {values.shape}"
        _refuse(happened, "budget=8.0")
    return values


def _refuse(happened: str, fix: str, code: str = "PIA070") -> NoReturn:
    raise UsageError(code, f"a privacy filter with {happened}", "No budget would be enforced", fix)
