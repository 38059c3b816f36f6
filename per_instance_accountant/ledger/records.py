"""The facts a ledger holds. No record stores a conclusion: orders and delta are chosen when reading."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.errors import UsageError

SAMPLING = ("poisson", "shuffled")
"""How batches were drawn. Only ``"poisson"`` gives amplification; ``sample_rate=1`` is full batch."""
KINDS = ("train", "unlearn")
MAX_RANKS = 1 << 16
DISCLOSED = ("histogram", "quantiles")
FAMILIES = ("renyi", "gaussian")
"""What a filter adds up: one step's Renyi divergence at an order, or its squared sensitivity ratio."""
RULES = ("worst_case", "fixed_thresholds", "sweep", "unamplified", "last_seen")


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise UsageError(
            "PIA070",
            f"{name} is {value!r}, allowed is {allowed}",
            "The fact was not recorded, because no loss could be computed from it",
            f"pass {name} in {allowed}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is fixed for the whole run; equal on all its ranks but for ``rank``.

    num_instances: N; instances are dataset positions 0..N-1.
    ids: (N,) business ids (int64 or str, unique) or None for the positions themselves.
    groups: name -> (N,) labels (int64 or str), for reports by class or person.
    assumptions: facts about the training problem that unlearning bounds rest on (JSON-able), with their
    source.
    run_id: 32 hex digits, ``new_run_id()`` of one rank sent to all; None: a fresh one, for one process only.
    rank, world_size: which of how many processes writes this ledger. With ``world_size > 1`` it is a *part*:
    the global facts (Phase, Thresholds, Filter) in the order in which they hold for all, and in each Step the
    instances that this rank drew. ``merge_parts`` makes the ledger of the run from the parts.
    """

    num_instances: int
    ids: NDArray[Any] | None = None
    groups: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    assumptions: Mapping[str, Any] | None = None
    software: Mapping[str, str] = field(default_factory=dict)
    run_id: str | None = None
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        _require(self.num_instances >= 1, "num_instances", self.num_instances, "[1, inf)")
        ranks = type(self.rank) is int and type(self.world_size) is int and 0 <= self.rank < self.world_size
        _require(ranks, "rank", self.rank, f"[0, world_size) with world_size {self.world_size!r}")
        _require(self.world_size <= MAX_RANKS, "world_size", self.world_size, f"[1, {MAX_RANKS}]")
        known = self.run_id is not None or self.world_size == 1
        _require(known, "run_id", self.run_id, "one run_id for all ranks, from new_run_id() of one of them")
        sound = self.run_id is None or is_hex(self.run_id, 32)
        _require(sound, "run_id", "another text", "32 lower case hex digits")


def new_run_id() -> str:
    """32 random hex digits: the identity that one rank makes and sends to all others.

    >>> len(new_run_id())
    32
    """
    return secrets.token_hex(16)


def is_hex(text: object, length: int) -> bool:
    """Whether ``text`` is a str of so many lower case hex digits."""
    return isinstance(text, str) and len(text) == length and set(text) <= set("0123456789abcdef")


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """The mechanism in force for the steps that follow, until the next Phase.

    One step releases ``sum_i clip(g_i) + N(0, noise_std^2 I)`` over the drawn instances, where every clipped
    gradient has norm at most ``max_grad_norm``, and moves the parameters by
    ``-learning_rate * (release / denominator + weight_decay * theta)`` when ``optimizer == "SGD"``.
    """

    kind: str
    sampling: str
    sample_rate: float
    noise_std: float
    max_grad_norm: float
    charging: str
    denominator: float
    learning_rate: float
    weight_decay: float = 0.0
    momentum: float = 0.0
    optimizer: str = "SGD"
    grad_sample_mode: str = "hooks"
    plan_digest: str | None = None
    """Digest of the plan that an ``unlearn`` phase carries out."""
    projection_radius: float | None = None
    """Before each step the parameters, all together, are projected onto the ball of this radius about 0."""

    def __post_init__(self) -> None:
        _require(self.kind in KINDS, "kind", self.kind, str(KINDS))
        _require(self.sampling in SAMPLING, "sampling", self.sampling, str(SAMPLING))
        _require(self.charging in RULES, "charging", self.charging, str(RULES))
        _require(0 < self.sample_rate <= 1, "sample_rate", self.sample_rate, "(0, 1]")
        for name in ("noise_std", "weight_decay", "momentum", "learning_rate"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, name, value, "[0, inf)")
        for name in ("max_grad_norm", "denominator"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, name, value, "(0, inf)")
        radius = self.projection_radius
        _require(radius is None or 0 < radius < math.inf, "projection_radius", radius, "(0, inf)")

    @property
    def amplification_rate(self) -> float:
        """Rate that accounting may use: the sample rate under Poisson sampling, otherwise 1."""
        return self.sample_rate if self.sampling == "poisson" else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """From the next step on, instance i is clipped at ``values[i] <= max_grad_norm``.

    values: (N,) float32, exactly the numbers that clipping uses. ``values[i] == 0``: i contributes nothing.
    source: ``"fixed"`` (chosen before training), ``"sweep"`` (from norms at released parameters) or
    ``"forget"`` (the instances of a deletion request are set to 0 and excluded from sampling).
    """

    values: NDArray[np.float32]
    source: str

    def __post_init__(self) -> None:
        _require(self.source in ("fixed", "sweep", "forget"), "source", self.source, "fixed, sweep or forget")
        ok = self.values.dtype == np.float32 and self.values.ndim == 1
        _require(ok, "values", f"{self.values.dtype} with shape {self.values.shape}", "a float32 vector")
        bad = ~(np.isfinite(self.values) & (self.values >= 0))
        _require(not bad.any(), "values", f"{int(bad.sum())} negative or non-finite thresholds", "[0, inf)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One noisy release, recorded BEFORE the noise is added. Charged whether or not its end is recorded.

    positions: (B,) int64, distinct, the instances that were drawn (empty for an empty Poisson draw).
    contributions: (B,) float32, upper bounds of the norms with which each entered the sum (after clipping;
    added up if an instance was drawn twice).
    """

    positions: NDArray[np.int64]
    contributions: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicStep:
    """``count`` updates of the model that used public data only, of no instance of this run: they cost nobody
    anything and are no ``Step``. Whoever states it vouches for it; it is never inferred. Training only."""

    count: int = 1

    def __post_init__(self) -> None:
        _require(type(self.count) is int and self.count >= 1, "count", self.count, "[1, inf)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Disclosure:
    """A statistic of individual values was published by an ``epsilon``-differentially private mechanism.
    Recorded BEFORE its noise is drawn, and charged to every instance.

    kind: ``"histogram"`` or ``"quantiles"``. epsilon: whatever becomes of one instance's row. identity: 32
    random hex digits of this one statistic, so that no other copy of the ledger can hold the same record.
    """

    kind: str
    epsilon: float
    identity: str | None = None

    def __post_init__(self) -> None:
        known = self.identity is None or is_hex(self.identity, 32)
        _require(known, "identity", "another text", "32 lower case hex digits")
        _require(self.kind in DISCLOSED, "kind", self.kind, str(DISCLOSED))
        sound = type(self.epsilon) is float and 0 < self.epsilon < math.inf
        _require(sound, "epsilon", self.epsilon, "(0, inf)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Stated before the first step: an instance leaves before the training step that would exceed its budget.

    family ``"renyi"``: instance i's Renyi divergences at ``orders[i]`` add up to at most ``budgets[i]`` nats.
    ``"gaussian"``: its squared sensitivity ratios, without amplification by sampling, add up to at most
    ``budgets[i]``; the orders are 2 then, where the two sums agree. orders, budgets: (N,) float64.
    """

    family: str
    orders: NDArray[np.float64]
    budgets: NDArray[np.float64]

    def __post_init__(self) -> None:
        _require(self.family in FAMILIES, "family", self.family, str(FAMILIES))
        for name, low in (("orders", 1.0), ("budgets", 0.0)):
            values = getattr(self, name)
            ok = values.dtype == np.float64 and values.ndim == 1 and values.shape == self.orders.shape
            _require(ok, name, f"{values.dtype} with shape {values.shape}", "a float64 vector")
            bad = ~(np.isfinite(values) & (values > low))
            _require(not bad.any(), name, f"{int(bad.sum())} entries outside", f"({low:g}, inf)")
        ok = self.family == "renyi" or bool((self.orders == 2).all())
        _require(ok, "orders", "other than 2 for a Gaussian filter", "2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """From the next step on these instances contribute nothing, for good, also across a Resume: the next step
    would have exceeded their budget. positions: (k,) int64, distinct, k >= 1."""

    positions: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """A writer continued from a checkpoint taken after ``at_step`` steps (``at_step`` below the steps
    recorded so far means that the later ones were abandoned; they stay charged).

    session: in a part, what the ranks that were started together have in common and no earlier start had:
    32 hex digits, ``new_run_id()`` of one of them sent to all. None for a run on one process.
    """

    at_step: int
    session: str | None = None

    def __post_init__(self) -> None:
        sound = self.session is None or is_hex(self.session, 32)
        _require(sound, "session", "another text", "32 lower case hex digits")


Event = Phase | Thresholds | Step | PublicStep | Disclosure | Resume | Filter | Drop
