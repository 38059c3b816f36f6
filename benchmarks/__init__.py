"""Figures about speed and cost. ``python -m benchmarks.NAME --format json [--quick]`` prints one object."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured number. target: not to be exceeded (to be reached, with ``at_least``); None: for scale."""

    value: float
    target: float | None = None
    at_least: bool = False

    def as_dict(self) -> dict[str, object]:
        """value, target, and whether it holds (None without a target; a NaN never holds)."""
        if self.target is None:
            holds = None
        else:
            holds = self.value >= self.target if self.at_least else self.value <= self.target
        return {"value": self.value, "target": self.target, "holds": holds}


def arguments(description: str | None) -> argparse.Namespace:
    """The options every benchmark has: ``--format`` and ``--quick``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, under 60 s")
    return parser.parse_args()


def machine() -> str:
    """Processor, cores this process may use, Python version."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores, Python {platform.python_version()}"


def report(name: str, figures: Mapping[str, Figure], output_format: str) -> None:
    """Print the figures: one JSON object, or one line each."""
    rows = {key: figure.as_dict() for key, figure in figures.items()}
    if output_format == "json":
        json.dump(
            {"name": name, "machine": machine(), "figures": rows}, sys.stdout, indent=2, allow_nan=False
        )
        print()
        return
    print(f"{name}  ({machine()})")
    for key, row in rows.items():
        target = "" if row["target"] is None else f"  target {row['target']:g}  holds {row['holds']}"
        print(f"  {key:40} {row['value']:.4g}{target}")
