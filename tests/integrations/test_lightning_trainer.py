"""Lightning takes private steps, and the ledger says exactly who was in them."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from per_instance_accountant import PrivacyEngine, PrivacyFilter, Sweep, account, audit
from per_instance_accountant.errors import PiaError
from per_instance_accountant.integrations.lightning import IndividualPrivacyCallback, PrivateLoader
from per_instance_accountant.ledger import Ledger, Resume, Step, Thresholds
from tests.integrations.conftest import CLIP, check_steps, examples, norms_by_hand, parameters

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec.*")


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


class Module(L.LightningModule):
    with_own_loss = True
    loss: Any = None

    def __init__(self, optimizers: int = 1) -> None:
        super().__init__()
        self.net, self.count = network(), optimizers
        self.snapshots: list[dict[str, torch.Tensor]] = []
        self.empty = 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.snapshots.append(parameters(self.net))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        self.empty += not len(x)
        if self.with_own_loss:
            return nn.functional.cross_entropy(self.net(x), y)
        return self.loss(self.net(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("validation", self.loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        made = [torch.optim.SGD(self.parameters(), lr=0.05) for _ in range(self.count)]
        return made if self.count > 1 else made[0]


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def own_loss(weights: dict[str, torch.Tensor], row: int) -> torch.Tensor:
    x, y = examples()[row]
    return nn.functional.cross_entropy(torch.func.functional_call(network(), weights, (x[None],)), y[None])


def run(
    folder: Any,
    *,
    module: Any = None,
    engine: Any = None,
    batch_size: int = 6,
    ckpt: Any = None,
    **changed: Any,
) -> tuple[Module, IndividualPrivacyCallback, L.Trainer]:
    module = module or Module()
    options = {name: changed.pop(name) for name in ("num_workers",) if name in changed}
    extra, delta = changed.pop("callbacks", []), changed.pop("delta", None)
    private = changed.pop("private", {})
    privacy = IndividualPrivacyCallback(
        engine or PrivacyEngine(accountant="rdp"),
        delta=delta,
        noise_multiplier=1.0,
        max_grad_norm=CLIP,
        **private,
    )
    module.loss = privacy.loss
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "default_root_dir": folder,
    }
    trainer = L.Trainer(callbacks=[privacy, *extra], **{**settings, **changed})
    loader = privacy.loader(DataLoader(examples(), batch_size=batch_size, **options))
    trainer.fit(module, loader, ckpt_path=ckpt)
    return module, privacy, trainer


@pytest.mark.parametrize(
    ("parts", "workers", "kind"), [(1, 0, Module), (3, 0, Module), (2, 2, Module), (1, 0, Manual)]
)
def test_recorded_contributions_are_those_of_the_drawn_instances(tmp_path, parts, workers, kind, torch_seed):
    module, privacy, trainer = run(
        tmp_path, module=kind(), accumulate_grad_batches=parts, num_workers=workers
    )
    engine = privacy.engine
    assert check_steps(engine, module.snapshots, own_loss) > 80
    assert trainer.global_step == engine.ledger.num_steps == engine.accountant.history[0][2]
    largest = audit(engine.ledger, delta=1e-3, tight=False).epsilon.max()
    assert largest == pytest.approx(engine.get_epsilon(1e-3), rel=0.02)


class Ghost(Module):
    with_own_loss = False


class ManualGhost(Manual):
    with_own_loss = False


GHOST = {"grad_sample_mode": "ghost"}


@pytest.mark.parametrize(
    ("parts", "kind", "batch_size"), [(1, Ghost, 6), (3, Ghost, 6), (1, Ghost, 1), (1, ManualGhost, 6)]
)
def test_ghost_clipping(tmp_path, parts, kind, batch_size, torch_seed):
    module, privacy, trainer = run(
        tmp_path, module=kind(), accumulate_grad_batches=parts, batch_size=batch_size, private=GHOST
    )
    assert check_steps(privacy.engine, module.snapshots, own_loss) > 80
    assert trainer.global_step == privacy.engine.ledger.num_steps
    # Evaluation after and during training takes the plain criterion.
    with torch.no_grad():
        expected = nn.functional.cross_entropy(module.net(torch.ones(2, 6)), torch.tensor([0, 1]))
        assert torch.equal(module.loss(module.net(torch.ones(2, 6)), torch.tensor([0, 1])), expected)


def test_the_same_module_with_and_without_ghost_clipping(tmp_path, torch_seed):
    found = []
    for private in ({}, GHOST):
        torch.manual_seed(3)
        engine = PrivacyEngine(accountant="rdp", charging=Sweep(every=5, slack=1.1))
        module, _, _ = run(tmp_path, module=Ghost(), engine=engine, private=private)
        assert len(module.snapshots) == engine.ledger.num_steps > 10
        found.append(next(e for e in engine.ledger.events() if isinstance(e, Thresholds)).values)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


def test_an_ordinary_loss_under_ghost_clipping_releases_nothing(tmp_path, torch_seed):
    engine = PrivacyEngine(accountant="rdp")
    with pytest.raises(PiaError, match="PIA005"):
        run(tmp_path, engine=engine, private=GHOST)
    assert engine.ledger.num_steps == 0


def test_without_undoing_the_division_contributions_differ(tmp_path, monkeypatch, torch_seed):
    """Seeded bug."""
    bind = PrivateLoader.bind

    def forgetful(self: Any, *arguments: Any) -> None:
        bind(self, *arguments)
        arguments[-1].optimizer.gradient_scale = 1.0

    monkeypatch.setattr(PrivateLoader, "bind", forgetful)
    module, privacy, _ = run(tmp_path, accumulate_grad_batches=3)
    with pytest.raises(AssertionError):
        check_steps(privacy.engine, module.snapshots, own_loss)


def test_empty_draws_reach_the_model_as_a_stand_in_and_charge_nobody(tmp_path, torch_seed):
    module, privacy, _ = run(tmp_path, batch_size=1, max_epochs=1)
    steps = [event for event in privacy.engine.ledger.events() if isinstance(event, Step)]
    assert sum(len(step.positions) == 0 for step in steps) > 10
    assert module.empty == 0
    check_steps(privacy.engine, module.snapshots, own_loss)


def test_sweeps_and_budgets_inside_lightning(tmp_path, torch_seed):
    engine = PrivacyEngine(
        accountant="rdp", charging=Sweep(every=5, slack=1.1), filter=PrivacyFilter(budget=1.5, delta=1e-2)
    )
    module, _, _ = run(tmp_path, engine=engine, accumulate_grad_batches=2, delta=1e-2)
    found = [event for event in engine.ledger.events() if isinstance(event, Thresholds)]
    rows = np.arange(len(examples()))
    for number, thresholds in enumerate(found):
        norms = np.minimum(norms_by_hand(own_loss, module.snapshots[5 * number], rows) * 1.1, CLIP)
        np.testing.assert_allclose(thresholds.values, norms, rtol=3e-5)
    assert len(found) == 3 and engine.dropped.any()


def test_resume_continues_the_ledger(tmp_path, torch_seed):
    engine = PrivacyEngine(accountant="rdp", ledger=tmp_path / "run")
    saved = L.pytorch.callbacks.ModelCheckpoint(
        dirpath=tmp_path, filename="a", every_n_epochs=1, save_top_k=-1
    )
    run(tmp_path, engine=engine, enable_checkpointing=True, callbacks=[saved], max_epochs=1)
    engine.close()
    engine = PrivacyEngine(accountant="rdp", ledger=tmp_path / "run")
    for _ in range(2):
        engine = PrivacyEngine(accountant="rdp", ledger=tmp_path / "run")
        module, _, _ = run(tmp_path, engine=engine, ckpt=tmp_path / "a.ckpt", max_epochs=2)
        engine.close()
    ledger = Ledger.open(tmp_path / "run")
    events = list(ledger.events())
    # Both continuations were released from one checkpoint, so both stay charged.
    assert ledger.num_steps == 3 * 11
    assert [event.at_step for event in events if isinstance(event, Resume)] == [11]
    assert engine.accountant.history[0][2] == 22
    steps = [event for event in events if isinstance(event, Step)][22:]
    for step, weights in zip(steps, module.snapshots, strict=True):
        expected = np.minimum(norms_by_hand(own_loss, weights, step.positions), CLIP)
        np.testing.assert_allclose(step.contributions, expected, rtol=3e-5)


def test_resume_without_a_place_in_the_ledger_is_refused(tmp_path, torch_seed):
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    plain = L.Trainer(max_epochs=1, accelerator="cpu", **quiet)
    plain.fit(Module(), DataLoader(examples(), batch_size=6))
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    engine = PrivacyEngine(accountant="rdp")
    with pytest.raises(PiaError, match="PIA040"):
        run(tmp_path, engine=engine, ckpt=tmp_path / "plain.ckpt")
    assert engine.ledger.num_steps == 0


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"gradient_clip_val": 1.0}, "gradient_clip_val"),
        ({"module": Module(optimizers=2)}, "multiple optimizers"),
        ({"overfit_batches": 3}, "overfit"),
        (
            {"callbacks": [IndividualPrivacyCallback(PrivacyEngine())]},
            "one IndividualPrivacyCallback|state_key",
        ),
    ],
    ids=lambda changed: next(iter(changed)) if isinstance(changed, dict) else "",
)
def test_settings_that_change_or_hide_steps_are_refused(tmp_path, changed, reason):
    engine = PrivacyEngine(accountant="rdp")
    with pytest.raises((PiaError, RuntimeError), match=reason):
        run(tmp_path, engine=engine, **changed)
    with pytest.raises(PiaError, match="PIA070"):
        _ = engine.tracker


def test_several_processes_are_refused(tmp_path):
    """Before anything is made private; Lightning's own set-up of processes is not part of this test."""
    privacy = IndividualPrivacyCallback(
        PrivacyEngine(accountant="rdp"), noise_multiplier=1.0, max_grad_norm=CLIP
    )
    trainer = L.Trainer(strategy="ddp", devices=1, accelerator="cpu", logger=False, callbacks=[privacy])
    with pytest.raises(PiaError, match=r"PIA100.*one process"):
        privacy.on_fit_start(trainer, Module())


