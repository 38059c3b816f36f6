"""Known defects of the pinned peers are found again, and this package has none of them: the quick table."""

from __future__ import annotations

import pytest

pytest.importorskip("opacus")
pytest.importorskip("dp_accounting")
pytest.importorskip("prv_accountant")

from benchmarks import peer_defects
from benchmarks.tables import markdown, put
from per_instance_accountant.errors import MissingDependencyError
from per_instance_accountant.testing import CHECKS, Report, Verdict, peers, run_checks


@pytest.fixture(scope="module")
def findings():
    return peer_defects.look(25, 1.0)


def test_every_known_defect_is_found(findings):
    assert len(findings) >= 24
    assert [(f.defect.peer, f.defect.law) for f in findings if not f.found] == []


def test_the_smallest_inputs_are_those_that_are_known(findings):
    found = {(f.defect.peer, f.defect.law): f for f in findings}
    assert "epsilon is -804.6" in found["OpacusRDP", "any_orders_are_sound"].what
    assert "did not return" in found["OpacusPRV", "impossible_input_is_refused"].what
    assert "epsilon = 0.0" in found["DpAccountingRDP", "impossible_input_is_refused"].what
    assert found["OpacusRDP", "steps_are_counted"].smallest == "steps=1, repeats=2"
    assert "9.0 for 99 instances" in found["Opacus", "neighbours_release_alike"].what


def test_none_of_them_is_ours():
    laws = sorted({defect.law for defect in peer_defects.KNOWN})
    judged = run_checks(peers.OpacusPerInstance, laws=laws, examples=2, seconds=20.0)
    assert judged.ok and len(judged.ran) >= 10, [v.smallest for v in judged.broken]


def test_the_laws_of_the_table_exist():
    known = {check.law.name for check in CHECKS}
    assert {defect.law for defect in peer_defects.KNOWN} <= known
    assert {defect.peer for defect in peer_defects.KNOWN} <= {peer.__name__ for peer in peers.PEERS}
    assert set(peers.versions()) == {"opacus", "dp-accounting", "prv-accountant"}


def test_the_table_says_what_was_not_found(findings):
    ours = [Report(accountant="Mine", verdicts=(Verdict(law="a", status="held", examples=3),))]
    text = peer_defects.table(
        [*findings[:1], peer_defects.Finding(defect=findings[0].defect, found=False)], ours
    )
    assert "1 of 2 known defects were found" in text and "| `Mine` | 1 | 3 | 0 | 0 |" in text


def test_a_table_is_put_into_its_place_only(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a: begin -->old<!-- a: end -->\nafter\n")
    put(page, "a", markdown(("x",), [("1|2",)]))
    put(page, "a", markdown(("x",), [("1|2",)]))
    text = page.read_text()
    assert text.startswith("before\n<!-- a: begin -->\n\n| x |") and text.endswith("<!-- a: end -->\nafter\n")
    assert "old" not in text and "1\\|2" in text
    with pytest.raises(ValueError, match="no place"):
        put(page, "b", "text")


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "prv_accountant", None)
    with pytest.raises(MissingDependencyError, match="prv-accountant is not installed"):
        peers.MicrosoftPRV()
