"""The page itself: one HTML file whose security policy allows its own style sheet and nothing else."""

from __future__ import annotations

import base64
import datetime
import functools
import hashlib
import importlib.resources
from dataclasses import dataclass
from typing import Final

from per_instance_accountant.report.drawing import draw
from per_instance_accountant.report.sections import Section
from per_instance_accountant.results.markup import Markup, element, join

_GLOSSARY: Final = (
    (
        "epsilon, delta",
        "Two numbers that bound how far two distributions differ: the law of everything released with "
        "the instance and without its contribution. Smaller is more private; delta is the share of bad luck.",
    ),
    ("instance", "One row of the training set, the unit of privacy here."),
    (
        "worst case",
        "The epsilon that holds for every instance whatever its data, from noise, sampling and clip norm.",
    ),
    ("individual epsilon", "The epsilon of one instance, from bounds on its own clipped gradients."),
    (
        "Rényi divergence, order",
        "A family of distances between distributions that add up over the steps of a run; "
        "epsilons are computed from it or from the law of the privacy loss itself.",
    ),
    (
        "basis",
        "What a number rests on. CERTIFIED: a bound known before the run. OUTPUT_SPECIFIC: the loss that "
        "this run realised. ESTIMATE: a score that bounds nothing.",
    ),
    ("charging rule", "Where the bound on an instance's contribution to one step comes from."),
    ("ledger", "The append-only record of the training run that all numbers are computed from."),
    (
        "steps to unlearn",
        "Noisy fine-tuning steps without the instance after which the model is as close as the target "
        "to one retrained without it and then fine-tuned the same way.",
    ),
)


@dataclass(frozen=True, slots=True)
class Number:
    """One of the four numbers at the top."""

    name: str
    value: str
    basis: str
    alert: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What the page says, in the order in which it says it."""

    title: str
    subtitle: str
    audience: str
    numbers: tuple[Number, ...]
    promise: str
    warning: str
    sections: tuple[Section, ...]
    absent: tuple[str, ...]
    statement: tuple[str, ...]
    method: tuple[tuple[str, str], ...]
    created: datetime.datetime


def render(page: Page) -> str:
    """The HTML document."""
    style = _style()
    body = element(
        "body",
        element("a", "Skip to content", class_="skip", href="#main"),
        _header(page),
        element("main", *_main(page), id="main"),
        element(
            "footer",
            element(
                "p",
                f"Written {_time(page.created)}. This file loads nothing from elsewhere and runs no scripts.",
                class_="meta",
            ),
        ),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy(style)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", f"{page.title}: {page.subtitle}"),
        element("style", Markup(style)),
    )
    return "<!doctype html>\n" + element("html", head, body, lang="en") + "\n"


@functools.cache
def _style() -> str:
    return importlib.resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")


def _policy(style: str) -> str:
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _time(moment: datetime.datetime) -> str:
    return moment.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _header(page: Page) -> Markup:
    line = f"per_instance_accountant · {_time(page.created)} · audience: {page.audience}"
    return element(
        "header",
        element("p", line, class_="meta"),
        element("h1", page.title),
        element("p", page.subtitle),
    )


def _main(page: Page) -> list[Markup]:
    parts = [
        element("dl", *map(_number, page.numbers), class_="numbers"),
        element(
            "div",
            element("h2", "What the numbers promise"),
            element("p", page.promise),
            element("p", element("strong", page.warning)),
            class_="promise",
        ),
    ]
    if page.sections:
        figures = [_figure(section, place) for place, section in enumerate(page.sections)]
        parts += [element("h2", "Findings"), element("div", *figures, class_="figures")]
    if page.absent:
        parts += [element("h2", "Not shown"), _plain_list(page.absent)]
    return [
        *parts,
        element("h2", "Privacy statement"),
        _plain_list(page.statement),
        element("h2", "Method"),
        _method(page.method),
        element("h2", "Glossary"),
        element(
            "dl",
            *(join(element("dt", name), element("dd", text)) for name, text in _GLOSSARY),
            class_="glossary",
        ),
    ]


def _plain_list(lines: tuple[str, ...]) -> Markup:
    return element("ul", *(element("li", line) for line in lines), class_="plain")


def _number(number: Number) -> Markup:
    return element(
        "div",
        element("dt", number.name),
        element("dd", number.value, class_="value bad" if number.alert else "value"),
        element("dd", number.basis, class_="basis"),
    )


def _figure(section: Section, place: int) -> Markup:
    return element(
        "figure",
        element("h3", section.title, id=f"figure-{place}"),
        element("p", section.finding, class_="finding" if section.ok else "finding bad"),
        draw(section.chart, f"{section.title}. {section.finding}"),
        element("figcaption", *([f"{section.note} "] if section.note else []), f"Basis: {section.basis}."),
        element("details", element("summary", f"Data of “{section.title}”"), _data(section)),
        role="group",
        aria_labelledby=f"figure-{place}",
    )


def _data(section: Section) -> Markup:
    header, rows = section.chart.table()
    head = element("tr", *(element("th", name, scope="col") for name in header))
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:]))
        for row in rows
    ]
    table = element(
        "table", element("caption", section.title), element("thead", head), element("tbody", *body)
    )
    return element(
        "div", table, class_="scroll", tabindex=0, role="region", aria_label=f"Data: {section.title}"
    )


def _method(rows: tuple[tuple[str, str], ...]) -> Markup:
    lines = [element("tr", element("th", name, scope="row"), element("td", text)) for name, text in rows]
    table = element(
        "table", element("caption", "How the numbers came about"), element("tbody", *lines), class_="text"
    )
    return element("div", table, class_="scroll", tabindex=0, role="region", aria_label="Method")
