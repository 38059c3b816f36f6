"""Search for a smallest input that breaks a law, where a call that does not return counts as broken."""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

Point = Mapping[str, Any]
"""Arguments of one example, by name."""

CALL_SECONDS: Final = 5.0
"""CPU seconds that one call of an accountant may take by default."""
_SHRINK_SECONDS: Final = 4.0
"""CPU seconds spent on making a failing input smaller, beyond which the smallest so far is reported."""


class LawBroken(AssertionError):
    """A law does not hold. law: its name. smallest: the smallest input found. what: what happened there."""

    def __init__(self, law: str, smallest: Point, what: str) -> None:
        self.law, self.smallest, self.what = law, smallest, what
        super().__init__(f"{law}: {what}\n  smallest input: {written(smallest)}")


class Broken(Exception):
    """Raised by the body of a law at an input where it does not hold."""


class Refused(Exception):
    """Raised by the body of a law at an input that the accountant refuses with an error, as it may."""


class CallHung(BaseException):
    """Raised into a call that took too long. Not an Exception, so that no loop swallows it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search did. examples: inputs at which the law was decided. refused: inputs the accountant
    refused. smallest, what: the failure, else None."""

    examples: int
    refused: int
    smallest: Point | None = None
    what: str | None = None


def written(point: Point) -> str:
    """A point as a line of arguments.

    >>> written({"noise_multiplier": 1.0, "steps": 3})
    'noise_multiplier=1.0, steps=3'
    """
    with np.printoptions(threshold=64, linewidth=10**6):
        return ", ".join(f"{name}={value!r}" for name, value in point.items())


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Interrupt the block with CallHung after this many CPU seconds; no limit outside the main thread."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def interrupt(*_: object) -> None:
        raise CallHung

    before = signal.signal(signal.SIGPROF, interrupt)
    # Repeated, because a bare except in the called code may swallow the first.
    signal.setitimer(signal.ITIMER_PROF, seconds, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


class Timed:
    """Stands for an object and gives each call of its methods this many CPU seconds."""

    def __init__(self, subject: Any, seconds: float) -> None:
        self._subject, self._seconds = subject, seconds

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._subject, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            with limited(self._seconds):
                return value(*args, **kwargs)

        return call


class _Probe:
    """Runs the body at one point after the other and remembers failures, so that a replay costs nothing."""

    def __init__(
        self, body: Callable[[Point], None], seconds: float, watch: Callable[[Point], None] | None
    ) -> None:
        self.body, self.seconds, self.watch = body, seconds, watch
        self.examples = self.refused = 0
        self.failures: dict[str, str] = {}
        self.last: tuple[Point, str] | None = None
        self.stop = float("inf")

    def __call__(self, point: Point) -> None:
        key = written(point)
        if key not in self.failures:
            if self.failures and time.process_time() > self.stop:
                return
            what = self._run(point)
            if what is None:
                return
            if not self.failures:
                self.stop = time.process_time() + min(_SHRINK_SECONDS, 2 * self.seconds)
            self.failures[key] = what
        self.last = (point, self.failures[key])
        raise Broken

    def _run(self, point: Point) -> str | None:
        if self.watch is not None:
            self.watch(point)
        self.examples += 1
        try:
            self.body(point)
        except CallHung:
            return f"a call did not return within {self.seconds:g} CPU seconds"
        except Refused:
            self.examples -= 1
            self.refused += 1
        except Broken as broken:
            return str(broken)
        except Exception as error:
            return f"raised {type(error).__name__}: {str(error)[:120]}".rstrip(": ")
        return None


def search(
    body: Callable[[Point], None],
    domain: SearchStrategy[Point],
    *,
    known: tuple[Point, ...] = (),
    examples: int = 100,
    seconds: float = CALL_SECONDS,
    watch: Callable[[Point], None] | None = None,
) -> Found:
    """Run ``body`` at the known points and at ``examples`` points of the domain; reproducible.

    A body that raises anything but Refused fails. The smallest failing point that Hypothesis finds is
    returned. seconds: named when a call is interrupted by :func:`limited`. watch: called with every point
    before it is tried, so that another process can tell where a call hangs.
    """
    probe = _Probe(body, seconds, watch)

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(domain)
    def drive(point: Point) -> None:
        probe(point)

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            for point in known:
                probe(point)
            drive()
        except Broken:
            if probe.last is None:
                raise
            smallest, what = probe.last
            return Found(examples=probe.examples, refused=probe.refused, smallest=smallest, what=what)
    return Found(examples=probe.examples, refused=probe.refused)
