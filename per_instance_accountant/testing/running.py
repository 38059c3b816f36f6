"""Running the laws: as pytest tests, in this process, or in a watched process that can be killed.

A law that did not run is never reported as held: every outcome names the number of inputs at which it
was decided.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final

from per_instance_accountant.errors import UsageError
from per_instance_accountant.testing import checks, conduct
from per_instance_accountant.testing.accountants import fresh, name_of
from per_instance_accountant.testing.laws import Check, Verdict, checks_in
from per_instance_accountant.testing.search import CALL_SECONDS, Point, written

LAW_SECONDS: Final = 120.0
"""Wall-clock seconds that one law may take in a watched process, by default."""
GIVE_UP: Final = 3
"""After so many laws that had to be stopped from outside, the rest is not asked."""
_NOT_ASKED: Final = f"not asked, because {GIVE_UP} laws had to be stopped before"
CHECKS: Final[tuple[Check, ...]] = checks_in(checks) + checks_in(conduct)
"""Every law of :mod:`checks` and :mod:`conduct`."""


def named(names: Sequence[str] = ()) -> list[Check]:
    """The checks with these names; all without names. Raises UsageError PIA070 for an unknown name.

    >>> [check.__name__ for check in named(["rdp_is_a_number"])]
    ['check_rdp_is_a_number']
    """
    known = {check.law.name: check for check in CHECKS}
    unknown = [name for name in names if name.removeprefix("check_") not in known]
    if unknown:
        raise UsageError(
            "PIA070",
            f"there is no law {unknown[0]!r}",
            "Nothing was checked",
            "pia check --list, which names all laws",
        )
    return [known[name.removeprefix("check_")] for name in names] if names else list(CHECKS)


def parametrize_with_checks(
    accountants: Sequence[Any], *, laws: Sequence[str] = (), examples: int | None = None
) -> Any:
    """Decorator: one pytest test for every accountant and law that concerns it.

    accountants: instances (copied before every use), classes or factories. The test takes
    ``accountant`` and ``check``. A law that does not concern an accountant is no test of it; raises
    UsageError PIA070 if none concerns one of them.

    >>> from per_instance_accountant.testing import parametrize_with_checks
    >>> from per_instance_accountant.testing.accountants import RenyiAccountant
    >>> @parametrize_with_checks([RenyiAccountant()])
    ... def test_laws(accountant, check):
    ...     check(accountant)
    """
    import pytest

    cases = []
    for accountant in accountants:
        subject = fresh(accountant)
        mine = [check for check in named(laws) if check.law.why_not(subject) is None]
        if not mine:
            raise UsageError(
                "PIA070",
                f"no law concerns {name_of(accountant)}",
                "Its tests would pass without having checked anything",
                "parametrize_with_checks([MyAccountant()]) without laws=",
            )
        cases += [
            pytest.param(accountant, _with(check, examples), id=f"{name_of(accountant)}-{check.law.name}")
            for check in mine
        ]
    return pytest.mark.parametrize(("accountant", "check"), cases)


def _with(check: Check, examples: int | None) -> Any:
    return check if examples is None else lambda accountant: check(accountant, examples=examples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Verdicts on one accountant. ``ok``: at least one law held, none is broken, and none ran out of time."""

    accountant: str
    verdicts: tuple[Verdict, ...]

    @property
    def broken(self) -> tuple[Verdict, ...]:
        """Verdicts of the laws that do not hold."""
        return tuple(v for v in self.verdicts if v.status == "broken")

    @property
    def unfinished(self) -> tuple[Verdict, ...]:
        """Verdicts of the laws that held at all inputs there was time for, fewer than asked."""
        return tuple(v for v in self.verdicts if v.status == "unfinished")

    @property
    def ran(self) -> tuple[Verdict, ...]:
        """Verdicts of the laws that were decided at one input at least."""
        return tuple(v for v in self.verdicts if v.status != "not applicable")

    @property
    def examples(self) -> int:
        """Inputs at which a law was decided, in all."""
        return sum(v.examples for v in self.verdicts)

    @property
    def ok(self) -> bool:
        """Whether something was checked and everything that was holds."""
        return bool(self.ran) and self.examples > 0 and not self.broken and not self.unfinished

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "accountant": self.accountant,
            "ok": self.ok,
            "laws_run": len(self.ran),
            "laws_broken": len(self.broken),
            "examples": self.examples,
            "laws": [asdict(verdict) for verdict in self.verdicts],
        }


def run_checks(
    accountant: Any,
    *,
    laws: Sequence[str] = (),
    examples: int | None = None,
    seconds: float = CALL_SECONDS,
) -> Report:
    """Ask the laws of an accountant, in this process. seconds: CPU time of one call.

    >>> from per_instance_accountant.testing.accountants import RenyiAccountant
    >>> report = run_checks(RenyiAccountant, laws=["rdp_is_a_number"], examples=20)
    >>> report.ok, report.examples
    (True, 21)
    """
    verdicts = [check.law.judge(accountant, examples=examples, seconds=seconds) for check in named(laws)]
    return Report(accountant=name_of(accountant), verdicts=tuple(verdicts))


# ------------------------------------------------------------------------------------ in a watched process


