"""How individual epsilons grew while the model trained, for quantiles of the instances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.accounting.running import RunningLoss
from per_instance_accountant.divergence import DEFAULT_ORDERS
from per_instance_accountant.ledger import Event, Filter, Ledger
from per_instance_accountant.ledger.records import Drop, Phase, Step, Thresholds

SHARES: Final = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}
_FOLLOWED: Final = 4096
_POINTS: Final = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectories:
    """Upper bounds from Renyi divergences, which may lie some per cent above the final tight epsilons.

    steps: (k,) numbers of steps. worst: (k,) worst case. quantiles: name -> (k,) over ``followed`` instances,
    which are spread evenly over the final ranking.
    """

    steps: tuple[int, ...]
    worst: tuple[float, ...]
    quantiles: dict[str, tuple[float, ...]]
    followed: int


def trajectories(
    ledger: Ledger, epsilon: NDArray[np.float64], delta: float, charging: str | None = None
) -> Trajectories | None:
    """Read the ledger once more and follow up to 4,096 instances; None without a step.

    epsilon: (N,) the final values, which choose whom to follow. charging: the name of the one rule that
    replaced those of the run, or None.
    """
    total = ledger.num_steps
    if total == 0:
        return None
    ranking = np.argsort(epsilon, kind="stable")
    count = min(_FOLLOWED, len(ranking))
    chosen = ranking[np.unique(np.linspace(0, len(ranking) - 1, count).round().astype(np.int64))]
    stops = np.unique(np.linspace(0, total, min(_POINTS, total) + 1).round().astype(np.int64))[1:]
    # All orders, so that the worst case ends at the number of the audit.
    running = RunningLoss(len(chosen) + 1, DEFAULT_ORDERS)
    places: set[int] = set(stops.tolist())
    rows: list[tuple[float, ...]] = []
    for event in _followed(ledger, np.asarray(chosen), charging):
        running.take(event)
        if isinstance(event, Step) and running.steps in places:
            rows.append(_levels(running, delta))
    # What came after the last step, such as released statistics, belongs to its end.
    rows[-1] = _levels(running, delta)
    worst_case, *quantiles = zip(*rows, strict=True)
    return Trajectories(
        steps=(0, *stops.tolist()),
        worst=(0.0, *worst_case),
        quantiles={name: (0.0, *values) for name, values in zip(SHARES, quantiles, strict=True)},
        followed=len(chosen),
    )


def _levels(running: RunningLoss, delta: float) -> tuple[float, ...]:
    """The worst case and the quantiles now, without the instance that stands for all others."""
    levels = np.quantile(running.epsilons(delta)[:-1], list(SHARES.values()), method="higher")
    return (running.worst_epsilon(delta), *levels.tolist())


class _Followed:
    """The events as they concern the chosen, who become 0..k-1. Instance k stands for all others, so that a
    contribution above the clip norm is seen whoever made it."""

    def __init__(self, ledger: Ledger, chosen: NDArray[np.int64], charging: str | None) -> None:
        self.chosen, self.charging = chosen, charging
        self.place = np.full(ledger.num_instances, -1, dtype=np.int64)
        self.place[chosen] = np.arange(len(chosen))
        self.same_rule = charging is None or {phase.charging for phase in ledger.phases} == {charging}

    def phase(self, event: Phase) -> Phase:
        return replace(event, charging=self.charging or event.charging)

    def thresholds(self, event: Thresholds) -> Thresholds:
        others = np.float32(event.values.max(initial=0.0))
        return replace(event, values=np.append(event.values[self.chosen], others))

    def step(self, event: Step) -> Step:
        where = self.place[event.positions]
        known = where >= 0
        others = np.float32(event.contributions[~known].max(initial=0.0))
        return Step(
            positions=np.append(where[known], len(self.chosen)),
            contributions=np.append(event.contributions[known], others),
        )

    def drop(self, event: Drop) -> Drop | None:
        """Another rule need not know when somebody left, and goes on charging."""
        left = self.place[event.positions]
        left = left[left >= 0]
        return replace(event, positions=left) if self.same_rule and left.size else None

    def nothing(self, event: Filter) -> None:
        """A budget charges nobody."""


_SEEN: Final[dict[type[Event], Callable[[_Followed, Any], Event | None]]] = {
    Phase: _Followed.phase,
    Thresholds: _Followed.thresholds,
    Step: _Followed.step,
    Drop: _Followed.drop,
    Filter: _Followed.nothing,
}
"""Other events concern everybody alike."""


def _followed(ledger: Ledger, chosen: NDArray[np.int64], charging: str | None) -> Iterator[Event]:
    followed = _Followed(ledger, chosen, charging)
    for event in ledger.events():
        seen = _SEEN.get(type(event))
        kept = event if seen is None else seen(followed, event)
        if kept is not None:
            yield kept
