"""Laws of privacy accounting, for anybody's accountant: strategies, checks, oracles, and a runner.

Needs the extra ``testing`` (Hypothesis, mpmath). torch is needed only for the adapters of Opacus.
"""

from __future__ import annotations

from per_instance_accountant.errors import MissingDependencyError

try:
    import hypothesis as _hypothesis  # noqa: F401
    import mpmath as _mpmath  # noqa: F401
except ImportError as _error:
    raise MissingDependencyError(
        "PIA061",
        f"{_error.name} is not installed",
        "No law can be checked",
        'pip install "per-instance-accountant[testing]"',
    ) from None

from per_instance_accountant.testing import oracles, strategies
from per_instance_accountant.testing.accountants import OPTIONAL, Accountant
from per_instance_accountant.testing.laws import Verdict, law
from per_instance_accountant.testing.running import (
    CHECKS,
    Report,
    parametrize_with_checks,
    run_checks,
    watch_checks,
)
from per_instance_accountant.testing.search import LawBroken

__all__ = [
    "CHECKS",
    "OPTIONAL",
    "Accountant",
    "LawBroken",
    "Report",
    "Verdict",
    "law",
    "oracles",
    "parametrize_with_checks",
    "run_checks",
    "strategies",
    "watch_checks",
]
