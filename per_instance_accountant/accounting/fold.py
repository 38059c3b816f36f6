"""The fold: facts of a ledger -> one Renyi curve per instance.

Every step is charged to every instance, drawn or not, at the bound ``c`` that its charging rule gives:
``D_alpha(sample_rate, c / noise_std)`` of the Poisson-sampled Gaussian
(``docs/math/individual_loss.md``). The value between two nodes of the sensitivity grid is read off
the chord, which lies above the curve because the Renyi divergence of one step is convex in the
squared sensitivity. Memory: the curves themselves, about 50 bytes per instance beside them, and a
bounded remainder; ``partition`` folds a range of instances only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.accounting.chords import CHUNK, ChordTables, clip_ratio, finished
from per_instance_accountant.accounting.compaction import require_draws
from per_instance_accountant.accounting.disclosures import disclosure_rdp
from per_instance_accountant.accounting.entries import ENFORCED, clip_norms, require_below, rule_in_fact
from per_instance_accountant.accounting.levels import Span, with_span
from per_instance_accountant.accounting.loss import IndividualLoss
from per_instance_accountant.accounting.rules import (
    Basis,
    ChargingRule,
    FixedThresholds,
    LastSeen,
    Sweep,
    Unamplified,
    WorstCase,
)
from per_instance_accountant.accounting.spending import certified_budget
from per_instance_accountant.divergence import DEFAULT_ORDERS, sampled_gaussian_rdp
from per_instance_accountant.errors import GuaranteeError, UsageError
from per_instance_accountant.ledger import Ledger
from per_instance_accountant.ledger.records import (
    Disclosure,
    Drop,
    Event,
    Filter,
    Phase,
    PublicStep,
    Resume,
    Step,
    Thresholds,
)

Array = NDArray[np.float64]

_BASIS: dict[str, Basis] = {
    r.name: r.basis for r in (WorstCase, FixedThresholds, Sweep, Unamplified, LastSeen)
}
_STRENGTH = (Basis.CERTIFIED, Basis.OUTPUT_SPECIFIC, Basis.ESTIMATE)
_FIXED = ("worst_case", "fixed_thresholds")
"""Rules whose bounds are known before the run."""
_ROUNDING = 1 + 1e-12
"""Covers the rounding of the additions (relative 1e-16 each, up to 4,000 spans per instance)."""


class _Fold:
    """Running totals of the instances ``part`` while the events of a ledger go by. ``bound`` is what
    each instance is charged from step ``since`` on."""

    def __init__(self, ledger: Ledger, part: slice, orders: Array, charging: str | None, apart: bool) -> None:
        size = part.stop - part.start
        self.part, self.rule_override, self.orders = part, charging, orders
        self.same_rule = charging is None or {p.charging for p in ledger.phases} == {charging}
        self.tables = ChordTables(ledger.phases, orders, complete=apart)
        self.rdp = np.zeros((size, len(orders)))
        self.worst = np.zeros(len(orders))
        self.squared_mu: Array | None = np.zeros(size)
        self.drawn = np.zeros(size)
        """Squared ratios of unamplified steps, added up."""
        self.phase: Phase | None = None
        self.enforced: Array = np.full(size, np.inf)
        self.thresholds: Thresholds | None = None
        self.forgotten = np.zeros(size, dtype=bool)
        self.seen: Array = np.full(size, np.inf)
        self.bound: Array = np.full(size, np.inf)
        self.since = np.zeros(size, dtype=np.int64)
        self.step = 0
        self.phase_start = 0
        self.rules_used: set[str] = set()
        self.spans: list[Span] | None = []
        self.worst_spans: list[Span] | None = []

    def take(self, event: Event) -> None:
        """Dispatch one event."""
        _TAKE[type(event)](self, event)

    def _take_phase(self, phase: Phase) -> None:
        self.settle_all()
        self.phase = phase
        self.phase_start = self.step
        self._set_bound()

    def _take_thresholds(self, thresholds: Thresholds) -> None:
        self.settle_all()
        self.thresholds = thresholds
        self.enforced = thresholds.values[self.part].astype(np.float64)
        if thresholds.source == "forget":
            self.forgotten |= self.enforced == 0
        self._set_bound()

    def _take_step(self, step: Step) -> None:
        rule = self.rule
        self.rules_used.add(rule_in_fact(rule, self.thresholds))
        require_below(step, self.mechanism, self.thresholds if rule in ENFORCED else None)
        self._charge_repeats(step)
        if rule in ("unamplified", "last_seen"):
            here = (step.positions >= self.part.start) & (step.positions < self.part.stop)
            positions, contributions = step.positions[here] - self.part.start, step.contributions[here]
            if rule == "unamplified":
                self._charge_drawn(positions, contributions)
            else:
                self._settle(positions)
                self.seen[positions] = self.bound[positions] = contributions
        self.step += 1

    def _take_filter(self, event: Filter) -> None:
        """:func:`certified_budget` says what it promises."""

    def _take_drop(self, event: Drop) -> None:
        """Dropped instances owe nothing more. When they leave follows from the bounds of the run's own rule,
        so that another rule, which need not know them, goes on charging them."""
        if not self.same_rule:
            return
        positions = event.positions
        positions = positions[(positions >= self.part.start) & (positions < self.part.stop)] - self.part.start
        if self.phase is not None and self.rule != "unamplified":
            self._settle(positions)
        self.forgotten[positions] = True
        self.bound[positions] = 0.0
        # A span holds one ratio per instance.
        self.spans = None

    def _take_resume(self, event: Resume | PublicStep) -> None:
        """Steps of an abandoned branch stay charged, the ledger has what binds the new one stated
        again, and steps on public data are nobody's."""

    def _take_disclosure(self, event: Disclosure) -> None:
        """Charged to everybody; the sum has no law of a Gaussian."""
        self.rdp += (cost := disclosure_rdp(event.epsilon, self.orders))
        self.worst += cost
        self.squared_mu = self.spans = self.worst_spans = None

    @property
    def rule(self) -> str:
        return self.rule_override or self.mechanism.charging

    @property
    def mechanism(self) -> Phase:
        if self.phase is None:
            raise GuaranteeError(
                "PIA011",
                "the ledger holds a step before any mechanism",
                "Its noise is unknown, so its loss is unbounded",
                "record the Phase before the first Step",
            )
        return self.phase

    def _set_bound(self) -> None:
        """Bounds from now on, by rule; forgotten instances take no part in any step and owe nothing."""
        if self.phase is None:
            return
        source = {"last_seen": self.seen}.get(self.rule)
        if source is None:
            source = self.enforced if self.rule in ENFORCED else np.full_like(self.bound, np.inf)
        self.bound = np.minimum(source, self.phase.max_grad_norm)
        self.bound[self.forgotten] = 0.0

    def settle_all(self) -> None:
        """Charge the span that ends now: everybody, and the worst case."""
        steps = self.step - self.phase_start
        if self.phase is not None and steps > 0:
            self.worst += steps * self.tables.top(self.phase)
            self._keep_span(self.phase, steps)
            self.phase_start = self.step
        if self.phase is not None and self.rule != "unamplified":
            for start in range(0, len(self.since), CHUNK):
                self._settle(slice(start, min(start + CHUNK, len(self.since))))
        self.since[:] = self.step

    def _keep_span(self, phase: Phase, steps: int) -> None:
        """Remember the ratios of the span for the tight epsilon, rounded up to float32."""
        rate, ratio = phase.amplification_rate, clip_ratio(phase)
        self.worst_spans = with_span(self.worst_spans, steps, rate, np.array([ratio]))
        if rule_in_fact(self.rule, self.thresholds) not in _FIXED:
            self.spans = None
        if self.spans is not None:
            share = np.minimum(self.bound / phase.max_grad_norm * (1 + 1e-15), 1.0)
            ratios = np.where(share > 0, share, np.nan) * ratio
            self.spans = with_span(self.spans, steps, rate, np.where(share > 0, ratios, 0.0))

    def _settle(self, positions: NDArray[np.int64] | slice) -> None:
        """Charge ``positions`` their present bound for the steps since they were last charged."""
        steps = self.step - self.since[positions]
        if not steps.any():
            return
        phase, bound = self.mechanism, self.bound[positions]
        # Rounded up: the division and the square may each round down by one unit in the last place.
        ratio = np.minimum(np.nextafter(bound / phase.max_grad_norm, np.inf), 1.0)
        squared = np.where(bound == 0, 0.0, np.minimum(np.nextafter(ratio**2, np.inf), 1.0))
        self.rdp[positions] += self.tables.losses(phase, squared, steps)
        if phase.amplification_rate < 1:
            self.squared_mu = None
        if self.squared_mu is not None:
            with np.errstate(invalid="ignore"):
                spent = np.where(squared > 0, steps * squared * clip_ratio(phase) ** 2, 0.0)
            self.squared_mu[positions] += spent
        self.since[positions] = self.step

    def _charge_drawn(self, positions: NDArray[np.int64], contributions: NDArray[np.float32]) -> None:
        """Gaussian loss of the drawn, nothing for the others, no amplification (``alpha c^2 / (2
        std^2)``)."""
        phase = self.mechanism
        squared = (np.nextafter(contributions.astype(np.float64), np.inf) / phase.noise_std) ** 2
        self.drawn[positions] += squared
        if self.squared_mu is not None:
            self.squared_mu[positions] += squared

    @property
    def rounding(self) -> float:
        """Covers the rounding of sums with one term for each step."""
        return 1.0 + self.step * float(np.finfo(np.float64).eps)

    def settle_drawn(self) -> None:
        """Charge the sums of :meth:`_charge_drawn`, which are the same at all orders."""
        for start in range(0, len(self.drawn) if self.drawn.any() else 0, CHUNK):
            part = slice(start, start + CHUNK)
            self.rdp[part] += self.drawn[part, None] * (self.orders / 2 * self.rounding)

    def _charge_repeats(self, step: Step) -> None:
        """A non-Poisson loader may put an instance into one release m times, up to m clip norms. Its batch
        order is public, so m is: the whole release is charged at m clip norms on top."""
        phase = self.mechanism
        repeats = clip_norms(step, phase)
        if repeats <= 1:
            return
        if phase.sampling == "poisson":
            raise GuaranteeError(
                "PIA011",
                f"step {self.step} records a contribution above the clip norm under Poisson sampling",
                "Clipping failed or an instance was drawn twice, so no individual number of this run holds",
                "train again with the loader and the optimizer returned by make_private",
            )
        ratios = np.array([repeats, 1]) * clip_ratio(phase)
        several, once = sampled_gaussian_rdp(phase.amplification_rate, ratios, self.orders)
        extra = np.where(np.isfinite(several), several - np.minimum(once, several), np.inf)
        self.worst += extra
        if self.rule in ENFORCED:
            extra = several  # many small thresholds may add up to all of it
        self.spans = self.worst_spans = None
        if self.rule != "unamplified":
            self.rdp += extra
            self.squared_mu = None


