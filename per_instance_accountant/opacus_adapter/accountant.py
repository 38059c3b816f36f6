"""The worst-case accountant that Opacus can be asked for by name:
``PrivacyEngine(accountant="per_instance")``."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import opacus.privacy_engine
from numpy.typing import ArrayLike
from opacus import accountants
from opacus.accountants import IAccountant

from per_instance_accountant.divergence import DEFAULT_ORDERS, rdp_to_epsilon, sampled_gaussian_rdp
from per_instance_accountant.errors import UsageError

NAME = "per_instance"


class PerInstanceAccountant(IAccountant):
    """What every instance is charged at most, from noise multipliers, sample rates and numbers of steps
    alone.

    history: list of (noise_multiplier, sample_rate, steps), as in Opacus. Individual losses need to know
    who was in which batch: they come from the ledger that ``per_instance_accountant.PrivacyEngine`` writes.

    >>> accountant = PerInstanceAccountant()
    >>> for _ in range(1000):
    ...     accountant.step(noise_multiplier=1.0, sample_rate=0.01)
    >>> len(accountant), round(accountant.get_epsilon(1e-5), 4)
    (1000, 2.1014)
    """

    history: list[tuple[float, float, int]]

    def __init__(self) -> None:
        self.history = []

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Record one step. Raises UsageError PIA070; the history is unchanged then."""
        entry = _checked((noise_multiplier, sample_rate, 1))
        if self.history and tuple(self.history[-1][:2]) == entry[:2]:
            self.history[-1] = (*entry[:2], self.history[-1][2] + 1)
        else:
            self.history.append(entry)

    def get_epsilon(self, delta: float, alphas: ArrayLike | None = None, **_: Any) -> float:
        """Upper bound of epsilon at ``delta`` for every instance. alphas: Renyi orders, default
        DEFAULT_ORDERS.

        Reads the history and changes nothing. Raises UsageError PIA070, PIA071.
        """
        orders = np.asarray(DEFAULT_ORDERS if alphas is None else alphas, dtype=np.float64)
        total = np.zeros(orders.shape)
        entries = np.array([_checked(entry) for entry in self.history], dtype=np.float64).reshape(-1, 3)
        entries = entries[entries[:, 2] > 0]
        for rate in np.unique(entries[:, 1]):
            noise, _rate, steps = entries[entries[:, 1] == rate].T
            with np.errstate(divide="ignore"):
                ratios = np.nextafter(1 / noise, np.inf)
            distinct, which = np.unique(ratios, return_inverse=True)
            counts = np.bincount(which, weights=steps)
            total = total + counts @ sampled_gaussian_rdp(float(rate), distinct, orders)
        # The sums are exact to a few roundings; the slack keeps the result on the safe side.
        return float(rdp_to_epsilon(orders, total * (1 + 1e-13), delta))

    def __len__(self) -> int:
        """Number of steps."""
        return sum(steps for _, _, steps in self.history)

    @classmethod
    def mechanism(cls) -> str:
        return NAME

    def state_dict(self, destination: Any = None) -> Any:
        """Plain values, a copy of the history; in every version of Opacus."""
        state = OrderedDict() if destination is None else destination
        state["history"], state["mechanism"] = list(self.history), NAME
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replace the history by a copy of a saved one.

        Raises ValueError as Opacus does for a state of another accountant, UsageError PIA070 for impossible
        entries; the history is unchanged then.
        """
        if not state_dict or "history" not in state_dict or state_dict.get("mechanism") != NAME:
            raise ValueError(f"this is no state of the accountant {NAME!r}")
        history = state_dict["history"]
        if not isinstance(history, (list, tuple)):
            _refuse("the history", type(history).__name__)
        self.history = [_checked(entry) for entry in history]


def _checked(entry: Any) -> tuple[float, float, int]:
    if not isinstance(entry, (list, tuple)) or len(entry) != 3:
        _refuse("an entry of the history", type(entry).__name__)
    noise, rate, steps = entry
    if not (isinstance(noise, (int, float, np.number)) and noise >= 0 and math.isfinite(noise)):
        _refuse("noise_multiplier", noise)
    if not (isinstance(rate, (int, float, np.number)) and 0 < rate <= 1):
        _refuse("sample_rate", rate)
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 0:
        _refuse("the number of steps", steps)
    return float(noise), float(rate), int(steps)


def _refuse(name: str, value: object) -> None:
    raise UsageError(
        "PIA070",
        f"{name} is {value!r}, which no run can have",
        "Epsilon would be wrong or NaN",
        "history entries are (noise_multiplier >= 0, 0 < sample_rate <= 1, steps >= 0)",
    )


def _register() -> None:
    if hasattr(accountants, "register_accountant"):
        accountants.register_accountant(NAME, PerInstanceAccountant, force=True)
        return
    # Opacus before 1.6 has no registry: the one function that knows the names is asked for one more.
    stock: Callable[[str], IAccountant] = accountants.create_accountant

    def create_accountant(mechanism: str) -> IAccountant:
        return PerInstanceAccountant() if mechanism == NAME else stock(mechanism)

    for module in (accountants, accountants.utils, opacus.privacy_engine):
        module.create_accountant = create_accountant


_register()