def test_loaders_in_the_wrong_place_are_refused(tmp_path):
    privacy = IndividualPrivacyCallback(
        PrivacyEngine(accountant="rdp"), noise_multiplier=1.0, max_grad_norm=CLIP
    )
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(callbacks=[privacy], max_epochs=1, accelerator="cpu", **quiet)
    with pytest.raises(PiaError, match=r"PIA070.*privacy.loader"):
        trainer.fit(Module(), DataLoader(examples(), batch_size=6))
    loader = privacy.loader(DataLoader(examples(), batch_size=6))
    with pytest.raises(PiaError, match=r"PIA070.*before the fit"):
        next(iter(loader))
    with pytest.raises(PiaError, match=r"PIA100.*two loaders"):
        privacy.loader(DataLoader(examples(), batch_size=6))
    with pytest.raises(PiaError, match="PIA007"):
        trainer.fit(Module(), DataLoader(examples(), batch_size=6))
    assert privacy.engine.ledger.num_steps == 0
    with pytest.raises(PiaError, match=r"PIA060.*twice"):
        trainer.fit(Module(), loader)


def test_stopping_inside_a_draw_is_noticed(tmp_path, torch_seed):
    with pytest.raises(PiaError, match="PIA002"):
        run(tmp_path, accumulate_grad_batches=3, limit_train_batches=5)


