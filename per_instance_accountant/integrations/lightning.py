"""Lightning: a callback that makes the steps of an ordinary LightningModule private."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from per_instance_accountant.errors import AlignmentError, UsageError
from per_instance_accountant.integrations.desk import (
    continue_from,
    own_randomness,
    position,
    refuse,
    refuse_arguments,
    require,
    stand_in,
    uses_ghost,
)
from per_instance_accountant.integrations.ghost_loss import FrameworkLoss
from per_instance_accountant.opacus_adapter import PrivacyEngine, Tracker
from per_instance_accountant.opacus_adapter.loader import TrackedLoader, check_loader, split_evenly

require("lightning", "lightning")

import lightning as L  # noqa: E402
from lightning.pytorch.strategies import SingleDeviceStrategy  # noqa: E402


class IndividualPrivacyCallback(L.Callback):
    """Makes the steps of a Lightning ``Trainer`` private and records every instance's part in them.

    engine: a fresh PrivacyEngine. noise_multiplier, max_grad_norm and other options: as for
    ``make_private``. delta: with it the running epsilons are logged at the end of each epoch (as private as
    the data). criterion: the loss that the sweeps of ``Sweep`` measure, over the module that
    :func:`trained_module` finds, and that :attr:`loss` computes; cross entropy if none is given.

    With ghost clipping a ``training_step`` returns ``privacy.loss(output, target)``, an ordinary tensor
    whose backward pass runs the two passes of ghost clipping.

    Pass the loader through :meth:`loader`. The expected size of a draw is about its batch size times
    ``accumulate_grad_batches``; each draw is split evenly over the accumulated batches.

    >>> privacy = IndividualPrivacyCallback(PrivacyEngine(accountant="rdp"), noise_multiplier=1.0,
    ...                                     max_grad_norm=1.0)
    >>> privacy.state_key
    'IndividualPrivacyCallback'
    """

    def __init__(self, engine: PrivacyEngine, *, delta: float | None = None, **options: Any) -> None:
        refuse_arguments(options)
        self.engine, self.delta = engine, delta
        self._options = options
        self.loss = FrameworkLoss(
            options.get("criterion")
            or torch.nn.CrossEntropyLoss(reduction=options.get("loss_reduction", "mean"))
        )
        """The criterion of the loop, with every way of clipping; needed with ghost clipping."""
        self._loader: PrivateLoader | None = None
        self._saved: Any = None
        self._optimizer: Any = None
        self._started = 0

    def loader(self, data_loader: DataLoader[Any]) -> PrivateLoader:
        """What to pass to ``trainer.fit`` for ``data_loader``. Raises UnsupportedError PIA060."""
        check_loader(data_loader)
        if self._loader is not None:
            refuse(
                "two loaders for one run", "IndividualPrivacyCallback(PrivacyEngine(...), ...) for each run"
            )
        self._loader = PrivateLoader(data_loader)
        return self._loader

    @property
    def state_key(self) -> str:
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """The place in the ledger. Raises AlignmentError PIA002 inside a logical batch."""
        return {} if self._optimizer is None else position(self.engine)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replace optimizer and loader by private ones, and continue the ledger of a checkpoint.

        Raises UnsupportedError PIA100 for settings that would change or hide private steps, UsageError PIA070
        when the loader did not come from :meth:`loader`, LedgerError PIA040 for a checkpoint without a place.
        """
        _refuse_settings(trainer)
        if self._loader is None:
            raise UsageError(
                "PIA070",
                "fit began without a loader of the privacy callback",
                "Nobody would know which instances a step uses",
                "trainer.fit(module, privacy.loader(DataLoader(dataset, batch_size=...)))",
            )
        parts = trainer.accumulate_grad_batches
        made = self.engine.make_private(
            module=trained_module(pl_module, trainer.optimizers[0]),
            optimizer=trainer.optimizers[0],
            data_loader=self._loader.drawing(parts),
            wrap_model=False,
            **self._options,
        )
        optimizer, loader = made[1], made[-1]
        if uses_ghost(self._options):
            self.loss.bind(made[2])
        own_randomness(optimizer, loader)
        if trainer.ckpt_path is not None:
            continue_from(self.engine, self._saved)
        # Lightning divides the loss by the number of accumulated batches; each is a part of one draw already.
        optimizer.gradient_scale = float(parts) if pl_module.automatic_optimization else 1.0
        self._loader.bind(split_evenly(loader, parts), stand_in(loader, optimizer), self.engine.tracker)
        self._optimizer = optimizer
        trainer.optimizers = [optimizer]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Raise AlignmentError PIA007 when Lightning fetched further ahead than it trains."""
        self._started += 1
        if self._loader is None or self._loader.delivered != self._started:
            raise AlignmentError(
                "PIA007",
                "the batch that training begins with is not the last one of the private loader",
                "Steps would be recorded with the instances of another batch",
                "trainer.fit(module, privacy.loader(data_loader)) with one loader, not a collection",
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A part of a draw is through the model, and Lightning did not step: add it to the sum."""
        if self.engine.tracker.holds_part:
            self._optimizer.step()
            self._optimizer.zero_grad()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.delta is not None:
            pl_module.log_dict(self.engine.metrics(self.delta))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.engine.tracker.recorder.flush()


