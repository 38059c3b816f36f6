"""What happened to the bytes: an unfinished tail is cut off, everything else is refused."""

from __future__ import annotations

import os
import random
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import rfc8785

from per_instance_accountant.errors import LedgerError
from per_instance_accountant.ledger import Ledger, LedgerWriter, Run, frames
from per_instance_accountant.ledger.encoding import StoredRun, encode_run

HEADER, TRAILER = 24, 37


@pytest.fixture(scope="module")
def sample(make: SimpleNamespace) -> SimpleNamespace:
    return make.small()


def outcome(make: SimpleNamespace, key: bytes, log: bytes) -> str:
    """The code of the error, or the digest of what was accepted. Any other exception fails the test."""
    try:
        return str(make.opened(key, log).digest)
    except LedgerError as error:
        return error.code


def whole_frames(sample: SimpleNamespace, size: int) -> int:
    return sum(end <= size for end in sample.ends)


def check_cut_points(make: SimpleNamespace, sample: SimpleNamespace) -> None:
    for cut in range(len(sample.log)):
        expected = whole_frames(sample, cut)
        if expected == 0:
            assert outcome(make, sample.key, sample.log[:cut]) == "PIA041"
        else:
            ledger = make.opened(sample.key, sample.log[:cut])
            assert ledger.anchor.sequence == expected - 1
            assert sample.ledger.holds(ledger.anchor)


