"""What every instance has spent of its budget so far, and whom the next step would take beyond it.

One class for both uses: the engine feeds it the events that it records, and a reader feeds it those of a
ledger, so that a resumed run knows exactly what was spent, and an auditor can check that nobody spent
more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.accounting.chords import CHUNK, ChordTables, clip_ratio, finished
from per_instance_accountant.accounting.disclosures import disclosure_rdp
from per_instance_accountant.accounting.filter import check_filterable
from per_instance_accountant.divergence import gaussian_epsilon, rdp_to_epsilon, sampled_gaussian_rdp
from per_instance_accountant.errors import GuaranteeError
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
Mask = NDArray[np.bool_]

_SLACK: Final = 1 + 1e-9
"""Covers the rounding of up to a million additions."""
_ABOVE: Final = 1 + 2.0**-22
"""Contributions are rounded up to float32."""


@final
class Spending:
    """Running sums of one filter. ``take`` every event after the Filter; everything else only reads.

    ``dropped``: (N,) who left. Steps of an unlearn phase are not filtered: they are counted apart, at
    the clip norm.

    >>> from per_instance_accountant.ledger.records import Phase
    >>> budgets = Filter(family="renyi", orders=np.full(2, 4.0), budgets=np.array([0.1, 1.0]))
    >>> spending = Spending(budgets)
    >>> spending.take(Phase(
    ...     kind="train", sampling="poisson", sample_rate=1.0, noise_std=5.0, max_grad_norm=1.0,
    ...     charging="worst_case", denominator=2.0, learning_rate=0.1))
    >>> spending.take(Step(positions=np.arange(2), contributions=np.ones(2, np.float32)))
    >>> spending.spent().round(4).tolist(), spending.exceeding().tolist()
    ([0.08, 0.08], [0])
    """

    def __init__(self, budgets: Filter) -> None:
        size = len(budgets.budgets)
        self.filter, self.dropped = budgets, np.zeros(size, dtype=np.bool_)
        self.orders, self.which = np.unique(budgets.orders, return_inverse=True)
        self.phase: Phase | None = None
        self.unfiltered: dict[Phase, int] = {}
        self.disclosed: list[float] = []
        """Epsilons at which statistics were published: beside the budgets, as unlearning is."""
        self.contradicted = False
        """Whether a recorded contribution lies above the bound that it was charged at, or a mechanism
        has none."""
        self._enforced = np.full(size, np.inf)
        self._forgotten = np.zeros(size, dtype=np.bool_)
        self._settled = np.zeros(size)
        self._steps = 0
        """Steps since ``_settled``, charged ``_charge`` each; always 0 for the rule Unamplified."""
        self._bound = np.zeros(size)
        self._charge = np.zeros(size)
        """What the next step may cost each instance, under ``phase``."""
        self._near = True
        """Whether somebody might be exceeding; else only ``_quiet`` more steps could change that."""
        self._quiet = 0.0

    @classmethod
    def of(cls, ledger: Ledger) -> Spending | None:
        """The state after all events of a ledger; None if it states no filter. One pass over the
        events."""
        spending = None
        for event in ledger.events():
            if isinstance(event, Filter):
                # Earlier events state thresholds or a mechanism at most; they are taken as well.
                spending = cls(event)
                break
            if isinstance(event, Step):
                return None
        if spending is not None:
            for event in ledger.events():
                spending.take(event)
        return spending

    def take(self, event: Event) -> None:
        """Follow one recorded event."""
        _TAKE[type(event)](self, event)

    def spent(self) -> Array:
        """(N,) sums so far, rounded up, in the unit of ``filter.budgets``."""
        return self._sums(self._steps) * _SLACK

    def exceeding(self, phase: Phase | None = None) -> NDArray[np.int64]:
        """Positions of instances still taking part whose budget one more step would exceed.

        phase: the mechanism of that step, when it is not the one in force. O(1) as long as nobody is
        near. Raises GuaranteeError PIA010 or PIA012 for a mechanism that the filter cannot bound.
        """
        charge = self._charge
        if phase is not None and phase != self.phase:
            check_filterable(phase, self.filter.family)
            charge = self._charges(phase)
        elif not self._near and self._steps + 1 <= self._quiet:
            return np.empty(0, dtype=np.int64)
        over = (self._sums(self._steps) + charge) * _SLACK > self.filter.budgets
        found = np.flatnonzero(over & ~self.dropped & ~self._forgotten)
        if charge is self._charge:
            self._near = bool(found.size)
        return found

    def kept(self) -> bool:
        """Whether the facts show that nobody exceeded the budget and everybody stayed under the
        bounds."""
        return not self.contradicted and bool((self.spent() <= self.filter.budgets).all())

    def _sums(self, steps: int) -> Array:
        return self._settled if not steps else self._settled + steps * self._charge

    def _settle(self) -> None:
        self._settled, self._steps = np.array(self._sums(self._steps)), 0

    def _take_filter(self, event: Filter) -> None:
        """It is what this object was made from."""

    def _take_phase(self, phase: Phase) -> None:
        self._settle()
        self.phase = phase
        try:
            check_filterable(phase, self.filter.family)
        except GuaranteeError:
            self.contradicted |= phase.kind == "train"
        self._set_charge()

    def _take_thresholds(self, event: Thresholds) -> None:
        self._settle()
        self._enforced = event.values.astype(np.float64)
        if event.source == "forget":
            self._forgotten = self._forgotten | (event.values == 0)
        self._set_charge()

    def _take_drop(self, event: Drop) -> None:
        # The others' charges are as before, so nothing but the sums of the dropped needs to be settled.
        # Without noise a charge is infinite: nothing times that must stay nothing.
        if self._steps:
            self._settled[event.positions] += self._steps * self._charge[event.positions]
        self._charge[event.positions] = self._bound[event.positions] = 0.0
        self.dropped[event.positions] = True
        self._set_quiet()

    def _take_resume(self, event: Resume) -> None:
        """Steps of an abandoned branch stay charged, and whoever was dropped stays dropped."""

    def _take_disclosure(self, event: Disclosure) -> None:
        self.disclosed.append(event.epsilon)

    def _take_public(self, event: PublicStep) -> None:
        """No instance took part."""

    def _take_step(self, step: Step) -> None:
        phase = self.phase
        if phase is None or phase.kind != "train":
            if phase is not None:
                self.unfiltered[phase] = self.unfiltered.get(phase, 0) + 1
            return
        positions, contributions = step.positions, step.contributions.astype(np.float64)
        if phase.charging == "unamplified":
            ratios = np.nextafter(contributions, np.inf) / phase.noise_std if phase.noise_std > 0 else np.inf
            drawn = np.where(contributions > 0, self.filter.orders[positions] / 2 * ratios**2, 0.0)
            self._settled[positions] += drawn
            sums = (self._settled[positions] + self._charge[positions]) * _SLACK
            self._near = self._near or bool((sums > self.filter.budgets[positions]).any())
        else:
            self.contradicted |= bool((contributions > self._bound[positions] * _ABOVE).any())
            self._steps += 1

    def _bounds(self, phase: Phase) -> Array:
        bounds: Array = np.full(len(self.dropped), phase.max_grad_norm)
        if phase.charging != "worst_case":
            bounds = np.minimum(self._enforced, bounds)
        bounds[self.dropped | self._forgotten] = 0.0
        return bounds

    def _charges(self, phase: Phase) -> Array:
        """(N,) upper bounds of what one step of ``phase`` costs each instance."""
        bounds = self._bounds(phase)
        share = np.minimum(np.nextafter(bounds / phase.max_grad_norm, np.inf), 1.0)
        squared = np.where(bounds == 0, 0.0, np.minimum(np.nextafter(share**2, np.inf), 1.0))
        ratio = clip_ratio(phase)
        if phase.charging == "unamplified" or phase.amplification_rate == 1:
            with np.errstate(invalid="ignore"):
                gaussian = self.filter.orders / 2 * squared * ratio**2 * (1 + 1e-15)
            return np.where(squared > 0, gaussian, 0.0)
        tables, charges = ChordTables([phase], self.orders), np.empty(len(squared))
        for start in range(0, len(squared), CHUNK):
            part = slice(start, min(start + CHUNK, len(squared)))
            losses = tables.losses(phase, squared[part], np.ones(part.stop - start, dtype=np.int64))
            charges[part] = losses[np.arange(len(losses)), self.which[part]]
        return finished(charges)

    def _set_charge(self) -> None:
        if self.phase is not None:
            self._bound, filtered = self._bounds(self.phase), self.phase.kind == "train"
            self._charge = self._charges(self.phase) if filtered else np.zeros_like(self._charge)
            self._set_quiet()

    def _set_quiet(self) -> None:
        """After how many steps, rounded down, the first sum comes near its budget."""
        self._near = self.phase is None or self.phase.charging == "unamplified"
        with np.errstate(divide="ignore", invalid="ignore"):
            room = (self.filter.budgets / _SLACK - self._settled) / self._charge
        room = np.where(self._charge > 0, room, np.inf)
        self._quiet = float(np.floor(room.min() * (1 - 1e-9))) - 1 if room.size else np.inf


_TAKE: dict[type[Event], Callable[[Spending, Any], None]] = {
    Phase: Spending._take_phase,
    Thresholds: Spending._take_thresholds,
    Step: Spending._take_step,
    Resume: Spending._take_resume,
    PublicStep: Spending._take_public,
    Disclosure: Spending._take_disclosure,
    Filter: Spending._take_filter,
    Drop: Spending._take_drop,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CertifiedBudget:
    """What a kept filter promises: both divergences of instance i at ``orders[i]`` are at most
    ``budgets[i]``, for all outputs of the run together; CERTIFIED. family: ``"gaussian"`` promises mu =
    sqrt(budgets[i]) as well.

    orders, budgets: (N,), the budgets with the unfiltered steps of unlearning phases on top, at the clip
    norm, and with published statistics.
    """

    family: str
    orders: Array
    budgets: Array

    def only(self, part: slice) -> CertifiedBudget:
        """The promise to some of the instances."""
        return CertifiedBudget(family=self.family, orders=self.orders[part], budgets=self.budgets[part])

    def epsilon(self, delta: float) -> Array:
        """(N,) upper bounds on epsilon at ``delta``. Raises UsageError PIA070."""
        if self.family == "gaussian":
            return np.asarray(gaussian_epsilon(np.sqrt(self.budgets) * (1 + 1e-15), delta))
        epsilon = np.empty(len(self.orders))
        for order in np.unique(self.orders):
            rows = self.orders == order
            epsilon[rows] = rdp_to_epsilon([order], self.budgets[rows, None], delta)
        return epsilon

    def rdp(self, orders: Array) -> Array:
        """(N, m) upper bounds of the divergence at ``orders`` (m,); inf above the order of a Renyi
        budget."""
        if self.family == "gaussian":
            return np.asarray(np.outer(self.budgets, orders / 2))
        return np.where(orders <= self.orders[:, None], self.budgets[:, None], np.inf)


def certified_budget(ledger: Ledger) -> CertifiedBudget | None:
    """The promise of the filter that a run was trained with, checked against every recorded step.

    None without a filter, and for a ledger whose steps show that it was not enforced. Steps of
    unlearning phases are added at the clip norm, for everybody. Raises LedgerError for damage.
    """
    spending = Spending.of(ledger)
    return None if spending is None else promised_by(spending)


def promised_by(spending: Spending) -> CertifiedBudget | None:
    """The promise after the events that ``spending`` took; None if they show that it was not enforced."""
    if not spending.kept():
        return None
    budgets = spending.filter.budgets.copy()
    if spending.disclosed and spending.filter.family == "gaussian":
        # No Gaussian bounds the sum of a Gaussian mechanism and one that is not.
        return None
    for epsilon in spending.disclosed:
        budgets += disclosure_rdp(epsilon, spending.filter.orders) * _SLACK
    for phase, steps in spending.unfiltered.items():
        if spending.filter.family == "gaussian":
            budgets += steps * clip_ratio(phase) ** 2 * _SLACK
        else:
            step = sampled_gaussian_rdp(phase.amplification_rate, [clip_ratio(phase)], spending.orders)[0]
            budgets += steps * step[spending.which] * _SLACK
    return CertifiedBudget(family=spending.filter.family, orders=spending.filter.orders, budgets=budgets)
