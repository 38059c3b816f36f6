"""What an evaluation measured: shown beside what is claimed, never instead of it."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike
from pydantic import ConfigDict, TypeAdapter, ValidationError

from per_instance_accountant.errors import UsageError
from per_instance_accountant.results.files import write_private

_MOST: Final = 1 << 24


def _require(ok: bool, happened: str, fix: str) -> None:
    if not ok:
        raise UsageError("PIA071", happened, "Nothing was drawn from it", fix)


@dataclass(frozen=True, slots=True, kw_only=True)
class BarrierEvidence:
    """Losses on the straight line between two models. lowest, mean, highest: (points,) over the pairs of
    models, in nats. on: the instances they are the mean loss of. pairs: number of pairs. between: the two
    models, in words."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    lowest: tuple[float, ...]
    mean: tuple[float, ...]
    highest: tuple[float, ...]
    on: str
    pairs: int
    between: str = "one model and the other"

    def __post_init__(self) -> None:
        curves = (self.lowest, self.mean, self.highest)
        fits = len({len(curve) for curve in curves}) == 1 and len(self.mean) >= 3 and self.pairs >= 1
        known = all(math.isfinite(value) for curve in curves for value in curve)
        _require(
            fits and known,
            f"a loss barrier of {len(self.mean)} points, finite: {known}",
            "BarrierEvidence.of(loss_barrier(...).path, on='the forgotten instances')",
        )

    @classmethod
    def of(cls, path: ArrayLike, *, on: str, between: str = "one model and the other") -> BarrierEvidence:
        """From (points, K) losses, such as ``evaluation.LossBarrier.path``.

        >>> BarrierEvidence.of([[1.0, 1.0], [2.0, 3.0], [1.0, 1.0]], on="test set").mean
        (1.0, 2.5, 1.0)
        """
        values = np.asarray(path, dtype=np.float64)
        _require(
            values.ndim == 2 and values.shape[1] >= 1,
            f"losses of shape {values.shape}",
            "BarrierEvidence.of(losses_of_shape_points_by_pairs, on='...')",
        )
        low, middle, high = values.min(1), values.mean(1), values.max(1)
        return cls(
            lowest=tuple(low.tolist()),
            mean=tuple(middle.tolist()),
            highest=tuple(high.tolist()),
            on=on,
            pairs=values.shape[1],
            between=between,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimEvidence:
    """One claim that was attacked. claimed: upper bound on epsilon. lower: lower bound on the empirical
    epsilon that an attack demonstrated, at its confidence; upper: the other end of an interval, if any."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    name: str
    claimed: float
    lower: float
    upper: float | None = None

    def __post_init__(self) -> None:
        upper = self.lower if self.upper is None else self.upper
        known = not any(math.isnan(value) for value in (self.claimed, self.lower, upper))
        _require(
            known and 0 <= self.lower <= upper and self.claimed >= 0,
            "a claim whose numbers are negative, not numbers or not an interval",
            "ClaimEvidence(name='x', claimed=1.0, lower=0.2, upper=0.9)",
        )

    @property
    def holds(self) -> bool:
        """Whether what was measured is compatible with the claim."""
        return self.lower <= self.claimed


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Everything measured that a page shows; parts that were not measured are empty."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    barriers: tuple[BarrierEvidence, ...] = ()
    claims: tuple[ClaimEvidence, ...] = ()
    confidence: float = 0.95
    """Of the intervals of the claims."""
    attack: str = ""
    """How the claims were attacked, in one sentence for the page."""

    def __post_init__(self) -> None:
        _require(0 < self.confidence < 1, f"confidence is {self.confidence!r}", "Evidence(confidence=0.95)")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Evidence:
        """From plain values as in ``{"claims": [{"name": "median", "claimed": 1.0, "lower": 0.1, "upper":
        0.7}]}``. Raises UsageError PIA071 for anything else."""
        try:
            return _adapter().validate_python(content)
        except ValidationError as error:
            places = sorted({".".join(map(str, found["loc"])) for found in error.errors()})
            raise UsageError(
                "PIA071",
                f"the evidence does not fit at {places}",
                "Nothing was drawn from it",
                '{"barriers": [...], "claims": [...], "confidence": 0.95}',
            ) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """As JSON that :meth:`load` and ``pia report --evidence`` read, readable by the owner only. Raises
        UsageError PIA070 for a path that is no regular file."""
        write_private(path, json.dumps(asdict(self), indent=2).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evidence:
        """From a JSON file. Raises UsageError PIA070 for a file that cannot be read, PIA071 for its
        content."""
        try:
            if Path(path).stat().st_size > _MOST:
                raise ValueError
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(
                "PIA070",
                f"the evidence is no readable JSON file ({type(error).__name__})",
                "Nothing was drawn from it",
                "--evidence evaluation.json",
            ) from None
        return cls.from_dict(content)


@functools.cache
def _adapter() -> TypeAdapter[Evidence]:
    return TypeAdapter(Evidence)