def check_bit_flips(make: SimpleNamespace, sample: SimpleNamespace) -> None:
    for bit in range(8 * len(sample.log)):
        flipped = bytearray(sample.log)
        flipped[bit // 8] ^= 1 << bit % 8
        assert outcome(make, sample.key, bytes(flipped)) == "PIA042", bit


def test_every_cut_point_recovers_to_the_last_whole_frame(
    make: SimpleNamespace, sample: SimpleNamespace
) -> None:
    check_cut_points(make, sample)


def test_every_zero_tail_recovers_to_the_last_whole_frame(
    make: SimpleNamespace, sample: SimpleNamespace
) -> None:
    for cut in range(len(sample.log)):
        for zeros in (len(sample.log) - cut, 4096):
            expected = whole_frames(sample, cut)
            log = sample.log[:cut] + bytes(zeros)
            if expected == 0:
                assert outcome(make, sample.key, log) == "PIA041"
            else:
                assert make.opened(sample.key, log).anchor.sequence == expected - 1


def test_every_single_bit_flip_is_refused(make: SimpleNamespace, sample: SimpleNamespace) -> None:
    check_bit_flips(make, sample)


def test_every_bit_flip_in_every_prefix_of_whole_frames_is_refused(
    make: SimpleNamespace, sample: SimpleNamespace
) -> None:
    # Only the last frame could be mistaken for an unfinished one, so each kind has to be last once.
    for start, end in pairwise(sample.ends):
        for bit in range(8 * start, 8 * end):
            flipped = bytearray(sample.log[:end])
            flipped[bit // 8] ^= 1 << bit % 8
            assert outcome(make, sample.key, bytes(flipped)) == "PIA042", bit


def test_seeded_bug_header_without_checksum(
    make: SimpleNamespace, sample: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = SimpleNamespace(key=sample.key, log=sample.log[: sample.ends[-2]])
    check_bit_flips(make, cut)
    monkeypatch.setattr(frames, "_is_sound", lambda header: header.startswith(b"PIAL"))
    with pytest.raises(AssertionError):
        check_bit_flips(make, cut)


def test_seeded_bug_recovery_that_stops_at_the_first_bad_frame(
    make: SimpleNamespace, sample: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames._Window, "is_zero", lambda self, offset: True)
    with pytest.raises(AssertionError):
        check_bit_flips(make, sample)


def rebuilt(parts: list[bytes]) -> list[bytes]:
    """Frames with the right sequence numbers and checksums, as somebody without the key would make them."""
    frames_ = []
    for number, part in enumerate(parts):
        fields = part[:12] + struct.pack("<Q", number)
        payload = part[HEADER:-TRAILER]
        header = fields + struct.pack("<I", crc32(fields))
        frames_.append(header + payload + struct.pack("<I", crc32(payload)) + part[-33:])
    return frames_


def unkeyed(parts: list[bytes]) -> bytes:
    """Also the chain recomputed, with a key of zeros."""
    previous, log = bytes(32), b""
    for part in parts:
        body = part[:-TRAILER]
        body_hash = blake2b(previous + body, digest_size=32, key=bytes(32), person=b"pia-ledger-chain")
        previous = body_hash.digest()
        log += body + part[-TRAILER:-33] + previous + part[-1:]
    return log


def tampered(sample: SimpleNamespace) -> dict[str, list[bytes]]:
    starts = [0, *sample.ends]
    parts = [sample.log[a:b] for a, b in pairwise(starts)]
    smaller = parts.copy()
    smaller[3] = parts[3][: HEADER + 8] + struct.pack("<ff", 0.0, 0.0) + parts[3][-TRAILER:]
    return {
        "contributions set to zero": smaller,
        "deleted": parts[:3] + parts[4:],
        "swapped": [*parts[:3], parts[5], parts[4], parts[3], parts[6]],
        "repeated": parts[:4] + parts[3:],
        "spliced": [*parts[:4], parts[3]],
    }


def check_tampering(make: SimpleNamespace, sample: SimpleNamespace) -> None:
    for name, parts in tampered(sample).items():
        for log in (b"".join(parts), b"".join(rebuilt(parts)), unkeyed(rebuilt(parts))):
            assert outcome(make, sample.key, log) == "PIA042", name


def test_tampering_without_the_key_is_refused(make: SimpleNamespace, sample: SimpleNamespace) -> None:
    check_tampering(make, sample)


def test_seeded_bug_a_chain_without_the_key(make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    right = frames._chain
    monkeypatch.setattr(frames, "_chain", lambda key, *rest: right(bytes(32), *rest))
    unprotected = make.small()
    with pytest.raises(AssertionError):
        check_tampering(make, unprotected)


def test_rollback_is_detected_by_every_later_anchor(make: SimpleNamespace, sample: SimpleNamespace) -> None:
    moments = [make.opened(sample.key, sample.log[:end]) for end in sample.ends]
    for i, old in enumerate(moments):
        for j, new in enumerate(moments):
            assert old.holds(new.anchor) == (j <= i)


def test_an_anchor_of_another_run_or_with_another_number_is_not_held(
    make: SimpleNamespace, sample: SimpleNamespace
) -> None:
    ledger, other = sample.ledger, make.small().ledger
    assert not ledger.holds(other.anchor)
    early = make.opened(sample.key, sample.log[: sample.ends[4]]).anchor
    edits = [
        {"steps": early.steps - 1},
        {"sequence": early.sequence + 1},
        {"sequence": 10**6, "steps": early.steps},
        {"digest": ledger.digest},
        {"run_id": "0" * 32},
    ]
    assert ledger.holds(early)
    for edit in edits:
        assert not ledger.holds(type(early).from_dict(early.to_dict() | edit)), edit


def test_wrong_key_is_refused(make: SimpleNamespace, sample: SimpleNamespace) -> None:
    assert outcome(make, bytes(32), sample.log) == "PIA042"


def with_header(log: bytes, start: int, layout: str, at: int, value: int) -> bytes:
    """One header field replaced and the header checksum made right again."""
    fields = bytearray(log[start : start + 20])
    struct.pack_into(layout, fields, at, value)
    return log[:start] + bytes(fields) + struct.pack("<I", crc32(fields)) + log[start + HEADER :]


@pytest.mark.parametrize("version", [0, 2, 65535])
def test_other_format_version_is_named(make: SimpleNamespace, sample: SimpleNamespace, version: int) -> None:
    with pytest.raises(LedgerError, match=f"format version {version}; .* knows 1") as caught:
        make.opened(sample.key, with_header(sample.log, 0, "<H", 4, version))
    assert caught.value.code == "PIA043"


@pytest.mark.parametrize("length", [(1 << 20) + 1, 1 << 30, (1 << 32) - 1])
def test_absurd_lengths_neither_allocate_nor_shorten(
    make: SimpleNamespace, sample: SimpleNamespace, length: int
) -> None:
    tracemalloc.start()
    try:
        for start in sample.ends[:-1]:
            assert outcome(make, sample.key, with_header(sample.log, start, "<I", 8, length)) == "PIA042"
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_a_huge_sparse_frame_is_refused_within_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a"
    LedgerWriter.create(path, Run(num_instances=1)).close()
    length = 300 << 20
    fields = struct.pack("<4sHHIQ", b"PIAL", 1, frames.RUN, length, 0)
    with (path / "events.log").open("r+b") as log:
        log.write(fields + struct.pack("<I", crc32(fields)))
        log.truncate(length + HEADER + TRAILER + 100)
        log.seek(length + HEADER + TRAILER)
        log.write(b"x")
    tracemalloc.start()
    try:
        with pytest.raises(LedgerError) as caught:
            Ledger.open(path)
        assert caught.value.code == "PIA042"
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def fuzzed(chance: random.Random, log: bytes) -> bytes:
    """Random edits; half of the results get right header checksums, so that deeper checks are reached."""
    edited = bytearray(log)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(edited))
        kind = chance.randrange(4)
        if kind == 0:
            edited[at : at + chance.randint(1, 40)] = chance.randbytes(chance.randint(0, 40))
        elif kind == 1:
            del edited[at : at + chance.randint(1, 200)]
        elif kind == 2:
            edited[at:at] = chance.randbytes(chance.randint(1, 64))
        else:
            other = chance.randrange(len(edited))
            edited[at:at] = edited[other : other + 100]
        edited = edited or bytearray(b"x")
    if chance.random() < 0.5:
        for start in range(len(edited) - HEADER):
            if edited[start : start + 4] == b"PIAL":
                struct.pack_into("<I", edited, start + 20, crc32(edited[start : start + 20]))
    return bytes(edited)


def test_fuzzed_logs_raise_ledger_errors_or_end_at_a_true_moment(
    make: SimpleNamespace, sample: SimpleNamespace
) -> None:
    chance = random.Random(5)
    refused = 0
    for _ in range(int(os.environ.get("PIA_FUZZ", "300"))):
        log = fuzzed(chance, sample.log)
        try:
            ledger = make.opened(sample.key, log)
        except LedgerError:
            refused += 1
        else:
            assert sample.ledger.holds(ledger.anchor)
    assert refused > 200


def sealed_with_key(sample: SimpleNamespace, kind: int, payload: bytes) -> bytes:
    previous = sample.log[-33:-1]
    return bytes(sample.log + frames.seal(sample.key, previous, kind, len(sample.ends), payload)[0])


def merge_payload(**changes: Any) -> bytes:
    sound = {"world_size": 2, "ranks": [0, 1], "incomplete": [[1, 2]], "confirmed": False}
    text = rfc8785.dumps(sound | changes)
    return struct.pack("<I", len(text)) + text


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (frames.STEP, struct.pack("<If", 3, float("nan"))),
        (frames.STEP, struct.pack("<If", 3, -1.0)),
        (frames.STEP, struct.pack("<If", 40, 1.0)),
        (frames.STEP, struct.pack("<IIff", 3, 3, 1.0, 1.0)),
        (frames.STEP, b"1234567"),
        (frames.STEP, bytes(8 * 41)),
        (frames.THRESHOLDS, struct.pack("<I", 1) + np.full(40, np.nan, "<f4").tobytes()),
        (frames.THRESHOLDS, struct.pack("<I", 1) + np.full(40, -1, "<f4").tobytes()),
        (frames.THRESHOLDS, struct.pack("<I", 9) + np.ones(40, "<f4").tobytes()),
        (frames.THRESHOLDS, struct.pack("<I", 1) + np.ones(39, "<f4").tobytes()),
        (frames.RESUME, b'{"at_step":-5}'),
        (frames.RESUME, b'{"at_step":99}'),
        (frames.RESUME, b'{"at_step":1.5}'),
        (frames.RESUME, b'{"at_step": 1}'),
        (frames.RESUME, b'{"at_step":1,"at_step":1}'),
        (frames.RESUME, b"[" * 100_000),
        (frames.RESUME, b'{"at_step":' + b"9" * 5000 + b"}"),
        (frames.RESUME, b'{"at_step":NaN}'),
        (frames.RESUME, b"\xff\xfe"),
        (frames.PUBLIC, b'{"count":0}'),
        (frames.PUBLIC, b'{"count":true}'),
        (frames.PUBLIC, b"{}"),
        (frames.DISCLOSURE, b'{"epsilon":0,"kind":"histogram"}'),
        (frames.DISCLOSURE, b'{"epsilon":-1,"kind":"histogram"}'),
        (frames.DISCLOSURE, b'{"epsilon":"1","kind":"histogram"}'),
        (frames.DISCLOSURE, b'{"epsilon":1,"kind":"everything"}'),
        (frames.MERGE, merge_payload(ranks=[1, 0])),
        (frames.MERGE, merge_payload(ranks=[0, 2])),
        (frames.MERGE, merge_payload(ranks=[])),
        (frames.MERGE, merge_payload(ranks=[True, 1])),
        (frames.MERGE, merge_payload(incomplete=[[1, 9]])),
        (frames.MERGE, merge_payload(incomplete=[[1, 2], [0, 1]])),
        (frames.MERGE, merge_payload(incomplete=[[1, 1]])),
        (frames.MERGE, merge_payload(incomplete=[[1]])),
        (frames.MERGE, merge_payload(confirmed=1)),
        (frames.MERGE, merge_payload(world_size=2.5)),
        (frames.MERGE, merge_payload(more=1)),
        (frames.MERGE, merge_payload() + b"x"),
        (frames.MERGE, b""),
        (frames.PHASE, b"{}"),
        (frames.PHASE, b"null"),
        (frames.MARK, b"x"),
        (frames.RUN, b""),
        (77, b""),
    ],
)
def test_well_sealed_nonsense_is_refused(
    make: SimpleNamespace, sample: SimpleNamespace, kind: int, payload: bytes
) -> None:
    assert outcome(make, sample.key, sealed_with_key(sample, kind, payload)) == "PIA042"


def test_a_well_sealed_frame_with_another_number_is_refused(
    make: SimpleNamespace, sample: SimpleNamespace
) -> None:
    for number in (0, len(sample.ends) - 1, len(sample.ends) + 1):
        frame, _ = frames.seal(sample.key, sample.log[-33:-1], frames.MARK, number, b"")
        assert outcome(make, sample.key, sample.log + frame) == "PIA042"


def test_well_sealed_sense_is_accepted(make: SimpleNamespace, sample: SimpleNamespace) -> None:
    log = sealed_with_key(sample, frames.STEP, struct.pack("<If", 3, 1.0))
    assert make.opened(sample.key, log).num_steps == sample.ledger.num_steps + 1
    merged = make.opened(sample.key, sealed_with_key(sample, frames.MERGE, merge_payload()))
    assert merged.merge.incomplete == ((1, 2),) and merged.merge.missing_ranks == ()
    public = make.opened(sample.key, sealed_with_key(sample, frames.PUBLIC, b'{"count":3}'))
    assert public.num_public_steps == 3
    disclosed = sealed_with_key(sample, frames.DISCLOSURE, b'{"epsilon":1,"kind":"histogram"}')
    assert list(make.opened(sample.key, disclosed).events())[-1].epsilon == 1.0


def replaced(old: bytes, new: bytes) -> Callable[[bytes, bytes], tuple[bytes, bytes]]:
    return lambda text, columns: (text.replace(old, new), columns)


@pytest.mark.parametrize(
    "edit",
    [
        replaced(b'"num_instances":40', b'"num_instances":1e300'),
        replaced(b'"num_instances":40', b'"num_instances":-1'),
        replaced(b'"num_instances":40', b'"num_instances":1152921504606846976'),
        replaced(b'"num_instances":40', b'"num_instances":41'),
        replaced(b'"format":1', b'"format":2'),
        replaced(b'"run_id":"', b'"run_id":"zz'),
        replaced(b'{"assumptions":null,', b"{"),
        lambda text, columns: (text, columns[:-200]),
        lambda text, columns: (text, b"\xff\xff\xff\xff" + b"\x7f" * 60),
        lambda text, columns: (text, columns[:100] + b"\xff" * 40 + columns[140:]),
        lambda text, columns: (b"", b""),
    ],
)
def test_well_sealed_nonsense_about_the_run_is_refused(
    make: SimpleNamespace,
    sample: SimpleNamespace,
    edit: Callable[[bytes, bytes], tuple[bytes, bytes]],
) -> None:
    payload = sample.log[HEADER : sample.ends[0] - TRAILER]
    size = struct.unpack_from("<I", payload)[0]
    before = payload[4 : 4 + size], payload[4 + size :]
    after = edit(*before)
    assert after != before
    payload = struct.pack("<I", len(after[0])) + b"".join(after)
    log, _ = frames.seal(sample.key, frames.GENESIS, frames.RUN, 0, payload)
    assert outcome(make, sample.key, log) == "PIA042"


def test_one_long_text_does_not_blow_up_a_column(make: SimpleNamespace, sample: SimpleNamespace) -> None:
    ids = np.array([str(i) for i in range(2000)])
    stored = StoredRun(run=Run(num_instances=2000, ids=ids, run_id="ab" * 16), created="")
    long = np.array(["x" * 100_000, *ids[1:]], object)
    for values, expected in ((ids, True), (long, False)):
        run = replace(stored.run, ids=values)
        payload = encode_run(replace(stored, run=run))
        log, _ = frames.seal(sample.key, frames.GENESIS, frames.RUN, 0, payload)
        tracemalloc.start()
        accepted = outcome(make, sample.key, log) != "PIA042"
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert accepted == expected
        assert peak < 50e6


def test_a_log_that_changes_after_opening_is_noticed(tmp_path: Path, make: SimpleNamespace) -> None:
    writer = LedgerWriter.create(tmp_path / "a", Run(num_instances=4))
    writer.append(make.phase())
    for _ in range(5):
        writer.append(make.step(1))
    writer.close()
    ledger = Ledger.open(tmp_path / "a")
    os.truncate(tmp_path / "a" / "events.log", 500)
    with pytest.raises(LedgerError, match="changed after it was opened"):
        list(ledger.events())
