"""The record of individual losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from per_instance_accountant.accounting.levels import Span, tight_epsilon
from per_instance_accountant.accounting.rules import Basis
from per_instance_accountant.accounting.spending import CertifiedBudget
from per_instance_accountant.divergence import gaussian_epsilon, rdp_to_epsilon
from per_instance_accountant.results import Tabular


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class IndividualLoss(Tabular):
    """One Renyi curve per instance. All values are upper bounds in nats; ``basis`` says of what.

    rdp: (N, m). orders: (m,). ids: (N,) business ids. charging: names of the rules that were applied.
    worst_case_rdp: (m,) what the clip norm allows for everybody, whatever their data (always CERTIFIED).
    mu: (N,) Gaussian-DP parameter when no step was amplified by sampling, else None; then epsilon is
    exact. num_steps: charged steps. digest: of the ledger that was read.
    spans, worst_spans: the steps with the ratios of the instances and of the worst case, where these
    are known and were fixed before the run, else None; the tight epsilons need them.
    certified_budget: what the privacy filter of the run promises, else None.
    """

    rdp: NDArray[np.float64]
    worst_case_rdp: NDArray[np.float64]
    orders: NDArray[np.float64]
    ids: NDArray[Any]
    basis: Basis
    charging: tuple[str, ...]
    num_steps: int
    mu: NDArray[np.float64] | None
    digest: str
    spans: tuple[Span, ...] | None = None
    worst_spans: tuple[Span, ...] | None = None
    certified_budget: CertifiedBudget | None = None

    def epsilon(self, delta: float) -> NDArray[np.float64]:
        """(N,) upper bounds on epsilon at ``delta``, on the loss's basis (Canonne, Kamath and
        Steinke 2020, Prop. 12;
        exact for steps without amplification)."""
        epsilon: NDArray[np.float64] = np.atleast_1d(rdp_to_epsilon(self.orders, self.rdp, delta))
        return epsilon if self.mu is None else np.minimum(epsilon, gaussian_epsilon(self.mu, delta))

    def worst_case_epsilon(self, delta: float) -> float:
        """Upper bound on epsilon at ``delta`` for every instance, whatever its data."""
        return float(rdp_to_epsilon(self.orders, self.worst_case_rdp, delta))

    def certified_epsilon(self, delta: float) -> NDArray[np.float64]:
        """(N,) upper bounds on epsilon that are CERTIFIED whatever the basis of ``rdp``: the worst
        case, the budget that a filter enforced, and :meth:`tight_epsilon` where its own basis is
        CERTIFIED; the smallest."""
        best = np.full(len(self.ids), self.tight_worst_case_epsilon(delta))
        if self.certified_budget is not None:
            best = np.minimum(best, self.certified_budget.epsilon(delta))
        return np.minimum(best, self.tight_epsilon(delta)) if self.basis is Basis.CERTIFIED else best

    def tight_epsilon(self, delta: float) -> NDArray[np.float64]:
        """(N,) upper bounds on epsilon, at most :meth:`epsilon`, on the loss's basis.

        Tight where the basis is CERTIFIED: a realised sum of adaptively chosen bounds is a statement
        about Renyi divergences only (docs/math/tight_epsilon.md), so elsewhere this is :meth:`epsilon`.
        """
        epsilon = self.epsilon(delta)
        if not self.spans or self.basis is not Basis.CERTIFIED:
            return epsilon
        return np.minimum(epsilon, tight_epsilon(self.spans, delta))

    def tight_worst_case_epsilon(self, delta: float) -> float:
        """Upper bound on epsilon for every instance, at most :meth:`worst_case_epsilon`, tight where
        possible."""
        epsilon = self.worst_case_epsilon(delta)
        if not self.worst_spans:
            return epsilon
        return float(min(epsilon, *tight_epsilon(self.worst_spans, delta)))

    def to_arrow(self) -> pa.Table:
        """One row per instance: id, basis, and ``rdp_<order>`` in nats for every order."""
        curves = {f"rdp_{order:g}": pa.array(self.rdp[:, j]) for j, order in enumerate(self.orders.tolist())}
        basis = pa.array([str(self.basis)] * len(self.ids), pa.string())
        return pa.table({"id": pa.array(self.ids), "basis": basis} | curves)

    def _summary(self) -> Mapping[str, str]:
        return {
            "instances": str(len(self.ids)),
            "steps": str(self.num_steps),
            "charging rule": "+".join(self.charging),
            "basis": str(self.basis),
            "orders": f"{len(self.orders)}, from {self.orders.min():g} to {self.orders.max():g}",
        }

    def __repr__(self) -> str:
        rules = "+".join(self.charging)
        return f"IndividualLoss({len(self.ids)} instances, {self.num_steps} steps, {rules}, {self.basis})"
