"""One frozen record per method: what it is, and every number it needs.

A record says with ``needs_retain`` whether the method must see retained instances as well.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

from numpy.typing import ArrayLike

from per_instance_accountant.errors import UsageError


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise UsageError(
            "PIA070",
            f"{name} is {value!r}, allowed is {allowed}",
            "No step was taken",
            f"pass {name} in {allowed}",
        )


def _real(name: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    ok = math.isfinite(value) and low <= value <= high and not (open_low and value == low)
    _require(ok, name, value, f"{'(' if open_low else '['}{low:g}, {high:g}]")


def _whole(name: str, value: int, low: int) -> None:
    _require(isinstance(value, int) and value >= low, name, value, f"the integers from {low} on")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Descent of every method: ``v = momentum v + (gradient + weight_decay w)``, ``w -= learning_rate v``.

    steps: at most so many. batch_size: instances of each kind (forget, retain) in a step. observe_every:
    steps between two looks at the instances to forget, at which methods with a goal may stop.
    """

    steps: int
    learning_rate: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 32
    observe_every: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "observe_every"):
            _whole(name, getattr(self, name), 1)
        _real("learning_rate", self.learning_rate, 0, open_low=True)
        _real("momentum", self.momentum, 0, 0.9999)
        _real("weight_decay", self.weight_decay, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """Targeted L2-PGD. radius, step_size: in units of the input. bounds: smallest and largest input value, or
    None. per_instance: examples tried per instance to forget."""

    radius: float
    step_size: float = 0.1
    iterations: int = 100
    per_instance: int = 20
    bounds: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        _real("radius", self.radius, 0, open_low=True)
        _real("step_size", self.step_size, 0, open_low=True)
        _whole("iterations", self.iterations, 1)
        _whole("per_instance", self.per_instance, 1)
        if self.bounds is not None:
            low, high = self.bounds
            _require(
                math.isfinite(low) and low < high < math.inf, "bounds", self.bounds, "low < high, finite"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceWise:
    """Unlearning with the model and the instances to forget only (Cha et al. 2024).

    goal: ``"misclassify"`` (any other class; instances that reached it are left alone) or ``"relabel"`` (the
    ``targets`` of the instances, drawn over the other classes if there are none). attack: adversarial
    examples of the model as it was, ``adversarial_batch`` of them in a step. importance: weight of the
    anchor at the start, 0 for none. replay: retained instances take the place of adversarial examples (for
    comparison; needs them). forget_share: weight of the loss on the instances to forget beside those, None
    for their share of the step as in the paper; a goal to misclassify needs more, since the ascent starts at
    gradients near zero. Stops when every instance reached the goal.

    With neither attack nor importance this is the plain negative gradient.
    """

    name: ClassVar[str] = "instance-wise"
    schedule: Schedule
    goal: Literal["misclassify", "relabel"] = "misclassify"
    attack: Attack | None = None
    importance: float = 0.0
    adversarial_batch: int = 64
    replay: bool = False
    forget_share: float | None = None

    def __post_init__(self) -> None:
        _require(self.goal in ("misclassify", "relabel"), "goal", self.goal, "misclassify or relabel")
        _real("importance", self.importance, 0)
        _whole("adversarial_batch", self.adversarial_batch, 1)
        _require(not (self.replay and self.attack), "replay", self.replay, "False where an attack is given")
        if self.forget_share is not None:
            _real("forget_share", self.forget_share, 0, 1, open_low=True)

    @property
    def needs_retain(self) -> bool:
        return self.replay


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTune:
    """Training goes on without the instances."""

    name: ClassVar[str] = "fine-tune"
    needs_retain: ClassVar[bool] = True
    schedule: Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class CertifiedRun:
    """The files of a plan that is to be carried out with a certificate: see ``finetuning.run_plan``.

    positions: training positions of the retained instances, in their order.
    """

    plan: str | os.PathLike[str]
    ledger: str | os.PathLike[str]
    checkpoint: str | os.PathLike[str]
    output: str | os.PathLike[str]
    positions: ArrayLike


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisyFineTune:
    """Fine-tuning with Gaussian noise of ``noise_std`` on the mean gradient of a step.

    certified: carries out that plan instead, clipped, recorded and certified; the plan then fixes every
    number and neither schedule nor noise_std is used. Without it nothing is clipped and nothing is promised.
    """

    name: ClassVar[str] = "noisy-fine-tune"
    needs_retain: ClassVar[bool] = True
    schedule: Schedule
    noise_std: float = 0.0
    certified: CertifiedRun | None = None

    def __post_init__(self) -> None:
        _real("noise_std", self.noise_std, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientAscent:
    """Ascent on the loss of the instances, unbounded as usually defined; stops when none is classified
    correctly, and never returns weights that are not finite."""

    name: ClassVar[str] = "gradient-ascent"
    needs_retain: ClassVar[bool] = False
    schedule: Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class NegGradPlus:
    """``retain_weight`` times the retained loss minus the rest of 1 times the forget loss (NegGrad+, Kurmanji
    et al. 2023)."""

    name: ClassVar[str] = "neg-grad-plus"
    needs_retain: ClassVar[bool] = True
    schedule: Schedule
    retain_weight: float = 0.95

    def __post_init__(self) -> None:
        _real("retain_weight", self.retain_weight, 0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomRelabel:
    """Random wrong labels for the instances, right labels for retained ones."""

    name: ClassVar[str] = "random-relabel"
    needs_retain: ClassVar[bool] = True
    schedule: Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class SalUn:
    """Random relabelling of the weights with the largest forget gradients only (Fan et al. 2024).

    keep: share of all weights that may change, exactly ``floor(keep * weights)`` of them by rank. The others
    do not move, whatever momentum and weight decay.
    """

    name: ClassVar[str] = "salun"
    needs_retain: ClassVar[bool] = True
    schedule: Schedule
    keep: float = 0.5

    def __post_init__(self) -> None:
        _real("keep", self.keep, 0, 1, open_low=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrub:
    """The student leaves its teacher, the model as it was, on the instances to forget and follows it on the
    others (Kurmanji et al. 2023).

    Rounds of ``forget_steps`` ascents on the divergence from the teacher and ``retain_steps`` descents on
    ``distillation`` times that divergence plus the training loss; after ``rounds`` of them descents only.
    """

    name: ClassVar[str] = "scrub"
    needs_retain: ClassVar[bool] = True
    schedule: Schedule
    rounds: int = 3
    forget_steps: int = 1
    retain_steps: int = 10
    distillation: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        for name in ("rounds", "forget_steps", "retain_steps"):
            _whole(name, getattr(self, name), 1)
        _real("distillation", self.distillation, 0)
        _real("temperature", self.temperature, 0, open_low=True)

    def ascends(self, step: int) -> bool:
        """Whether this step, counted from 0, is one on the instances to forget."""
        turn, place = divmod(step, self.forget_steps + self.retain_steps)
        return turn < self.rounds and place < self.forget_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseFineTune:
    """Fine-tuning with ``strength`` times the sum of absolute weights, falling linearly to zero over the
    steps (Jia et al. 2023)."""

    name: ClassVar[str] = "l1-sparse"
    needs_retain: ClassVar[bool] = True
    schedule: Schedule
    strength: float = 5e-4

    def __post_init__(self) -> None:
        _real("strength", self.strength, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrain:
    """New weights, trained on the retained instances: the reference that others approximate."""

    name: ClassVar[str] = "retrain"
    needs_retain: ClassVar[bool] = True
    schedule: Schedule


Method = (
    InstanceWise
    | FineTune
    | NoisyFineTune
    | GradientAscent
    | NegGradPlus
    | RandomRelabel
    | SalUn
    | Scrub
    | SparseFineTune
    | Retrain
)
METHODS: Final[dict[str, type[Method]]] = {
    record.name: record
    for record in (
        InstanceWise,
        FineTune,
        NoisyFineTune,
        GradientAscent,
        NegGradPlus,
        RandomRelabel,
        SalUn,
        Scrub,
        SparseFineTune,
        Retrain,
    )
}
"""Name -> record of the method."""
