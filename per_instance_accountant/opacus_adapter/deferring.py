"""Contributions that stay on an accelerator: one asynchronous copy for many steps, and no step that waits.

A step is promised to the ledger, with the norms at which its instances are clipped in place of their
contributions, before it is released; so nothing is ever released uncharged. The contributions follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from per_instance_accountant.errors import AlignmentError
from per_instance_accountant.ledger import Event, LedgerWriter, Step
from per_instance_accountant.opacus_adapter.clipping import clip_on_device, round_up, round_up_on_device

FLUSH_STEPS, FLUSH_ROWS = 64, 1 << 20
"""So many steps, or rows of batches, wait on the device before one copy takes them all."""


class Observation(NamedTuple):
    """A part of a step: (B,) dataset positions, and (B,) upper bounds of the norms with which they entered
    the clipped sum. measured: (B,) their contributions, still on the device, where the bounds are limits."""

    positions: NDArray[np.int64]
    contributions: NDArray[np.float32]
    measured: torch.Tensor | None = None


class Copy:
    """Numbers (n,) on their way from a device to the host."""

    def __init__(self, values: torch.Tensor) -> None:
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self._host.copy_(values, non_blocking=True)
        self._event = torch.cuda.Event() if values.is_cuda else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(values.device))

    def arrived(self) -> bool:
        """Whether the numbers are there; does not wait."""
        return self._event is None or bool(self._event.query())

    def take(self) -> NDArray[np.float32]:
        """The numbers, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()


@dataclass(frozen=True, slots=True)
class Due:
    """A promised fact. number: its own in the ledger. finish: makes the step of its completed parts."""

    number: int
    event: Event
    parts: Sequence[Observation] = ()
    finish: Callable[[Sequence[Observation]], Step] | None = None

    def completed(self, values: NDArray[np.float32]) -> tuple[Event, int]:
        """The fact with its first contributions from ``values``, and how many it took."""
        if self.finish is None:
            return self.event, 0
        parts, used = [], 0
        for part in self.parts:
            if part.measured is not None:
                count = len(part.positions)
                part = part._replace(contributions=values[used : used + count], measured=None)
                used += count
            parts.append(part)
        return self.finish(parts), used


class Deferral:
    """The promised steps of one recorder whose contributions are on a device or on their way from it.

    A gradient that is not finite cannot be seen without waiting. The device itself then makes void that
    release and every one after it: all gradients are zero, noise included. The host raises PIA006 when it
    learns of it, at most two flushes later.
    """

    devices: frozenset[str] = frozenset({"cuda"})
    """Kinds of devices that are worth not waiting for."""
    copy: Callable[[torch.Tensor], Any] = Copy

    def __init__(self) -> None:
        self._due: list[Due] = []
        self._copying: tuple[list[Due], Any] | None = None
        self._steps = self._rows = 0
        self._bad: torch.Tensor | None = None
        """How many norms were not finite so far, on the device; None as long as no step was deferred."""
        self.spoiled = 0
        """The same, as far as the host knows."""

    @property
    def idle(self) -> bool:
        """Whether no contribution is on its way."""
        return not self._due and self._copying is None

    def clip(
        self, norms: torch.Tensor, positions: NDArray[np.int64], limits: NDArray[np.float64]
    ) -> tuple[torch.Tensor, Observation]:
        """(B,) factors for norms (B,) float64 on a device, and what is to be recorded; nobody waits."""
        even = bool(len(limits)) and bool((limits == limits[0]).all())
        there = torch.full_like(norms, limits[0]) if even else _send(limits, norms.device)
        bad = torch.zeros((), device=norms.device) if self._bad is None else self._bad.to(norms.device)
        self._bad = bad + norms.isfinite().logical_not().sum()
        factors, contributions = clip_on_device(norms, there)
        # What is void is charged as promised: a release that nobody can tell from one that failed.
        measured = torch.where(self._bad > 0, round_up_on_device(there), contributions)
        return factors, Observation(positions, round_up(limits), measured)

    def void(self, parameters: Sequence[torch.Tensor]) -> None:
        """Zero the gradients that are about to be applied, if a norm was not finite."""
        if self._bad is not None:
            bad = self._bad > 0
            for p in parameters:
                if p.grad is not None:
                    p.grad.masked_fill_(bad.to(p.device, non_blocking=True), 0.0)

    def add(self, due: Due) -> None:
        """One more fact that was promised."""
        self._due.append(due)
        self._steps += due.finish is not None
        self._rows += sum(len(part.positions) for part in due.parts)

    def advance(self, write: Callable[[list[Due], NDArray[np.float32]], None]) -> None:
        """Write what has arrived, and send off what waits if it is enough for one copy."""
        if self._copying is not None and self._copying[1].arrived():
            self._finish(write)
        if self._steps >= FLUSH_STEPS or self._rows >= FLUSH_ROWS:
            self._finish(write)
            self._start()

    def drain(self, write: Callable[[list[Due], NDArray[np.float32]], None]) -> None:
        """Write everything, waiting for the device."""
        self._finish(write)
        self._start()
        self._finish(write)

    def _start(self) -> None:
        if self._due:
            parts = [part.measured for due in self._due for part in due.parts if part.measured is not None]
            device = parts[0].device if parts else torch.device("cpu")
            bad = torch.zeros(1, device=device) if self._bad is None else self._bad.to(device).reshape(1)
            self._copying = self._due, self.copy(torch.cat([bad, *(part.to(device) for part in parts)]))
            self._due, self._steps, self._rows = [], 0, 0

    def _finish(self, write: Callable[[list[Due], NDArray[np.float32]], None]) -> None:
        if self._copying is not None:
            due, copy = self._copying
            values = copy.take()
            self.spoiled = max(self.spoiled, int(values[0]))
            write(due, values[1:])
            self._copying = None

    def check(self) -> None:
        """Raise AlignmentError PIA006 if the host has learned of a gradient that was not finite."""
        if self.spoiled:
            raise AlignmentError(
                "PIA006",
                f"{self.spoiled} per-sample gradients of the last steps were NaN or infinite",
                "Their step and all after it were made void on the device: nothing of them was released",
                "engine.abandon(), then go on from the parameters as they are, or from a checkpoint",
            )

    def forget(self) -> None:
        """Go on after a gradient that was not finite."""
        self._bad, self.spoiled = None, 0


def write_due(
    writer: LedgerWriter, due: list[Due], values: NDArray[np.float32], follow: Callable[[Event], None]
) -> None:
    """Complete promised facts in the ledger, then let ``follow`` take them in their order."""
    events, measured, used = [], [], 0
    for item in due:
        event, count = item.completed(values[used:])
        used += count
        events.append(event)
        if isinstance(event, Step):
            measured.append((item.number, event.contributions))
    writer.fulfil(measured)
    for event in events:
        follow(event)


def _send(limits: NDArray[np.float64], device: torch.device) -> torch.Tensor:
    values = torch.from_numpy(limits)
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
