"""The directory, its one writer, and a device that refuses."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from per_instance_accountant.errors import LedgerError, PiaError
from per_instance_accountant.ledger import Ledger, LedgerWriter, Run, frames, storage

RUN = Run(num_instances=10)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


def code_of(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    with pytest.raises(PiaError) as caught:
        call(*args, **options)
    return caught.value.code


def in_child(check: Callable[[], bool]) -> bool:
    """Whether ``check`` is true in a forked process."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def bytes_of(path: Path) -> bytes:
    return (path / "events.log").read_bytes()


def test_everything_is_owner_only_whatever_the_umask(path: Path) -> None:
    path.mkdir(mode=0o755)
    (path / "events.log").touch(mode=0o644)
    before = os.umask(0)
    try:
        LedgerWriter.create(path, RUN).close()
        Ledger.open(path).export(path / "tables")
    finally:
        os.umask(before)
    modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in (path, *path.rglob("*"))}
    assert len(modes) == 8
    assert {name: mode for name, mode in modes.items() if mode not in (0o600, 0o700)} == {}
    assert modes["run"] == modes["tables"] == 0o700


def test_an_existing_ledger_is_not_overwritten(path: Path, make: SimpleNamespace) -> None:
    with LedgerWriter.create(path, RUN) as writer:
        writer.append(make.phase())
    before = bytes_of(path), (path / "key").read_bytes()
    assert code_of(LedgerWriter.create, path, RUN) == "PIA045"
    (path / "events.log").write_bytes(before[0] + b"x")
    assert code_of(LedgerWriter.create, path, RUN) == "PIA045"
    damaged = before[0][:30] + b"?" + before[0][31:]
    (path / "events.log").write_bytes(damaged)
    assert code_of(LedgerWriter.create, path, RUN) == "PIA045"
    assert (bytes_of(path), (path / "key").read_bytes()) == (damaged, before[1])


def test_a_log_whose_key_is_gone_is_neither_read_nor_overwritten(path: Path) -> None:
    LedgerWriter.create(path, RUN).close()
    (path / "key").unlink()
    before = bytes_of(path)
    assert code_of(Ledger.open, path) == "PIA041"
    assert code_of(LedgerWriter.create, path, RUN) == "PIA045"
    assert bytes_of(path) == before


@pytest.mark.parametrize("size", [0, 1, 100])
def test_an_interrupted_creation_may_be_repeated(path: Path, size: int) -> None:
    LedgerWriter.create(path, RUN).close()
    os.truncate(path / "events.log", size)
    assert code_of(Ledger.open, path) == "PIA041"
    assert code_of(LedgerWriter.resume, path) == "PIA041"
    LedgerWriter.create(path, RUN).close()
    assert Ledger.open(path).num_steps == 0


