"""Options, the JSON of numbers and the static page of figures."""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import Figure, machine

Plot = tuple[str, str, Mapping[str, tuple[Sequence[Any], Sequence[float | None]]], str, str]
"""Title, kind ("line", "points", or "matrix" with a series per row and names of columns for x), series, names
of the axes."""


def options(description: str | None) -> argparse.Namespace:
    """``--format`` and ``--quick`` as every benchmark; where to write; the user's own data and model."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--quick", action="store_true", help="small sizes, under 60 s")
    parser.add_argument("--output", type=Path, help="folder for numbers.json and index.html")
    parser.add_argument("--data", help="package.module:name of a dataset of (input, label) pairs")
    parser.add_argument("--model", help="package.module:name of a classifier for it")
    parser.add_argument("--count", type=int, default=500, help="training instances taken of --data")
    parser.add_argument("--steps", type=int, default=400, help="training steps with --data")
    parser.add_argument("--noise-std", type=float, default=2.0, help="of the sum of gradients, with --data")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args()
    if bool(chosen.data) != bool(chosen.model):
        parser.error("--data and --model belong together")
    return chosen


def write(
    folder: Path, name: str, figures: Mapping[str, Figure], tables: Mapping[str, Any], plots: Sequence[Plot]
) -> None:
    """numbers.json with everything, index.html with figures and the numbers that have a target."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {key: figure.as_dict() for key, figure in figures.items()}
    document = {"name": name, "machine": machine(), "figures": rows, "tables": tables}
    (folder / "numbers.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    targets = {key: row for key, row in rows.items() if row["target"] is not None}
    cells = [
        f"<tr><td>{html.escape(key)}</td><td>{row['value']:.4g}</td><td>{row['target']:g}</td>"
        f"<td>{'holds' if row['holds'] else 'does not hold'}</td></tr>"
        for key, row in targets.items()
    ]
    pictures = [
        f'<figure><img alt="{html.escape(plot[0])}" src="data:image/png;base64,{drawn(plot)}">'
        f"<figcaption>{html.escape(plot[0])}</figcaption></figure>"
        for plot in plots
    ]
    (folder / "index.html").write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>'
        f"<h1>{name}</h1><p>Every number is an ESTIMATE, except claims of the accountant.</p>"
        f"{''.join(pictures)}<table><tr><th>figure</th><th>value</th><th>target</th><th></th></tr>"
        f"{''.join(cells)}</table></html>",
        encoding="utf-8",
    )


def keep(folder: Path | None, name: str, figures: Mapping[str, Figure], tables: Mapping[str, Any]) -> None:
    """What is done so far, as ``parts/NAME.json``: a run that is stopped leaves it."""
    if folder is None:
        return
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    rows = {key: figure.as_dict() for key, figure in figures.items()}
    document = json.dumps({"figures": rows, "tables": tables}, indent=1)
    (folder / "parts" / f"{name}.json").write_text(document, encoding="utf-8")


def drawn(plot: Plot) -> str:
    """The picture as base64 PNG."""
    from matplotlib.figure import Figure as Canvas

    title, kind, series, across, up = plot
    canvas = Canvas(figsize=(6, 4), layout="constrained")
    axes = canvas.subplots()
    axes.set(title=title, xlabel=across, ylabel=up)
    if kind == "matrix":
        _matrix(axes, series)
    else:
        _lines(axes, kind, series)
    target = io.BytesIO()
    canvas.savefig(target, format="png", dpi=90)
    return base64.b64encode(target.getvalue()).decode()


def _lines(axes: Any, kind: str, series: Mapping[str, Any]) -> None:
    for number, (label, (x, y)) in enumerate(series.items()):
        marker = "os^Dv<>P"[number % 8]
        axes.plot(x, y, marker=marker, linestyle="-" if kind == "line" else "", label=label, alpha=0.8)
    widest = max(max(x) for x, _ in series.values())
    if widest > 10:
        axes.set_xscale("symlog")
    if kind == "points":
        axes.set_yscale("symlog")
    axes.legend(fontsize="small")


def _matrix(axes: Any, series: Mapping[str, Any]) -> None:
    """Numbers between -1 and 1 in coloured fields; None stays empty."""
    columns = list(next(iter(series.values()))[0])
    values = np.array([[np.nan if value is None else value for value in y] for _, y in series.values()])
    axes.imshow(values, vmin=-1, vmax=1, cmap="RdBu", aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize="small")
    axes.set_yticks(range(len(series)), list(series), fontsize="small")
    for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
        axes.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center", fontsize="small")
