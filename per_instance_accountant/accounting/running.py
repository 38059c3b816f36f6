"""Running individual epsilons while events are recorded, for dashboards: O(batch) work for one step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.accounting.chords import clip_ratio
from per_instance_accountant.accounting.disclosures import disclosure_rdp
from per_instance_accountant.accounting.entries import ENFORCED, above_bounds, clip_norms
from per_instance_accountant.accounting.odometer import Odometer
from per_instance_accountant.divergence import DEFAULT_ORDERS, rdp_to_epsilon, sampled_gaussian_rdp
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

ORDERS: Final = tuple(DEFAULT_ORDERS[i] for i in range(3, 195, 4))
"""A quarter of the default orders: every epsilon stays an upper bound, at most a few per cent larger."""
QUANTILES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@final
class RunningLoss:
    """Totals of all instances under the rules of the run, as ``account`` computes them, rounded up
    further.

    ``take`` follows one event: O(batch) for a step, O(N) for thresholds, and O(N x orders) when the
    noise, clip norm, rate or rule changes. About 600 bytes per instance.

    >>> from per_instance_accountant.ledger import LedgerWriter, Run
    >>> writer = LedgerWriter.create(None, Run(num_instances=2))
    >>> writer.append(Phase(
    ...     kind="train", sampling="poisson", sample_rate=0.01, noise_std=1.0, max_grad_norm=1.0,
    ...     charging="worst_case", denominator=1.0, learning_rate=0.1))
    >>> writer.append(Step(positions=np.array([1]), contributions=np.ones(1, np.float32)))
    >>> metrics = RunningLoss.of(writer.ledger()).metrics(1e-5)
    >>> round(metrics["privacy/epsilon_worst"], 3), metrics["privacy/steps"]
    (0.959, 1.0)
    """

    def __init__(self, num_instances: int, orders: Sequence[float] = ORDERS) -> None:
        self.orders, self.steps = np.array(orders), 0
        self._phase: Phase | None = None
        self._odometer: Odometer | None = None
        self._settled: Array | None = None
        """(N, orders) of earlier mechanisms; None while there is none."""
        self._squared: Array | None = None
        """(N,) sums of squared ratios of unamplified steps; None while there is none."""
        self._worst = np.zeros(len(self.orders))
        self._enforced: Array = np.full(num_instances, np.inf)
        self._thresholds: Thresholds | None = None
        self._seen: Array = np.full(num_instances, np.inf)
        self._out = np.zeros(num_instances, dtype=np.bool_)
        self._noiseless = False
        self._once: Array = self._worst

    @classmethod
    def of(cls, ledger: Ledger) -> RunningLoss:
        """The totals after all events of a ledger."""
        running = cls(ledger.num_instances)
        for event in ledger.events():
            running.take(event)
        return running

    def take(self, event: Event) -> None:
        """Follow one recorded event."""
        _TAKE[type(event)](self, event)

    def epsilons(self, delta: float) -> Array:
        """(N,) upper bounds of epsilon so far, on the basis of the run's rules. Raises UsageError
        PIA070."""
        if self._noiseless:
            return np.full(len(self._out), np.inf)
        if self._settled is None and self._squared is None and self._odometer is not None:
            return self._odometer.epsilons(self.orders, delta)
        return np.asarray(rdp_to_epsilon(self.orders, self._curves(), delta))

    def worst_epsilon(self, delta: float) -> float:
        """Upper bound of epsilon so far for everybody whatever their data: CERTIFIED. Raises UsageError
        PIA070."""
        return (
            np.inf if self._noiseless else float(rdp_to_epsilon(self.orders, self._worst * (1 + 1e-9), delta))
        )

    def metrics(self, delta: float) -> dict[str, float]:
        """One flat dictionary for any logger: the worst case, which is CERTIFIED, and the largest
        epsilon and quantiles of all instances, which rest on the rules of the run."""
        epsilons = self.epsilons(delta)
        levels = np.quantile(epsilons, list(QUANTILES.values()), method="higher")
        return {
            "privacy/epsilon_worst": self.worst_epsilon(delta),
            "privacy/epsilon_max": float(epsilons.max()),
            **{f"privacy/epsilon_{name}": float(v) for name, v in zip(QUANTILES, levels, strict=True)},
            "privacy/delta": delta,
            "privacy/steps": float(self.steps),
        }

    def _curves(self) -> Array:
        curves = (
            np.zeros((len(self._out), len(self.orders))) if self._settled is None else self._settled.copy()
        )
        if self._squared is not None:
            curves += np.outer(self._squared * (1 + 1e-9), self.orders / 2)
        if self._odometer is not None:
            curves += self._odometer.rdp(self.orders)
        return np.minimum(curves, self._worst * (1 + 1e-9))

    def _take_phase(self, phase: Phase) -> None:
        if self._phase is not None and _charged_alike(phase, self._phase):
            self._phase = phase
            return
        if self._odometer is not None:
            earlier = 0.0 if self._settled is None else self._settled
            self._settled = earlier + self._odometer.rdp(self.orders)
        ratio, self._phase, self._odometer = clip_ratio(phase), phase, None
        if not math.isfinite(ratio):
            return
        self._once = np.asarray(sampled_gaussian_rdp(phase.amplification_rate, [ratio], self.orders)[0])
        if phase.charging != "unamplified":
            self._odometer = Odometer(len(self._out), phase.amplification_rate, ratio)
            self._set_bounds()
        elif self._squared is None:
            self._squared = np.zeros(len(self._out))

    def _set_bounds(self) -> None:
        if self._phase is None or self._odometer is None:
            return
        source = {"worst_case": np.full(len(self._out), np.inf), "last_seen": self._seen}
        bounds = source.get(self._phase.charging, self._enforced)
        self._odometer.set_bounds(slice(None), self._shares(np.where(self._out, 0.0, bounds)))

    def _shares(self, bounds: Array) -> Array:
        """Squares of bounds over the clip norm, at most 1, rounded up."""
        clip = np.inf if self._phase is None else self._phase.max_grad_norm
        share = np.minimum(np.nextafter(bounds / clip, np.inf), 1.0)
        return np.where(bounds > 0, np.minimum(np.nextafter(share**2, np.inf), 1.0), 0.0)

    def _take_thresholds(self, event: Thresholds) -> None:
        self._thresholds, self._enforced = event, event.values.astype(np.float64)
        if event.source == "forget":
            self._out |= event.values == 0
        self._set_bounds()

    def _take_drop(self, event: Drop) -> None:
        self._out[event.positions] = True
        if self._odometer is not None:
            self._odometer.set_bounds(event.positions, np.zeros(len(event.positions)))

    def _take_step(self, step: Step) -> None:
        self.steps += 1
        phase, contributions = self._phase, step.contributions.astype(np.float64)
        if phase is None or phase.noise_std == 0:
            self._noiseless = True
            return
        self._worst = self._worst + self._once
        self._charge_repeats(phase, step)
        if phase.charging == "unamplified" and self._squared is not None:
            self._squared[step.positions] += (np.nextafter(contributions, np.inf) / phase.noise_std) ** 2
        elif self._odometer is not None:
            if phase.charging == "last_seen":
                self._seen[step.positions] = contributions
                self._odometer.set_bounds(step.positions, self._shares(contributions))
            self._odometer.advance()

    def _charge_repeats(self, phase: Phase, step: Step) -> None:
        """A loader with replacement may put an instance into one release several times, whoever it was: as
        ``account`` charges it. A step that was not clipped at its thresholds is charged at the clip norm."""
        repeats = clip_norms(step, phase)
        extra = np.zeros(len(self.orders))
        if repeats > 1:
            ratio = repeats * clip_ratio(phase)
            several = np.asarray(sampled_gaussian_rdp(phase.amplification_rate, [ratio], self.orders)[0])
            extra = np.where(np.isfinite(several), several - np.minimum(self._once, several), np.inf)
            self._worst = self._worst + extra
            extra = several if phase.charging in ENFORCED else extra
        if phase.charging in ENFORCED and above_bounds(step, phase, self._thresholds):
            extra = extra + self._once
        if phase.charging != "unamplified" and extra.any():
            self._settle(extra)

    def _settle(self, cost: Array) -> None:
        """Charge ``cost`` (orders,) to everybody."""
        earlier = np.zeros((len(self._out), len(self.orders))) if self._settled is None else self._settled
        self._settled = earlier + cost

    def _take_disclosure(self, event: Disclosure) -> None:
        cost = disclosure_rdp(event.epsilon, self.orders)
        self._worst = self._worst + cost
        self._settle(cost)

    def _take_nothing(self, event: Filter | Resume | PublicStep) -> None:
        """Budgets and public data charge nobody, and abandoned steps stay charged."""


def _charged_alike(one: Phase, other: Phase) -> bool:
    names = ("amplification_rate", "noise_std", "max_grad_norm", "charging")
    return all(getattr(one, name) == getattr(other, name) for name in names)


_TAKE: dict[type[Event], Callable[[RunningLoss, Any], None]] = {
    Phase: RunningLoss._take_phase,
    Thresholds: RunningLoss._take_thresholds,
    Step: RunningLoss._take_step,
    Drop: RunningLoss._take_drop,
    Filter: RunningLoss._take_nothing,
    Resume: RunningLoss._take_nothing,
    PublicStep: RunningLoss._take_nothing,
    Disclosure: RunningLoss._take_disclosure,
}
