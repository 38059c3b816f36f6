"""How hard each instance is to forget: the least number of steps for everybody, each alone."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from per_instance_accountant.accounting import ChargingRule
from per_instance_accountant.ledger import Ledger
from per_instance_accountant.results import Tabular
from per_instance_accountant.results.rounding import rounded_up
from per_instance_accountant.unlearning.applicable import Facts
from per_instance_accountant.unlearning.assumptions import Array, Assumptions
from per_instance_accountant.unlearning.bounds.interface import Measure, require
from per_instance_accountant.unlearning.chain import Everybody, everybody
from per_instance_accountant.unlearning.planner import (
    Answer,
    Question,
    refuse_untrained,
    solve,
    stated_assumptions,
    unlearning_mechanism,
)

_MOST_KINDS: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class EveryoneSteps(Tabular):
    """One row per instance that was not forgotten; as sensitive as the training data.

    ids (n,). steps (n,): K alone, inf where unreachable. value (n,): upper bound after K steps (at the limit
    where unreachable), in nats. bound_index (n,): position in ``bound_names``. Thresholds were rounded up, so
    steps and value are upper bounds of what :func:`plan` gives for that instance.
    """

    ids: NDArray[Any]
    steps: Array
    value: Array
    bound_index: NDArray[np.int8]
    bound_names: tuple[str, ...]
    target: float
    measure: Measure
    direction: str
    training_steps: int

    @property
    def bound(self) -> NDArray[np.str_]:
        """(n,) name of the bound that gave the value."""
        return np.array(self.bound_names)[self.bound_index]

    def quantile(self, shares: Iterable[float]) -> Array:
        """Steps that these shares of the instances need at most (inf counts as above every number)."""
        points = np.atleast_1d(np.asarray(list(shares), dtype=np.float64))
        require(bool(np.all((points >= 0) & (points <= 1))), "shares", "outside", "[0, 1]")
        ranks = np.maximum(np.ceil(points * len(self.steps)).astype(np.int64) - 1, 0)
        return np.sort(self.steps)[ranks]

    def to_arrow(self) -> pa.Table:
        """One row per instance: id, steps (null: unreachable), epsilon after them, bound."""
        reached = np.isfinite(self.steps)
        steps = np.where(reached, self.steps, 0).astype(np.int64)
        return pa.table(
            {
                "id": pa.array(self.ids),
                "steps": pa.array(steps, mask=~reached),
                "epsilon": pa.array(self.value),
                "bound": pa.array(self.bound.tolist(), pa.string()),
            }
        )

    def _summary(self) -> Mapping[str, str]:
        counts = [_count(k) for k in self.quantile([0.5, 0.9, 1.0])]
        return {
            "instances": str(len(self.ids)),
            "steps, median / p90 / all": " / ".join(counts),
            "target epsilon": rounded_up(self.target),
            "training steps": str(self.training_steps),
        }

    def __repr__(self) -> str:
        half, most = (_count(k) for k in self.quantile([0.5, 1.0]))
        return f"<EveryoneSteps: {len(self.ids)} instances, median {half} steps, all {most} steps>"


def _count(steps: float) -> str:
    return f"{steps:.0f}" if math.isfinite(steps) else "unreachable"


def plan_everyone(
    ledger: Ledger | str | os.PathLike[str],
    target_epsilon: float,
    *,
    order: float | None = None,
    target_delta: float | None = None,
    assumptions: Assumptions | Mapping[str, Any] | None = None,
    charging: ChargingRule | None = None,
    direction: str = "both",
    max_steps: int | None = None,
    step_grid: Iterable[int] | None = None,
    projection_radius: float | None = None,
    learning_rate: float | None = None,
    noise_multiplier: float | None = None,
    levels: int = 8,
) -> EveryoneSteps:
    """Least K for every instance, each alone; arguments and errors as in :func:`plan`.

    levels: thresholds are rounded up to this many values per factor of two; one computation serves all
    instances with equal rounded thresholds, and none is made between two that need the same K. Never add the
    steps or values of several instances: a forget set needs :func:`plan`.

    >>> from per_instance_accountant.ledger import LedgerWriter
    >>> from per_instance_accountant.ledger.records import Phase, Run, Step, Thresholds
    >>> writer = LedgerWriter.create(None, Run(num_instances=4))
    >>> writer.append(Thresholds(values=np.array([0, 0.1, 0.5, 1], np.float32), source="fixed"))
    >>> writer.append(Phase(kind="train", sampling="poisson", sample_rate=1.0, noise_std=4.0,
    ...     max_grad_norm=1.0, charging="fixed_thresholds", denominator=4.0, learning_rate=0.1,
    ...     weight_decay=0.5))
    >>> for _ in range(300):
    ...     writer.append(Step(positions=np.empty(0, np.int64), contributions=np.empty(0, np.float32)))
    >>> known = {"smoothness": 1.0, "clipping_never_binds": True, "individual_thresholds": True}
    >>> plan_everyone(writer.ledger(), 0.01, order=8, assumptions=known).steps.tolist()
    [0.0, 24.0, 54.0, 68.0]
    """
    ledger = Ledger.open(ledger)
    question = Question.of(target_epsilon, direction, max_steps, step_grid)
    measure = Measure(order=order, delta=target_delta)
    require(levels >= 1 and levels == int(levels), "levels", levels, "[1, inf)")
    everyone = everybody(ledger, charging)
    refuse_untrained(everyone.chain)
    facts = Facts(
        chain=everyone.chain,
        assumptions=stated_assumptions(assumptions, ledger),
        measure=measure,
        mechanism=unlearning_mechanism(everyone.chain, projection_radius, learning_rate, noise_multiplier),
    )
    kinds, member = _kinds(everyone, int(levels))
    answers = _solve_kinds(facts, question, everyone, kinds)
    names = tuple(dict.fromkeys(answer.bound for answer in answers))
    steps = np.array([math.inf if answer.steps is None else answer.steps for answer in answers], float)
    codes = np.array([names.index(answer.bound) for answer in answers], dtype=np.int8)
    return EveryoneSteps(
        ids=ledger.ids[everyone.positions],
        steps=steps[member],
        value=np.array([answer.value for answer in answers])[member],
        bound_index=codes[member],
        bound_names=names,
        target=question.target,
        measure=measure,
        direction=direction,
        training_steps=everyone.chain.num_steps,
    )


def _rounded_up(thresholds: Array, levels: int) -> Array:
    """(n,) thresholds on a public geometric grid, never below the given ones nor above the largest."""
    top = thresholds.max(initial=0.0)
    with np.errstate(divide="ignore", over="ignore"):
        grid = np.exp2(np.ceil(np.log2(thresholds) * levels) / levels)
    return np.where(thresholds > 0, np.maximum(np.minimum(grid, top), thresholds), 0.0)


def _kinds(everyone: Everybody, levels: int) -> tuple[Array, NDArray[np.int64]]:
    """(k, v) different rounded thresholds in ascending order, and (n,) the row of each instance.

    Under a filter whose budgets count two more columns follow: minus the watched order, and the budget
    rounded up. K does not fall along any of them.
    """
    limits, promised = everyone.limits, everyone.budgets
    rounded = [_rounded_up(limit, levels) for limit in limits]
    if promised is not None:
        kinds, member = _distinct([*rounded, -promised.orders, _rounded_up(promised.budgets, levels)])
        if len(kinds) <= _MOST_KINDS:
            return kinds, member
    kinds, member = _distinct(rounded)
    if len(kinds) > _MOST_KINDS:
        # Too many courses over time: everybody is charged the largest of the own thresholds throughout.
        largest = _rounded_up(np.max(np.stack(rounded), axis=0), levels)
        values, member = np.unique(largest, return_inverse=True)
        kinds = np.broadcast_to(values[:, None], (len(values), len(limits)))
    return kinds, member


def _distinct(columns: list[Array]) -> tuple[Array, NDArray[np.int64]]:
    """(k, v) different rows of the columns, sorted by the first, and (n,) the row of each instance."""
    key, inverse = np.unique(columns[0], return_inverse=True)
    rows = key[:, None]
    for column in columns[1:]:
        values, place = np.unique(column, return_inverse=True)
        joint, inverse = np.unique(inverse * len(values) + place, return_inverse=True)
        rows = np.column_stack([rows[joint // len(values)], values[joint % len(values)]])
    return rows, inverse


def _solve_kinds(facts: Facts, question: Question, everyone: Everybody, kinds: Array) -> list[Answer]:
    """One answer per row. Where no threshold rises as another falls, K is monotone along the rows."""

    def alone(row: int, limit: float) -> Answer:
        thresholds, rest = np.split(kinds[row], [len(everyone.limits)])
        budgets = everyone.budgets
        if budgets is not None:
            # Budgets that were too many to be told apart are not used.
            own = (-rest[:1], rest[1:]) if rest.size else (np.full(1, 2.0), np.full(1, np.inf))
            budgets = replace(budgets, orders=own[0], budgets=own[1])
        chain = everyone.alone(thresholds, budgets)
        return solve(replace(facts, chain=chain), replace(question, limit=int(limit)))

    if not bool(np.all(np.diff(kinds, axis=0) >= 0)):
        return [alone(row, question.limit) for row in range(len(kinds))]
    last = len(kinds) - 1
    answers = {last: alone(last, question.limit)}
    if last > 0:
        answers[0] = alone(0, _limit(answers[last], question))
    spans = [(0, last)]
    while spans:
        low, high = spans.pop()
        if high - low < 2:
            continue
        if answers[low].steps == answers[high].steps:
            # Between them K is the same, and the larger threshold's value bounds the smaller ones'.
            answers |= dict.fromkeys(range(low + 1, high), answers[high])
            continue
        middle = (low + high) // 2
        answers[middle] = alone(middle, _limit(answers[high], question))
        if answers[middle].steps is None:
            answers[middle] = answers[high]
        spans += [(low, middle), (middle, high)]
    return [answers[row] for row in range(len(kinds))]


def _limit(above: Answer, question: Question) -> float:
    """What suffices for a larger threshold suffices for a smaller one."""
    return question.limit if above.steps is None else above.steps