def test_a_model_of_several_parts_is_called_as_a_whole(tmp_path, torch_seed):
    class Parts(Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.net(x))

    class Whole(Parts):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    class Twice(Parts):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.head(self.net(batch[0])), batch[1])

    _, privacy, _ = run(tmp_path, module=Whole(), max_epochs=1)
    assert privacy.engine.ledger.num_steps == 11
    with pytest.raises(PiaError, match="PIA005"):
        run(tmp_path, module=Twice(), max_epochs=1)


def test_a_budget_can_end_the_run_quietly(tmp_path, torch_seed):
    budget = PrivacyFilter(budget=1.6, delta=1e-2, on_spent="stop")
    engine = PrivacyEngine(accountant="rdp", filter=budget)
    _, _, trainer = run(tmp_path, engine=engine, accumulate_grad_batches=2, max_epochs=5)
    assert trainer.global_step == engine.ledger.num_steps > 0
    assert account(engine.ledger).epsilon(1e-2).max() <= 1.6


def test_validation_and_checkpoints_inside_an_epoch(tmp_path, torch_seed):
    class Validated(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def val_dataloader(self) -> DataLoader[Any]:
            return DataLoader(examples(), batch_size=31)

    saved = L.pytorch.callbacks.ModelCheckpoint(dirpath=tmp_path / "c", every_n_train_steps=2, save_top_k=-1)
    module, privacy, _ = run(
        tmp_path,
        module=Validated(),
        accumulate_grad_batches=3,
        callbacks=[saved],
        enable_checkpointing=True,
        val_check_interval=3,
    )
    assert len(list((tmp_path / "c").iterdir())) == 4
    check_steps(privacy.engine, module.snapshots, own_loss)


def test_skipping_inside_a_training_step_is_noticed(tmp_path, torch_seed):
    class Skipping(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    with pytest.raises(PiaError, match="PIA005"):
        run(tmp_path, module=Skipping())
