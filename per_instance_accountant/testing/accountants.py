"""What an accountant must offer so that the laws can be asked of it, and this package's own accountants."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from per_instance_accountant.accounting import account
from per_instance_accountant.divergence import (
    DEFAULT_ORDERS,
    rdp_to_epsilon,
    sampled_gaussian_epsilon,
    sampled_gaussian_rdp,
)
from per_instance_accountant.errors import UsageError
from per_instance_accountant.ledger import LedgerWriter, Phase, Run, Step, Thresholds
from per_instance_accountant.unlearning import bounds

Floats = NDArray[np.float64]


@runtime_checkable
class Accountant(Protocol):
    """Counts Poisson-sampled Gaussian steps. Only these two methods are needed.

    ``step``: ``steps`` releases of clipped sums with noise of std ``noise_multiplier`` times the clip
    norm. ``epsilon``: an upper bound at ``delta`` of all steps so far. Further methods are judged where
    they exist, each by laws of its own; see :data:`OPTIONAL`.
    """

    def step(self, *, noise_multiplier: float, sample_rate: float, steps: int = 1) -> None:
        """Count ``steps`` equal steps."""

    def epsilon(self, delta: float) -> float:
        """Upper bound at ``delta``."""


OPTIONAL: Final[dict[str, str]] = {
    "rdp": "rdp(orders) -> (m,): Renyi divergences of the steps so far, upper bounds in nats",
    "epsilon_over": "epsilon_over(orders, delta) -> float: epsilon from the given Renyi orders only",
    "state_dict": "state_dict() and load_state_dict(state): the state as plain values",
    "num_steps": "num_steps() -> int: steps counted so far",
    "calibrate": "calibrate(target_epsilon, delta, sample_rate, steps) -> float: a noise multiplier",
    "individual_rdp": "individual_rdp(sample_rate, ratios (T, N), orders) -> (N, m): by instance",
    "unlearning_rdp": "unlearning_rdp(*, sensitivity, noise_std, contraction, training_steps, "
    "unlearning_steps, order) -> float: what is left after noisy contractive unlearning steps",
}
"""Optional method -> what it means. Attribute ``relation``: ``"add_or_remove"`` (default) or
``"replace_one"``."""


def fresh(accountant: Any) -> Accountant:
    """A new accountant: the call of a class or factory, or a deep copy of an instance.

    Raises UsageError PIA071 for what has no ``step`` and ``epsilon``.

    >>> fresh(RenyiAccountant).epsilon(1e-5), fresh(RenyiAccountant()).epsilon(1e-5)
    (0.0, 0.0)
    """
    is_factory = inspect.isclass(accountant) or (
        callable(accountant) and not isinstance(accountant, Accountant)
    )
    made = accountant() if is_factory else copy.deepcopy(accountant)
    if not isinstance(made, Accountant):
        raise UsageError(
            "PIA071",
            f"a {type(made).__name__} has no methods step and epsilon",
            "Nothing can be asked of it, so nothing was checked",
            "def step(self, *, noise_multiplier, sample_rate, steps=1), def epsilon(self, delta)",
        )
    return made


def name_of(accountant: Any) -> str:
    """Name of an accountant, a class or a factory, for reports."""
    named = accountant if hasattr(accountant, "__name__") else type(accountant)
    return str(named.__name__)


class _History:
    """Entries (noise_multiplier, sample_rate, steps), checked before they are taken."""

    relation: ClassVar[str] = "add_or_remove"

    def __init__(self) -> None:
        self._entries: list[tuple[float, float, int]] = []

    def step(self, *, noise_multiplier: float, sample_rate: float, steps: int = 1) -> None:
        """Raises UsageError PIA070; nothing is counted then."""
        entry = _checked(noise_multiplier, sample_rate, steps)
        if self._entries and self._entries[-1][:2] == entry[:2]:
            entry = (*entry[:2], self._entries.pop()[2] + entry[2])
        self._entries.append(entry)

    def num_steps(self) -> int:
        """Steps counted so far."""
        return sum(steps for _, _, steps in self._entries)

    def state_dict(self) -> dict[str, Any]:
        """A copy of the entries."""
        return {"entries": [list(entry) for entry in self._entries]}

    def load_state_dict(self, state: Any) -> None:
        """Replace the entries. Raises UsageError PIA070 or PIA071; nothing changes then."""
        try:
            entries = [_checked(*entry) for entry in state["entries"]]
        except (TypeError, KeyError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise _refused("the state", type(error).__name__, "PIA071") from None
        self._entries = entries


def _checked(noise_multiplier: Any, sample_rate: Any, steps: Any) -> tuple[float, float, int]:
    numbers = all(isinstance(v, (int, float, np.number)) for v in (noise_multiplier, sample_rate))
    if not (numbers and 0 <= noise_multiplier < np.inf):
        raise _refused("noise_multiplier", noise_multiplier)
    if not 0 < sample_rate <= 1:
        raise _refused("sample_rate", sample_rate)
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 0:
        raise _refused("steps", steps)
    return float(noise_multiplier), float(sample_rate), int(steps)


def _refused(name: str, value: object, code: str = "PIA070") -> UsageError:
    return UsageError(
        code,
        f"{name} is {value!r}, which no run can have",
        "No epsilon exists for it, so nothing was counted",
        "accountant.step(noise_multiplier=1.0, sample_rate=0.01)",
    )


class RenyiAccountant(_History):
    """``divergence.sampled_gaussian_rdp`` and ``rdp_to_epsilon``.

    >>> accountant = RenyiAccountant()
    >>> accountant.step(noise_multiplier=1.0, sample_rate=0.01, steps=1000)
    >>> round(accountant.epsilon(1e-5), 4)
    2.1014
    """

    def rdp(self, orders: ArrayLike) -> Floats:
        """(m,) upper bounds in nats."""
        total = np.zeros(np.size(orders))
        for noise, rate, steps in self._entries:
            if steps:
                total += steps * sampled_gaussian_rdp(rate, _ratio(noise), orders)[0] * (1 + 1e-15)
        return total * (1 + 1e-13)

    def epsilon_over(self, orders: ArrayLike, delta: float) -> float:
        """Epsilon from these orders."""
        return float(rdp_to_epsilon(orders, self.rdp(orders), delta))

    def epsilon(self, delta: float) -> float:
        """Epsilon from the default orders."""
        return self.epsilon_over(DEFAULT_ORDERS, delta)


class TightAccountant(_History):
    """``divergence.sampled_gaussian_epsilon``.

    >>> accountant = TightAccountant()
    >>> accountant.step(noise_multiplier=1.0, sample_rate=0.01, steps=1000)
    >>> round(accountant.epsilon(1e-5), 4)
    1.8282
    """

    def epsilon(self, delta: float) -> float:
        """Tight upper bound."""
        entries = [entry for entry in self._entries if entry[2]]
        rates = [rate for _, rate, _ in entries] or [1.0]
        ratios = [_ratio(noise) for noise, _, _ in entries] or [1.0]
        counts = [steps for _, _, steps in entries] or [0]
        return float(sampled_gaussian_epsilon(rates, ratios, counts, delta))


def _ratio(noise_multiplier: float) -> float:
    return float(np.nextafter(1 / noise_multiplier, np.inf)) if noise_multiplier > 0 else float("inf")


class LedgerAccountant(_History):
    """``account`` on a ledger in memory, for one instance that is charged the clip norm, or for many.

    >>> accountant = LedgerAccountant()
    >>> accountant.step(noise_multiplier=1.0, sample_rate=0.01, steps=1000)
    >>> round(accountant.epsilon(1e-5), 4)
    2.1014
    """

    def epsilon(self, delta: float) -> float:
        """Epsilon of the first instance, over the default orders."""
        return float(account(self._ledger()).epsilon(delta)[0])

    def rdp(self, orders: ArrayLike) -> Floats:
        """(m,) losses of the first instance."""
        return np.asarray(account(self._ledger(), orders=np.asarray(orders, dtype=np.float64)).rdp[0])

    def step(self, *, noise_multiplier: float, sample_rate: float, steps: int = 1) -> None:
        """Raises UsageError PIA070 also for more than 20,000 steps, each of which would be a record."""
        if self.num_steps() + steps > _MOST_STEPS:
            raise _refused("steps", steps)
        super().step(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)

    def _ledger(self) -> Any:
        writer = LedgerWriter.create(None, Run(num_instances=2))
        for noise, rate, steps in self._entries:
            writer.append(_phase(noise, rate, "worst_case"))
            for _ in range(steps):
                writer.append(_NOBODY)
        return writer.ledger()

    def individual_rdp(self, sample_rate: float, ratios: Floats, orders: ArrayLike) -> Floats:
        """(N, m) losses of a run whose thresholds over noise std are ``ratios`` (T, N)."""
        writer = LedgerWriter.create(None, Run(num_instances=ratios.shape[1]))
        top = float(max(ratios.max(), 1e-6)) * (1 + 1e-6)
        # Divided by the largest, so that the clip norm of the phase is 1.
        writer.append(_phase(1 / top, sample_rate, "sweep"))
        for row in ratios:
            share = row / top
            narrow = share.astype(np.float32)
            up = np.where(narrow < share, np.nextafter(narrow, np.float32(np.inf)), narrow)
            writer.append(Thresholds(values=up, source="sweep"))
            writer.append(_NOBODY)
        return account(writer.ledger(), orders=np.asarray(orders, dtype=np.float64)).rdp

    def unlearning_rdp(self, *, unlearning_steps: int, **problem: Any) -> float:
        """``bounds.contractive``: both directions, after this many unlearning steps."""
        return float(bounds.contractive(**problem).value(unlearning_steps))


_MOST_STEPS: Final = 20_000
_NOBODY: Final = Step(positions=np.empty(0, np.int64), contributions=np.empty(0, np.float32))


def _phase(noise: float, rate: float, charging: str) -> Phase:
    return Phase(
        kind="train",
        sampling="poisson",
        sample_rate=rate,
        noise_std=noise,
        max_grad_norm=1.0,
        charging=charging,
        denominator=1.0,
        learning_rate=0.1,
    )


OURS: Final[tuple[Callable[[], Accountant], ...]] = (RenyiAccountant, TightAccountant, LedgerAccountant)
"""This package's accountants; torch is not needed for them."""
