"""How far reading a large ledger has come: a bar with the time left, on terminals only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from tqdm.auto import tqdm

from per_instance_accountant.ledger import Ledger
from per_instance_accountant.ledger.frames import ReadAt
from per_instance_accountant.ledger.promises import read_all
from per_instance_accountant.ledger.storage import Source, directory_source

DELAY_S: Final = 1.0
"""Passes that end sooner show no bar."""


def open_ledger(path: str) -> Ledger:
    """As ``Ledger.open``; this and every later pass shows a bar on stderr if that is a terminal."""
    return Ledger(*read_all(_Watched(directory_source(Path(path)))))


@final
@dataclass(frozen=True, slots=True)
class _Watched:
    """A source whose passes are followed. What is done with the bytes takes longer than reading them, and
    in step with it."""

    source: Source

    @property
    def key(self) -> bytes:
        return self.source.key

    @property
    def path(self) -> Path | None:
        return self.source.path

    @contextmanager
    def reading(self) -> Iterator[tuple[ReadAt, int]]:
        with self.source.reading() as (read_at, size), _bar(size) as bar:

            def read(count: int, offset: int) -> bytes:
                # Before the block: what lies ahead of it has been worked on by now.
                bar.update(max(0, offset - bar.n))
                return read_at(count, offset)

            yield read, size


def _bar(size: int) -> tqdm[None]:
    return tqdm(
        total=size,
        desc="reading the ledger",
        unit="B",
        unit_scale=True,
        disable=None,
        leave=False,
        delay=DELAY_S,
    )
