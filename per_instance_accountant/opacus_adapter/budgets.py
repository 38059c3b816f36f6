"""The budgets of a privacy filter on their way into a run: stated once, read again when it continues."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.accounting.filter import PrivacyFilter
from per_instance_accountant.accounting.rules import ChargingRule, WorstCase
from per_instance_accountant.accounting.spending import Spending
from per_instance_accountant.errors import GuaranteeError, LedgerError
from per_instance_accountant.ledger import LedgerWriter, Phase


def check_budget(budget: PrivacyFilter, charging: ChargingRule, budgets: NDArray[np.float64]) -> None:
    """Raise GuaranteeError PIA012 for a filter whose end of the run would tell about one instance.

    Dropping is invisible to the others; the number of steps is not. A run may end by a budget only where
    the end follows from public numbers: everybody charged the clip norm, one budget.
    """
    public = isinstance(charging, WorstCase) and len(np.unique(budgets)) == 1
    if budget.on_spent != "drop" and not public:
        raise GuaranteeError(
            "PIA012",
            f"on_spent={budget.on_spent!r} with charging rule {charging.name!r}",
            "The number of steps would tell when one instance's own losses were spent: no bound holds",
            'PrivacyFilter(on_spent="drop"), or charging=WorstCase() with one budget for everybody',
        )


def adopt_budget(writer: LedgerWriter, budget: PrivacyFilter | None, mechanism: Phase) -> Spending | None:
    """State the filter before the first step, or go on with the one recorded, whose sums are read again.

    Raises LedgerError PIA045 for budgets other than the recorded ones, or a filter after the first step.
    """
    spending = Spending.of(writer.ledger())
    if budget is None:
        return spending
    budgets = budget.per_instance(writer.run.num_instances, writer.run.groups)
    orders = None if spending is None else spending.filter.orders
    stated = budget.stated(budgets, mechanism, orders=orders)
    if spending is None:
        writer.append(stated)
        return Spending(stated)
    known = spending.filter
    if stated.family != known.family or not np.array_equal(stated.budgets, known.budgets):
        raise LedgerError(
            "PIA045",
            "the budgets given differ from the ones that the ledger recorded before training",
            "Budgets that are changed later may depend on what was released",
            "pass the same PrivacyFilter(...) as at the start of the run",
        )
    return spending


def not_admitted(
    spending: Spending, positions: NDArray[np.int64], taken: Iterable[NDArray[np.int64]]
) -> NDArray[np.bool_]:
    """(B,) who must not enter the sum: the dropped, and repetitions within one logical batch.

    taken: positions of its earlier parts. A loader that repeats an instance would let it contribute
    twice what its budget was compared with.
    """
    out = np.ones(len(positions), dtype=np.bool_)
    out[np.unique(positions, return_index=True)[1]] = False
    for earlier in taken:
        out |= np.isin(positions, earlier)
    return out | spending.dropped[positions]
