"""From a deletion request to the least number of noisy steps."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.accounting import Basis, ChargingRule, FixedThresholds, WorstCase
from per_instance_accountant.errors import PlanError
from per_instance_accountant.ledger import Ledger
from per_instance_accountant.unlearning.applicable import (
    ROWS,
    Facts,
    NotApplicable,
    applicable,
    contraction_of,
)
from per_instance_accountant.unlearning.assumptions import Assumptions
from per_instance_accountant.unlearning.bounds.interface import MAX_STEPS, REFERENCE, Bound, Measure, require
from per_instance_accountant.unlearning.canonical import ACCOUNTING_VERSION, software_versions
from per_instance_accountant.unlearning.chain import TrainingChain, training_chain
from per_instance_accountant.unlearning.mechanism import Mechanism
from per_instance_accountant.unlearning.plan_file import InstanceSteps, UnlearningPlan


def plan(
    ledger: Ledger | str | os.PathLike[str],
    ids: Iterable[int | str] | NDArray[Any],
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
    request_id: str | None = None,
) -> UnlearningPlan:
    """Least number K of noisy steps without the forget set, so that the result is close to retraining without
    it.

    ids: the deletion request. Give one of order (Renyi divergence <= target_epsilon nats) and target_delta.
    assumptions: :class:`Assumptions`, a mapping, or None for those of the run. charging: None for the rule of
    the run, or WorstCase(). direction: ``"both"``, or ``"remove"`` for D(trained || retrained) only. Every
    applicable bound is evaluated; the one with the least K decides. An unreachable target is a plan with
    ``reachable=False``, not an error. step_grid: a public list of numbers of steps; K is rounded up to the
    next of them, so that K reveals no more of the instances than that (beyond the last: unreachable).
    projection_radius: project all parameters onto the ball of this radius before each unlearning step, which
    needs no assumption on the loss. learning_rate, noise_multiplier (noise std over clip norm): of the
    unlearning steps, None for those of the last training phase; needed where its learning rate ended at 0.
    Choose them without looking at the instances to forget. request_id: your name of the request, for the
    plan and the certificate; not the name of a person.

    Raises PlanError PIA032 (unknown, repeated, never trained, all or no instances) and PIA031 (assumptions),
    UsageError PIA070 (target, order, delta), GuaranteeError PIA012 (the run is not certified), LedgerError.
    Sources of the bounds: docs/math/unlearning_bounds.md.

    >>> from per_instance_accountant.ledger import LedgerWriter
    >>> from per_instance_accountant.ledger.records import Phase, Run, Step
    >>> from per_instance_accountant.unlearning import softmax_regression
    >>> writer = LedgerWriter.create(None, Run(num_instances=100))
    >>> writer.append(Phase(kind="train", sampling="poisson", sample_rate=0.1, noise_std=4.0,
    ...     max_grad_norm=1.5, charging="worst_case", denominator=10.0, learning_rate=0.1, weight_decay=0.1))
    >>> for _ in range(300):
    ...     writer.append(Step(positions=np.empty(0, np.int64), contributions=np.empty(0, np.float32)))
    >>> known = softmax_regression(feature_norm=1.0, num_instances=100, denominator=10.0)
    >>> found = plan(writer.ledger(), ids=[7], target_epsilon=0.05, order=8, assumptions=known)
    >>> found.steps, found.bound, found.value <= 0.05
    (155, 'R4 subsampled', True)
    """
    ledger = Ledger.open(ledger)
    measure = Measure(order=order, delta=target_delta)
    question = Question.of(target_epsilon, direction, max_steps, step_grid)
    _check_request_id(request_id)
    known = stated_assumptions(assumptions, ledger)
    positions = _requested(ledger, ids)
    chain = training_chain(ledger, positions, charging)
    refuse_untrained(chain)
    mechanism = unlearning_mechanism(chain, projection_radius, learning_rate, noise_multiplier)
    facts = Facts(chain=chain, assumptions=known, measure=measure, mechanism=mechanism)
    group = solve(facts, question)
    rows = _per_instance(facts, question, group, ledger.ids[positions].tolist())
    return UnlearningPlan(
        ids=tuple(row.id for row in rows),
        steps=group.steps,
        reachable=group.steps is not None,
        value=group.value,
        bound=group.bound,
        deciding_id=_deciding(rows, chain),
        per_instance=rows,
        training_steps=chain.num_steps,
        cost_ratio=None if group.steps is None else group.steps / chain.num_steps,
        target=question.target,
        step_grid=question.grid,
        max_steps=question.asked,
        request_id=request_id,
        measure=measure,
        direction=direction,
        reference=REFERENCE,
        basis=Basis.CERTIFIED.value,
        charging=None if charging is None else charging.name,
        mechanism=mechanism,
        contraction=_finite(contraction_of(facts)),
        assumptions=known.to_dict(),
        not_applicable=(*group.refused, *silent_steps(mechanism)),
        anchor=ledger.anchor,
        accounting_version=ACCOUNTING_VERSION,
        software=software_versions(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked of every bound: ``value(K) <= target`` for the least K up to ``limit``, on ``grid``.
    asked: the limit as the caller stated it."""

    target: float
    direction: str
    limit: int
    asked: int
    grid: tuple[int, ...] | None

    @classmethod
    def of(
        cls, target: float, direction: str, max_steps: int | None, step_grid: Iterable[int] | None
    ) -> Question:
        """Checked. Raises UsageError PIA070."""
        require(0 < target < math.inf, "target_epsilon", target, "(0, inf)")
        require(direction in ("both", "remove"), "direction", direction, "('both', 'remove')")
        asked = MAX_STEPS if max_steps is None else max_steps
        require(0 <= asked < math.inf and asked == int(asked), "max_steps", max_steps, "[0, inf)")
        limit = asked
        grid = None if step_grid is None else tuple(int(k) for k in step_grid)
        if grid is not None:
            rising = len(grid) > 0 and grid[0] >= 0 and all(a < b for a, b in itertools.pairwise(grid))
            require(rising, "step_grid", f"{len(grid)} numbers", "increasing non-negative integers")
            limit = min(limit, grid[-1])
        return cls(target=float(target), direction=direction, limit=int(limit), asked=int(asked), grid=grid)

    def rounded(self, steps: float) -> float:
        """``steps`` or the next number of the grid."""
        if self.grid is None or math.isinf(steps):
            return steps
        return next((k for k in self.grid if steps <= k <= self.limit), math.inf)


