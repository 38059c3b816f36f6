"""Accelerate: private steps in loops that an ``Accelerator`` prepares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from per_instance_accountant.errors import UsageError
from per_instance_accountant.integrations.desk import own_randomness, refuse, require, stand_in
from per_instance_accountant.integrations.ghost_loss import ghost_criterion
from per_instance_accountant.opacus_adapter import PrivacyEngine, Tracker
from per_instance_accountant.opacus_adapter.loader import TrackedLoader, relay, split_evenly

require("accelerate", "transformers")

from accelerate import Accelerator  # noqa: E402
from accelerate.utils import send_to_device  # noqa: E402


def prepare(
    accelerator: Accelerator, engine: PrivacyEngine, model: Any, optimizer: Any, *rest: Any
) -> tuple[Any, ...]:
    """Prepare what ``engine.make_private`` returned for a loop of Accelerate: the same tuple.

    Accelerate builds loaders anew and reads a batch ahead; the positions of the instances stay with the
    batch, and the step is attributed when the loop receives it. With ``gradient_accumulation_steps=k`` each
    Poisson draw is split evenly over k batches: ``data_loader`` draws whole steps. Use
    ``accelerator.backward(loss)``. Returns (model, optimizer, loader), and with ghost clipping (model,
    optimizer, criterion, loader): losses of this criterion are ordinary tensors. Raises UnsupportedError
    PIA100 for several processes and float16, UsageError PIA071 for objects of another engine.

    >>> import torch
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> model, examples = torch.nn.Linear(2, 1), TensorDataset(torch.ones(8, 2), torch.ones(8, 1))
    >>> engine = PrivacyEngine(accountant="rdp")
    >>> made = engine.make_private(
    ...     module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    ...     data_loader=DataLoader(examples, batch_size=4), noise_multiplier=1.0, max_grad_norm=1.0)
    >>> accelerator = Accelerator(cpu=True)
    >>> model, optimizer, loader = prepare(accelerator, engine, *made)
    >>> for x, y in loader:
    ...     optimizer.zero_grad()
    ...     accelerator.backward(torch.nn.functional.mse_loss(model(x), y))
    ...     optimizer.step()
    >>> engine.ledger.num_steps
    2
    """
    tracker, data_loader = engine.tracker, rest[-1] if rest else None
    if optimizer is not tracker.optimizer or not isinstance(data_loader, TrackedLoader):
        raise UsageError(
            "PIA071",
            "optimizer and loader are not those that this engine made private",
            "Steps would be taken without noise or without a record",
            "prepare(accelerator, engine, *engine.make_private(...)), before accelerator.prepare",
        )
    if accelerator.num_processes > 1:
        refuse("an Accelerator over several processes", "torchrun with DPDDP: docs/several_processes.md")
    if accelerator.mixed_precision == "fp16":
        refuse("mixed_precision='fp16', which scales losses", "Accelerator(mixed_precision='no')")
    parts = accelerator.gradient_accumulation_steps
    empty = send_to_device(stand_in(data_loader, optimizer), accelerator.device)
    split = split_evenly(data_loader, parts)
    optimizer.gradient_scale = float(parts)
    shard = accelerator.prepare_data_loader(split)
    model, optimizer = accelerator.prepare(model, optimizer)
    # Now that the parameters are where they stay: noise is drawn on their device.
    own_randomness(tracker.optimizer, data_loader)
    criterion = [ghost_criterion(loss) for loss in rest[:-1]]
    return model, optimizer, *criterion, AcceleratedLoader(shard, split, tracker, empty)


class AcceleratedLoader:
    """Batches of a prepared loader, attributed when the loop receives them. Made by :func:`prepare`."""

    def __init__(self, shard: Any, loader: TrackedLoader, tracker: Tracker, stand_in: Any) -> None:
        self._shard, self._loader, self._tracker, self._stand_in = shard, loader, tracker, stand_in
        self.dataset = loader.dataset

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in relay(iter(self._shard), self._loader):
            yield self._stand_in if self._tracker.batch_is_empty else batch
            # Accelerate makes step() do nothing until the last of the accumulated batches.
            if self._tracker.holds_part:
                self._tracker.optimizer.step()
                self._tracker.optimizer.zero_grad()
