"""Which bounds apply to a chain, and why the others do not. Adding a bound: one file in bounds/ and one row
here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from per_instance_accountant.divergence import DEFAULT_ORDERS
from per_instance_accountant.unlearning.assumptions import Array, Assumptions, contraction_factors
from per_instance_accountant.unlearning.bounds.bounded_domain import BoundedDomain, batch_sizes
from per_instance_accountant.unlearning.bounds.clipped_gradients import ClippedGradients
from per_instance_accountant.unlearning.bounds.contractive import Contractive, contractive_from
from per_instance_accountant.unlearning.bounds.data_processing import DataProcessing, data_processing_from
from per_instance_accountant.unlearning.bounds.filter_budget import FilterBudget
from per_instance_accountant.unlearning.bounds.fixed_lsi import FixedLsi
from per_instance_accountant.unlearning.bounds.interface import Bound, Measure, Tail
from per_instance_accountant.unlearning.bounds.schedule import Schedule
from per_instance_accountant.unlearning.bounds.shifted_lsi import Curve, ShiftedLsi, orders_below, tabulated
from per_instance_accountant.unlearning.bounds.subsampled import Subsampled, subsampled_from
from per_instance_accountant.unlearning.chain import TrainingChain
from per_instance_accountant.unlearning.mechanism import Mechanism


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Facts:
    """Everything a bound may use: training, the assumptions, the measure, and the mechanism of the
    unlearning steps."""

    chain: TrainingChain
    assumptions: Assumptions
    measure: Measure
    mechanism: Mechanism | None

    def data_processing(self) -> DataProcessing:
        """R0, which every other bound may start from."""
        chain = self.chain
        return data_processing_from(
            chain.counts, chain.amplification_rates, chain.ratios, self.measure, disclosed=chain.disclosed
        )

    def schedule(self) -> Schedule:
        """Shifts, noise and contraction per step on the iterate, each rounded to the safe side."""
        chain, per_step = self.chain, self.chain.counts
        learning_rate, denominator = chain.per_span("learning_rate"), chain.per_span("denominator")
        shifts = np.nextafter(chain.thresholds * (learning_rate / denominator)[:, None], np.inf) * (1 + 1e-15)
        shifts = np.where((chain.thresholds > 0) & (learning_rate > 0)[:, None], shifts, 0.0)
        noise = learning_rate * chain.per_span("noise_std") / denominator * (1 - 1e-15)
        return Schedule(
            shifts=np.repeat(shifts, per_step, axis=0),
            noise_std=np.repeat(noise, per_step),
            contraction=np.repeat(self._factors(chain.mechanisms), per_step),
            rates=np.repeat(chain.amplification_rates, per_step),
            tail=self.tail(),
        )

    def tail(self) -> Tail:
        """The unlearning steps on the iterate."""
        m = self.mechanism
        if m is None:
            return Tail(noise_std=0.0, contraction=1.0)
        return Tail(noise_std=_noise(m), contraction=float(self._factors((m,))[0]))

    def _factors(self, mechanisms: tuple[Mechanism, ...]) -> Array:
        def column(name: str) -> Array:
            return np.array([getattr(m, name) for m in mechanisms], dtype=np.float64)

        # A filter may have dropped everybody who is drawn, also from a full batch.
        empty = [self.chain.filtered or (m.sampling == "poisson" and m.sample_rate < 1) for m in mechanisms]
        return contraction_factors(
            self.assumptions,
            learning_rate=column("learning_rate"),
            weight_decay=column("weight_decay"),
            denominator=column("denominator"),
            batch_may_be_empty=np.array(empty, dtype=np.bool_),
        )


def _noise(m: Mechanism) -> float:
    """Noise std of one step on the iterate, rounded down."""
    return m.learning_rate * m.noise_std / m.denominator * (1 - 1e-15)


def contraction_of(facts: Facts) -> float | None:
    """Contraction factor of the unlearning steps (upper bound), None when unknown."""
    if facts.assumptions.smoothness is None or facts.mechanism is None:
        return None
    return facts.tail().contraction


Requirement = Callable[[Facts], str | None]
"""None when it is met, else the reason."""


def _one_state(facts: Facts) -> str | None:
    mechanisms = (*facts.chain.mechanisms, *((facts.mechanism,) if facts.mechanism else ()))
    if all(m.optimizer == "SGD" and m.momentum == 0 for m in mechanisms):
        return None
    return "the optimizer is not plain SGD, so the parameters are not the whole state"


def _one_branch(facts: Facts) -> str | None:
    if facts.chain.abandoned_steps == 0:
        return None
    return f"{facts.chain.abandoned_steps} abandoned steps may have been seen: the iterates are not hidden"


def _no_hidden_state(facts: Facts) -> str | None:
    if not facts.chain.hidden_state:
        return None
    return "a filter's decisions depend on the models so far, so a step depends on more than the parameters"


def _nothing_published(facts: Facts) -> str | None:
    if not facts.chain.disclosed:
        return None
    return f"{len(facts.chain.disclosed)} statistics of individual values were published, beside the model"


def _every_update_known(facts: Facts) -> str | None:
    if facts.chain.public_steps == 0:
        return None
    return f"{facts.chain.public_steps} updates from public data, whose contraction nobody states"


def _filtered(facts: Facts) -> str | None:
    if facts.chain.budgets is None:
        return "the run states no privacy filter"
    if facts.chain.hidden_state:
        return None
    return "who left is public, so the recorded charges themselves are bounds"


def _contraction_known(facts: Facts) -> str | None:
    known = facts.assumptions
    if known.smoothness is None:
        return "no smoothness is stated (assumptions={'smoothness': ...})"
    if known.num_instances is not None and known.num_instances < facts.chain.num_instances:
        return f"smoothness is of {known.num_instances} instances, the run has {facts.chain.num_instances}"
    denominators = {m.denominator for m in facts.chain.mechanisms}
    denominators |= {facts.mechanism.denominator} if facts.mechanism else set()
    if known.denominator is None and len(denominators) > 1:
        return "smoothness is stated without a denominator, the steps have several (denominator=...)"
    return None


_BINDING: Final = 1 + 2.0**-16
"""Clipping uses norms that are rounded up and a stabiliser of 1e-6, so it begins just below its threshold."""


def _clipping_never_binds(facts: Facts) -> str | None:
    known, chain = facts.assumptions, facts.chain
    if not known.clipping_never_binds:
        return "clipping may bind, which destroys contraction (clipping_never_binds=True if it never does)"
    if chain.at_threshold:
        return (
            f"{chain.at_threshold} recorded contributions reached the threshold they were clipped at,"
            " which contradicts clipping_never_binds"
        )
    clip = chain.per_span("max_grad_norm")
    tail = (facts.mechanism.max_grad_norm,) if facts.mechanism else ()
    bound = known.gradient_norm or 0.0
    if known.gradient_norm is not None and chain.largest_contribution > bound * (1 + 1e-5) + 2e-6:
        return f"recorded contributions reach {chain.largest_contribution:.6g}, above the bound {bound:.6g}"
    needed = bound * _BINDING + 2e-6
    if known.gradient_norm is not None and min((*clip.tolist(), *tail)) < needed:
        return f"instance gradients may reach {bound:.6g}; clipping begins there, the clip norm must be above"
    individual = chain.smallest_threshold < (needed if known.gradient_norm is not None else clip)
    if np.any(individual & chain.thresholds_from_sweep):
        return "thresholds were measured during training, so clipping may bind at other parameters"
    if np.any(individual) and not known.individual_thresholds:
        return (
            "individual thresholds lie below the gradient bound"
            " (individual_thresholds=True if each is at least its instance's own gradient bound)"
        )
    return None


CONTRACTION: Final[tuple[Requirement, ...]] = (
    _one_state,
    _one_branch,
    _nothing_published,
    _no_hidden_state,
    _every_update_known,
    _contraction_known,
    _clipping_never_binds,
)


def _sampling_hides(facts: Facts) -> str | None:
    if np.any(facts.chain.amplification_rates < 1):
        return None
    return "no step hides who was drawn, so R3 is never above it"


def _steps_have_one_state(facts: Facts) -> str | None:
    m = facts.mechanism
    if m is None or (m.optimizer == "SGD" and m.momentum == 0):
        return None
    return "the optimizer of the unlearning steps is not plain SGD, so the parameters are not the whole state"


def _projected(facts: Facts) -> str | None:
    if facts.mechanism is None or facts.mechanism.projection_radius is None:
        return "the parameters are not projected before each unlearning step (projection_radius=...)"
    if facts.chain.above_clip:
        return f"{facts.chain.above_clip} recorded contributions lie above the clip norm"
    return None


DISTANCE: Final[tuple[Requirement, ...]] = (
    _steps_have_one_state,
    _one_branch,
    _nothing_published,
    _projected,
)
BALL: Final[tuple[Requirement, ...]] = (*DISTANCE, _no_hidden_state)
"""R6 allows any two maps with clipped gradients; R5 needs the same kernel in both worlds."""


def _filter_budget(facts: Facts) -> Bound:
    promised = facts.chain.budgets
    if promised is None:
        raise ValueError("the run states no privacy filter")
    return FilterBudget(
        measure=facts.measure,
        family=promised.family,
        orders=promised.orders,
        budgets=promised.budgets,
    )


def _contractive(facts: Facts) -> Bound:
    return contractive_from(facts.schedule(), facts.measure)


def _subsampled(facts: Facts) -> Bound:
    return subsampled_from(facts.schedule(), facts.measure)


_BALL_ROUNDING: Final = 1 + 4e-6
"""Covers projection and clipping in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ball:
    """The unlearning steps on a ball: start distance, Lipschitz factor of the regulariser, twice the largest
    clipped gradient of one instance on the iterate, instances that may be drawn and their rate, noise std."""

    distance: float
    decay: float
    pull: float
    retained: int
    rate: float
    noise_std: float

    @classmethod
    def of(cls, facts: Facts) -> _Ball:
        m = facts.mechanism
        if m is None or m.projection_radius is None:
            raise ValueError("the steps are not projected")
        product = m.learning_rate * m.weight_decay
        return cls(
            distance=2 * m.projection_radius * _BALL_ROUNDING,
            decay=abs(1 - product) * (1 + 4e-16) + 4e-16 * (1 + product),
            pull=2 * m.learning_rate * m.max_grad_norm / m.denominator * _BALL_ROUNDING,
            retained=facts.chain.num_instances - facts.chain.thresholds.shape[1],
            rate=m.sample_rate if m.sampling == "poisson" else 1.0,
            noise_std=_noise(m),
        )


