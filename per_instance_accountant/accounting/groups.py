"""Renyi curves of whole groups, such as all rows of one person: never a sum of the members' epsilons."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from per_instance_accountant.accounting.chords import clip_ratio
from per_instance_accountant.accounting.disclosures import disclosure_rdp
from per_instance_accountant.accounting.entries import ENFORCED, clip_norms, require_below, rule_in_fact
from per_instance_accountant.accounting.loss import IndividualLoss
from per_instance_accountant.accounting.rules import Basis, FixedThresholds, Sweep, Unamplified, WorstCase
from per_instance_accountant.divergence import (
    DEFAULT_ORDERS,
    group_gaussian_rdp,
    group_gaussian_rdp_removal,
)
from per_instance_accountant.errors import GuaranteeError, UnsupportedError, UsageError
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

_BASIS: Final = {rule.name: rule.basis for rule in (WorstCase, FixedThresholds, Sweep, Unamplified)}
_LEVELS: Final = 512
"""Ratios are rounded up to this many levels per octave, so that groups share computations; costs
0.14 % of a ratio."""
_ROUNDING: Final = 1 + 1e-9
_FORMULAS: Final = {"both": group_gaussian_rdp, "removal": group_gaussian_rdp_removal}


def account_groups(
    ledger: Ledger | str | os.PathLike[str],
    groups: str | Mapping[Any, ArrayLike],
    orders: Sequence[float] | Array | None = None,
    *,
    direction: Literal["both", "removal"] = "both",
) -> IndividualLoss:
    """Renyi losses of groups over all recorded steps: all members in the data set, against none of them.

    groups: the name of labels that the run holds, or label -> business ids of its members (instances
    in no group are left out). direction: ``"both"``, or ``"removal"`` for the divergence of the run
    with the group from the run without it only, which is much smaller at high orders and says
    nothing about the other one.

    Returns an IndividualLoss with one row per group in the order of its ``ids``, the labels. Every
    step is charged by the law of the group's summed thresholds over the independent draws of its members
    (``divergence.group_gaussian_rdp``, docs/math/sampled_gaussian.md); under ``Unamplified`` by the
    Gaussian with the sum of the drawn members' contributions. The basis is that of the run's rules.

    Raises UsageError PIA070, PIA071 for overlapping, empty or unknown groups, PlanError PIA032 for
    unknown ids, UnsupportedError PIA060 for the rule ``last_seen``, GuaranteeError PIA011 for
    contributions above the bounds.

    >>> from per_instance_accountant.ledger import LedgerWriter, Run
    >>> people = {"person": np.array(["a", "a", "b"])}
    >>> writer = LedgerWriter.create(None, Run(num_instances=3, groups=people))
    >>> writer.append(Phase(
    ...     kind="train", sampling="poisson", sample_rate=1.0, noise_std=2.0, max_grad_norm=1.0,
    ...     charging="worst_case", denominator=1.0, learning_rate=0.1))
    >>> writer.append(Step(positions=np.arange(3), contributions=np.ones(3, np.float32)))
    >>> account_groups(writer.ledger(), "person", orders=[4.0]).rdp.round(4).tolist()
    [[2.0], [0.5]]
    """
    ledger = Ledger.open(ledger)
    ledger.require_whole()
    if direction not in _FORMULAS:
        _refuse("PIA070", f"direction={direction!r}", 'account_groups(ledger, "person", direction="both")')
    labels, which = _membership(ledger, groups)
    grid = np.atleast_1d(np.asarray(DEFAULT_ORDERS if orders is None else orders, dtype=np.float64))
    fold = _GroupFold(which, len(labels), grid, direction)
    for event in ledger.events():
        _TAKE[type(event)](fold, event)
    fold.settle()
    return IndividualLoss(
        rdp=np.minimum(fold.rdp, fold.worst) * _ROUNDING,
        worst_case_rdp=fold.worst.max(axis=0) * _ROUNDING,
        orders=grid,
        ids=labels,
        basis=max((_BASIS[name] for name in fold.rules), key=tuple(Basis).index, default=Basis.CERTIFIED),
        charging=tuple(sorted(fold.rules)),
        num_steps=ledger.num_steps,
        mu=None if fold.squared_mu is None else np.sqrt(fold.squared_mu) * _ROUNDING,
        digest=ledger.digest,
    )


def _membership(
    ledger: Ledger, groups: str | Mapping[Any, ArrayLike]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """(G,) labels, and (N,) the number of the group that an instance belongs to, -1 for none."""
    if isinstance(groups, str):
        if groups not in ledger.groups:
            _refuse("PIA071", f"no group {groups!r} in the run, which holds {sorted(ledger.groups)}", _GIVEN)
        labels, which = np.unique(ledger.groups[groups], return_inverse=True)
        return labels, which.astype(np.int64)
    which = np.full(ledger.num_instances, -1, dtype=np.int64)
    for number, members in enumerate(groups.values()):
        positions = ledger.positions_of(members)
        if not positions.size:
            _refuse("PIA070", "a group without members", _GIVEN)
        shared = int((which[positions] >= 0).sum())
        if shared:
            _refuse(
                "PIA070",
                f"{shared} instances in two groups",
                "one group for everything that belongs together",
            )
        which[positions] = number
    if not groups:
        _refuse("PIA070", "no groups", _GIVEN)
    return np.array(list(groups)), which


_GIVEN: Final = (
    'PrivacyEngine(groups={"person": labels}), or account_groups(ledger, {"person a": ["id 1", "id 2"]})'
)


def _refuse(code: str, happened: str, fix: str) -> NoReturn:
    raise UsageError(code, happened, "No loss of a group was computed", fix)


class _GroupFold:
    """Totals of G groups while the events go by; ``worst`` charges every member the clip norm."""

    def __init__(self, which: NDArray[np.int64], count: int, orders: Array, direction: str) -> None:
        self.which, self.orders, self.formula = which, orders, _FORMULAS[direction]
        members = np.flatnonzero(which >= 0)
        self.members = members[np.argsort(which[members], kind="stable")]
        self.sizes = np.bincount(which[members], minlength=count)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.rdp, self.worst = np.zeros((count, len(orders))), np.zeros((count, len(orders)))
        self.squared_mu: Array | None = np.zeros(count)
        self.enforced: Array = np.full(len(which), np.inf)
        self.thresholds: Thresholds | None = None
        self.gone = np.zeros(len(which), dtype=np.bool_)
        self.phase: Phase | None = None
        self.steps = 0
        self.rules: set[str] = set()
        self.known: dict[tuple[float, bytes], Array] = {}

    def take_phase(self, phase: Phase) -> None:
        self.settle()
        self.phase = phase

    def take_thresholds(self, event: Thresholds) -> None:
        self.settle()
        self.thresholds, self.enforced = event, event.values.astype(np.float64)
        if event.source == "forget":
            self.gone |= event.values == 0

    def take_drop(self, event: Drop) -> None:
        self.settle()
        self.gone[event.positions] = True

    def take_step(self, step: Step) -> None:
        phase = self.phase
        if phase is None or phase.charging not in _BASIS:
            raise UnsupportedError(
                "PIA060",
                "groups of a run that was charged by the norms its instances were last seen with",
                "The members' norms were observed at different parameters, so their sum means nothing",
                "train with charging=Sweep(every=50), or WorstCase()",
            )
        self.rules.add(rule_in_fact(phase.charging, self.thresholds))
        if phase.charging in ENFORCED:
            require_below(step, phase, self.thresholds)
        self._charge_repeats(step, phase)
        self.steps += 1
        contributions = step.contributions.astype(np.float64)
        if phase.charging == "unamplified":
            inside = self.which[step.positions] >= 0
            groups = self.which[step.positions][inside]
            sums = np.bincount(groups, np.nextafter(contributions[inside], np.inf), len(self.sizes))
            with np.errstate(divide="ignore", invalid="ignore"):
                squared = np.where(sums > 0, (sums / phase.noise_std) ** 2, 0.0)
            self._add(np.outer(squared, self.orders / 2), squared)

    def _charge_repeats(self, step: Step, phase: Phase) -> None:
        """Contributions of the rule Unamplified tell how often its drawn were in the release; the worst case
        is then as many clip norms of every member."""
        repeats = clip_norms(step, phase)
        if repeats <= 1:
            return
        if phase.charging != "unamplified" or phase.sampling == "poisson":
            raise GuaranteeError(
                "PIA011",
                "a step records a contribution above the clip norm",
                "The draws of the group's members are not what the bound assumes",
                "train again with the loader and the optimizer returned by make_private",
            )
        clip = np.full(len(self.which), phase.max_grad_norm)
        once, several = self._one_step(phase, clip), self._one_step(phase, repeats * clip)
        self.worst += np.where(np.isfinite(several), several - np.minimum(once, several), np.inf)

    def take_disclosure(self, event: Disclosure) -> None:
        """Pure differential privacy for one instance is that of k times its epsilon for k of them."""
        cost = disclosure_rdp(event.epsilon * self.sizes[:, None], self.orders)
        self.worst += cost
        self._add(cost, None)

    def take_nothing(self, event: Filter | Resume | PublicStep) -> None:
        """Budgets charge nobody, and abandoned steps stay charged."""

    def settle(self) -> None:
        """Charge the span that ends now."""
        phase, steps, self.steps = self.phase, self.steps, 0
        if phase is None or not steps:
            return
        clip = np.full(len(self.which), phase.max_grad_norm)
        self.worst += steps * self._one_step(phase, clip)
        if phase.charging == "unamplified":
            return
        bounds = clip if phase.charging == "worst_case" else np.minimum(self.enforced, clip)
        bounds = np.where(self.gone, 0.0, bounds)
        squared = None
        if phase.amplification_rate == 1:
            total = np.add.reduceat(bounds[self.members], self.starts) * (1 + 1e-12)
            squared = steps * np.where(total > 0, (total / phase.max_grad_norm * clip_ratio(phase)) ** 2, 0.0)
        self._add(steps * self._one_step(phase, bounds), squared)

    def _add(self, rdp: Array, squared: Array | None) -> None:
        self.rdp += rdp
        self.squared_mu = None if squared is None or self.squared_mu is None else self.squared_mu + squared

    def _one_step(self, phase: Phase, bounds: Array) -> Array:
        """(G, orders) losses of one step: groups of one size are rows of one matrix, equal rows are
        computed once."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(bounds > 0, bounds / phase.max_grad_norm * clip_ratio(phase), 0.0)[self.members]
        result = np.empty_like(self.rdp)
        for size in np.unique(self.sizes):
            groups = np.flatnonzero(self.sizes == size)
            rows = np.sort(
                _rounded_up(ratios[self.starts[groups][:, None] + np.arange(size)], clip_ratio(phase))
            )
            distinct, which = np.unique(rows, axis=0, return_inverse=True)
            curves = np.stack([self._curve(phase.amplification_rate, row) for row in distinct])
            result[groups] = curves[which.ravel()]
        return result

    def _curve(self, rate: float, row: Array) -> Array:
        key = (rate, row.tobytes())
        if key not in self.known:
            self.known[key] = np.asarray(self.formula(rate, row, self.orders))
        return self.known[key]


def _rounded_up(ratios: Array, top: float) -> Array:
    """Ratios on a geometric grid, not below themselves, not above ``top`` where they are not."""
    with np.errstate(divide="ignore", invalid="ignore"):
        level = np.exp2(np.ceil(np.log2(ratios) * _LEVELS) / _LEVELS) * (1 + 1e-14)
    return np.where(ratios > 0, np.maximum(ratios, np.minimum(level, top)), 0.0)


_TAKE: dict[type[Event], Callable[[_GroupFold, Any], None]] = {
    Phase: _GroupFold.take_phase,
    Thresholds: _GroupFold.take_thresholds,
    Step: _GroupFold.take_step,
    Drop: _GroupFold.take_drop,
    Filter: _GroupFold.take_nothing,
    Resume: _GroupFold.take_nothing,
    PublicStep: _GroupFold.take_nothing,
    Disclosure: _GroupFold.take_disclosure,
}
