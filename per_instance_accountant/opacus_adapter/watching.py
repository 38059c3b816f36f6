"""What a tracker says about loops that break the order of a step, and how it sees the forward passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch

from per_instance_accountant.errors import AlignmentError

if TYPE_CHECKING:
    from per_instance_accountant.opacus_adapter.capture import Tracker


class ForwardWatch:
    """Forward pre-hook that reports to a tracker. Copies of the model have none of it."""

    def __init__(self, tracker: Tracker | None = None) -> None:
        self.tracker = tracker

    def __call__(self, module: torch.nn.Module, inputs: Any, named: Any) -> None:
        if self.tracker is not None:
            self.tracker.count_forward(module, [inputs, named])

    def __reduce__(self) -> Any:
        return ForwardWatch, ()


UNBROKEN = "step every physical batch of a logical batch; after break or an error call engine.abandon()"


def broken(happened: str, fix: str = UNBROKEN) -> NoReturn:
    """Raise AlignmentError PIA002."""
    raise AlignmentError(
        "PIA002",
        happened,
        "The release would be of a batch that nobody drew, or an instance could enter it twice",
        fix,
    )


def refuse_hook() -> NoReturn:
    """Raise AlignmentError PIA004."""
    raise AlignmentError(
        "PIA004",
        "the optimizer's step hook was replaced after it got its accountant",
        "Opacus keeps one hook only, so its own accountant would stay at epsilon 0",
        "remove that attach_step_hook call; register_step_post_hook on optimizer.original_optimizer is free",
    )


def addresses(content: Any) -> set[int]:
    """Addresses of the tensors inside a batch."""
    if isinstance(content, torch.Tensor):
        return {content.data_ptr()} if content.numel() else set()
    if isinstance(content, dict):
        content = list(content.values())
    if not isinstance(content, (list, tuple)):
        return set()
    return {address for item in content for address in addresses(item)}