def load(reference: str) -> Any:
    """The object that ``module:name`` names, or ``file.py:name``. Raises UsageError PIA070."""
    module, _, name = reference.partition(":")
    try:
        if module.endswith(".py"):
            path = Path(module).resolve()
            sys.path.insert(0, str(path.parent))
            module = path.stem
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    # Whatever the code of a module raises while it is imported.
    except Exception as error:
        raise UsageError(
            "PIA070",
            f"{reference!r} cannot be imported ({type(error).__name__}: {error})",
            "Nothing was checked",
            "pia check my_package.my_module:MyAccountant",
        ) from None
    return found


def watch_checks(
    reference: str,
    *,
    laws: Sequence[str] = (),
    examples: int | None = None,
    seconds: float = CALL_SECONDS,
    law_seconds: float = LAW_SECONDS,
    follow: Callable[[Verdict], None] = lambda verdict: None,
) -> Report:
    """Ask the laws of ``module:accountant`` in another process, which is killed where it hangs.

    follow: called with each verdict as it comes. law_seconds: wall-clock time of one law, after which the
    next one is asked in a new process. A law whose last call did not return counts as broken at its input,
    and none is asked after ``GIVE_UP`` such laws; one that was still getting on is unfinished. Memory of that
    process is limited to 8 GiB. Raises UsageError PIA070 or PIA071 if the reference names no accountant.
    """
    left = [check.law.name for check in named(laws)]
    verdicts: list[Verdict] = []
    name, stopped = reference, 0
    while left:
        child = _Child(reference, left, examples, seconds)
        for line in child.lines(law_seconds):
            if "name" in line:
                name = line["name"]
            elif "refused" in line and "law" not in line:
                raise UsageError(line["code"], *line["refused"])
            else:
                verdicts.append(Verdict(**line))
                left.remove(verdicts[-1].law)
                follow(verdicts[-1])
        if left:
            verdicts.append(child.end(left.pop(0), law_seconds))
            stopped += child.timed_out and verdicts[-1].status == "broken"
            follow(verdicts[-1])
        if stopped == GIVE_UP:
            verdicts += [Verdict(law=law, status="not applicable", what=_NOT_ASKED) for law in left]
            break
    return Report(accountant=name, verdicts=tuple(verdicts))


class _Child:
    """One process that asks laws and writes a line for each."""

    def __init__(self, reference: str, laws: list[str], examples: int | None, seconds: float) -> None:
        self.place = tempfile.NamedTemporaryFile("r", prefix="pia-check-")  # noqa: SIM115
        order = {
            "reference": reference,
            "laws": laws,
            "examples": examples,
            "seconds": seconds,
            "place": self.place.name,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(order)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.timed_out, self.idle, self.patience = False, 0.0, seconds

    def lines(self, law_seconds: float) -> Iterator[dict[str, Any]]:
        """Lines as they come; the process is killed when none comes in time."""
        stream = self.process.stdout
        while stream is not None:
            timer = threading.Timer(law_seconds, self._kill)
            timer.start()
            text = stream.readline()
            timer.cancel()
            if not text:
                break
            yield json.loads(text)
        self.process.wait()

    def _kill(self) -> None:
        self.idle = time.time() - os.stat(self.place.name).st_mtime
        self.timed_out = True
        self.process.kill()

    def end(self, law: str, law_seconds: float) -> Verdict:
        """The verdict on the law during which the process ended."""
        count, _, smallest = self.place.read().partition("\n")
        what, status = f"a call did not return; stopped after {law_seconds:g} s", "broken"
        if self.timed_out and self.idle < min(self.patience, law_seconds / 2):
            # Inputs were still coming: the law is slow, or many inputs were asked for.
            what, status = f"no input broke it in {law_seconds:g} s; give it more, or ask fewer", "unfinished"
        if not self.timed_out:
            code = self.process.returncode
            how = f"ended with code {code}"
            if code < 0:
                how = f"was killed by signal {-code} ({signal.strsignal(-code)})"
            what = f"the process {how} before it answered"
        return Verdict(
            law=law,
            status=status,
            examples=int(count or 0),
            smallest=smallest or "before the first input",
            what=what,
            seconds=law_seconds if self.timed_out else 0.0,
        )


def _serve(order: dict[str, Any], out: IO[str]) -> None:
    """Asks laws in a child process."""

    def tell(line: dict[str, Any]) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    try:
        accountant = load(order["reference"])
        _make(accountant)
    except UsageError as error:
        tell({"code": error.code, "refused": [error.happened, error.meaning, error.fix]})
        return
    tell({"name": name_of(accountant)})
    place = os.open(order["place"], os.O_WRONLY)
    for name in order["laws"]:
        count = 0

        def watch(point: Point) -> None:
            nonlocal count
            count += 1
            text = f"{count}\n{written(point)}".encode()
            os.ftruncate(place, 0)
            os.pwrite(place, text, 0)

        os.ftruncate(place, 0)
        (check,) = named([name])
        judged = check.law.judge(
            accountant, examples=order["examples"], seconds=order["seconds"], watch=watch
        )
        tell(asdict(judged))


def _make(accountant: Any) -> None:
    try:
        fresh(accountant)
    except UsageError:
        raise
    # Whatever the accountant raises while it is made.
    except Exception as error:
        raise UsageError(
            "PIA071",
            f"making a {name_of(accountant)} raised {type(error).__name__}: {error}",
            "Nothing can be asked of it, so nothing was checked",
            "pia check my_module:make_accountant, a function that gives a new one",
        ) from None


def _limit_memory() -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = 8 << 30
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))


if __name__ == "__main__":
    # What the accountant prints must not be taken for a verdict.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _limit_memory()
    from per_instance_accountant.testing import running

    running._serve(json.loads(sys.argv[1]), channel)
