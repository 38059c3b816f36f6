"""Pictures and pages of results, bound when they are first asked for.

Results stand at the bottom of the package and views at its top: a result names its view here, and the
room of the view is loaded by that name only when somebody calls it. Nothing below depends on the report.
"""

from __future__ import annotations

import importlib
from typing import Any, Final

_HOME: Final = {
    "figure": "per_instance_accountant.report.plots",
    "write_report": "per_instance_accountant.report",
}


def view(name: str) -> Any:
    """The function of that name. Raises MissingDependencyError PIA061 if it needs an extra."""
    return getattr(importlib.import_module(_HOME[name]), name)
