"""From individual losses to individual budgets at one delta."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from per_instance_accountant.accounting import Basis, ChargingRule, IndividualLoss, account
from per_instance_accountant.audit.statement import model_card_text, statement_text
from per_instance_accountant.divergence import DEFAULT_ORDERS
from per_instance_accountant.errors import UsageError
from per_instance_accountant.ledger import Ledger
from per_instance_accountant.ledger.records import Phase
from per_instance_accountant.results import Tabular
from per_instance_accountant.results.rounding import rounded_up
from per_instance_accountant.results.views import view

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
_BYTES_PER_INSTANCE = 2 * 8 * len(DEFAULT_ORDERS) + 64
"""The curve of an instance, its use, and what the fold keeps beside it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class BudgetAudit(Tabular):
    """Individual budgets. Every epsilon is an upper bound on ``basis``; all values are as private as the
    data.

    epsilon: (N,). ids: (N,) business ids. worst_case: epsilon that holds for everybody whatever
    their data (CERTIFIED), from Renyi divergences, as Opacus computes it; worst_case_tight: at most
    that, from the law of the privacy loss itself. groups: name -> (N,) labels. num_abandoned_steps:
    charged steps of branches that were not continued.
    """

    epsilon: NDArray[np.float64]
    ids: NDArray[Any]
    basis: Basis
    charging: tuple[str, ...]
    delta: float
    worst_case: float
    worst_case_tight: float
    num_steps: int
    num_abandoned_steps: int
    groups: Mapping[str, NDArray[Any]]
    phases: tuple[Phase, ...]
    digest: str
    certified_budget: NDArray[np.float64] | None = None
    """(N,) epsilon that is CERTIFIED for each instance because a privacy filter kept to it; None without."""
    ledger: Ledger | None = None
    """What was read, for the trajectories of a report."""

    def top(self, k: int = 10) -> list[dict[str, Any]]:
        """The ``k`` instances with the largest epsilon, largest first; ties in order of position."""
        order = np.argsort(-self.epsilon, kind="stable")[: max(k, 0)]
        return [
            {"id": self.ids[i].item(), "epsilon": float(self.epsilon[i]), "basis": str(self.basis)}
            for i in order
        ]

    def by_group(self, name: str) -> list[dict[str, Any]]:
        """Median, 95 % quantile and maximum of epsilon by label of ``name``, largest median first.

        Raises UsageError PIA071 for a name that the ledger does not hold.
        """
        if name not in self.groups:
            raise UsageError(
                "PIA071",
                f"the ledger holds no group {name!r}; it holds {sorted(self.groups)}",
                "No number was computed",
                "PrivacyEngine(groups={'label': labels}) when training",
            )
        labels, index = np.unique(self.groups[name], return_inverse=True)
        rows = [
            {
                "group": label.item(),
                "instances": int(np.sum(index == j)),
                "median": _upper_quantile(self.epsilon[index == j], 0.5),
                "p95": _upper_quantile(self.epsilon[index == j], 0.95),
                "max": float(self.epsilon[index == j].max()),
                "basis": str(self.basis),
            }
            for j, label in enumerate(labels)
        ]
        return sorted(rows, key=lambda row: -row["median"])

    def quantiles(self, q: float | Sequence[float] = QUANTILES) -> NDArray[np.float64]:
        """Quantiles of epsilon over the instances, rounded up to a value that occurs."""
        levels = np.atleast_1d(np.asarray(q, dtype=np.float64))
        if not np.all((levels >= 0) & (levels <= 1)):
            raise UsageError(
                "PIA070",
                "a quantile level is outside [0, 1]",
                "No number was computed",
                "audit.quantiles([0.5, 0.9])",
            )
        return np.quantile(self.epsilon, levels, method="higher")

    def num_over(self, budget: float) -> int:
        """How many instances have an epsilon above ``budget``."""
        if not budget >= 0:
            raise UsageError(
                "PIA070",
                f"budget is {budget!r}, allowed is [0, inf]",
                "A comparison with it would be meaningless",
                "audit.num_over(8.0)",
            )
        return int(np.sum(~(self.epsilon <= budget)))

    def metrics(self) -> dict[str, float]:
        """A flat dictionary for any experiment logger."""
        levels = dict(zip(QUANTILES, self.quantiles().tolist(), strict=True))
        return {
            "privacy/epsilon_worst": self.worst_case,
            "privacy/epsilon_worst_tight": self.worst_case_tight,
            **{f"privacy/epsilon_p{round(100 * q)}": value for q, value in levels.items()},
            "privacy/epsilon_max": float(self.epsilon.max()),
            "privacy/delta": self.delta,
            "privacy/certified": float(self.basis is Basis.CERTIFIED),
        }

    def statement(self) -> str:
        """What the numbers promise, in words."""
        return statement_text(self)

    def model_card(self) -> str:
        """A Markdown block for a model card, without individual values."""
        return model_card_text(self)

    def to_dict(self) -> dict[str, Any]:
        """Summary without individual values."""
        return {
            "instances": len(self.ids),
            "steps": self.num_steps,
            "delta": self.delta,
            "basis": str(self.basis),
            "charging": list(self.charging),
            "epsilon_worst": self.worst_case,
            "epsilon_worst_tight": self.worst_case_tight,
            "epsilon_quantiles": {
                str(q): v for q, v in zip(QUANTILES, self.quantiles().tolist(), strict=True)
            },
            "epsilon_max": float(self.epsilon.max()),
            **self._certified_summary(),
            "ledger": self.digest,
        }

    def _certified_summary(self) -> dict[str, float]:
        if self.certified_budget is None:
            return {}
        return {"epsilon_certified_max": float(self.certified_budget.max())}

    def to_arrow(self) -> pa.Table:
        """One row per instance: id, epsilon, basis, and the group labels."""
        columns: dict[str, Any] = {"id": pa.array(self.ids), "epsilon": pa.array(self.epsilon)}
        columns["basis"] = pa.array([str(self.basis)] * len(self.ids))
        if self.certified_budget is not None:
            columns["epsilon_certified"] = pa.array(self.certified_budget)
        return pa.table(columns | {f"group_{name}": pa.array(labels) for name, labels in self.groups.items()})

    def report(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Write the audit as one static HTML page, owner-only: see
        :func:`per_instance_accountant.report.write_report` for ``audience=`` and the other options."""
        view("write_report")(self, path, **options)

    def keep(self) -> None:
        """Keep these numbers beside their ledger, owner-only: see
        :func:`per_instance_accountant.audit.kept.kept_audit`."""
        from per_instance_accountant.audit.kept import keep_audit

        keep_audit(self)

    def _summary(self) -> Mapping[str, str]:
        low, middle, high = (rounded_up(q) for q in self.quantiles([0.1, 0.5, 0.9]).tolist())
        return {
            "worst-case epsilon": f"{rounded_up(self.worst_case)} (CERTIFIED)",
            "individual epsilon, p10 / median / p90": f"{low} / {middle} / {high} ({self.basis})",
            "delta": f"{self.delta:g}",
            "instances": str(len(self.ids)),
            "steps": str(self.num_steps),
        }

    def __repr__(self) -> str:
        low, middle, high = (rounded_up(q) for q in self.quantiles([0.1, 0.5, 0.9]).tolist())
        return (
            f"BudgetAudit({len(self.ids)} instances, {self.num_steps} steps, delta={self.delta:g}: "
            f"worst case {rounded_up(self.worst_case)} (CERTIFIED); "
            f"p10 {low}, median {middle}, p90 {high} ({self.basis}))"
        )


def _upper_quantile(values: NDArray[np.float64], q: float) -> float:
    return float(np.quantile(values, q, method="higher"))


def audit_budgets(
    ledger: Ledger | str | os.PathLike[str],
    delta: float,
    charging: ChargingRule | None,
    tight: bool,
    memory: int,
) -> BudgetAudit:
    """See :func:`per_instance_accountant.audit`."""
    ledger = Ledger.open(ledger)
    if not 0 < delta < 1:
        raise UsageError(
            "PIA070",
            f"delta is {delta!r}, allowed is (0, 1)",
            "No guarantee exists for it",
            "audit(ledger, delta=1e-5)",
        )
    if not memory >= 1:
        raise UsageError(
            "PIA070",
            f"memory is {memory!r} bytes, allowed is [1, inf)",
            "Nothing was computed",
            "audit(ledger, memory=2**30)",
        )
    size = ledger.num_instances
    rows = max(memory // _BYTES_PER_INSTANCE, 1)
    losses = (
        account(ledger, charging, partition=(start, min(start + rows, size)))
        for start in range(0, size, rows)
    )
    parts = [
        (_epsilons(loss, delta, tight), _certified(loss, delta), _without_curves(loss)) for loss in losses
    ]
    loss, certified = parts[0][2], [budget for _, budget, _ in parts if budget is not None]
    return BudgetAudit(
        epsilon=np.concatenate([epsilon for epsilon, _, _ in parts]),
        ids=ledger.ids,
        basis=loss.basis,
        charging=loss.charging,
        delta=delta,
        worst_case=loss.worst_case_epsilon(delta),
        worst_case_tight=loss.tight_worst_case_epsilon(delta) if tight else loss.worst_case_epsilon(delta),
        num_steps=loss.num_steps,
        num_abandoned_steps=ledger.num_abandoned_steps,
        groups=ledger.groups,
        phases=ledger.phases,
        digest=loss.digest,
        certified_budget=np.concatenate(certified) if certified else None,
        ledger=ledger,
    )


def _certified(loss: IndividualLoss, delta: float) -> NDArray[np.float64] | None:
    return None if loss.certified_budget is None else loss.certified_epsilon(delta)


def _epsilons(loss: IndividualLoss, delta: float, tight: bool) -> NDArray[np.float64]:
    return loss.tight_epsilon(delta) if tight else loss.epsilon(delta)


def _without_curves(loss: IndividualLoss) -> IndividualLoss:
    """What is the same for every part, so that the curves of a part can go before the next one is
    folded."""
    return replace(loss, rdp=loss.rdp[:0], ids=loss.ids[:0], mu=None, spans=None)
