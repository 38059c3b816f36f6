"""The Hugging Face ``Trainer``: private steps in the stock training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch.utils.data import DataLoader

from per_instance_accountant.errors import GuaranteeError, UnsupportedError, UsageError
from per_instance_accountant.integrations.desk import (
    Desk,
    continue_from,
    own_randomness,
    position,
    refuse,
    refuse_arguments,
    require,
    stand_in,
    uses_ghost,
)
from per_instance_accountant.integrations.ghost_loss import FrameworkLoss, LabelLosses, ghost_criterion
from per_instance_accountant.opacus_adapter import PrivacyEngine
from per_instance_accountant.opacus_adapter.loader import TrackedLoader, split_evenly

require("transformers", "transformers")
require("accelerate", "transformers")

from transformers import Trainer, TrainerCallback  # noqa: E402
from transformers.trainer_callback import ExportableState  # noqa: E402

KEY = "pia_index"
IGNORED = -100
"""Label that the losses of transformers leave out of their mean."""


class IndividualPrivacyCallback(TrainerCallback, ExportableState):
    """Makes the steps of a stock ``Trainer`` private and records every instance's part in them.

    engine: a fresh PrivacyEngine. noise_multiplier, max_grad_norm and other options: as for ``make_private``;
    the expected size of a draw is about ``per_device_train_batch_size * gradient_accumulation_steps``.
    delta: with it the running epsilons join what the Trainer logs (as private as the data).

    The callback gives the Trainer a loader whose batches carry a ticket under ``pia_index``, because the
    Trainer fetches batches ahead; the model's forward pass hands it in. With gradient accumulation each
    Poisson draw is split evenly, so one optimizer step is one draw. Losses must be means over instances:
    ``num_items_in_batch`` is withheld, because a loss divided by it lets one instance scale the gradients of
    the others. With ghost clipping the losses are computed from outputs and labels, one for each instance:
    ``criterion=losses`` with ``losses(outputs, labels)`` of shape (B,), cross entropy of a classification if
    none is given.

    >>> from transformers import TrainingArguments
    >>> privacy = IndividualPrivacyCallback(PrivacyEngine(accountant="rdp"), noise_multiplier=1.0,
    ...                                     max_grad_norm=1.0)
    >>> privacy.attached
    False
    """

    def __init__(self, engine: PrivacyEngine, *, delta: float | None = None, **options: Any) -> None:
        refuse_arguments(options)
        self.engine, self.delta = engine, delta
        self._options = options
        self._optimizer: Any = None
        self._begun = False

    @property
    def attached(self) -> bool:
        """Whether :meth:`attach` bound it to a Trainer."""
        return self._optimizer is not None

    def attach(self, trainer: Trainer) -> None:
        """Give ``trainer`` a private optimizer and loader, before ``trainer.train()``.

        Raises UnsupportedError PIA100 for settings of the Trainer that would change or hide private steps,
        PIA060 for models or loaders that cannot be tracked, UsageError PIA070 for a second call.
        """
        if self.attached:
            raise UsageError(
                "PIA070",
                "the callback is attached to a Trainer already",
                "Two trainings would write one ledger",
                "IndividualPrivacyCallback(PrivacyEngine(ledger=...), ...) for each Trainer",
            )
        _refuse_settings(trainer)
        ghost = uses_ghost(self._options)
        if ghost:
            _use_own_losses(trainer, self._options)
        parts = trainer.args.gradient_accumulation_steps
        model: Any = trainer.model
        model.train()
        trainer.create_optimizer()
        made = self.engine.make_private(
            module=model,
            optimizer=trainer.optimizer,
            data_loader=_plain_loader(trainer, parts),
            **{"criterion": _own_loss, "wrap_model": False, **self._options},
        )
        optimizer, loader = made[1], made[-1]
        own_randomness(optimizer, loader)
        desk = Desk(self.engine.tracker)
        loader.consumer = desk
        if ghost:
            trainer.compute_loss_func = _InstanceMean(ghost_criterion(made[2]))
            # The Trainer multiplies p.grad by 1 to find its norm, and logs what it finds.
            optimizer.hides_sum = True
        elif trainer.compute_loss_func is not None:
            trainer.compute_loss_func = _InstanceMean(trainer.compute_loss_func)
        elif not getattr(trainer, "loss_is_scaled_for_ga", None):
            # The Trainer divides by the number of accumulated batches; each is a part of one draw already.
            optimizer.gradient_scale = float(parts)
        trainer.model_accepts_loss_kwargs = False
        model.register_forward_pre_hook(_TicketHook(desk), with_kwargs=True, prepend=True)
        tickets = TicketLoader(split_evenly(loader, parts), desk, stand_in(loader, optimizer))
        # On the object, which the Trainer asks for its loader; its class stays as it is.
        vars(trainer)["get_train_dataloader"] = lambda: tickets
        trainer.optimizer = self._optimizer = optimizer
        # First, so that loggers see what it adds to the log.
        others = [callback for callback in trainer.callback_handler.callbacks if callback is not self]
        trainer.callback_handler.callbacks = [self, *others]

    def state(self) -> dict[str, Any]:
        """What the Trainer's checkpoints keep: the place in the ledger."""
        return {"args": {}, "attributes": {"position": position(self.engine) if self._begun else None}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Check that this Trainer steps the private optimizer; continue the ledger when it resumes."""
        mine = objects.get("optimizer")
        mine = getattr(mine, "optimizer", mine)
        if not self.attached or mine is not self._optimizer:
            raise UsageError(
                "PIA070",
                "the Trainer begins to train with an optimizer that is not private",
                "Nothing would be clipped, noised or recorded",
                "privacy.attach(trainer) before trainer.train(), once for each Trainer",
            )
        if state.global_step:
            _refuse_skipping(args)
            saved = state.stateful_callbacks.get(type(self).__name__, {})
            saved = saved[0] if isinstance(saved, list) else saved
            continue_from(self.engine, saved.get("attributes", {}).get("position"))
        self._begun = True

    def on_substep_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """A part of a draw is through the model: clip it and add it to the sum."""
        self._optimizer.step()
        self._optimizer.zero_grad()

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """The Trainer zeroes the model's gradients; per-sample gradients need the optimizer's own."""
        self._optimizer.zero_grad()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **objects: Any) -> None:
        if self.delta is not None and logs is not None and self._begun:
            values = self.engine.metrics(self.delta)
            logs.update(values)
            state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self.engine.tracker.recorder.flush()


class TicketLoader:
    """Batches of a tracked loader as dicts with a ticket; its length is the number of physical batches."""

    def __init__(self, loader: TrackedLoader, desk: Desk, stand_in: Any) -> None:
        self._loader, self._desk, self._stand_in = loader, desk, stand_in
        self.dataset = loader.dataset

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._loader:
            if not isinstance(batch, Mapping):
                raise UnsupportedError(
                    "PIA060",
                    f"a batch of type {type(batch).__name__} in a Trainer",
                    "It cannot carry the ticket that says which instances it is made of",
                    "let the data collator return a dict",
                )
            yield {**(self._stand_in if self._desk.empty else batch), KEY: self._desk.issued}


class _TicketHook:
    """Forward pre-hook: takes the ticket out of the model's arguments. A copied model has none of it."""

    def __init__(self, desk: Desk | None = None) -> None:
        self._desk = desk

    def __call__(self, module: torch.nn.Module, inputs: Any, named: dict[str, Any]) -> Any:
        if KEY not in named:
            return None
        named = dict(named)
        ticket = named.pop(KEY)
        if self._desk is not None:
            if isinstance(named.get("labels"), torch.Tensor):
                _check_labels(named["labels"])
            self._desk.collect(ticket)
        return inputs, named

    def __reduce__(self) -> Any:
        return _TicketHook, ()


class _InstanceMean:
    """A user's loss without ``num_items_in_batch``."""

    def __init__(self, loss: Any) -> None:
        self._loss = loss

    def __call__(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        ghost = isinstance(self._loss, FrameworkLoss)
        return self._loss(outputs, labels, **({} if ghost else {"num_items_in_batch": None}))


def _use_own_losses(trainer: Trainer, options: dict[str, Any]) -> None:
    """Ghost clipping needs the loss of each instance, not the mean that the model computes."""
    if trainer.compute_loss_func is not None:
        refuse(
            "compute_loss_func under ghost clipping, which needs the loss of each instance",
            "IndividualPrivacyCallback(..., criterion=losses), losses(outputs, labels) of shape (B,)",
        )
    options["criterion"] = LabelLosses(options.get("criterion"), options.get("loss_reduction", "mean"))


def _check_labels(labels: torch.Tensor) -> None:
    """Raise GuaranteeError PIA101 when instances count differently in a mean over all labels of the batch."""
    if labels.dim() == 0 or not len(labels):
        return
    counted = (labels != IGNORED).reshape(len(labels), -1)
    shifted = counted[:, 1:] if labels.dim() == 2 else counted
    if any(len(torch.unique(part.sum(dim=1))) > 1 for part in (counted, shifted)):
        raise GuaranteeError(
            "PIA101",
            "the instances of a batch have different numbers of labels that are not ignored",
            "The loss is a mean over all labels, so each instance scales the gradients of the others",
            "Trainer(compute_loss_func=...) with a mean over instances of each instance's own mean loss",
        )


def _own_loss(outputs: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """The loss that a model computes from its labels, for sweeps."""
    loss: torch.Tensor = outputs["loss"]
    return loss


def _plain_loader(trainer: Trainer, parts: int) -> DataLoader[Any]:
    stock = trainer.get_train_dataloader()
    names = (
        "collate_fn",
        "num_workers",
        "pin_memory",
        "persistent_workers",
        "worker_init_fn",
        "prefetch_factor",
    )
    options: dict[str, Any] = {name: getattr(stock, name) for name in names}
    return DataLoader(stock.dataset, batch_size=trainer.args.train_batch_size * parts, **options)


def _refuse_skipping(args: Any) -> None:
    if not args.ignore_data_skip:
        refuse(
            "the Trainer resumes by skipping batches of the epoch it was in",
            "TrainingArguments(ignore_data_skip=True): Poisson draws are independent of earlier ones",
        )


def _refuse_settings(trainer: Trainer) -> None:
    args = trainer.args
    single = args.world_size == 1 and args.n_gpu <= 1
    found = {
        "TrainingArguments(max_grad_norm=0.0)": bool(args.max_grad_norm and args.max_grad_norm > 0),
        "TrainingArguments(fp16=False)": args.fp16,
        "TrainingArguments(label_smoothing_factor=0.0)": args.label_smoothing_factor != 0,
        "TrainingArguments(gradient_checkpointing=False)": args.gradient_checkpointing,
        "TrainingArguments(torch_compile=False)": args.torch_compile,
        "TrainingArguments(auto_find_batch_size=False)": args.auto_find_batch_size,
        "TrainingArguments(restore_callback_states_from_checkpoint=False)": (
            args.restore_callback_states_from_checkpoint
        ),
        "one process and one device for each Trainer": not single,
        "no deepspeed, no fsdp": bool(args.deepspeed) or bool(args.fsdp),
        "attach to a new Trainer, before its train()": (
            hasattr(trainer.optimizer, "optimizer") or isinstance(trainer.optimizer, DPOptimizer)
        ),
    }
    for fix, wrong in found.items():
        if wrong:
            refuse("a setting of the Trainer that private steps cannot work with", fix)