_TAKE: dict[type[Event], Callable[[_Fold, Any], None]] = {
    Phase: _Fold._take_phase,
    Thresholds: _Fold._take_thresholds,
    Step: _Fold._take_step,
    Resume: _Fold._take_resume,
    PublicStep: _Fold._take_resume,
    Disclosure: _Fold._take_disclosure,
    Filter: _Fold._take_filter,
    Drop: _Fold._take_drop,
}


def _checked_orders(orders: Sequence[float] | Array | None) -> Array:
    values = np.atleast_1d(np.asarray(DEFAULT_ORDERS if orders is None else orders, dtype=np.float64))
    if values.ndim != 1 or values.size == 0 or not np.all(values > 1):
        raise UsageError(
            "PIA070",
            f"orders has {int((~(values > 1)).sum())} entries that are not above 1, of {values.size}",
            "The Renyi divergence is used at orders above 1 only",
            "account(ledger, orders=[2, 8, 32])",
        )
    return values


def _checked_partition(partition: tuple[int, int] | None, size: int) -> slice:
    start, stop = (0, size) if partition is None else partition
    if not (0 <= start < stop <= size):
        raise UsageError(
            "PIA070",
            f"the partition is ({start}, {stop}), allowed are positions 0 <= start < stop <= {size}",
            "No instance of this ledger would be accounted for by it",
            f"account(ledger, partition=(0, {size}))",
        )
    return slice(start, stop)


