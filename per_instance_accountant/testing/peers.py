"""Adapters: the accountants of Opacus, dp_accounting and prv_accountant as the laws ask for them.

Nothing is imported before an adapter is made. Each only passes on what its library answers.
"""

from __future__ import annotations

import copy
import importlib
import logging
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar, Final

from per_instance_accountant.errors import MissingDependencyError

Orders = Sequence[float]


def _library(module: str, package: str) -> Any:
    """The module, with its log silenced; MissingDependencyError PIA061 without it."""
    try:
        found = importlib.import_module(module)
    except ImportError:
        raise MissingDependencyError(
            "PIA061",
            f"{package} is not installed",
            "Its accountant was not checked",
            f"pip install {package}",
        ) from None
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    return found


class _Opacus:
    """An accountant of Opacus; many steps at once are given as a saved history."""

    relation: ClassVar[str] = "add_or_remove"
    package: ClassVar[str] = "opacus"
    class_name: ClassVar[str]

    def __init__(self) -> None:
        self._kind = getattr(_library("opacus.accountants", "opacus"), self.class_name)
        self._accountant = self._kind()

    def step(self, *, noise_multiplier: float, sample_rate: float, steps: int = 1) -> None:
        """Count steps, the first of them through Opacus' own ``step``."""
        if steps == 0:
            return
        self._accountant.step(noise_multiplier=noise_multiplier, sample_rate=sample_rate)
        state = self._accountant.state_dict()
        noise, rate, counted = state["history"][-1]
        state["history"][-1] = (noise, rate, counted + steps - 1)
        self._accountant.load_state_dict(state)

    def epsilon(self, delta: float) -> float:
        """``get_epsilon(delta)``."""
        return float(self._accountant.get_epsilon(delta))

    def num_steps(self) -> int:
        """``len(accountant)``, documented as the number of optimization steps."""
        return len(self._accountant)

    def state_dict(self) -> Any:
        """Of the library."""
        return self._accountant.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Of the library."""
        self._accountant.load_state_dict(state)

    def calibrate(self, target_epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
        """``get_noise_multiplier``."""
        search = _library("opacus.accountants.utils", "opacus").get_noise_multiplier
        return float(
            search(
                target_epsilon=target_epsilon,
                target_delta=delta,
                sample_rate=sample_rate,
                steps=steps,
                accountant=self._kind.mechanism(),
            )
        )


class OpacusRDP(_Opacus):
    """``opacus.accountants.RDPAccountant``."""

    class_name = "RDPAccountant"

    def rdp(self, orders: Orders) -> Any:
        """``compute_rdp`` summed over the history."""
        compute = _library("opacus.accountants.analysis.rdp", "opacus").compute_rdp
        history = self._accountant.history
        return sum(compute(q=q, noise_multiplier=s, steps=n, orders=list(orders)) for s, q, n in history)

    def epsilon_over(self, orders: Orders, delta: float) -> float:
        """``get_epsilon(delta, alphas=orders)``."""
        return float(self._accountant.get_epsilon(delta, alphas=list(orders)))


class OpacusPRV(_Opacus):
    """``opacus.accountants.PRVAccountant``."""

    class_name = "PRVAccountant"


class OpacusGDP(_Opacus):
    """``opacus.accountants.GaussianAccountant``."""

    class_name = "GaussianAccountant"


class OpacusPerInstance(_Opacus):
    """This package's accountant, registered with Opacus. The search for a noise is that of Opacus, and is
    judged there."""

    class_name = "PerInstanceAccountant"
    calibrate = None  # type: ignore[assignment]

    def __init__(self) -> None:
        adapter = _library("per_instance_accountant.opacus_adapter.accountant", "opacus")
        self._kind = adapter.PerInstanceAccountant
        self._accountant = self._kind()

    def epsilon_over(self, orders: Orders, delta: float) -> float:
        """``get_epsilon(delta, alphas=orders)``."""
        return float(self._accountant.get_epsilon(delta, alphas=list(orders)))


class _DpAccounting:
    """An accountant of dp_accounting."""

    relation: ClassVar[str] = "add_or_remove"
    package: ClassVar[str] = "dp-accounting"

    def __init__(self) -> None:
        self._events = _library("dp_accounting", "dp-accounting")
        self._accountant = self._make()

    def _make(self) -> Any:
        raise NotImplementedError

    def _relation(self) -> Any:
        kinds = self._events.NeighboringRelation
        return kinds.REPLACE_ONE if self.relation == "replace_one" else kinds.ADD_OR_REMOVE_ONE

    def step(self, *, noise_multiplier: float, sample_rate: float, steps: int = 1) -> None:
        """Compose the event; without sampling a plain Gaussian one."""
        event = self._events.GaussianDpEvent(noise_multiplier)
        if sample_rate != 1:
            event = self._events.PoissonSampledDpEvent(sample_rate, event)
        if steps:
            self._accountant.compose(event, steps)

    def epsilon(self, delta: float) -> float:
        """``get_epsilon(delta)``."""
        return float(self._accountant.get_epsilon(delta))

    def __deepcopy__(self, memo: dict[int, Any]) -> _DpAccounting:
        other = type(self)()
        other._accountant = copy.deepcopy(self._accountant, memo)
        return other


class DpAccountingRDP(_DpAccounting):
    """``dp_accounting.rdp.RdpAccountant``."""

    def _make(self, orders: Orders | None = None) -> Any:
        kind = _library("dp_accounting.rdp.rdp_privacy_accountant", "dp-accounting").RdpAccountant
        return (
            kind(neighboring_relation=self._relation())
            if orders is None
            else kind(list(orders), self._relation())
        )

    def rdp(self, orders: Orders) -> Any:
        """Of what was composed so far, at other orders."""
        return self._again(orders)._rdp

    def epsilon_over(self, orders: Orders, delta: float) -> float:
        """The same events in an accountant with these orders."""
        return float(self._again(orders).get_epsilon(delta))

    def _again(self, orders: Orders) -> Any:
        accountant = self._make(orders)
        accountant.compose(self._accountant.ledger) if self._composed() else None
        return accountant

    def _composed(self) -> bool:
        return not isinstance(self._accountant.ledger, self._events.NoOpDpEvent)


class DpAccountingRDPReplaceOne(DpAccountingRDP):
    """The same for data sets in which one instance is replaced."""

    relation = "replace_one"


class DpAccountingPLD(_DpAccounting):
    """``dp_accounting.pld.PLDAccountant``."""

    def _make(self) -> Any:
        module = _library("dp_accounting.pld.pld_privacy_accountant", "dp-accounting")
        return module.PLDAccountant(neighboring_relation=self._relation())

    def step(self, *, noise_multiplier: float, sample_rate: float, steps: int = 1) -> None:
        """Compose the event; a rate of 1 stays a sampled event, as a training loop would state it."""
        gaussian = self._events.GaussianDpEvent(noise_multiplier)
        if steps:
            self._accountant.compose(self._events.PoissonSampledDpEvent(sample_rate, gaussian), steps)


class MicrosoftPRV:
    """``prv_accountant.PRVAccountant``; its upper bound."""

    relation: ClassVar[str] = "add_or_remove"
    package: ClassVar[str] = "prv-accountant"

    def __init__(self) -> None:
        _library("prv_accountant", "prv-accountant")
        self._entries: dict[tuple[float, float], int] = {}

    def step(self, *, noise_multiplier: float, sample_rate: float, steps: int = 1) -> None:
        """Remember the mechanism; the library sees them all at once."""
        key = (noise_multiplier, sample_rate)
        self._entries[key] = self._entries.get(key, 0) + steps

    def epsilon(self, delta: float) -> float:
        """Upper end of ``compute_epsilon`` with errors 0.01 in epsilon and delta / 1000."""
        library = _library("prv_accountant", "prv-accountant")
        kind = library.PoissonSubsampledGaussianMechanism
        counts = list(self._entries.values())
        accountant = library.PRVAccountant(
            prvs=[kind(noise_multiplier=noise, sampling_probability=rate) for noise, rate in self._entries],
            max_self_compositions=counts,
            eps_error=0.01,
            delta_error=delta / 1000,
        )
        return float(accountant.compute_epsilon(delta=delta, num_self_compositions=counts)[2])


PEERS: Final = (
    OpacusRDP,
    OpacusPRV,
    OpacusGDP,
    DpAccountingRDP,
    DpAccountingRDPReplaceOne,
    DpAccountingPLD,
    MicrosoftPRV,
)
"""Accountants of other libraries."""


def versions() -> dict[str, str]:
    """Installed versions of the libraries of the peers; those that are missing are left out.

    >>> set(versions()) <= {"opacus", "dp-accounting", "prv-accountant"}
    True
    """
    found = {}
    for package in sorted({peer.package for peer in PEERS}):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