class PrivateLoader:
    """A loader for ``trainer.fit`` that becomes private when the fit starts."""

    def __init__(self, data_loader: DataLoader[Any]) -> None:
        self._plain = data_loader
        self._private: TrackedLoader | None = None
        self.delivered = 0
        """Batches handed out so far."""

    def drawing(self, parts: int) -> DataLoader[Any]:
        """The user's loader with batches that are ``parts`` times as large."""
        plain = self._plain
        if parts == 1 or plain.batch_size is None:
            return plain
        names = (
            "collate_fn",
            "num_workers",
            "pin_memory",
            "persistent_workers",
            "worker_init_fn",
            "generator",
        )
        options: dict[str, Any] = {name: getattr(plain, name) for name in names}
        return DataLoader(plain.dataset, batch_size=plain.batch_size * parts, **options)

    def bind(self, private: TrackedLoader, stand_in: Any, tracker: Tracker) -> None:
        """Hand out the batches of ``private`` from now on."""
        self._private, self._stand_in, self._tracker = private, stand_in, tracker

    @property
    def _current(self) -> TrackedLoader:
        if self._private is None:
            raise UsageError(
                "PIA070",
                "the private loader was read before the fit with its callback started",
                "Its batches would be in no ledger",
                "L.Trainer(callbacks=[privacy]).fit(module, privacy.loader(data_loader))",
            )
        return self._private

    def __len__(self) -> int:
        return len(self._current)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._current:
            self.delivered += 1
            yield self._stand_in if self._tracker.batch_is_empty else batch


def trained_module(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> torch.nn.Module:
    """The innermost module that owns all parameters of ``optimizer``: its forward passes are counted.

    A ``training_step`` may then call ``self.net(x)`` when everything is inside ``net``; with several trained
    submodules it must call ``self(x)``.

    >>> inner = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    >>> outer = torch.nn.ModuleDict({"net": inner})
    >>> trained_module(outer, torch.optim.SGD(outer.parameters())) is inner
    True
    """
    wanted = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for child in module.children():
        if wanted <= {id(p) for p in child.parameters()}:
            return trained_module(child, optimizer)
    return module


def _refuse_settings(trainer: Any) -> None:
    found = {
        "Trainer(devices=1): the loader draws for one process": not isinstance(
            trainer.strategy, SingleDeviceStrategy
        ),
        "one optimizer from configure_optimizers": len(trainer.optimizers) != 1,
        "Trainer(gradient_clip_val=None)": bool(trainer.gradient_clip_val),
        "Trainer(precision='32-true')": str(trainer.precision) not in ("32-true", "64-true", "bf16-mixed"),
        "Trainer(overfit_batches=0)": bool(trainer.overfit_batches),
        "Trainer(reload_dataloaders_every_n_epochs=0)": bool(trainer.reload_dataloaders_every_n_epochs),
        "one IndividualPrivacyCallback": sum(
            isinstance(callback, IndividualPrivacyCallback) for callback in trainer.callbacks
        )
        != 1,
    }
    for fix, wrong in found.items():
        if wrong:
            refuse("a setting of the Trainer that private steps cannot work with", fix)
