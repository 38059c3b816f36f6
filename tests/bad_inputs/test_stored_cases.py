"""What is stored: killed, cut, flipped, forged, rolled back, forked, read-only, hostile; and what leaves."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from per_instance_accountant import account, audit
from per_instance_accountant.errors import PiaError, UsageError
from per_instance_accountant.ledger import (
    Anchor,
    Ledger,
    LedgerWriter,
    Resume,
    Run,
    Step,
    frames,
    merge_parts,
    new_run_id,
    storage,
)
from per_instance_accountant.ledger import encoding as codec
from tests.bad_inputs.cases import N, ledger_of, make_phase, refused, step_of, unchanged_after, writer_of

CANARY = "canary-7731-of-one-person"


def on_disk(path: Path, steps: int = 3, **run: Any) -> Path:
    with writer_of(make_phase(), path=path, **run) as writer:
        for number in range(steps):
            writer.append(step_of(number))
    return path


def log_of(path: Path) -> bytes:
    return (path / "events.log").read_bytes()


def write_log(path: Path, log: bytes) -> None:
    (path / "events.log").write_bytes(log)


def sealed(path: Path, kind: int, payload: bytes) -> None:
    """Append a frame as only the owner of the key can."""
    log, key = log_of(path), (path / "key").read_bytes()
    sequence = Ledger.open(path).anchor.sequence + 1
    write_log(path, log + frames.seal(key, log[-33:-1], kind, sequence, payload)[0])


def killed_between_record_and_release(path: Path) -> None:
    writer = writer_of(make_phase(), step_of(0), path=path)
    writer._end()
    ledger = Ledger.open(path)
    assert ledger.num_steps == 1 and not ledger.confirmed
    assert (account(ledger).rdp == account(ledger_of(make_phase(), step_of(0))).rdp).all()


def killed_while_writing(path: Path) -> None:
    log = log_of(on_disk(path))
    write_log(path, log[: -(61 + 61 + 4)])
    assert Ledger.open(path).num_steps == 2
    with LedgerWriter.resume(path) as writer:
        writer.append(make_phase())
        writer.append(step_of(1))
    assert Ledger.open(path).num_steps == 3


def zeros_at_the_end(path: Path) -> None:
    log = log_of(on_disk(path))
    write_log(path, log + bytes(5000))
    assert Ledger.open(path).num_steps == 3


def single_bit_flips(path: Path) -> None:
    log = log_of(on_disk(path))
    for place in np.random.default_rng(0).integers(8 * len(log), size=300).tolist():
        flipped = bytearray(log)
        flipped[place // 8] ^= 1 << place % 8
        write_log(path, bytes(flipped))
        with pytest.raises(PiaError) as caught:
            Ledger.open(path)
        assert caught.value.code in ("PIA042", "PIA043")


def frames_of(path: Path) -> list[bytes]:
    log, offset, found = log_of(path), 0, []
    while offset < len(log):
        end = offset + 24 + struct.unpack_from("<I", log, offset + 8)[0] + 37
        found.append(log[offset:end])
        offset = end
    return found


def rewritten(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    write_log(path, b"".join(change(frames_of(on_disk(path)))))
    refused(lambda: Ledger.open(path), "PIA042")


def forged_without_the_key(path: Path) -> None:
    """A changed payload with both checksums computed anew."""

    def forge(found: list[bytes]) -> list[bytes]:
        payload = struct.pack("<I", 5) + np.float32(0.5).tobytes()
        forged, _ = frames.seal(bytes(32), found[1][-33:-1], frames.STEP, 2, payload)
        return [*found[:2], forged, *found[3:]]

    rewritten(path, forge)


def rolled_back(path: Path) -> None:
    on_disk(path)
    anchor = Ledger.open(path).anchor
    write_log(path, b"".join(frames_of(path)[:-2]))
    assert not Ledger.open(path).holds(anchor)
    refused(lambda: LedgerWriter.resume(path, anchor), "PIA040")


def resumed_twice(path: Path) -> None:
    writer = writer_of(make_phase(), step_of(0), path=path)
    anchor = writer.anchor
    writer.close()
    for position in (1, 2):
        with LedgerWriter.resume(path, anchor) as branch:
            branch.append(make_phase())
            branch.append(step_of(position))
    ledger = Ledger.open(path)
    assert ledger.num_steps == 3 and ledger.num_abandoned_steps == 1
    three = ledger_of(make_phase(), step_of(0), step_of(1), step_of(2))
    assert (account(ledger).rdp >= account(three).rdp).all()


def a_ledger_older_than_the_model(path: Path) -> None:
    on_disk(path)
    ahead = replace(Ledger.open(path).anchor, sequence=99, steps=50)
    refused(lambda: LedgerWriter.resume(path, ahead), "PIA040")


def the_ledger_of_another_run(path: Path) -> None:
    on_disk(path)
    other = on_disk(path.with_name("other"))
    refused(lambda: LedgerWriter.resume(path, Ledger.open(other).anchor), "PIA040")


def the_same_part_twice(path: Path) -> None:
    identity = new_run_id()
    part = ledger_of(make_phase(), step_of(0), run_id=identity, rank=0, world_size=2)
    refused(lambda: merge_parts([part, part], path), "PIA115")
    refused(lambda: merge_parts([part], path), "PIA116")
    assert not path.exists()


def a_read_only_directory(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.chmod(path.parent, 0o500)
    try:
        if os.geteuid() == 0:
            pytest.skip("root writes everywhere; tests/ledger drops its rights for this")
        refused(lambda: LedgerWriter.create(path, Run(num_instances=N)), "PIA041")
    finally:
        os.chmod(path.parent, 0o700)


def links_in_place_of_files(path: Path) -> None:
    on_disk(path)
    victim = path.with_name("victim")
    victim.write_bytes(log_of(path))
    for name in ("events.log", "key"):
        kept = (path / name).read_bytes()
        (path / name).unlink()
        (path / name).symlink_to(victim)
        refused(lambda: Ledger.open(path), "PIA041")
        refused(lambda: LedgerWriter.resume(path), "PIA041")
        (path / name).unlink()
        (path / name).write_bytes(kept)
    path.with_name("link").symlink_to(path)
    refused(lambda: Ledger.open(path.with_name("link")), "PIA041")


def a_full_device(path: Path) -> None:
    writer = writer_of(make_phase(), step_of(0), path=path)
    original = os.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.os, "write", lambda fd, data: original(fd, data[: len(data) // 2]))
        refused(lambda: writer.append(step_of(1)), "PIA041")
    writer.append(step_of(2))
    writer.close()
    steps = [event.positions.tolist() for event in Ledger.open(path).events() if isinstance(event, Step)]
    assert steps == [[0], [2]]


def two_writers(path: Path) -> None:
    writer = writer_of(make_phase(), path=path)
    refused(lambda: LedgerWriter.resume(path), "PIA044")
    writer.close()


def append_in_a_child(writer: LedgerWriter, answer: Any) -> None:
    try:
        writer.append(step_of(1))
        answer.send("accepted")
    except PiaError as error:
        answer.send(error.code)


def a_forked_process(path: Path) -> None:
    writer = writer_of(make_phase(), path=path)
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    child = context.Process(target=append_in_a_child, args=(writer, theirs))
    child.start()
    assert mine.recv() == "PIA044"
    child.join()
    writer.append(step_of(0))
    writer.close()
    assert Ledger.open(path).num_steps == 1


class Payload:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def a_crafted_pickle(path: Path) -> None:
    on_disk(path)
    target = path.with_name("executed")
    for name in ("events.log", "key"):
        kept = (path / name).read_bytes()
        (path / name).write_bytes(pickle.dumps(Payload(str(target))))
        with pytest.raises(PiaError):
            Ledger.open(path)
        (path / name).write_bytes(kept)
    assert not target.exists()


def absurd_sizes(path: Path) -> None:
    on_disk(path)
    key = (path / "key").read_bytes()
    text = b'{"assumptions":null,"created":"","format":1,"num_instances":1152921504606846976,"run_id":"%s"}'
    nested = b"[" * 900_000
    for payload in (struct.pack("<I", 2**31) + b"{}", struct.pack("<I", len(nested)) + nested, text):
        write_log(path, frames.seal(key, frames.GENESIS, frames.RUN, 0, payload)[0])
        refused(lambda: Ledger.open(path), "PIA042")


def other_versions(path: Path) -> None:
    log = bytearray(log_of(on_disk(path)))
    log[4:6] = struct.pack("<H", 2)
    log[20:24] = struct.pack("<I", frames.crc32(bytes(log[:20])))
    write_log(path, bytes(log))
    error = refused(lambda: Ledger.open(path), "PIA043")
    assert "version 2" in str(error)


def numbers_that_are_none(path: Path) -> None:
    for norm in (np.nan, -1.0, np.inf):
        ledger = on_disk(path.with_name(f"with-{norm}"))
        sealed(ledger, frames.STEP, struct.pack("<I", 3) + np.float32(norm).tobytes())
        refused(lambda ledger=ledger: Ledger.open(ledger), "PIA042")


def negative_steps(path: Path) -> None:
    for payload in (b'{"at_step":-5}', b'{"at_step":1e3}', b'{"at_step":NaN}'):
        ledger = on_disk(path.with_name(f"a{len(payload)}{payload[11]}"))
        sealed(ledger, frames.RESUME, payload)
        refused(lambda ledger=ledger: Ledger.open(ledger), "PIA042")
    unchanged_after(writer_of(make_phase()), Resume(at_step=-1), "PIA045")
    with pytest.raises(UsageError):
        Anchor(sequence=1, steps=-1, digest="sha256:" + "0" * 64, run_id="0" * 32)


def a_clock_that_jumps(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        now = iter([2e9, 1e9, 1e9, 0.0, -1e9])
        patch.setattr(time, "time", lambda: next(now, 0.0))
        on_disk(path)
    for second in (0, 4e9):
        os.utime(path / "events.log", (second, second))
        assert Ledger.open(path).num_steps == 3


def a_missing_or_other_key(path: Path) -> None:
    on_disk(path)
    log, key = log_of(path), (path / "key").read_bytes()
    (path / "key").write_bytes(bytes(32))
    refused(lambda: Ledger.open(path), "PIA042")
    refused(lambda: LedgerWriter.resume(path), "PIA042")
    (path / "key").write_bytes(key[:31])
    refused(lambda: Ledger.open(path), "PIA041")
    (path / "key").unlink()
    refused(lambda: Ledger.open(path), "PIA041")
    refused(lambda: LedgerWriter.resume(path), "PIA041")
    refused(lambda: LedgerWriter.create(path, Run(num_instances=N)), "PIA045")
    assert log_of(path) == log


def many_steps_do_not_overflow(path: Path) -> None:
    """Steps are counted in Python and int64; 2^16 of them are one more than a 16-bit counter holds."""
    writer = writer_of(make_phase())
    for _ in range(70_000):
        writer.append(step_of())
    once = account(ledger_of(make_phase(), step_of()), orders=[2.0]).rdp[0, 0]
    assert account(writer.ledger(), orders=[2.0]).rdp[0, 0] == pytest.approx(70_000 * once, rel=1e-9)


def many_instances(path: Path) -> None:
    """Ten million here; the format takes ten times as many."""
    assert codec.MAX_INSTANCES >= 100_000_000
    ledger = ledger_of(make_phase(), step_of(0), num_instances=10_000_000)
    loss = account(ledger, orders=[2.0], partition=(9_999_990, 10_000_000))
    assert loss.rdp.shape == (10, 1) and (loss.rdp > 0).all()


def owner_only(path: Path) -> None:
    before = os.umask(0)
    try:
        on_disk(path)
        ledger = Ledger.open(path)
        ledger.export(path.with_name("tables"))
        audit(ledger).report(path.with_name("page.html"))
        identity = new_run_id()
        part = on_disk(path.with_name("part"), run_id=identity, world_size=2)
        merge_parts([part], path.with_name("merged"), allow_missing=True)
    finally:
        os.umask(before)
    for place in [path, path.with_name("tables"), path.with_name("merged"), path.with_name("page.html")]:
        for found in [place, *(place.iterdir() if place.is_dir() else ())]:
            assert found.stat().st_mode & 0o077 == 0, found


def nothing_of_a_person_in_messages(path: Path) -> None:
    run = {"num_instances": 2, "ids": np.array([CANARY, "b"]), "groups": {"g": np.array([CANARY, "b"])}}
    messages = []
    logging.getLogger().addHandler(handler := logging.Handler())
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    try:
        ledger = ledger_of(make_phase(), step_of(0, norm=0.7731), **run)
        calls: list[Callable[[], Any]] = [
            lambda: ledger.positions_of([CANARY, CANARY]),
            lambda: ledger.positions_of([CANARY + "?"]),
            lambda: ledger.positions_of([7731]),
            lambda: writer_of(**(run | {"ids": np.array([CANARY, CANARY])})),
            lambda: writer_of(make_phase(), step_of(0, norm=-0.7731)),
            lambda: audit(ledger, delta=2.0),
        ]
        for call in calls:
            with pytest.raises(PiaError) as caught:
                call()
            messages += [str(caught.value), repr(caught.value)]
    finally:
        logging.getLogger().removeHandler(handler)
    messages += [repr(ledger), repr(audit(ledger)), repr(ledger.anchor), json.dumps(ledger.anchor.to_dict())]
    assert not any("7731" in message for message in messages)


def pseudonyms_are_keyed(path: Path) -> None:
    first, second = (ledger_of(num_instances=1, ids=np.array([CANARY])) for _ in range(2))
    assert first.pseudonym(CANARY) == first.pseudonym(CANARY) != second.pseudonym(CANARY)


CASES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "killed between record and release": ("the step is charged", killed_between_record_and_release),
    "killed while writing": ("ends at the last whole frame, goes on from there", killed_while_writing),
    "zeros at the end": ("ends at the last whole frame", zeros_at_the_end),
    "one bit flipped anywhere": ("refused, never shortened", single_bit_flips),
    "a frame deleted": ("refused", lambda path: rewritten(path, lambda f: f[:2] + f[3:])),
    "two frames swapped": ("refused", lambda path: rewritten(path, lambda f: [*f[:2], f[3], f[2], *f[4:]])),
    "a frame repeated": ("refused", lambda path: rewritten(path, lambda f: [*f[:3], f[2], *f[3:]])),
    "a frame forged, checksums computed anew": ("refused", forged_without_the_key),
    "rolled back to an older moment": ("refused against any later anchor", rolled_back),
    "resumed twice from one checkpoint": ("both branches charged", resumed_twice),
    "a ledger older than the model": ("refused", a_ledger_older_than_the_model),
    "the ledger of another run": ("refused", the_ledger_of_another_run),
    "the same part twice, or a part missing": ("refused, nothing written", the_same_part_twice),
    "a read-only directory": ("refused before training", a_read_only_directory),
    "symbolic links": ("never followed", links_in_place_of_files),
    "a full device": ("the step is refused, whole frames stay, the writer goes on", a_full_device),
    "two writers": ("the second refused", two_writers),
    "a forked process": ("the child refused", a_forked_process),
    "a crafted pickle": ("never executed", a_crafted_pickle),
    "absurd sizes and nesting": ("refused", absurd_sizes),
    "another format version": ("refused by its number", other_versions),
    "well sealed numbers that are none": ("refused", numbers_that_are_none),
    "negative or broken numbers of steps": ("refused", negative_steps),
    "a clock that jumps": ("no influence", a_clock_that_jumps),
    "a missing, short or other key": ("refused, never signed anew", a_missing_or_other_key),
    "more steps than a small counter holds": ("counted exactly", many_steps_do_not_overflow),
    "ten million instances": ("opened and folded by parts", many_instances),
    "files under a permissive umask": ("owner-only", owner_only),
    "messages about a person": ("counts only", nothing_of_a_person_in_messages),
    "pseudonyms": ("keyed, unlinkable between ledgers", pseudonyms_are_keyed),
}


@pytest.mark.parametrize("name", CASES)
def test_stored(name: str, tmp_path: Path) -> None:
    CASES[name][1](tmp_path / "runs" / "run")
