"""``pia report`` and ``pia export``."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from per_instance_accountant import audit
from tests.cli.conftest import NUM_INSTANCES, Pia
from tests.cli.test_process import run


def test_report_writes_a_private_page_and_says_so(pia: Pia, ledger: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = pia("report", ledger, "-o", page, "--budget", "0.5", "--format", "json")
    assert done.code == 0 and done.err == ""
    assert json.loads(done.out) == {
        "report": str(page),
        "audience": "internal",
        "bytes": page.stat().st_size,
    }
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    assert "instances above the budget of 0.5" in page.read_text(encoding="utf-8")


def test_report_shows_evidence_and_steps(pia: Pia, ledger: Path, tmp_path: Path) -> None:
    evidence, page = tmp_path / "evidence.json", tmp_path / "page.html"
    claims = [{"name": "worst case", "claimed": 0.1, "lower": 0.2, "upper": 0.9}]
    evidence.write_text(json.dumps({"claims": claims}))
    done = pia("report", ledger, "-o", page, "--evidence", evidence, "--target-epsilon", "1", "--order", "4")
    assert done.code == 0, done.err
    text = page.read_text(encoding="utf-8")
    assert "1 of 1 claims are refuted" in text and "Steps to unlearn" in text


def test_a_shareable_report_names_nobody(pia: Pia, ledger: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = pia("report", ledger, "-o", page, "--audience", "shareable", "--by", "label")
    assert done.code == 0
    text = page.read_text(encoding="utf-8")
    assert "Groups by" not in text and "Individual epsilon" not in text and "worst-case epsilon" in text


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("--audience", "public"), 2),
        (("--order", "8"), 2),
        (("--release-epsilon", "0.5"), 2),
        (("--evidence", "missing.json"), 2),
        (("--by", "nothing"), 2),
        (("--output", "missing/report.html"), 2),
    ],
)
def test_report_refuses_what_it_cannot_show(pia: Pia, ledger: Path, args: tuple[str, ...], code: int) -> None:
    done = pia("report", ledger, *args)
    assert done.code == code and not Path("report.html").exists()


def test_a_missing_ledger_is_damaged_input(pia: Pia, tmp_path: Path) -> None:
    assert pia("report", tmp_path / "none").code == 3
    assert pia("export", tmp_path / "none", "-o", tmp_path / "x").code == 3


def test_export_writes_what_the_audit_says(pia: Pia, ledger: Path, tmp_path: Path) -> None:
    table = audit(ledger).to_arrow()
    assert pia("export", ledger, "--as", "parquet", "-o", tmp_path / "a.parquet").code == 0
    assert pq.read_table(tmp_path / "a.parquet") == table
    assert pia("export", ledger, "--as", "csv", "-o", tmp_path / "a.csv").code == 0
    lines = (tmp_path / "a.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == NUM_INSTANCES + 1 and not any(line.startswith(("=", "+", "@")) for line in lines)
    assert pia("export", ledger, "--as", "ledger", "-o", tmp_path / "tables").code == 0
    assert (tmp_path / "tables" / "steps.parquet").exists()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {0o600}


def test_the_model_card_holds_public_numbers_only(pia: Pia, ledger: Path, tmp_path: Path) -> None:
    shown = pia("export", ledger, "--as", "model-card").out
    assert shown.startswith("## Privacy") and shown == audit(ledger).model_card()
    assert str(audit(ledger).epsilon[3]) not in shown and "median" not in shown and "| ann" not in shown
    assert pia("export", ledger, "--as", "model-card", "-o", tmp_path / "card.md").code == 0
    assert (tmp_path / "card.md").read_text(encoding="utf-8") == shown


def test_export_needs_a_place(pia: Pia, ledger: Path) -> None:
    done = pia("export", ledger)
    assert done.code == 2 and "--output is missing" in done.err


def test_completion_is_offered_for_shells(pia: Pia) -> None:
    shown = pia("--show-completion", "bash")
    assert shown.code == 0 and "_pia_completion" in shown.out


def test_the_page_loads_neither_torch_nor_a_plotting_library(ledger: Path, tmp_path: Path) -> None:
    done = run("report", ledger, "-o", tmp_path / "page.html", NO_COLOR="1", TERM="dumb")
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == "loaded:"
    assert "\x1b" not in done.stdout
