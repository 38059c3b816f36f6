"""The scoreboard: its exact values are exact, and its figures fail on a package that is wrong."""

from __future__ import annotations

from typing import Any

import mpmath as mp
import numpy as np
import pytest

from benchmarks import Figure, exact, scoreboard
from per_instance_accountant.errors import LedgerError
from per_instance_accountant.ledger import merging


@pytest.mark.parametrize("order", [1.5, 2, 7])
def test_exact_divergences(order: float) -> None:
    with mp.workdps(50):
        whole = exact.rdp_of_step(1 - 1e-16, 0.5, order)
        assert abs(whole / (order * 0.125) - 1) < 1e-12
        two = mp.log(1 + mp.mpf("0.01") * (mp.exp(mp.mpf("0.25")) - 1))
        assert abs(exact.rdp_of_step(0.1, 0.5, 2) / two - 1) < mp.mpf("1e-15")
        q, r, a = mp.mpf("0.3"), mp.mpf("0.7"), 6
        assert abs(exact._broken(q, r, mp.mpf(a)) / exact._whole(q, r, a) - 1) < mp.mpf("1e-40")


def test_exact_deltas() -> None:
    with mp.workdps(40):
        gauss = mp.ncdf(mp.mpf(1) / 2 - 1) - mp.e * mp.ncdf(-mp.mpf(1) / 2 - 1)
        assert abs(exact.one_step_delta(1.0, 1.0, 1.0) / gauss - 1) < mp.mpf("1e-30")
        grid = [mp.mpf(k) / 50 for k in range(-600, 700)]
        densities = [(mp.npdf(x), mp.mpf("0.8") * mp.npdf(x) + mp.mpf("0.2") * mp.npdf(x - 1)) for x in grid]
        e = mp.exp(mp.mpf("0.1"))
        both = [
            sum(max(a - e * b, 0) for a, b in pairs) / 50
            for pairs in (densities, [p[::-1] for p in densities])
        ]
        assert abs(exact.one_step_delta(0.2, 1.0, 0.1) / max(both) - 1) < mp.mpf("2e-3")


def held(figures: dict[str, Figure]) -> bool:
    return all(figure.as_dict()["holds"] is not False for figure in figures.values())


def test_a_formula_below_the_truth_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = scoreboard.sampled_gaussian_rdp
    monkeypatch.setattr(scoreboard, "WHOLE", (2, 8))
    monkeypatch.setattr(scoreboard, "BROKEN", (1.5,))
    assert held(scoreboard.formulas(True))
    monkeypatch.setattr(scoreboard, "sampled_gaussian_rdp", lambda *a: original(*a) * (1 - 1e-8))
    assert not held(scoreboard.formulas(True))
    monkeypatch.setattr(scoreboard, "sampled_gaussian_rdp", lambda *a: original(*a) * np.nan)
    assert not held(scoreboard.formulas(True))


def test_a_reader_that_forgives_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert held(scoreboard.damage(True))
    original = scoreboard.steps_in

    def forgiving(key: bytes, log: bytes) -> Any:
        found = original(key, log)
        return 0 if found is None else found

    monkeypatch.setattr(scoreboard, "steps_in", forgiving)
    assert not held(scoreboard.damage(True))


def test_a_merge_that_drops_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert held(scoreboard.merges(True))
    monkeypatch.setattr(merging._Merging, "_together", lambda self, steps, phase: steps[0])
    assert not held(scoreboard.merges(True))


def test_an_untyped_error_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(scoreboard, "gaussian_epsilon", broken)
    assert not held(scoreboard.duration_of_calls(True))


def test_the_page_says_what_holds() -> None:
    text = scoreboard.page({"good": Figure(value=0, target=0), "bad": Figure(value=2, target=1)})
    assert "| good | 0 | at most 0 | yes |" in text and "| bad | 2 | at most 1 | NO |" in text
    with pytest.raises(LedgerError):
        scoreboard.Ledger.open("nothing/here")
