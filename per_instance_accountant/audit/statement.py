"""The statement: unit, adjacency, sampling, what is released, what is not covered, what each number rests
on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from per_instance_accountant.accounting import Basis
from per_instance_accountant.audit.rounding import rounded_up

if TYPE_CHECKING:
    from per_instance_accountant.audit.budget import BudgetAudit

_MEANING = {
    Basis.CERTIFIED: (
        "CERTIFIED: with and without this instance, the law of everything released differs by at most "
        "this much, in both directions. The bound was enforced at every step and known before the run."
    ),
    Basis.OUTPUT_SPECIFIC: (
        "OUTPUT_SPECIFIC: the loss that this run realised. It is a statement about the set of runs whose "
        "accumulated loss stays under a budget fixed in advance, not a bound known before the run."
    ),
    Basis.ESTIMATE: (
        "ESTIMATE: a score that ranks instances. It bounds nothing, and no certificate can be built on it."
    ),
}


def statement_text(audit: BudgetAudit) -> str:
    """Plain text, one sentence a line."""
    sampling = sorted({_sampling(p.sampling, p.sample_rate) for p in audit.phases})
    lines = [
        "Unit of privacy: one training row. Groups of rows need a group bound, never a sum of epsilons.",
        "Adjacency: the row's contribution is replaced by zero; normalisers and sampling rates stay.",
        f"Sampling: {'; '.join(sampling) or 'no step was taken'}.",
        f"Released: all {audit.num_steps} noisy updates, hence every checkpoint and the final model.",
        "Not covered: hyperparameter search, later use of the data, floating-point and timing side channels.",
        f"The worst case is epsilon {rounded_up(audit.worst_case)} at delta {audit.delta:g}: CERTIFIED.",
        f"From the law of the privacy loss itself it is {rounded_up(audit.worst_case_tight)}: CERTIFIED.",
        f"Individual values rest on {'+'.join(audit.charging)}. {_MEANING[audit.basis]}",
        "Individual values depend on the data. Treat them like the training data.",
    ]
    if audit.certified_budget is not None:
        largest = rounded_up(float(audit.certified_budget.max()))
        lines.insert(
            7,
            "A privacy filter let every instance leave before it exceeded its budget, "
            f"at most epsilon {largest} at delta {audit.delta:g}: CERTIFIED.",
        )
    if len({(p.noise_std, p.max_grad_norm, p.amplification_rate) for p in audit.phases}) > 1:
        lines.insert(
            4, "Noise, clip norm or rate changed: the numbers hold if the schedule was fixed before."
        )
    if audit.num_abandoned_steps:
        repeated = f"{audit.num_abandoned_steps} of the steps were repeated after a checkpoint was loaded"
        lines.insert(4, f"{repeated}; both are charged.")
    return "\n".join(lines)


def _sampling(kind: str, rate: float) -> str:
    if kind != "poisson":
        return "fixed-size batches, no amplification by sampling"
    return "full batch" if rate == 1 else f"Poisson, rate {rate:.6g}"
