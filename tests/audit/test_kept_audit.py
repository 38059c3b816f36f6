"""An audit that was kept shows the same numbers, of the same ledger and code, or none."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from per_instance_accountant import LastSeen, audit
from per_instance_accountant.accounting import PrivacyFilter
from per_instance_accountant.audit import kept
from per_instance_accountant.audit.kept import kept_audit
from per_instance_accountant.errors import LedgerError, UsageError
from per_instance_accountant.ledger import LedgerWriter, Phase, Run, Step

N = 30


def mechanism(charging: str, noise_std: float = 1.0) -> Phase:
    return Phase(
        kind="train",
        sampling="poisson",
        sample_rate=0.1,
        noise_std=noise_std,
        max_grad_norm=1.0,
        charging=charging,
        denominator=3.0,
        learning_rate=0.1,
    )


def trained(path: Path | None, phase: Phase, *, filtered: bool = False) -> Path | None:
    chance = np.random.default_rng(0)
    run = Run(num_instances=N, ids=np.arange(N) + 500, groups={"class": np.arange(N) % 2})
    with LedgerWriter.create(path, run) as writer:
        if filtered:
            rule = PrivacyFilter(budget=50.0, delta=1e-5)
            writer.append(rule.stated(rule.per_instance(N, {}), phase))
        writer.append(phase)
        for _ in range(20):
            drawn = np.flatnonzero(chance.random(N) < 0.2)
            writer.append(Step(positions=drawn, contributions=chance.random(drawn.size).astype(np.float32)))
    return path


def same(first: Any, second: Any) -> None:
    for field in fields(first):
        if field.name in ("ledger", "groups"):
            continue
        np.testing.assert_array_equal(getattr(first, field.name), getattr(second, field.name))
    assert first.top(7) == second.top(7) and first.by_group("class") == second.by_group("class")
    assert first.quantiles().tolist() == second.quantiles().tolist()
    assert first.to_dict() == second.to_dict() and first.statement() == second.statement()


@pytest.mark.parametrize("charging", ["worst_case", "unamplified", "last_seen"])
def test_kept_numbers_are_the_numbers(charging: str, tmp_path: Path) -> None:
    path = trained(tmp_path / "run", mechanism(charging))
    made = audit(path, 1e-6)
    made.keep()
    same(made, kept_audit(path))
    kept_audit(path).keep()
    same(made, kept_audit(path))


def test_budgets_of_a_filter_and_infinite_losses_are_kept(tmp_path: Path) -> None:
    path = trained(tmp_path / "filtered", mechanism("worst_case"), filtered=True)
    made = audit(path, 1e-5)
    made.keep()
    assert made.certified_budget is not None
    same(made, kept_audit(path))
    path = trained(tmp_path / "bare", mechanism("worst_case", noise_std=0.0))
    made = audit(path, 1e-5)
    made.keep()
    assert made.worst_case == np.inf
    same(made, kept_audit(path))


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trained(tmp_path / "run", mechanism("worst_case"))
    with pytest.raises(LedgerError, match=r"PIA041.*no audit is kept"):
        kept_audit(path)
    audit(path, 1e-6, charging=LastSeen()).keep()
    assert (path / "audit").stat().st_mode & 0o777 == 0o600
    assert str(kept_audit(path).basis) == "ESTIMATE"
    content = (path / "audit").read_bytes()
    for place in range(0, len(content), 5):
        (path / "audit").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(LedgerError, match=r"PIA042.*'audit'"):
            kept_audit(path)
    (path / "audit").write_bytes(content)
    with monkeypatch.context() as patch:
        patch.setattr(kept, "_code_digest", lambda: "0" * 64)
        with pytest.raises(LedgerError, match=r"PIA040.*another version"):
            kept_audit(path)
    with LedgerWriter.resume(path) as writer:
        writer.append(Step(positions=np.array([1]), contributions=np.ones(1, np.float32)))
    with pytest.raises(LedgerError, match=r"PIA040.*other facts"):
        kept_audit(path)


def test_a_ledger_in_memory_keeps_nothing() -> None:
    writer = LedgerWriter.create(None, Run(num_instances=1))
    writer.append(mechanism("worst_case"))
    with pytest.raises(UsageError, match="PIA071"):
        audit(writer.ledger(), 1e-5).keep()
