"""Over every test: no error and no log line repeats an id or a norm that a ledger of that test holds."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from per_instance_accountant import errors
from per_instance_accountant.ledger import records, writer

SHORTEST_ID, SHORTEST_NORM = 6, 7
"""Shorter texts occur in sentences by chance."""
_MOST_NORMS, _MOST_SECRETS = 32, 200
"""Of a step and of a test, so that watching costs next to nothing."""


class Witness(logging.Handler):
    """What was said, and what must not be said, since the last ``forget``."""

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.said: list[str] = []
        self.secrets: set[str] = set()

    def forget(self) -> None:
        self.said.clear()
        self.secrets.clear()

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    def learn_ids(self, ids: Any) -> None:
        if ids is not None and np.asarray(ids).dtype.kind in "UO":
            texts = (str(one) for one in np.asarray(ids)[:1000])
            self.secrets |= {text for text in texts if len(text) >= SHORTEST_ID}

    def learn_norms(self, norms: Any) -> None:
        known = isinstance(norms, np.ndarray) and norms.dtype == np.float32
        if known and len(self.secrets) < _MOST_SECRETS:
            texts = map(repr, norms.ravel()[:_MOST_NORMS].tolist())
            self.secrets |= {text for text in texts if len(text) >= SHORTEST_NORM}

    def leaks(self) -> int:
        """How many messages repeat a secret."""
        return sum(any(secret in message for secret in self.secrets) for message in self.said)


WITNESS = Witness()


def _watch() -> None:
    """Errors report themselves; writers report the ids and norms that they are given."""
    original_error, original_run = errors.PiaError.__init__, writer.checked_run
    original_append = writer.LedgerWriter.append

    def said(self: errors.PiaError, *parts: Any) -> None:
        original_error(self, *parts)
        WITNESS.said.append(str(self))

    def checked(run: records.Run) -> records.Run:
        WITNESS.learn_ids(run.ids)
        return original_run(run)

    def append(self: writer.LedgerWriter, event: Any) -> None:
        if isinstance(event, records.Step):
            WITNESS.learn_norms(event.contributions)
        original_append(self, event)

    errors.PiaError.__init__ = said  # type: ignore[method-assign]
    writer.checked_run = checked
    writer.LedgerWriter.append = append  # type: ignore[method-assign]
    logging.getLogger().addHandler(WITNESS)


_watch()


@pytest.fixture(autouse=True)
def nothing_about_a_person_is_said() -> Iterator[None]:
    """Fails the test in which an error or a log line repeats an id or a norm."""
    WITNESS.forget()
    yield
    leaks = WITNESS.leaks()
    WITNESS.forget()
    assert leaks == 0, f"{leaks} messages repeat an id or a norm of this test"
