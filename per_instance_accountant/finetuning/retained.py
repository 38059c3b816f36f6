"""Which instances a run may touch: all that were trained on and never asked to be forgotten, and no other."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset, Subset

from per_instance_accountant.accounting import FixedThresholds
from per_instance_accountant.errors import PlanError, UsageError
from per_instance_accountant.ledger import Ledger
from per_instance_accountant.ledger.records import Thresholds
from per_instance_accountant.unlearning import UnlearningPlan


def retained_positions(
    ledger: Ledger, forget: NDArray[np.int64], dataset: Dataset[Any], positions: ArrayLike | None
) -> NDArray[np.int64]:
    """Training positions of the rows of ``dataset``; they must be exactly the retained ones.

    Raises PlanError PIA034 when one must be forgotten or a retained one is missing, UsageError PIA071 when
    the positions cannot be told.
    """
    rows = _rows(dataset, positions)
    gone = np.union1d(forget, np.flatnonzero(ledger.forgotten))
    held = int(np.isin(rows, gone).sum())
    if held:
        raise PlanError(
            "PIA034",
            f"{held} rows of the data are instances that must be forgotten",
            "A step that draws them would undo the deletion",
            "Subset(dataset, retained) with retained = np.setdiff1d(np.arange(N), forgotten)",
        )
    expected = np.setdiff1d(np.arange(ledger.num_instances), gone)
    if not np.array_equal(np.sort(rows), expected):
        raise PlanError(
            "PIA034",
            f"the data hold {len(rows)} rows, not exactly the {len(expected)} retained instances",
            "The reference is retraining on all retained instances",
            "Subset(dataset, retained) with retained = np.setdiff1d(np.arange(N), forgotten)",
        )
    return rows


def _rows(dataset: Dataset[Any], positions: ArrayLike | None) -> NDArray[np.int64]:
    count = len(dataset)  # type: ignore[arg-type]
    given = getattr(dataset, "indices", None) if positions is None else positions
    if positions is None and not isinstance(dataset, Subset):
        given = None
    rows = np.asarray(given if given is not None else [])
    if given is None or rows.shape != (count,) or rows.dtype.kind not in "iu":
        raise UsageError(
            "PIA071",
            f"the data have {count} rows whose training positions are not known",
            "Nobody could tell whether a deleted instance is among them",
            "run_plan(dataset=torch.utils.data.Subset(training_set, retained), ...) or positions=retained",
        )
    return rows.astype(np.int64)


def forget_thresholds(ledger: Ledger, plan: UnlearningPlan, forget: NDArray[np.int64]) -> Thresholds:
    """Fixed thresholds as in training, or the clip norm, with the forget set at zero.

    Zero means forgotten, so a retained instance whose threshold was zero gets the smallest positive one.
    """
    fixed = None
    for event in ledger.events():
        if isinstance(event, Thresholds) and event.source != "sweep":
            fixed = event.values
    gone = np.union1d(forget, np.flatnonzero(ledger.forgotten))
    clip = np.float32(plan.mechanism.max_grad_norm)
    individual = fixed is not None and ledger.phases[-1].charging == FixedThresholds.name
    values = fixed.copy() if fixed is not None and individual else np.full(ledger.num_instances, clip)
    values[values == 0] = np.finfo(np.float32).tiny
    values[gone] = 0
    return Thresholds(values=values.astype(np.float32), source="forget")
