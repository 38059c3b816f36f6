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
"""Title, kind ("line"; "points", both axes logarithmic; "matrix" with a series per row and names of columns
for x), series, names of the axes."""


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


STYLE = """body{font:16px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
figure{display:inline-block;margin:.5em;max-width:34em}img{max-width:100%}figcaption{font-size:.85em}
table{border-collapse:collapse}td,th{border-bottom:1px solid #ccc;padding:.2em .8em;text-align:left}
td.bad{background:#fdd}"""


def write(
    folder: Path,
    name: str,
    about: str,
    figures: Mapping[str, Figure],
    tables: Mapping[str, Any],
    plots: Sequence[Plot],
) -> None:
    """numbers.json with everything, index.html with pictures by data set, targets and intervals. about: what
    the page says before them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {key: figure.as_dict() for key, figure in figures.items()}
    document = {"name": name, "machine": machine(), "figures": rows, "tables": tables}
    (folder / "numbers.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    sections: dict[str, list[str]] = {}
    for plot in plots:
        heading, _, caption = plot[0].partition(": ")
        text = html.escape(caption or heading)
        picture = f'<img alt="{text}" src="data:image/png;base64,{drawn(plot)}">'
        sections.setdefault(heading if caption else "", []).append(
            f"<figure>{picture}<figcaption>{text}</figcaption></figure>"
        )
    shown = "".join(f"<h2>{html.escape(head)}</h2>{''.join(body)}" for head, body in sections.items())
    (folder / "index.html").write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
        f"<h1>{name}</h1><p>{html.escape(about)}</p><p>Every number is an ESTIMATE, except claims of the "
        f"accountant.</p>{shown}<h2>Targets</h2>{_targets(figures)}"
        f"<details><summary>All numbers with a 95 % interval</summary>{_intervals(figures)}</details></html>",
        encoding="utf-8",
    )


def _targets(figures: Mapping[str, Figure]) -> str:
    wanted = {key: figure.as_dict() for key, figure in figures.items() if figure.target is not None}
    cells = [
        f"<tr><td>{_plain(key)}</td><td>{row['value']:.4g}</td>"
        f"<td>{'at least' if figures[key].at_least else 'at most'} {row['target']:.4g}</td>"
        f"<td{'' if row['holds'] else ' class=bad'}>{'holds' if row['holds'] else 'does not hold'}</td></tr>"
        for key, row in wanted.items()
    ]
    return f"<table><tr><th>figure</th><th>value</th><th>target</th><th></th></tr>{''.join(cells)}</table>"


def _intervals(figures: Mapping[str, Figure]) -> str:
    cells = [
        f"<tr><td>{_plain(key)}</td><td>{figure.value:.4g}</td>"
        f"<td>[{figures[key + '_low'].value:.4g}, {figures[key + '_high'].value:.4g}]</td></tr>"
        for key, figure in figures.items()
        if key + "_low" in figures and key + "_high" in figures
    ]
    return f"<table><tr><th>figure</th><th>value</th><th>95 %</th></tr>{''.join(cells)}</table>"


def _plain(key: str) -> str:
    return html.escape(key.replace("_", " "))


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
    axes.set(xlabel=across, ylabel=up)
    axes.set_title(title.replace("_", " "), fontsize="medium")
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
        axes.plot(
            x,
            y,
            marker=marker,
            linestyle="-" if kind == "line" else "",
            label=label.replace("_", " "),
            alpha=0.8,
        )
    places = [place for x, _ in series.values() for place in x]
    if not isinstance(places[0], str) and max(places) > 10:
        axes.set_xscale("symlog")
    if kind == "points":
        axes.set_yscale("symlog")
    axes.legend(fontsize="small")


def _matrix(axes: Any, series: Mapping[str, Any]) -> None:
    """Numbers between -1 and 1 in coloured fields; None stays empty."""
    columns = list(next(iter(series.values()))[0])
    values = np.array([[np.nan if value is None else value for value in y] for _, y in series.values()])
    axes.imshow(values, vmin=-1, vmax=1, cmap="RdBu", aspect="auto")
    names = [[name.replace("_", " ") for name in some] for some in (columns, series)]
    axes.set_xticks(range(len(columns)), names[0], rotation=30, ha="right", fontsize="small")
    axes.set_yticks(range(len(series)), names[1], fontsize="small")
    for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
        value = values[row, column]
        colour = "white" if abs(value) > 0.6 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize="small", color=colour)
