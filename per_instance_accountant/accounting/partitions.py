"""The fold over ranges of instances, in other processes or on other machines: bit-identical to the
whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from per_instance_accountant.accounting.fold import account
from per_instance_accountant.accounting.loss import IndividualLoss
from per_instance_accountant.accounting.rules import ChargingRule
from per_instance_accountant.accounting.spending import CertifiedBudget
from per_instance_accountant.errors import GuaranteeError, MissingDependencyError, UsageError
from per_instance_accountant.ledger import Ledger

Array = NDArray[np.float64]
Part = tuple[int, int]
Mapper = Callable[[Callable[[Part], IndividualLoss], Sequence[Part]], Iterable[IndividualLoss]]
"""``mapper(function, parts)`` calls the function for every part, anywhere, and returns the results
in order."""


def partitions(num_instances: int, parts: int) -> list[Part]:
    """``parts`` ranges ``(start, stop)`` of nearly equal length, at most one per instance.

    >>> partitions(10, 3)
    [(0, 3), (3, 6), (6, 10)]
    """
    if not (num_instances >= 1 and parts >= 1):
        _refuse(
            "PIA070", f"{parts} parts of {num_instances} instances", "partitions(ledger.num_instances, 8)"
        )
    edges = np.arange(min(parts, num_instances) + 1) * num_instances // min(parts, num_instances)
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def account_in_parts(
    ledger: str | os.PathLike[str],
    parts: int,
    *,
    mapper: Mapper = map,
    charging: ChargingRule | None = None,
    orders: Sequence[float] | Array | None = None,
) -> IndividualLoss:
    """``account(ledger)`` computed in ``parts`` ranges of instances by ``mapper``; bit-identical to it.

    ledger: the path, which every worker must be able to read; each verifies it from the first byte
    to the last. mapper: the builtin map, ``executor.map`` of a process pool, or :func:`dask_mapper`.
    Raises what ``account`` raises, and GuaranteeError PIA011 when the ledger changed between two parts.
    """
    fold = partial(_account_part, os.fspath(ledger), charging, None if orders is None else tuple(orders))
    return join(list(mapper(fold, partitions(Ledger.open(ledger).num_instances, parts))))


def _account_part(
    ledger: str, charging: ChargingRule | None, orders: tuple[float, ...] | None, part: Part
) -> IndividualLoss:
    return account(ledger, charging, orders, partition=part)


def dask_mapper(client: Any) -> Mapper:
    """A mapper over the workers of a ``dask.distributed.Client``. Raises MissingDependencyError
    PIA061."""
    try:
        import distributed
    except ImportError:
        raise MissingDependencyError(
            "PIA061",
            "dask.distributed is not installed",
            "Nothing was computed",
            "pip install 'per-instance-accountant[dask]'",
        ) from None
    if not isinstance(client, distributed.Client):
        _refuse(
            "PIA071", f"a {type(client).__name__} instead of a Client", "dask_mapper(distributed.Client())"
        )

    def mapper(function: Callable[[Part], IndividualLoss], parts: Sequence[Part]) -> list[IndividualLoss]:
        # pure=False: the same path may hold more steps than at an earlier call.
        cluster: Any = client
        gathered: list[IndividualLoss] = cluster.gather(cluster.map(function, parts, pure=False))
        return gathered

    return mapper


def join(losses: Sequence[IndividualLoss]) -> IndividualLoss:
    """The losses of disjoint parts of the instances of one ledger, in the order given, as one record.

    Raises GuaranteeError PIA011 for losses of different ledgers, orders or rules, UsageError PIA070
    for nothing, or an instance that is there twice.
    """
    if not losses:
        _refuse("PIA070", "no losses to join", "join([account(ledger, partition=part) for part in parts])")
    first = losses[0]
    if len({(loss.digest, loss.basis, loss.charging, loss.orders.tobytes()) for loss in losses}) > 1:
        raise GuaranteeError(
            "PIA011",
            f"{len(losses)} losses that are not of one ledger, rule and list of orders",
            "Steps of one run would be missing from the losses of the instances of another",
            "join([account(ledger, partition=part) for part in partitions(ledger.num_instances, 8)])",
        )
    ids = np.concatenate([loss.ids for loss in losses])
    repeated = len(ids) - len(np.unique(ids))
    if repeated:
        _refuse("PIA070", f"{repeated} instances that are in two parts", "join each part once")
    return replace(
        first,
        rdp=np.concatenate([loss.rdp for loss in losses]),
        ids=ids,
        mu=_joined([loss.mu for loss in losses]),
        spans=_joined_spans(losses),
        certified_budget=_joined_budgets([loss.certified_budget for loss in losses]),
    )


def _joined(columns: Sequence[Array | None]) -> Array | None:
    known = [column for column in columns if column is not None]
    return np.concatenate(known) if len(known) == len(columns) else None


def _joined_spans(losses: Sequence[IndividualLoss]) -> Any:
    """Spans of the parts side by side, where they are cut at the same steps; else None: epsilons
    from the curves."""
    spans = [loss.spans for loss in losses if loss.spans is not None]
    shapes = {tuple((span.steps, span.sample_rate) for span in part) for part in spans}
    if len(spans) < len(losses) or len(shapes) != 1:
        return None
    columns = zip(*spans, strict=True)
    return tuple(replace(cut[0], ratios=np.concatenate([span.ratios for span in cut])) for cut in columns)


def _joined_budgets(budgets: Sequence[CertifiedBudget | None]) -> CertifiedBudget | None:
    known = [budget for budget in budgets if budget is not None]
    if len(known) < len(budgets):
        return None
    orders, sums = (np.concatenate([getattr(b, name) for b in known]) for name in ("orders", "budgets"))
    return CertifiedBudget(family=known[0].family, orders=orders, budgets=sums)


def _refuse(code: str, happened: str, fix: str) -> NoReturn:
    raise UsageError(code, happened, "No losses were computed", fix)