def test_a_directory_with_other_contents_is_left_alone(path: Path) -> None:
    path.mkdir(mode=0o755)
    (path / "thesis.tex").touch()
    assert code_of(LedgerWriter.create, path, RUN) == "PIA045"
    assert os.listdir(path) == ["thesis.tex"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_missing_and_unusable_paths(path: Path, tmp_path: Path) -> None:
    assert code_of(Ledger.open, path) == "PIA041"
    assert code_of(LedgerWriter.resume, path) == "PIA041"
    (tmp_path / "file").touch()
    assert code_of(Ledger.open, tmp_path / "file") == "PIA041"
    assert code_of(LedgerWriter.create, tmp_path / "file", RUN) == "PIA041"
    assert code_of(LedgerWriter.create, tmp_path / "file" / "run", RUN) == "PIA041"
    assert code_of(LedgerWriter.create, "/proc/run", RUN) == "PIA041"
    path.mkdir()
    os.mkfifo(path / "key")
    assert code_of(Ledger.open, path) == "PIA041"


@pytest.mark.parametrize("name", ["run", "run/events.log", "run/key"])
def test_symbolic_links_are_not_followed(path: Path, tmp_path: Path, name: str) -> None:
    LedgerWriter.create(path, RUN).close()
    moved = tmp_path / "elsewhere"
    (tmp_path / name).rename(moved)
    (tmp_path / name).symlink_to(moved)
    before = sorted((p, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file())
    for call in (Ledger.open, LedgerWriter.resume, lambda p: LedgerWriter.create(p, RUN)):
        assert code_of(call, path) in ("PIA041", "PIA045")
    assert sorted((p, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()) == before


def test_no_write_through_a_dangling_link(path: Path, tmp_path: Path) -> None:
    path.mkdir()
    (path / "events.log").symlink_to(tmp_path / "target")
    assert code_of(LedgerWriter.create, path, RUN) == "PIA041"
    assert not (tmp_path / "target").exists()


def test_a_read_only_directory_is_readable_but_takes_no_writer() -> None:
    # Outside pytest's directories: those are closed to the other user that a test run as root becomes.
    top = Path(tempfile.mkdtemp())
    path = top / "run"
    LedgerWriter.create(path, RUN).close()
    for entry, mode in (
        (path / "events.log", 0o444),
        (path / "key", 0o444),
        (path, 0o555),
        (top, 0o555),
    ):
        entry.chmod(mode)

    def check() -> bool:
        if os.getuid() == 0:
            os.setuid(65534)
        refused = code_of(LedgerWriter.create, top / "new", RUN)
        return Ledger.open(path).num_steps == 0 and refused == code_of(LedgerWriter.resume, path) == "PIA041"

    try:
        assert in_child(check)
    finally:
        top.chmod(0o755)
        path.chmod(0o755)
        shutil.rmtree(top)


def test_one_writer_at_a_time(path: Path) -> None:
    writer = LedgerWriter.create(path, RUN)
    assert code_of(LedgerWriter.resume, path) == "PIA044"
    assert code_of(LedgerWriter.create, path, RUN) == "PIA044"
    assert in_child(lambda: code_of(LedgerWriter.resume, path) == "PIA044")
    assert Ledger.open(path).num_steps == 0
    writer.close()
    LedgerWriter.resume(path).close()


def test_a_writer_that_is_dropped_frees_the_ledger(path: Path) -> None:
    writer = LedgerWriter.create(path, RUN)
    del writer
    LedgerWriter.resume(path).close()


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_forked_child_cannot_write(path: Path, make: SimpleNamespace, on_disk: bool) -> None:
    writer = LedgerWriter.create(path if on_disk else None, RUN)
    writer.append(make.phase())
    writer.append(make.step(1))
    before = writer.ledger().anchor

    def check() -> bool:
        codes = {code_of(writer.append, make.step(2)), code_of(writer.flush), code_of(lambda: writer.anchor)}
        writer.close()
        return codes == {"PIA044"}

    assert in_child(check)
    assert writer.ledger().anchor == before
    writer.append(make.step(2))
    writer.close()
    assert writer.ledger().num_steps == 2


def test_a_child_that_outlives_its_parent_does_not_hold_the_lock(path: Path) -> None:
    writer = LedgerWriter.create(path, RUN)
    ready, release = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(ready[1], b"x")
        os.read(release[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        writer.close()
        LedgerWriter.resume(path).close()
    finally:
        os.write(release[1], b"x")
        os.waitpid(child, 0)


def test_after_close_nothing_is_written(path: Path, make: SimpleNamespace) -> None:
    writer = LedgerWriter.create(path, RUN)
    writer.append(make.phase())
    writer.close()
    before = bytes_of(path)
    writer.close()
    assert code_of(writer.append, make.phase()) == code_of(writer.flush) == "PIA044"
    assert bytes_of(path) == before
    assert writer.anchor == Ledger.open(path).anchor


def test_an_exception_leaves_the_last_step_unconfirmed(path: Path, make: SimpleNamespace) -> None:
    writer = LedgerWriter.create(path, RUN)
    writer.append(make.phase())
    writer.append(make.step(1))
    with pytest.raises(KeyError), writer:
        raise KeyError
    ledger = Ledger.open(path)
    assert (ledger.num_steps, ledger.confirmed) == (1, False)
    with LedgerWriter.resume(path) as writer:
        assert not writer.ledger().confirmed
    assert [type(event).__name__ for event in Ledger.open(path).events()] == ["Phase", "Step", "Resume"]


def short_write(real: Callable[[int, bytes], int], problem: str) -> Callable[[int, bytes], int]:
    def write(descriptor: int, frame: bytes) -> int:
        if problem == "short":
            return real(descriptor, frame[: len(frame) // 2])
        real(descriptor, frame[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    return write


def check_full_device(
    path: Path, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    writer = LedgerWriter.create(path, RUN)
    writer.append(make.phase())
    writer.append(make.step(1))
    before, anchor = bytes_of(path), writer.ledger().anchor
    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "write", short_write(os.write, problem))
        assert code_of(writer.append, make.step(2)) == "PIA041"
        assert code_of(writer.flush) == "PIA041"
    assert bytes_of(path) == before
    assert writer.ledger().anchor == anchor
    writer.append(make.step(3))
    writer.close()
    assert [list(e.positions) for e in Ledger.open(path).events() if hasattr(e, "positions")] == [[1], [3]]


@pytest.mark.parametrize("problem", ["short", "full"])
def test_a_full_device_leaves_whole_frames(
    path: Path, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    check_full_device(path, make, monkeypatch, problem)


def test_seeded_bug_no_rollback_after_a_short_write(
    path: Path, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.DirectoryLog, "truncate", lambda self, end: None)
    with pytest.raises(AssertionError):
        check_full_device(path, make, monkeypatch, "short")


def test_a_file_size_limit_of_the_system_leaves_whole_frames(path: Path, make: SimpleNamespace) -> None:
    def check() -> bool:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        writer = LedgerWriter.create(path, RUN)
        writer.append(make.phase())
        size = len(bytes_of(path))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, size + 20))
        return code_of(writer.append, make.step(2)) == "PIA041" and len(bytes_of(path)) == size

    assert in_child(check)
    assert Ledger.open(path).num_steps == 0
    LedgerWriter.resume(path).close()


def test_when_even_the_rollback_fails_the_next_writer_cuts(
    path: Path, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(descriptor: int, end: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    writer = LedgerWriter.create(path, RUN)
    writer.append(make.phase())
    whole = bytes_of(path)
    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "write", short_write(os.write, "short"))
        patch.setattr(storage.os, "ftruncate", broken)
        assert code_of(writer.append, make.step(2)) == "PIA041"
    assert len(bytes_of(path)) > len(whole)
    assert code_of(writer.append, make.step(2)) == "PIA041"
    assert Ledger.open(path).num_steps == 0
    LedgerWriter.resume(path).close()
    assert bytes_of(path) == whole


def test_a_failed_fsync_ends_the_writer_and_charges_the_step(
    path: Path, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    writer = LedgerWriter.create(path, RUN, fsync="step")
    writer.append(make.phase())
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_sync_file", broken)
        assert code_of(writer.append, make.step(1)) == "PIA041"
    assert code_of(writer.append, make.step(2)) == "PIA041"
    assert Ledger.open(path).num_steps == 1


@pytest.mark.parametrize(("fsync", "per_step"), [("close", 0), ("step", 1)])
def test_fsync_policy(
    path: Path, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, fsync: Any, per_step: int
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(storage, "_sync_file", calls.append)
    writer = LedgerWriter.create(path, RUN, fsync=fsync)
    writer.append(make.phase())
    calls.clear()
    for number in range(5):
        writer.append(make.step(number))
    assert len(calls) == 5 * per_step
    writer.flush()
    assert len(calls) == 5 * per_step + 1
    writer.append(make.thresholds(np.ones(10)))
    assert len(calls) == 5 * per_step + 2
    assert code_of(LedgerWriter.create, path, RUN, fsync="never") == "PIA070"


def test_one_write_per_step(path: Path, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LedgerWriter.create(path, RUN)
    writer.append(make.phase())
    sizes: list[int] = []
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "write", lambda fd, frame: sizes.append(len(frame)) or real(fd, frame))
        writer.append(make.step(*range(10)))
    assert sizes == [24 + 10 * 8 + 37]


def test_an_interrupt_inside_an_append_ends_the_writer(
    path: Path, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = LedgerWriter.create(path, RUN)
    writer.append(make.phase())
    real = os.write

    def interrupted(descriptor: int, frame: bytes) -> int:
        real(descriptor, frame)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.append(make.step(1))
    assert code_of(writer.append, make.step(2)) == code_of(writer.flush) == "PIA044"
    writer.close()
    assert Ledger.open(path).num_steps == 1
    LedgerWriter.resume(path).close()


def test_memory_and_disk_hold_the_same_bytes(
    path: Path, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    import secrets

    monkeypatch.setattr(secrets, "token_bytes", bytes)
    monkeypatch.setattr(secrets, "token_hex", lambda size: "ab" * size)
    writers = [LedgerWriter.create(place, Run(num_instances=10, ids=np.arange(10))) for place in (path, None)]
    for writer in writers:
        for event in (make.phase(), make.thresholds(np.ones(10)), make.step(4, 1), make.step()):
            writer.append(event)
        writer.close()
    digests = {writer.ledger().digest for writer in writers} | {Ledger.open(path).digest}
    assert len(digests) == 1
    assert writers[1].ledger().path is None


def test_nothing_heavy_is_imported_for_a_ledger_without_columns() -> None:
    program = (
        "import sys; from per_instance_accountant.ledger import LedgerWriter, Run;"
        "LedgerWriter.create(None, Run(num_instances=3)).close();"
        "print([m for m in ('pyarrow', 'torch', 'pickle5') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_crafted_pickle_is_not_executed(path: Path, make: SimpleNamespace) -> None:
    import pickle

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(path / "executed"),))

    LedgerWriter.create(path, RUN).close()
    (path / "events.log").write_bytes(pickle.dumps(Trap()) + bytes(range(1, 200)))
    assert code_of(Ledger.open, path) == "PIA042"
    key, payload = (path / "key").read_bytes(), pickle.dumps(Trap())
    (path / "events.log").write_bytes(frames.seal(key, frames.GENESIS, frames.RUN, 0, payload)[0])
    assert code_of(Ledger.open, path) == "PIA042"
    assert not (path / "executed").exists()


def test_ledger_errors_are_typed(path: Path) -> None:
    with pytest.raises(LedgerError, match=r"PIA041: .* Fix: "):
        Ledger.open(path)