def _curve(facts: Facts) -> Curve:
    """P(order) of training by data processing."""
    start = facts.data_processing()
    return lambda orders: start.rdp(0, orders)


def _bounded_domain(facts: Facts) -> Bound:
    ball = _Ball.of(facts)
    sizes, chances = batch_sizes(ball.retained, ball.rate)
    with np.errstate(divide="ignore"):
        separations = (ball.decay * ball.distance + ball.pull * sizes) / ball.noise_std * (1 + 1e-14)
    return BoundedDomain(measure=facts.measure, curve=_curve(facts), separations=separations, chances=chances)


def _clipped_gradients(facts: Facts) -> Bound:
    """Everybody retained may be drawn at every step, so the largest batch bounds the drift."""
    ball = _Ball.of(facts)
    return ClippedGradients(
        measure=facts.measure,
        start_distance=ball.distance,
        drift=ball.pull * ball.retained,
        decay=ball.decay,
        noise_std=ball.noise_std,
    )


def _fixed_lsi(facts: Facts) -> Bound:
    shifted = _shifted_lsi(facts)
    return FixedLsi(
        measure=shifted.measure,
        curve=shifted.curve,
        constant=shifted.constant,
        tail=shifted.tail,
        direction=shifted.direction,
    )


def _shifted_lsi(facts: Facts) -> ShiftedLsi:
    """Without hidden sampling the maps with the forget set are contractive by the same assumptions: both
    directions."""
    plan, start = facts.schedule(), facts.data_processing()
    order = facts.measure.order or float(DEFAULT_ORDERS[-1])
    if start.mu(0) is not None:
        return ShiftedLsi(
            measure=facts.measure,
            curve=lambda orders: start.rdp(0, orders),
            constant=float(plan.variances().sum()) * (1 + 1e-12),
            tail=plan.tail,
            direction="both",
        )
    orders = orders_below(order)
    return ShiftedLsi(
        measure=facts.measure,
        curve=tabulated(orders, start.rdp(0, orders)),
        constant=float(plan.variances().sum()) * (1 + 1e-12),
        tail=plan.tail,
        direction="remove",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One bound: its name, what it needs, how it is built."""

    name: str
    requirements: tuple[Requirement, ...]
    build: Callable[[Facts], Bound]


ROWS: Final[tuple[Row, ...]] = (
    Row(name=DataProcessing.name, requirements=(), build=Facts.data_processing),
    Row(name=FilterBudget.name, requirements=(_filtered,), build=_filter_budget),
    Row(name=FixedLsi.name, requirements=CONTRACTION, build=_fixed_lsi),
    Row(name=ShiftedLsi.name, requirements=CONTRACTION, build=_shifted_lsi),
    Row(name=Contractive.name, requirements=CONTRACTION, build=_contractive),
    Row(name=Subsampled.name, requirements=(*CONTRACTION, _sampling_hides), build=_subsampled),
    Row(name=BoundedDomain.name, requirements=BALL, build=_bounded_domain),
    Row(name=ClippedGradients.name, requirements=DISTANCE, build=_clipped_gradients),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NotApplicable:
    """A bound that was not used, and why."""

    bound: str
    reason: str


def applicable(facts: Facts, direction: str) -> tuple[tuple[Bound, ...], tuple[NotApplicable, ...]]:
    """The bounds that hold for ``facts`` in ``direction`` (``"both"`` or ``"remove"``), and the rest with
    reasons."""
    bounds: list[Bound] = []
    refused: list[NotApplicable] = []
    for row in ROWS:
        reasons = [reason for reason in (need(facts) for need in row.requirements) if reason is not None]
        if reasons:
            refused.append(NotApplicable(bound=row.name, reason=reasons[0]))
            continue
        bound = row.build(facts)
        if direction == "both" and bound.direction != "both":
            refused.append(
                NotApplicable(
                    bound=row.name,
                    reason="under hidden sampling it covers one direction only (direction='remove')",
                )
            )
            continue
        bounds.append(bound)
    return tuple(bounds), tuple(refused)