def _check_rule(ledger: Ledger, charging: ChargingRule | None) -> None:
    """A rule that rests on clipping at thresholds needs a ledger of a run that clipped at them."""
    require_draws(ledger, None if charging is None else charging.name)
    if charging is None or charging.name not in ENFORCED:
        return
    other = {p.charging for p in ledger.phases} - {charging.name}
    if other:
        raise GuaranteeError(
            "PIA013",
            f"the run was trained with {sorted(other)}, not with {charging.name}",
            "Nobody was clipped at individual thresholds, so they bound nothing",
            "account(ledger) for the rule of the run, or charging=WorstCase()",
        )
    if isinstance(charging, FixedThresholds) and charging.thresholds is not None:
        _check_thresholds(ledger, charging)


def _check_thresholds(ledger: Ledger, charging: FixedThresholds) -> None:
    recorded = next((e.values for e in ledger.events() if isinstance(e, Thresholds)), None)
    given = charging.as_float32()
    cap = np.float32(min(p.max_grad_norm for p in ledger.phases))
    if recorded is None or recorded.shape != given.shape or (recorded > np.minimum(given, cap)).any():
        raise GuaranteeError(
            "PIA013",
            "the thresholds given are below those that the ledger recorded as enforced, or of another length",
            "A threshold that was not enforced by clipping bounds nothing",
            "account(ledger, charging=FixedThresholds()) for the recorded thresholds",
        )


