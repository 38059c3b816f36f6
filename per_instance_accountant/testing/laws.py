"""What a law is: a body that is tried at points of a domain, and the verdict on one accountant."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final, Protocol

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from per_instance_accountant.testing.accountants import OPTIONAL, Accountant, fresh
from per_instance_accountant.testing.search import (
    CALL_SECONDS,
    Broken,
    LawBroken,
    Point,
    Refused,
    Timed,
    search,
    written,
)

REFUSALS: Final = (ValueError, TypeError, ArithmeticError, NotImplementedError)
"""Errors by which an accountant may refuse an input. A MemoryError or an assertion is a failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Outcome of one law. status: ``"held"``, ``"broken"``, ``"unfinished"`` (out of time), or ``"not
    applicable"`` with the reason in ``what``.

    examples: inputs at which the law was decided. refused: inputs that the accountant refused, as it may.
    smallest: the smallest failing input, written out. seconds: CPU time.
    """

    law: str
    status: str
    examples: int = 0
    refused: int = 0
    smallest: str | None = None
    what: str | None = None
    seconds: float = 0.0


class Check(Protocol):
    """A ``check_*`` function: ``check(accountant)`` raises LawBroken, or returns the verdict."""

    law: Law
    __name__: str
    __doc__: str | None

    def __call__(
        self,
        accountant: Any,
        *,
        examples: int | None = None,
        seconds: float = CALL_SECONDS,
        watch: Callable[[Point], None] | None = None,
    ) -> Verdict: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Law:
    """name: of the check. needs: optional methods that it asks for. examples: default number of inputs.

    known: inputs that are always tried. relations: neighbouring relations for which it is true.
    """

    name: str
    body: Callable[..., None]
    domain: SearchStrategy[Point]
    needs: tuple[str, ...]
    examples: int
    known: tuple[Point, ...]
    relations: tuple[str, ...]

    def why_not(self, accountant: Accountant) -> str | None:
        """Why the law does not concern this accountant; None if it does."""
        missing = [name for name in self.needs if not callable(getattr(accountant, name, None))]
        if missing:
            return f"has no {missing[0]}"
        relation = getattr(accountant, "relation", "add_or_remove")
        return None if relation in self.relations else f"its relation is {relation}"

    def judge(
        self,
        accountant: Any,
        *,
        examples: int | None = None,
        seconds: float = CALL_SECONDS,
        watch: Callable[[Point], None] | None = None,
    ) -> Verdict:
        """Search for an input that breaks the law. Never raises for what the accountant does."""
        reason = self.why_not(fresh(accountant))
        if reason is not None:
            return Verdict(law=self.name, status="not applicable", what=reason)
        start = time.process_time()

        def new() -> Timed:
            return Timed(fresh(accountant), seconds)

        found = search(
            lambda point: self.body(new, **point),
            self.domain,
            known=self.known,
            examples=self.examples if examples is None else examples,
            seconds=seconds,
            watch=watch,
        )
        smallest, what = None if found.smallest is None else written(found.smallest), found.what
        status = "held" if smallest is None else "broken"
        if status == "held" and not found.examples:
            status, what = "not applicable", "refuses every input"
        return Verdict(
            law=self.name,
            status=status,
            examples=found.examples,
            refused=found.refused,
            smallest=smallest,
            what=what,
            seconds=time.process_time() - start,
        )


def law(
    *,
    needs: tuple[str, ...] = (),
    examples: int = 60,
    known: tuple[Point, ...] = (),
    relations: tuple[str, ...] = ("add_or_remove", "replace_one"),
    **domain: SearchStrategy[Any],
) -> Callable[[Callable[..., None]], Check]:
    """Make a check of a body ``body(new, **point)``; ``new()`` is a fresh accountant.

    The body raises Broken through :func:`require`, and Refused through :func:`asked`.
    """
    unknown = set(needs) - set(OPTIONAL)
    if unknown:
        raise ValueError(f"no optional methods: {sorted(unknown)}")

    def decorate(body: Callable[..., None]) -> Check:
        made = Law(
            name=body.__name__.removeprefix("check_"),
            body=body,
            domain=st.fixed_dictionaries(domain),
            needs=needs,
            examples=examples,
            known=known,
            relations=relations,
        )

        @functools.wraps(body)
        def check(accountant: Any, **options: Any) -> Verdict:
            verdict = made.judge(accountant, **options)
            if verdict.status == "broken":
                raise LawBroken(made.name, {"point": _Plain(verdict.smallest)}, verdict.what or "")
            return verdict

        check.law = made  # type: ignore[attr-defined]
        check.__signature__ = inspect.signature(Check.__call__)  # type: ignore[attr-defined]
        return check  # type: ignore[return-value]

    return decorate


def checks_in(module: ModuleType) -> tuple[Check, ...]:
    """The checks that a module defines, in its order."""
    return tuple(value for value in vars(module).values() if isinstance(getattr(value, "law", None), Law))


class _Plain(str):
    """Text that is written without quotes."""

    def __repr__(self) -> str:
        return str(self)


def require(holds: bool, what: str) -> None:
    """Raise Broken unless ``holds``; a comparison with NaN does not hold."""
    if not holds:
        raise Broken(what)


def number(value: Any, name: str) -> float:
    """``value`` as a number in [0, inf]; NaN, negative and non-numeric values break the law."""
    require(hasattr(value, "__float__"), f"{name} is a {type(value).__name__}, no number")
    result = float(value)
    require(result == result, f"{name} is NaN")
    require(result >= 0, f"{name} is {result!r}, below 0")
    return result


def asked(question: Callable[[], Any]) -> Any:
    """The answer; an error by which an accountant may refuse raises Refused."""
    try:
        return question()
    except Broken:
        raise
    except REFUSALS as error:
        raise Refused from error