def geometric_grid(last: int, ratio: float = 1.25) -> tuple[int, ...]:
    """A public step grid: 0, 1 and whole numbers that grow by ``ratio`` up to at least ``last``.

    >>> geometric_grid(20, 2.0)
    (0, 1, 2, 4, 8, 16, 32)
    """
    require(last >= 1 and last == int(last), "last", last, "[1, inf)")
    require(1 < ratio < math.inf, "ratio", ratio, "(1, inf)")
    grid = [0, 1]
    while grid[-1] < last:
        grid.append(max(grid[-1] + 1, math.ceil(grid[-1] * ratio)))
    return tuple(grid)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Least K (None: unreachable), the value there and the bound that gave it."""

    steps: int | None
    value: float
    bound: str
    refused: tuple[NotApplicable, ...]


def solve(facts: Facts, question: Question) -> Answer:
    """Least K over all applicable bounds, and the smallest value any of them gives at that K."""
    bounds, refused = applicable(facts, question.direction)
    least: float = math.inf
    for bound in bounds:
        within = question.limit if math.isinf(least) else int(least)
        least = min(least, bound.steps(question.target, within))
    least = question.rounded(least)
    at = question.limit if math.isinf(least) else int(least)
    values = [bound.value(at) for bound in bounds]
    best = int(np.argmin(values))
    return Answer(
        steps=None if math.isinf(least) else int(least),
        value=values[best],
        bound=bounds[best].name,
        refused=refused,
    )


def bound_of(made: UnlearningPlan, ledger: Ledger | str | os.PathLike[str]) -> Bound:
    """The bound that decided ``made``, as a function of the number of steps, computed again from ``ledger``.

    Raises PlanError PIA033 when the ledger does not hold the moment of the plan, LedgerError.
    """
    ledger = Ledger.open(ledger)
    row = next((row for row in ROWS if row.name == made.bound), None)
    if row is None or not ledger.holds(made.anchor):
        raise PlanError(
            "PIA033",
            "the plan was made for another ledger, or by a bound that is not known here",
            "What its steps reach cannot be said",
            "plan again: plan(ledger, ids=ids, ...)",
        )
    rules: dict[str, ChargingRule] = {rule.name: rule for rule in (WorstCase(), FixedThresholds())}
    rule = None if made.charging is None else rules[made.charging]
    chain = training_chain(ledger, ledger.positions_of(list(made.ids)), rule, stop=made.training_steps)
    known = Assumptions.from_dict(made.assumptions)
    return row.build(Facts(chain=chain, assumptions=known, measure=made.measure, mechanism=made.mechanism))


def _per_instance(
    facts: Facts, question: Question, group: Answer, ids: list[int | str]
) -> tuple[InstanceSteps, ...]:
    """Every member alone; members with the same thresholds at every step share one computation."""
    if len(ids) == 1:
        return (InstanceSteps(id=ids[0], steps=group.steps, value=group.value, bound=group.bound),)
    _, first, kind = np.unique(facts.chain.thresholds, axis=1, return_index=True, return_inverse=True)
    answers = [
        solve(replace(facts, chain=facts.chain.only(np.array([member]))), question)
        for member in first.tolist()
    ]
    own = [answers[k] for k in kind.ravel().tolist()]
    return tuple(
        InstanceSteps(id=i, steps=a.steps, value=a.value, bound=a.bound)
        for i, a in zip(ids, own, strict=True)
    )


def _deciding(rows: tuple[InstanceSteps, ...], chain: TrainingChain) -> int | str:
    """The instance whose own K is largest; ties: the largest threshold, then the first of the request."""
    steps = np.array([math.inf if row.steps is None else row.steps for row in rows])
    return rows[int(np.lexsort((-chain.thresholds.max(axis=0), -steps))[0])].id


def unlearning_mechanism(
    chain: TrainingChain,
    projection_radius: float | None,
    learning_rate: float | None = None,
    noise_multiplier: float | None = None,
) -> Mechanism:
    """That of the last training phase, with what is given in its place. Every bound takes the unlearning
    steps as they are; the reference continues by the same ones. Raises UsageError PIA070."""
    mechanism = chain.last_training or chain.mechanisms[-1]
    given = {
        "projection_radius": projection_radius,
        "learning_rate": learning_rate,
        "noise_multiplier": noise_multiplier,
    }
    changes: dict[str, Any] = {name: float(value) for name, value in given.items() if value is not None}
    for name, value in changes.items():
        require(0 < value < math.inf, name, value, "(0, inf)")
    if "noise_multiplier" in changes:
        changes["noise_std"] = changes.pop("noise_multiplier") * mechanism.max_grad_norm
    return replace(mechanism, **changes)


def silent_steps(mechanism: Mechanism) -> tuple[NotApplicable, ...]:
    """Why no number of steps changes anything, if they move nothing or add no noise."""
    for name, option in (("learning_rate", "learning_rate=..."), ("noise_std", "noise_multiplier=...")):
        if getattr(mechanism, name) == 0:
            reason = f"training ended with {name} 0: such steps hide nothing (plan(..., {option}))"
            return (NotApplicable(bound="noisy steps", reason=reason),)
    return ()


def stated_assumptions(given: Assumptions | Mapping[str, Any] | None, ledger: Ledger) -> Assumptions:
    """What the caller states, else what the run states."""
    if isinstance(given, Assumptions):
        return given
    if given is not None:
        return Assumptions.from_dict(given)
    return Assumptions.from_dict(ledger.run.assumptions or {}, source="run")


def _check_request_id(request_id: str | None) -> None:
    ok = request_id is None or (isinstance(request_id, str) and 0 < len(request_id) <= 200)
    shown = "another value" if not isinstance(request_id, str) else f"{len(request_id)} characters"
    require(ok and (request_id or "x").isprintable(), "request_id", shown, "1 to 200 printable characters")


def _requested(ledger: Ledger, ids: Iterable[int | str] | NDArray[Any]) -> NDArray[np.int64]:
    wanted = ids if isinstance(ids, np.ndarray) else list(ids)
    positions = ledger.positions_of(wanted)
    if positions.size == 0:
        raise _refused("the request names no instance", "plan(ledger, ids=[17], ...)")
    if positions.size >= ledger.num_instances:
        raise _refused("the request names every instance", "retrain: nothing is left to fine-tune on")
    return positions


def refuse_untrained(chain: TrainingChain) -> None:
    """Raise PlanError PIA032 without a training step, or for instances that were forgotten before."""
    if chain.num_steps == 0:
        raise _refused(
            "the ledger holds no training step", "train first: the model has seen none of the instances"
        )
    gone = int(chain.forgotten.sum())
    if gone:
        raise _refused(f"{gone} of the requested instances were forgotten before", "request the others only")


def _refused(happened: str, fix: str) -> PlanError:
    return PlanError("PIA032", happened, "There is nothing to unlearn, or nothing to unlearn with", fix)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
