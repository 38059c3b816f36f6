"""Facts about the training problem that contraction bounds rest on, each with its source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.errors import PlanError

Array = NDArray[np.float64]

SOURCES: Final = ("derived", "user", "run")
_UP: Final = 1 + 4e-16
_CLIP_ROUNDING: Final = 2e-6
"""Share of the curvature that clipping at a threshold rounded to float32 may bend (docs/math)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What is known of the loss. None or False: not known, and bounds that need it do not apply.

    smoothness: L such that for EVERY batch that can be drawn, the whole data set included, the Hessian of the
    sum of instance losses is at most ``L * denominator`` (upper bound), without the regulariser. convexity:
    lower bound of the same Hessian over ``denominator``, also when any instances are left out of the batch; 0
    for a convex loss. denominator: the one that L refers to; None means that of the ledger's steps.
    clipping_never_binds: no instance gradient exceeds the threshold it is clipped at (per-instance clipping
    destroys contraction). gradient_norm: upper bound of every instance's gradient norm, by which that is
    checked against the ledger. individual_thresholds: individual thresholds below gradient_norm are at least
    that instance's own gradient bound. radius: bound on the parameters. num_instances: N that L is for.
    feature_norm: bound on every instance's features, from which a helper derived the rest.
    sources: name -> ``"derived"``, ``"user"`` or ``"run"``. ``"derived"`` is checked: smoothness and
    gradient_norm must follow from feature_norm, num_instances and denominator as in a helper below.

    Raises PlanError PIA031 for values out of range.
    """

    smoothness: float | None = None
    convexity: float = 0.0
    denominator: float | None = None
    num_instances: int | None = None
    clipping_never_binds: bool = False
    gradient_norm: float | None = None
    individual_thresholds: bool = False
    radius: float | None = None
    feature_norm: float | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("smoothness", "gradient_norm", "radius", "feature_norm"):
            value = getattr(self, name)
            _require(value is None or (_is_number(value) and 0 <= value < math.inf), name, value, "[0, inf)")
        ok = self.denominator is None or (_is_number(self.denominator) and 0 < self.denominator < math.inf)
        _require(ok, "denominator", self.denominator, "(0, inf)")
        _require(
            _is_number(self.convexity) and math.isfinite(self.convexity),
            "convexity",
            self.convexity,
            "(-inf, inf)",
        )
        if self.smoothness is not None:
            _require(self.convexity <= self.smoothness, "convexity", self.convexity, "(-inf, smoothness]")
        whole = self.num_instances is None or (type(self.num_instances) is int and self.num_instances >= 1)
        _require(whole, "num_instances", self.num_instances, "[1, inf)")
        for name in ("clipping_never_binds", "individual_thresholds"):
            _require(type(getattr(self, name)) is bool, name, getattr(self, name), "True or False")
        known = {n: s for n, s in self.sources.items() if n in _NAMES and s in SOURCES}
        _require(len(known) == len(self.sources), "sources", dict(self.sources), f"names to one of {SOURCES}")
        object.__setattr__(self, "sources", MappingProxyType(dict(self.sources)))
        derived = [name for name, source in known.items() if source == "derived"]
        _require(not derived or self._follows(derived), "source", "derived", "what a helper derived")

    def _follows(self, derived: list[str]) -> bool:
        """Whether the derived facts are consequences of the stated ones for one of the linear models."""
        norm, count, denominator = self.feature_norm, self.num_instances, self.denominator
        if not set(derived) <= _DERIVABLE or norm is None or count is None or denominator is None:
            return False
        smoothness, gradient = self.smoothness or 0.0, self.gradient_norm or 0.0
        return self.convexity <= 0 and any(
            smoothness >= curvature * norm**2 * count / denominator and gradient >= slope * norm
            for curvature, slope in _LINEAR_MODELS
        )

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """``{name: {"value": v, "source": s}}`` of everything that is stated."""
        stated = {name: getattr(self, name) for name in _NAMES}
        return {
            name: {"value": value, "source": self.sources.get(name, "user")}
            for name, value in stated.items()
            if value is not None and value != _DEFAULTS[name]
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], *, source: str = "user") -> Assumptions:
        """Inverse of :meth:`to_dict`; plain values ``{"smoothness": 1.8}`` get ``source``.

        Raises PlanError PIA031 for unknown names and malformed entries.

        >>> Assumptions.from_dict({"smoothness": 1.8, "clipping_never_binds": True}).sources["smoothness"]
        'user'
        """
        unknown = [name for name in content if name not in _NAMES]
        _require(not unknown, "assumptions", f"{len(unknown)} unknown names", f"{_NAMES}")
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for name, entry in content.items():
            if isinstance(entry, Mapping):
                _require(set(entry) == {"value", "source"}, name, sorted(entry), "value and source")
                values[name], sources[name] = entry["value"], entry["source"]
            elif entry is not None:
                values[name], sources[name] = entry, source
        return cls(**values, sources=sources)


_NAMES: Final = tuple(f.name for f in fields(Assumptions) if f.name != "sources")
_DEFAULTS: Final = {f.name: f.default for f in fields(Assumptions) if f.name != "sources"}


_LINEAR_MODELS: Final = ((0.5, math.sqrt(2)), (0.25, 1.0))
"""Curvature and slope over the feature norm: softmax and logistic regression."""
_DERIVABLE: Final = frozenset(("smoothness", "convexity", "gradient_norm", "clipping_never_binds"))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise PlanError(
            "PIA031",
            f"assumption {name} is {value!r}, allowed is {allowed}",
            "No bound can rest on it",
            f"Assumptions({name}=...) in {allowed}",
        )


def contraction_factors(
    assumptions: Assumptions,
    *,
    learning_rate: Array,
    weight_decay: Array,
    denominator: Array,
    batch_may_be_empty: NDArray[np.bool_],
) -> Array:
    """(S,) Lipschitz constants (upper bounds) of ``theta -> theta - lr (sum_batch grad / denominator + wd
    theta)``.

    The Hessian of the batch sum over the denominator lies in ``[m, L]``, so the factor is
    ``max(|1 - lr (wd + m)|, |1 - lr (wd + L)|)``, rounded up. An empty batch has Hessian 0: there m is at
    most 0.

    >>> whole = np.array([False])
    >>> known = Assumptions(smoothness=1.0, convexity=0.5)
    >>> ones = np.ones(1)
    >>> float(contraction_factors(known, learning_rate=0.1 * ones, weight_decay=0 * ones, denominator=ones,
    ...     batch_may_be_empty=whole).round(9)[0])
    0.95
    """
    if assumptions.smoothness is None:
        return np.full(len(learning_rate), np.inf)
    scale = 1.0 if assumptions.denominator is None else assumptions.denominator / denominator
    upper = assumptions.smoothness * scale
    lower = np.where(batch_may_be_empty, min(assumptions.convexity, 0.0), assumptions.convexity) * scale
    ends = [np.abs(1 - learning_rate * (weight_decay + edge)) for edge in (lower, upper)]
    # The absolute term covers the rounding of 1 - x, relative to 1 and to the largest product.
    rounding = 4e-16 * (1 + learning_rate * (weight_decay + np.abs(upper) + np.abs(lower)))
    # A clip norm counts as reached up to its storage in float32; clipping may then change at most this.
    share = _CLIP_ROUNDING if assumptions.gradient_norm is not None else 0.0
    return np.maximum(*ends) * _UP + rounding + share * learning_rate * np.abs(upper)


def softmax_regression(
    *, feature_norm: float, num_instances: int, denominator: float, individual_thresholds: bool = False
) -> Assumptions:
    """Multiclass cross-entropy on linear logits ``W x`` with ``|x| <= feature_norm`` (a bias entry counts
    into x).

    Per instance: Hessian at most ``feature_norm^2 / 2``, gradient norm at most ``sqrt(2) feature_norm``
    (docs/math/ unlearning_bounds.md). The regulariser must be the optimizer's weight decay, outside the clip.
    denominator: the expected batch size for mean-reduced losses. individual_thresholds: thresholds were set
    per instance, at least ``sqrt(2) |x_i|`` each. Raises PlanError PIA031.

    >>> softmax_regression(feature_norm=1.0, num_instances=100, denominator=10.0).smoothness
    5.000000000000002
    """
    return _linear_model(*_LINEAR_MODELS[0], feature_norm, num_instances, denominator, individual_thresholds)


def logistic_regression(
    *, feature_norm: float, num_instances: int, denominator: float, individual_thresholds: bool = False
) -> Assumptions:
    """Binary cross-entropy on a linear logit: Hessian at most ``feature_norm^2 / 4``, gradient at most
    ``feature_norm``.

    Arguments and errors as in :func:`softmax_regression`; individual thresholds at least ``|x_i|`` each.

    >>> logistic_regression(feature_norm=2.0, num_instances=100, denominator=100.0).gradient_norm
    2.000000000000001
    """
    return _linear_model(*_LINEAR_MODELS[1], feature_norm, num_instances, denominator, individual_thresholds)


def _linear_model(
    curvature: float, slope: float, norm: float, num_instances: int, denominator: float, individual: bool
) -> Assumptions:
    _require(_is_number(norm) and 0 < norm < math.inf, "feature_norm", norm, "(0, inf)")
    _require(type(num_instances) is int and num_instances >= 1, "num_instances", num_instances, "[1, inf)")
    _require(_is_number(denominator) and 0 < denominator < math.inf, "denominator", denominator, "(0, inf)")
    stated: dict[str, Any] = {
        "smoothness": curvature * norm**2 * num_instances / denominator * _UP,
        "denominator": float(denominator),
        "num_instances": num_instances,
        "clipping_never_binds": True,
        "gradient_norm": slope * norm * _UP,
        "feature_norm": float(norm),
        "individual_thresholds": individual,
    }
    sources = {name: "derived" if name in _DERIVABLE else "user" for name in (*stated, "convexity")}
    return Assumptions(**stated, sources=sources)
