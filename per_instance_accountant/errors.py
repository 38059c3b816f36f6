"""Typed errors: what happened, what it means for the guarantee, the line that fixes it, a stable code.

Every error of the package is a :class:`PiaError`. A wrong claim is always an error, never a warning.
"""

from __future__ import annotations

from typing import Final

CODES: Final[dict[str, str]] = {
    "PIA001": "a step was taken without a fresh batch from the tracked loader",
    "PIA002": "the loop ended or skipped a batch inside a logical batch",
    "PIA003": "the number of per-sample gradients differs from the number of instances in the batch",
    "PIA004": "another party replaced the optimizer's step hook",
    "PIA005": "more than one forward or backward pass for one step",
    "PIA006": "a per-sample gradient is not finite",
    "PIA007": "the tracked loader was wrapped by something that hides the instances of a batch",
    "PIA008": "the model was updated without a recorded noisy step",
    "PIA009": "the clip norm or the noise changed in the middle of a logical batch",
    "PIA010": "the loader does not sample as the accounting assumes",
    "PIA011": "the number asked for cannot be supported by the facts in the ledger",
    "PIA012": "an estimate or an output-specific number was used where a certified one is needed",
    "PIA013": "thresholds were asked for that were not enforced during training",
    "PIA020": "the next step would exceed a privacy budget",
    "PIA030": "the target cannot be reached by any number of steps",
    "PIA031": "an assumption of a bound is missing, out of range or does not hold",
    "PIA032": "the deletion request names unknown, repeated or never trained instances, or all of them",
    "PIA033": "the run of a plan does not match the plan",
    "PIA034": "the data given for unlearning contain instances that must be forgotten",
    "PIA040": "the ledger and the checkpoint do not belong to the same moment of the same run",
    "PIA041": "the ledger is missing or cannot be read",
    "PIA042": "the ledger is damaged: bytes differ from what was written",
    "PIA043": "the ledger has a format that this version does not know",
    "PIA044": "the ledger is in use by another writer, or was closed",
    "PIA045": "the facts offered to the ledger contradict facts it holds",
    "PIA050": "the certificate does not match the evidence",
    "PIA051": "the certificate or the plan cannot be read",
    "PIA060": "this configuration is not supported",
    "PIA061": "an optional dependency is not installed",
    "PIA070": "an argument is outside its range",
    "PIA071": "an argument has the wrong type or shape",
    "PIA085": "a request id stands for another request already",
    "PIA115": "the parts that ranks wrote do not make up one run",
    "PIA116": "parts of a run on several ranks are missing",
    "PIA117": "the part of one rank was used where the whole run is needed",
    "PIA118": "a statistic cannot be published privately, because values depend on several instances",
    "PIA125": "too few seeds, instances or models for an interval",
    "PIA126": "the instances to forget cannot be compared with anything",
    "PIA127": "the straight line between two models means nothing",
    "PIA100": "a framework is set up in a way that changes or hides private steps",
    "PIA101": "the loss of one instance depends on which others are in its batch",
    "PIA102": "a process of the run stopped, or disagrees with the others",
    "PIA103": "processes of one run draw the same random numbers",
    "PIA090": "norms computed again from the batch differ from those of the loop",
    "PIA091": "noise that was drawn before would be drawn again",
    "PIA092": "the denominator of the released sum was changed during training",
}
"""Stable code -> title. A code is never reused for another meaning."""


class PiaError(Exception):
    """Base of all errors: ``code``, and the three sentences that make up the message.

    >>> str(PiaError("PIA070", "delta is 2.0", "No guarantee exists for it", "delta=1e-5"))
    'PIA070: delta is 2.0. No guarantee exists for it. Fix: delta=1e-5'
    """

    def __init__(self, code: str, happened: str, meaning: str, fix: str) -> None:
        self.code, self.happened, self.meaning, self.fix = code, happened, meaning, fix
        super().__init__(f"{code}: {happened}. {meaning}. Fix: {fix}")

    def __reduce__(self) -> tuple[type[PiaError], tuple[str, str, str, str]]:
        """An error crosses from one process to another whole."""
        return type(self), (self.code, self.happened, self.meaning, self.fix)


class UsageError(PiaError, ValueError):
    """An argument is outside its range or has the wrong shape; nothing was changed."""


class GuaranteeError(PiaError):
    """The number asked for would not be a valid privacy statement."""


class AlignmentError(PiaError, RuntimeError):
    """The training loop and the ledger disagree on which instances a step used; nothing was written."""


class LedgerError(PiaError):
    """The ledger is missing, damaged, of another run, or in use."""


class BudgetExceeded(PiaError, RuntimeError):
    """The next step would exceed a privacy budget; it was not taken, and nothing was released or charged."""


class PlanError(PiaError):
    """A deletion request or plan cannot be carried out as stated."""


class CertificateError(PiaError):
    """A certificate or plan file is malformed or does not match the evidence."""


class UnsupportedError(PiaError):
    """A configuration whose accounting is not implemented; refused rather than mis-stated."""


class MissingDependencyError(PiaError, ImportError):
    """An optional extra is needed."""
