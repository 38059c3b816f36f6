"""A privacy filter as the unlearning bounds see it: who left, whether that was public, what is promised."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.accounting import FixedThresholds, WorstCase
from per_instance_accountant.accounting.spending import Spending, promised_by
from per_instance_accountant.errors import GuaranteeError
from per_instance_accountant.ledger.records import Drop, Event, Filter, Phase, Step, Thresholds

Array = NDArray[np.float64]

PUBLIC_RULES: Final = (WorstCase.name, FixedThresholds.name)
"""Charges of these rules are known before training, so the moment at which anybody leaves is as well."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MemberBudgets:
    """What a filter promises to each member alone, for all outputs of the run together, both directions.

    family ``"renyi"``: the divergence at ``orders[i]`` is at most ``budgets[i]`` nats. ``"gaussian"``: the
    run is ``sqrt(budgets[i])``-GDP. orders, budgets: (f,).
    """

    family: str
    orders: Array
    budgets: Array

    def only(self, members: NDArray[np.int64]) -> MemberBudgets:
        """The promise to some of the members."""
        return replace(self, orders=self.orders[members], budgets=self.budgets[members])


class FilterReplay:
    """Follows the events of a ledger. ``hidden``: whether the decisions followed from the course of training.

    Under the rules of ``PUBLIC_RULES`` nobody decides anything: the charges are constants of the run, and the
    ledger must show exactly the drops that follow from them. Under every other rule the drops depend on
    released models, so that a step is a function of more than the parameters.
    """

    def __init__(self) -> None:
        self.hidden = False
        self._spending: Spending | None = None
        self._before: list[Event] = []
        self._leaving: list[NDArray[np.int64]] = []
        self._public = np.zeros(0, dtype=np.int64)
        self._phase: Phase | None = None
        self._started = self._measured = False

    @property
    def active(self) -> bool:
        """Whether the run states a filter."""
        return self._spending is not None

    def dropped(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(f,) who of ``positions`` takes part in no further step, on whatever course training takes: those
        who left by a hidden decision would have stayed on other courses, so they are not among them."""
        return np.isin(positions, self._public)

    def take(self, event: Event) -> bool:
        """Follow one event; whether somebody leaves before this step. Raises GuaranteeError PIA011."""
        self._phase = event if isinstance(event, Phase) else self._phase
        self._measured = event.source == "sweep" if isinstance(event, Thresholds) else self._measured
        if isinstance(event, Filter):
            self._spending = Spending(event)
            for earlier in self._before:
                self._spending.take(earlier)
        elif isinstance(event, Step):
            return self._step(event)
        elif isinstance(event, Drop):
            # Stated before the mechanism of the step it precedes, which decides who leaves.
            self._leaving.append(event.positions)
        elif self._spending is not None:
            self._spending.take(event)
        elif not self._started:
            self._before.append(event)
        return False

    def _step(self, step: Step) -> bool:
        self._started = True
        if self._spending is None:
            return False
        left = np.sort(np.concatenate(self._leaving)) if self._leaving else np.empty(0, np.int64)
        if self._phase is not None and self._phase.kind == "train":
            by_threshold = self._phase.charging == FixedThresholds.name
            public = self._phase.charging in PUBLIC_RULES and not (by_threshold and self._measured)
            self.hidden |= not public
            if public and not self.hidden and not np.array_equal(left, self._spending.exceeding()):
                raise _contradicted("the instances that left are not those whose budget was spent")
        if left.size:
            self._spending.take(Drop(positions=left))
            self._public = self._public if self.hidden else np.concatenate([self._public, left])
        self._leaving = []
        self._spending.take(step)
        return bool(left.size)

    def promise(self, positions: NDArray[np.int64]) -> MemberBudgets | None:
        """The budgets of ``positions``, with what was not filtered on top; None if nothing is promised.

        Raises GuaranteeError PIA011 if the recorded steps exceed them.
        """
        if self._spending is None:
            return None
        if not self._spending.kept():
            raise _contradicted("somebody spent more than the budget")
        promised = promised_by(self._spending)
        if promised is None:
            return None
        return MemberBudgets(
            family=promised.family, orders=promised.orders[positions], budgets=promised.budgets[positions]
        )


def _contradicted(happened: str) -> GuaranteeError:
    return GuaranteeError(
        "PIA011",
        f"the run states a privacy filter, but {happened}",
        "What the filter promises, and who took part in which step, is then unknown",
        "train with PrivacyEngine(filter=...), which enforces it, or retrain without the instances",
    )
