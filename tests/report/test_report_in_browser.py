"""The page in a real browser: three widths, light and dark, print, and an accessibility check."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from per_instance_accountant.audit.budget import BudgetAudit
from per_instance_accountant.ledger import Ledger
from per_instance_accountant.report import drawing, report_html
from per_instance_accountant.unlearning import plan_everyone
from tests.report.test_report_page import EVIDENCE, NOON

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS, SCHEMES = (320, 768, 1280), ("light", "dark")
TOUCHING = """() => {
  const found = [];
  for (const chart of document.querySelectorAll('.chart')) {
    const texts = [...chart.querySelectorAll('text, li, .axis-label')];
    const boxes = texts.map(e => [e.textContent, e.getBoundingClientRect()]);
    for (const [i, [a, p]] of boxes.entries()) for (const [b, q] of boxes.slice(i + 1))
      if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1.5 && q.top < p.bottom - 1.5)
        found.push([a, b]);
  }
  return found;
}"""
SIZES = """() => [...document.querySelectorAll('.chart .plot')]
  .map(e => Math.round(e.getBoundingClientRect().height))"""
OUTSIDE = """() => {
  const outside = (f, t) => {
    const a = f.getBoundingClientRect(), b = t.getBoundingClientRect();
    return b.left < a.left - 1 || b.right > a.right + 1;
  };
  return [...document.querySelectorAll('figure')]
    .flatMap(f => [...f.querySelectorAll('text')].filter(t => outside(f, t)).map(t => t.textContent));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None and not os.environ.get("CI"):
        pytest.skip("no Chromium on PATH: install it to see the page in a browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(audited: BudgetAudit, source: Ledger, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    everyone = plan_everyone(source, 0.3, order=8)
    texts = {
        "internal": report_html(audited, budget=0.5, everyone=everyone, evidence=EVIDENCE, created=NOON),
        "shareable": report_html(audited, audience="shareable", by="label", created=NOON),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


def shown(browser: Any, path: Path, width: int, scheme: str, bypass_csp: bool = False) -> Any:
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme=scheme,
        bypass_csp=bypass_csp,
        java_script_enabled=True,
    )
    page = context.new_page()
    page.problems = []
    page.on("console", lambda message: page.problems.append(message.text))
    page.on(
        "request", lambda request: page.problems.append(request.url) if "file:" not in request.url else None
    )
    page.goto(path.as_uri())
    return page


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["internal", "shareable"])
def test_the_page_fits(
    browser: Any, pages: dict[str, Path], name: str, scheme: str, width: int, tmp_path: Path
) -> None:
    page = shown(browser, pages[name], width, scheme)
    assert page.problems == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(TOUCHING) == []
    assert page.evaluate(OUTSIDE) == []
    assert set(page.evaluate(SIZES)) == {drawing.HEIGHT}
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 26)"
    assert dark == (scheme == "dark")
    picture = page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    page.context.close()


def violations(browser: Any, path: Path, width: int, scheme: str) -> list[str]:
    from axe_playwright_python.sync_playwright import Axe

    # The policy of the page keeps axe out as it keeps everybody out.
    page = shown(browser, path, width, scheme, bypass_csp=True)
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    found = [violation["id"] for violation in Axe().run(page).response["violations"]]
    page.context.close()
    return found


@pytest.mark.parametrize("width", [320, 1280])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_is_accessible(browser: Any, pages: dict[str, Path], scheme: str, width: int) -> None:
    assert violations(browser, pages["internal"], width, scheme) == []
    assert violations(browser, pages["shareable"], width, scheme) == []


def test_the_checks_see_their_seeded_faults(browser: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    text = pages["internal"].read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    broken.write_text(
        text.replace(' lang="en"', "").replace("--mute:#595959", "--mute:#bbbbbb"), encoding="utf-8"
    )
    assert {"html-has-lang", "color-contrast"} <= set(violations(browser, broken, 1280, "light"))
    broken.write_text(text.replace("<main", "<script>document.title = 1</script><main", 1), encoding="utf-8")
    page = shown(browser, broken, 1280, "light")
    assert page.problems and page.title() != "1"
    page.context.close()


def test_labels_that_touch_are_seen(
    browser: Any, audited: BudgetAudit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "spread", lambda wanted, gap, low, high: [100.0 for _ in wanted])
    path = tmp_path / "touching.html"
    path.write_text(report_html(audited, created=NOON), encoding="utf-8")
    page = shown(browser, path, 1280, "light")
    assert page.evaluate(TOUCHING) != []
    page.context.close()


def test_print_is_light_and_shows_the_tables(browser: Any, pages: dict[str, Path]) -> None:
    page = shown(browser, pages["internal"], 700, "dark")
    hidden = page.locator("details table").first.bounding_box()
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    box = page.locator("details table").first.bounding_box()
    assert box is not None and box["height"] > 50 and (hidden is None or hidden["height"] < box["height"])
    assert page.pdf().startswith(b"%PDF")
    page.context.close()
