"""The fold: facts of a ledger -> one Renyi curve per instance.

Every step is charged to every instance, drawn or not, at the bound ``c`` that its charging rule gives:
``D_alpha(sample_rate, c / noise_std)`` of the Poisson-sampled Gaussian (``docs/math/individual_loss.md``).
The value between two nodes of the sensitivity grid is read off the chord, which lies above the curve because
the
Renyi divergence of one step is convex in the squared sensitivity.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
from per_instance_accountant.divergence import DEFAULT_ORDERS, SensitivityGrid, sampled_gaussian_rdp
from per_instance_accountant.errors import GuaranteeError, UsageError
from per_instance_accountant.ledger import Ledger
from per_instance_accountant.ledger.records import Event, Phase, Resume, Step, Thresholds

Array = NDArray[np.float64]

_BASIS: dict[str, Basis] = {
    r.name: r.basis for r in (WorstCase, FixedThresholds, Sweep, Unamplified, LastSeen)
}
_ENFORCED = ("fixed_thresholds", "sweep")
_STRENGTH = (Basis.CERTIFIED, Basis.OUTPUT_SPECIFIC, Basis.ESTIMATE)
_CHUNK = 1 << 15
_ROUNDING = 1 + 1e-12
"""Covers the rounding of the additions (relative 1e-16 each, up to 4,000 spans per instance)."""


class _Fold:
    """Running totals while the events of a ledger go by. ``bound`` is what each instance is charged from
    step ``since`` on."""

    def __init__(self, num_instances: int, orders: Array, charging: str | None) -> None:
        self.rule_override, self.orders = charging, orders
        self.rdp = np.zeros((num_instances, len(orders)))
        self.worst = np.zeros(len(orders))
        self.squared_mu: Array | None = np.zeros(num_instances)
        self.grid = SensitivityGrid(bits=6, octaves=16)
        self.node_ratios = np.sqrt(self.grid.nodes)
        self.tables: dict[tuple[float, float], tuple[Array, NDArray[np.bool_]]] = {}
        self.phase: Phase | None = None
        self.enforced: Array = np.full(num_instances, np.inf)
        self.forgotten = np.zeros(num_instances, dtype=bool)
        self.seen: Array = np.full(num_instances, np.inf)
        self.bound: Array = np.full(num_instances, np.inf)
        self.since = np.zeros(num_instances, dtype=np.int64)
        self.step = 0
        self.phase_start = 0
        self.rules_used: set[str] = set()

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
        self.enforced = thresholds.values.astype(np.float64)
        if thresholds.source == "forget":
            self.forgotten |= self.enforced == 0
        self._set_bound()

    def _take_step(self, step: Step) -> None:
        rule = self.rule
        self.rules_used.add(rule)
        self._charge_repeats(step)
        if rule == "unamplified":
            self._charge_drawn(step)
        elif rule == "last_seen":
            self._settle(step.positions)
            self.seen[step.positions] = self.bound[step.positions] = step.contributions
        self.step += 1

    def _take_resume(self, resume: Resume) -> None:
        """Steps of an abandoned branch stay charged; the ledger has what binds the new one stated again."""

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
            source = self.enforced if self.rule in _ENFORCED else np.full_like(self.bound, np.inf)
        self.bound = np.minimum(source, self.phase.max_grad_norm)
        self.bound[self.forgotten] = 0.0

    def _losses(self, nodes: NDArray[np.int64]) -> Array:
        """(len(nodes), orders) losses of one step at grid nodes; each node of a mechanism is computed
        once."""
        phase = self.mechanism
        key = (phase.amplification_rate, _ratio(phase))
        if key not in self.tables:
            size = len(self.node_ratios)
            self.tables[key] = (np.zeros((size, len(self.orders))), np.zeros(size, dtype=bool))
        table, known = self.tables[key]
        new = np.unique(nodes[~known[nodes]])
        if new.size:
            # Node 0 is a zero contribution, also where there is no noise.
            with np.errstate(invalid="ignore"):
                ratios = np.where(new > 0, self.node_ratios[new] * key[1], 0.0)
            table[new] = sampled_gaussian_rdp(key[0], ratios, self.orders)
            known[new] = True
        losses: Array = table[nodes]
        return losses

    def settle_all(self) -> None:
        """Charge the span that ends now: everybody, and the worst case."""
        if self.phase is not None and self.step > self.phase_start:
            top = np.array([len(self.node_ratios) - 1])
            self.worst += (self.step - self.phase_start) * self._losses(top)[0]
            self.phase_start = self.step
        if self.phase is not None and self.rule != "unamplified":
            for start in range(0, len(self.since), _CHUNK):
                self._settle(np.arange(start, min(start + _CHUNK, len(self.since))))
        self.since[:] = self.step

    def _settle(self, positions: NDArray[np.int64]) -> None:
        """Charge ``positions`` their present bound for the steps since they were last charged."""
        steps = self.step - self.since[positions]
        if not steps.any():
            return
        phase = self.mechanism
        # Rounded up: the division and the square may each round down by one unit in the last place.
        ratio = np.minimum(np.nextafter(self.bound[positions] / phase.max_grad_norm, np.inf), 1.0)
        squared = np.where(self.bound[positions] == 0, 0.0, np.minimum(np.nextafter(ratio**2, np.inf), 1.0))
        lower, weight = self.grid.locate(squared)
        # A weight of zero silences an infinite loss (no noise): 0 * inf would be NaN.
        with np.errstate(invalid="ignore"):
            low = np.where(weight[:, None] < 1, (1 - weight)[:, None] * self._losses(lower), 0.0)
            high = np.where(weight[:, None] > 0, weight[:, None] * self._losses(lower + 1), 0.0)
            self.rdp[positions] += np.where(steps[:, None] > 0, steps[:, None] * (low + high), 0.0)
        if phase.amplification_rate < 1:
            self.squared_mu = None
        if self.squared_mu is not None:
            self.squared_mu[positions] += steps * squared * _ratio(phase) ** 2
        self.since[positions] = self.step

    def _charge_drawn(self, step: Step) -> None:
        """Gaussian loss of the drawn, nothing for the others, no amplification (``alpha c^2 / (2
        std^2)``)."""
        phase = self.mechanism
        squared = (np.nextafter(step.contributions.astype(np.float64), np.inf) / phase.noise_std) ** 2
        self.rdp[step.positions] += squared[:, None] * (self.orders / 2)
        if self.squared_mu is not None:
            self.squared_mu[step.positions] += squared

    def _charge_repeats(self, step: Step) -> None:
        """A non-Poisson loader may put an instance into one release m times: its contribution is then up to
        m clip norms.

        The batch order of such a loader is public, so m is; the whole release is charged at m clip norms on
        top.
        """
        phase = self.mechanism
        repeats = math.ceil(step.contributions.max(initial=0.0) / phase.max_grad_norm - 1e-6)
        if repeats <= 1:
            return
        if phase.sampling == "poisson":
            raise GuaranteeError(
                "PIA011",
                f"step {self.step} records a contribution above the clip norm under Poisson sampling",
                "Clipping failed or an instance was drawn twice, so no individual number of this run holds",
                "train again with the loader and the optimizer returned by make_private",
            )
        ratios = np.array([repeats, 1]) * _ratio(phase)
        several, once = sampled_gaussian_rdp(phase.amplification_rate, ratios, self.orders)
        extra = np.where(np.isfinite(several), several - once, np.inf)
        self.worst += extra
        if self.rule != "unamplified":
            self.rdp += extra
            self.squared_mu = None


_TAKE: dict[type[Event], Callable[[_Fold, Any], None]] = {
    Phase: _Fold._take_phase,
    Thresholds: _Fold._take_thresholds,
    Step: _Fold._take_step,
    Resume: _Fold._take_resume,
}


def _ratio(phase: Phase) -> float:
    """Sensitivity ratio of the worst case: clip norm over noise std, infinite without noise."""
    return phase.max_grad_norm / phase.noise_std if phase.noise_std > 0 else np.inf


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


def _check_rule(ledger: Ledger, charging: ChargingRule | None) -> None:
    """A rule that rests on clipping at thresholds needs a ledger of a run that clipped at them."""
    if charging is None or charging.name not in _ENFORCED:
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
) -> IndividualLoss:
    """Individual Renyi losses of every instance over all recorded steps.

    ledger: an open Ledger or the path of one. charging: a rule, or None for the rule(s) of the run itself.
    orders: (m,) Renyi orders above 1, or None for ``divergence.DEFAULT_ORDERS``.

    Returns an :class:`IndividualLoss` whose ``rdp`` (N, m) are upper bounds in nats, with the basis on which
    they
    stand. Raises UsageError PIA070 for orders at most 1, GuaranteeError PIA013 for a rule that the run did
    not
    enforce, LedgerError for a ledger that is missing or damaged.

    Source of the step formula: Mironov, Talwar and Zhang 2019 with the instance's own bound as sensitivity;
    chord and
    composition are derived in ``docs/math/individual_loss.md``.

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
    _check_rule(ledger, charging)
    fold = _Fold(ledger.num_instances, _checked_orders(orders), charging.name if charging else None)
    for event in ledger.events():
        fold.take(event)
    fold.settle_all()
    rules = fold.rules_used or ({charging.name} if charging else {p.charging for p in ledger.phases})
    return IndividualLoss(
        rdp=np.minimum(fold.rdp, fold.worst) * _ROUNDING,
        worst_case_rdp=fold.worst * _ROUNDING,
        orders=fold.orders,
        ids=ledger.ids,
        basis=max((_BASIS[r] for r in rules), key=_STRENGTH.index, default=Basis.CERTIFIED),
        charging=tuple(sorted(rules)),
        num_steps=ledger.num_steps,
        mu=None if fold.squared_mu is None else np.sqrt(fold.squared_mu) * _ROUNDING,
        digest=ledger.digest,
    )
