"""A seal changes how fast a ledger is opened, and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from per_instance_accountant.errors import LedgerError, UsageError
from per_instance_accountant.ledger import (
    Drop,
    Filter,
    Ledger,
    LedgerWriter,
    PublicStep,
    Resume,
    Run,
    sealing,
)
from per_instance_accountant.ledger.walk import RunningDigest

N = 12
ATTRIBUTES = (
    "num_steps",
    "num_abandoned_steps",
    "abandoned",
    "phases",
    "disclosures",
    "num_public_steps",
    "sessions",
    "confirmed",
    "digest",
    "anchor",
)


def course(make: SimpleNamespace) -> list[Any]:
    """Every kind of fact, so that what is read without looking into steps has something to forget."""
    fixed = make.thresholds(np.linspace(0.1, 1, N), "fixed")
    forget = np.where(np.arange(N) == 5, 0, fixed.values).astype(np.float32)
    return [
        Filter(family="gaussian", orders=np.full(N, 2.0), budgets=np.full(N, 9.0)),
        make.phase(charging="fixed_thresholds"),
        fixed,
        make.step(0, 3, contribution=0.1),
        make.step(),
        Drop(positions=np.array([3])),
        make.step(7, 2, contribution=0.1),
        PublicStep(count=4),
        Resume(at_step=2),
        make.phase(noise_std=2.0),
        make.step(8, 9, contribution=0.1),
        make.thresholds(forget, "forget"),
        make.step(1, contribution=0.1),
        make.step(0, 8, contribution=0.1),
    ]


@pytest.fixture
def sealed(make: SimpleNamespace, tmp_path: Path) -> Callable[[int], Path]:
    """The ledger of the course, sealed after so many of its events."""

    def build(count: int) -> Path:
        path, events = tmp_path / f"run-{count}", course(make)
        with LedgerWriter.create(path, Run(num_instances=N, ids=np.arange(N) + 100)) as writer:
            for event in events[:count]:
                writer.append(event)
            writer.ledger().seal()
            for event in events[count:]:
                writer.append(event)
        return path

    return build


def outcome(path: Path) -> str:
    """The code of the error, or the digest of what was opened by its seal."""
    try:
        return Ledger.open_sealed(path).digest
    except LedgerError as error:
        return error.code


def test_a_sealed_ledger_is_the_same_ledger(make: SimpleNamespace, sealed: Callable[[int], Path]) -> None:
    for count in range(len(course(make)) + 1):
        path = sealed(count)
        fast, full = Ledger.open_sealed(path), Ledger.open(path)
        for name in ATTRIBUTES:
            assert getattr(fast, name) == getattr(full, name), (count, name)
        assert np.array_equal(fast.forgotten, full.forgotten) and np.array_equal(fast.ids, full.ids)
        assert len(list(fast.events())) == len(course(make))
        # The same facts may follow: who was dropped or forgotten, and what is fixed, is known as well.
        for event in (make.step(5), make.step(3), Drop(positions=np.array([3]))):
            with pytest.raises(LedgerError, match="PIA045"):
                sealing.walk_by_seal(fast.source)[0].progress.check(event)


def test_opening_by_a_seal_does_not_look_into_steps(
    sealed: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, reads = sealed(14), []
    original = sealing.frames.read_header
    monkeypatch.setattr(sealing.frames, "read_header", lambda h: reads.append(original(h)) or reads[-1])
    monkeypatch.setattr("per_instance_accountant.ledger.encoding._decode_step", None)
    assert Ledger.open_sealed(path).num_steps == 6
    assert len(reads) == 15


def check_bit_flips(path: Path) -> None:
    log = (path / "events.log").read_bytes()
    for bit in range(0, 8 * len(log), 89):
        flipped = bytearray(log)
        flipped[bit // 8] ^= 1 << bit % 8
        (path / "events.log").write_bytes(flipped)
        assert outcome(path) == "PIA042", bit
    (path / "events.log").write_bytes(log)


@pytest.mark.parametrize("count", [14, 7])
def test_no_flipped_bit_is_accepted(count: int, sealed: Callable[[int], Path]) -> None:
    check_bit_flips(sealed(count))


def test_a_reader_that_trusts_the_seal_blindly_fails(
    sealed: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sealed(14)
    genuine = "sha256:" + (path / "seal").read_bytes()[24:56].hex()
    monkeypatch.setattr(RunningDigest, "upto", lambda self, end: genuine)
    with pytest.raises(AssertionError):
        check_bit_flips(path)


def test_a_log_that_was_cut_behind_its_seal_is_refused(sealed: Callable[[int], Path]) -> None:
    path = sealed(7)
    log, whole = (path / "events.log").read_bytes(), Ledger.open(path)
    sealed_end = int.from_bytes((path / "seal").read_bytes()[16:24], "little")
    assert 0 < sealed_end < len(log)
    for cut in range(0, len(log), 7):
        (path / "events.log").write_bytes(log[:cut])
        if cut < sealed_end:
            assert outcome(path) == "PIA042"
        else:
            assert outcome(path) == Ledger.open(path).digest
            assert whole.holds(Ledger.open_sealed(path).anchor)


def test_every_changed_byte_of_a_seal_is_refused_and_without_one_all_is_verified(
    sealed: Callable[[int], Path],
) -> None:
    path = sealed(9)
    content, digest = (path / "seal").read_bytes(), Ledger.open(path).digest
    for place in range(len(content)):
        (path / "seal").write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        assert outcome(path) == "PIA042"
    for wrong in (b"", content[:-1], content + b"\0", bytes(len(content))):
        (path / "seal").write_bytes(wrong)
        assert outcome(path) == "PIA042"
    assert Ledger.open(path).digest == digest
    (path / "seal").unlink()
    assert outcome(path) == digest


def test_a_seal_of_another_ledger_or_of_another_history_is_refused(
    sealed: Callable[[int], Path], make: SimpleNamespace, tmp_path: Path
) -> None:
    path, other = sealed(14), sealed(13)
    shutil.copy(path / "seal", other / "seal")
    assert outcome(other) == "PIA042"
    for name in ("one", "two"):
        shutil.copytree(path, tmp_path / name)
        with LedgerWriter.resume(tmp_path / name) as writer:
            writer.append(make.step(1 if name == "one" else 2, contribution=0.1))
        Ledger.open(tmp_path / name).seal()
    shutil.copy(tmp_path / "one" / "seal", tmp_path / "two" / "seal")
    assert outcome(tmp_path / "two") == "PIA042"
    assert outcome(tmp_path / "one") == Ledger.open(tmp_path / "one").digest


def test_a_seal_that_was_forged_with_the_key_is_no_way_around_the_facts(
    sealed: Callable[[int], Path],
) -> None:
    """Whoever has the key may write any history, but no reader takes other facts than those in the log."""
    path = sealed(14)
    ledger = Ledger.open(path)
    digest = RunningDigest(ledger.source)
    for end in (1, 30, 500, ledger.source.reading().__enter__()[1] - 1):
        forged = sealing.Seal(3, end, bytes.fromhex(RunningDigest(ledger.source).upto(end)[7:]), bytes(32))
        sealing.write_seal(ledger.source, forged)
        assert outcome(path) == "PIA042"
    whole = bytes.fromhex(digest.upto(ledger._end)[7:])
    sealing.write_seal(ledger.source, sealing.Seal(ledger._sequence, ledger._end, whole, bytes(32)))
    with pytest.raises(LedgerError, match="PIA042"):
        list(Ledger.open_sealed(path).events())


def test_a_seal_is_owner_only_complete_or_absent_and_follows_no_link(
    sealed: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sealed(5)
    assert (path / "seal").stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(path)) == ["events.log", "key", "seal"]
    before = (path / "seal").read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(LedgerError, match=r"PIA041: seal cannot be used \(No space left"):
        Ledger.open(path).seal()
    monkeypatch.undo()
    assert (path / "seal").read_bytes() == before and len(os.listdir(path)) == 3
    (path / "seal").rename(tmp_path / "elsewhere")
    (path / "seal").symlink_to(tmp_path / "elsewhere")
    assert outcome(path) == "PIA041"
    Ledger.open(path).seal()
    assert not (path / "seal").is_symlink() and (tmp_path / "elsewhere").read_bytes() == before
    with pytest.raises(UsageError, match="PIA071"):
        LedgerWriter.create(None, Run(num_instances=1)).ledger().seal()


def test_writing_goes_on_and_nothing_new_begins_beside_a_seal(
    sealed: Callable[[int], Path], make: SimpleNamespace
) -> None:
    path = sealed(14)
    with LedgerWriter.resume(path) as writer:
        writer.append(make.step(2, contribution=0.1))
    assert Ledger.open_sealed(path).num_steps == 7 == Ledger.open(path).num_steps
    (path / "events.log").unlink()
    with pytest.raises(LedgerError, match="PIA045"):
        LedgerWriter.create(path, Run(num_instances=1))


def test_promised_steps_count_whatever_was_sealed(
    sealed: Callable[[int], Path], make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A seal knows the log only; steps whose contributions were on their way when a run was killed are
    elsewhere."""
    path = sealed(14)
    writer = LedgerWriter.resume(path)
    writer.promise(make.step(2, 10, contribution=0.1))
    del writer  # killed: nothing is flushed
    fast, full = Ledger.open_sealed(path), Ledger.open(path)
    assert fast.num_steps == full.num_steps == 7 and fast.digest == full.digest
    before = (path / "seal").read_bytes()
    with pytest.raises(UsageError, match="PIA071"):
        full.seal()
    assert (path / "seal").read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr("per_instance_accountant.ledger.reader.promised_bytes", lambda source: b"")
        assert Ledger.open_sealed(path).num_steps == 6  # what would be forgotten otherwise
    LedgerWriter.resume(path).close()
    Ledger.open(path).seal()
    assert Ledger.open_sealed(path).num_steps == 7
