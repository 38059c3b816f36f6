"""What it costs to import the package and to ask ``pia`` for help, in CPU seconds of a fresh process.

CPU seconds (user and system) are disturbed less by other work than wall time, the minimum of several
runs least of all. A bare interpreter, numpy, torch and opacus stand beside them for scale.
"""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks import Figure, arguments, report

COMMANDS: dict[str, tuple[list[str], float | None]] = {
    "import_per_instance_accountant_cpu_s": (["-c", "import per_instance_accountant"], 0.25),
    "pia_help_cpu_s": (["-m", "per_instance_accountant", "--help"], 0.4),
    "bare_interpreter_cpu_s": (["-c", "pass"], None),
    "import_numpy_cpu_s": (["-c", "import numpy"], None),
    "import_torch_cpu_s": (["-c", "import torch"], None),
    "import_opacus_cpu_s": (["-c", "import opacus"], None),
}
"""Name -> arguments of the interpreter and the target in CPU seconds."""


def cpu_seconds(args: list[str]) -> float:
    """User and system CPU seconds of one child interpreter. Raises CalledProcessError if it fails."""
    process = subprocess.Popen([sys.executable, *args], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read() if process.stderr else b""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.stderr:
        process.stderr.close()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args, stderr=errors)
    return usage.ru_utime + usage.ru_stime


def measure(repetitions: int) -> dict[str, Figure]:
    """Smallest cost of each command over the repetitions, after one run that fills the byte-code cache."""
    figures = {}
    for name, (args, target) in COMMANDS.items():
        cpu_seconds(args)
        value = min(cpu_seconds(args) for _ in range(repetitions))
        figures[name] = Figure(value=value, target=target)
    return figures


if __name__ == "__main__":
    options = arguments(__doc__)
    report("import_time", measure(2 if options.quick else 7), options.format)
