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
    """Plain text, one sentence or two a line: unit, adjacency, mechanism, sampling, what is released, what
    is not covered, and what each number rests on."""
    lines = [
        "Unit of privacy: one training row. Groups of rows need a group bound, never a sum of epsilons.",
        "A person with several rows is such a group: without a bound on the rows of a person, no guarantee "
        "for persons is possible.",
        "Adjacency: the row's contribution is replaced by zero; normalisers and sampling rates stay.",
        *_mechanism(audit),
        f"Released: all {audit.num_steps} noisy updates, hence every checkpoint and the final model. An "
        "observer may see all of them and know all other rows.",
        *_published(audit),
        "Not covered: hyperparameter search, statistics of the data used for preprocessing, data used before "
        "or after this run, floating-point and timing side channels.",
        f"The worst case is epsilon {rounded_up(audit.worst_case)} at delta {audit.delta:g}: CERTIFIED. It "
        "holds for every row, whatever its data, from Renyi divergences.",
        f"From the law of the privacy loss itself it is {rounded_up(audit.worst_case_tight)}: CERTIFIED.",
        *_filtered(audit),
        f"Individual values rest on {'+'.join(audit.charging)}. {_MEANING[audit.basis]}",
        "Every epsilon is an upper bound on its basis and is rounded up where it is shown.",
        "Individual values depend on the data. Treat them like the training data.",
    ]
    return "\n".join(lines)


def _mechanism(audit: BudgetAudit) -> list[str]:
    """Noise and sampling, and what the numbers assume of them."""
    multipliers = sorted({f"{p.noise_std / p.max_grad_norm:.6g}" for p in audit.phases})
    sampling = sorted({_sampling(p.sampling, p.sample_rate) for p in audit.phases})
    lines = [
        "Mechanism: in every step the gradient of each drawn row is clipped, and Gaussian noise is added to "
        f"the sum; noise multiplier {', '.join(multipliers) or 'not stated'}.",
        f"Sampling: {'; '.join(sampling) or 'no step was taken'}.",
    ]
    if any(p.sampling == "poisson" and p.sample_rate < 1 for p in audit.phases):
        lines.append(
            "The numbers assume that each batch draws every row independently with that probability, and "
            "that nobody sees who was drawn."
        )
    if audit.num_abandoned_steps:
        repeated = f"{audit.num_abandoned_steps} of the steps were repeated after a checkpoint was loaded"
        lines.append(f"{repeated}; both are charged.")
    if audit.ledger is not None and audit.ledger.merge is not None:
        lines.append(audit.ledger.merge.statement())
    if len({(p.noise_std, p.max_grad_norm, p.amplification_rate) for p in audit.phases}) > 1:
        lines.append("Noise, clip norm or rate changed: the numbers hold if the schedule was fixed before.")
    return lines


def _published(audit: BudgetAudit) -> list[str]:
    found = () if audit.ledger is None else audit.ledger.disclosures
    if not found:
        return []
    total = rounded_up(sum(one.epsilon for one in found))
    return [
        f"Published beside training: {len(found)} statistics of individual losses with differential privacy, "
        f"epsilon {total} together, which every number below includes."
    ]


def _filtered(audit: BudgetAudit) -> list[str]:
    if audit.certified_budget is None:
        return []
    largest = rounded_up(float(audit.certified_budget.max()))
    return [
        "A privacy filter let every instance leave before it exceeded its budget, "
        f"at most epsilon {largest} at delta {audit.delta:g}: CERTIFIED."
    ]


def _sampling(kind: str, rate: float) -> str:
    if kind != "poisson":
        return "fixed-size batches, no amplification by sampling"
    return "full batch" if rate == 1 else f"Poisson, rate {rate:.6g}"


def model_card_text(audit: BudgetAudit) -> str:
    """Markdown for a model card, without individual values: the worst case and the statement."""
    rows = [
        ("worst-case epsilon", f"{rounded_up(audit.worst_case_tight)} (CERTIFIED)"),
        ("worst-case epsilon by Renyi divergences", f"{rounded_up(audit.worst_case)} (CERTIFIED)"),
        ("delta", f"{audit.delta:g}"),
        ("unit of privacy", "one training row"),
        ("training rows", str(len(audit.ids))),
        ("noisy steps", str(audit.num_steps)),
        ("ledger", f"`{audit.digest}`"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    statement = "\n".join(f"- {line}" for line in statement_text(audit).splitlines())
    return f"## Privacy\n\n| | |\n|---|---|\n{table}\n\n{statement}\n"