def account(
    ledger: Ledger | str | os.PathLike[str],
    charging: ChargingRule | None = None,
    orders: Sequence[float] | Array | None = None,
    *,
    partition: tuple[int, int] | None = None,
    apart: bool = False,
) -> IndividualLoss:
    """Individual Renyi losses of every instance over all recorded steps.

    ledger: an open Ledger or the path of one. charging: a rule, or None for the rule(s) of the run
    itself. orders: (m,) Renyi orders above 1, or None for ``divergence.DEFAULT_ORDERS``.
    partition: ``(start, stop)`` positions, or None for all; the parts of a data set are folded
    independently of each other, each in about ``8 m + 50`` bytes per instance. apart: whether no bit
    of an instance's values may depend on other instances, as private statistics of them need.

    Returns an :class:`IndividualLoss` whose ``rdp`` (N, m) are upper bounds in nats, with the basis
    on which they stand. Raises UsageError PIA070 for orders at most 1 or a partition outside the data
    set, GuaranteeError PIA013 for a rule that the run did not enforce, PIA011 for one that needs draws
    and a compacted ledger, LedgerError for a ledger that is missing or damaged.

    Source of the step formula: Mironov, Talwar and Zhang 2019 with the instance's own bound as
    sensitivity; chord and composition are derived in ``docs/math/individual_loss.md``.

    >>> from per_instance_accountant.accounting import FixedThresholds
    >>> from per_instance_accountant.ledger.records import Phase, Run, Step, Thresholds
    >>> from per_instance_accountant.ledger import LedgerWriter
    >>> import numpy as np
    >>> writer = LedgerWriter.create(None, Run(num_instances=2))
    >>> writer.append(Phase(
    ...     kind="train", sampling="poisson", sample_rate=0.01, noise_std=1.0, max_grad_norm=1.0,
    ...     charging="fixed_thresholds", denominator=10.0, learning_rate=0.1))
    >>> writer.append(Thresholds(values=np.array([0.25, 1.0], dtype=np.float32), source="fixed"))
    >>> nobody = Step(positions=np.empty(0, np.int64), contributions=np.empty(0, np.float32))
    >>> for _ in range(100):
    ...     writer.append(nobody)
    >>> loss = account(writer.ledger(), orders=[8])
    >>> print(loss.basis, [f"{value:.5f}" for value in loss.rdp[:, 0]])
    CERTIFIED ['0.00259', '0.08936']
    """
    ledger = Ledger.open(ledger)
    ledger.require_whole()
    _check_rule(ledger, charging)
    part = _checked_partition(partition, ledger.num_instances)
    fold = _Fold(ledger, part, _checked_orders(orders), charging.name if charging else None, apart)
    for event in ledger.events():
        fold.take(event)
    fold.settle_all()
    fold.settle_drawn()
    filtered = certified_budget(ledger)
    rules = fold.rules_used or ({charging.name} if charging else {p.charging for p in ledger.phases})
    np.minimum(finished(fold.rdp), fold.worst, out=fold.rdp)
    fold.rdp *= _ROUNDING
    return IndividualLoss(
        rdp=fold.rdp,
        worst_case_rdp=fold.worst * _ROUNDING,
        orders=fold.orders,
        ids=ledger.ids[part],
        basis=max((_BASIS[r] for r in rules), key=_STRENGTH.index, default=Basis.CERTIFIED),
        charging=tuple(sorted(rules)),
        num_steps=ledger.num_steps,
        mu=None if fold.squared_mu is None else np.sqrt(fold.squared_mu * fold.rounding) * _ROUNDING,
        digest=ledger.digest,
        certified_budget=None if filtered is None else filtered.only(part),
        spans=None if fold.spans is None else tuple(fold.spans),
        worst_spans=None if fold.worst_spans is None else tuple(fold.worst_spans),
    )
