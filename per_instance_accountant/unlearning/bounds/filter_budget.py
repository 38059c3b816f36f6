"""R0 by budgets: a privacy filter bounds what training cost, whatever course training took."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from per_instance_accountant.errors import UsageError
from per_instance_accountant.unlearning.bounds.interface import MAX_STEPS, Bound, Measure, require

Array = NDArray[np.float64]

FAMILIES: Final = ("renyi", "gaussian")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FilterBudget(Bound):
    """The budgets of the members, the same for every K.

    family ``"renyi"``: at ``orders[i]`` and below, member i alone costs at most ``budgets[i]`` nats; several
    members only at a delta, by the group property of (epsilon, delta). ``"gaussian"``: member i alone is
    ``sqrt(budgets[i])``-GDP, several together the sum of theirs. orders, budgets: (f,).
    """

    name: ClassVar[str] = "R0 filter budget"
    assumptions_used: ClassVar[tuple[str, ...]] = ()
    measure: Measure
    family: str
    orders: Array
    budgets: Array
    direction: str = "both"

    def rdp(self, steps: int, orders: Array) -> Array:
        """(m,) upper bounds in nats, whatever ``steps``; inf where no budget was watched."""
        mu = self.mu(steps)
        if mu is not None:
            return orders * (mu**2 / 2)
        spent = self.budgets > 0
        if not spent.any():
            return np.zeros(len(orders))
        if spent.sum() > 1:
            return np.full(len(orders), np.inf)
        watched, budget = float(self.orders[spent][0]), float(self.budgets[spent][0])
        return np.where(orders <= watched, budget, np.inf)

    def mu(self, steps: int) -> float | None:
        """``sum_i sqrt(budget_i)`` of a Gaussian filter, else None."""
        del steps
        if self.family != "gaussian":
            return None
        return float(np.sqrt(self.budgets).sum()) * (1 + 1e-12)

    def value(self, steps: int) -> float:
        """Upper bound; several members of a Renyi filter by :func:`group_epsilon`."""
        if self.family == "renyi" and self.measure.delta is not None:
            return group_epsilon(self.orders, self.budgets, self.measure.delta)
        return Bound.value(self, steps)

    def steps(self, target: float, max_steps: int = MAX_STEPS) -> float:
        """0 or inf: steps change nothing. Raises UsageError PIA070 unless target is in (0, inf)."""
        require(0 < target < math.inf, "target", target, "(0, inf)")
        require(max_steps >= 0 and max_steps == int(max_steps), "max_steps", max_steps, "[0, inf)")
        return 0 if self.value(0) <= target else math.inf

    def conversion_orders(self, steps: int) -> Array:
        """The orders that were watched."""
        return self.orders


def group_epsilon(orders: Array, budgets: Array, delta: float) -> float:
    """Upper bound on epsilon at ``delta`` for the members together, both directions; inf if there is none.

    Members are removed one after the other. With ``delta_j = delta e^-E / f`` and the epsilons ``e_j`` at
    those, their sum is ``E`` where ``E = sum c_j / (1 - sum 1 / (a_j - 1))``, ``c_j`` the epsilon at
    ``delta / f`` (docs/math/unlearning_bounds.md).

    >>> round(group_epsilon(np.array([16.0]), np.array([0.5]), 1e-5), 4)
    1.0182
    >>> round(group_epsilon(np.array([16.0, 16.0]), np.array([0.5, 0.5]), 1e-5), 4)
    2.4562
    """
    spent = budgets > 0
    orders, budgets = orders[spent], budgets[spent]
    count = len(orders)
    if not count:
        return 0.0
    if count == 1:
        # The budget holds below its order as well, and 1 / delta is the order that gives the least epsilon.
        orders = np.minimum(orders, 1 / delta)
    spread = float((1 / (orders - 1)).sum()) if count > 1 else 0.0
    if spread >= 1:
        return math.inf
    share = math.log(delta) - math.log(count)
    alone = budgets + np.log1p(-1 / orders) - (share + np.log(orders)) / (orders - 1)
    return float(np.maximum(alone, 0.0).sum()) / (1 - spread) * (1 + 1e-12) + 1e-15


def filter_budget(
    *,
    budget: ArrayLike,
    watched_order: ArrayLike | None = None,
    order: float | None = None,
    delta: float | None = None,
) -> FilterBudget:
    """R0 for a run with a privacy filter: both directions, no assumption, no use of the number of steps.

    budget: number or (f,) of the members, in nats at ``watched_order`` (number or (f,)), or squared GDP
    parameters without it. Raises UsageError PIA070, PIA071. Feldman and Zrnic 2021; groups: our derivation,
    docs/math/unlearning_bounds.md.

    >>> filter_budget(budget=0.3, watched_order=8, order=4).value(0)
    0.3
    >>> round(filter_budget(budget=[0.01, 0.04], delta=1e-5).value(0), 6)
    1.131775
    """
    budgets = np.atleast_1d(np.asarray(budget, dtype=np.float64))
    require(bool(np.all((budgets >= 0) & (budgets < np.inf))), "budget", "negative or infinite", "[0, inf)")
    given = np.asarray(2.0 if watched_order is None else watched_order, dtype=np.float64)
    if budgets.ndim != 1 or given.shape not in ((), budgets.shape):
        raise UsageError(
            "PIA071",
            f"budget has shape {budgets.shape}, watched_order {given.shape}",
            "Each member of the forget set needs its budget and the order it was watched at",
            "filter_budget(budget=[0.3, 0.5], watched_order=[8, 8], ...)",
        )
    require(bool(np.all((given > 1) & (given < np.inf))), "watched_order", "outside", "(1, inf)")
    return FilterBudget(
        measure=Measure(order=order, delta=delta),
        family="gaussian" if watched_order is None else "renyi",
        orders=np.broadcast_to(given, budgets.shape).astype(np.float64),
        budgets=budgets,
    )
