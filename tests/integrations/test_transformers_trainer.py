"""The stock Trainer takes private steps, and the ledger says exactly who was in them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from per_instance_accountant import LastSeen, PrivacyEngine, PrivacyFilter, Sweep, WorstCase, account, audit
from per_instance_accountant.errors import PiaError
from per_instance_accountant.integrations import desk
from per_instance_accountant.integrations.transformers import IndividualPrivacyCallback
from per_instance_accountant.ledger import Ledger, Resume, Step, Thresholds
from tests.integrations.conftest import CLIP, check_steps, norms_by_hand

SIZE = 40


class Sentences(Dataset):
    def __init__(self, labels: torch.Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(5, 60, (SIZE, 8), generator=generator)
        self.labels = torch.randint(0, 2, (SIZE,), generator=generator) if labels is None else labels

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[row], "labels": self.labels[row]}


def tiny() -> BertForSequenceClassification:
    torch.manual_seed(5)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=60,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    # One row of positions is shared by all instances, so it has no per-sample gradient.
    model.bert.embeddings.position_embeddings.requires_grad_(False)
    return model


class Snapshots(TrainerCallback):
    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})


def own_loss(weights: dict[str, torch.Tensor], row: int) -> torch.Tensor:
    batch = {name: value[None] for name, value in Sentences()[row].items()}
    return torch.func.functional_call(tiny(), weights, (), batch).loss


def training(
    folder: Any,
    *,
    parts: int = 1,
    engine: Any = None,
    attach: bool = True,
    noise: float = 1.0,
    **changed: Any,
) -> tuple[Trainer, IndividualPrivacyCallback, Snapshots]:
    trainer_options = {name: changed.pop(name) for name in ("compute_loss_func",) if name in changed}
    private = changed.pop("private", {})
    dataset, model = changed.pop("dataset", Sentences()), changed.pop("model", None) or tiny()
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": parts,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**{**options, **changed}),
        train_dataset=dataset,
        **trainer_options,
    )
    privacy = IndividualPrivacyCallback(
        engine or PrivacyEngine(accountant="rdp"), noise_multiplier=noise, max_grad_norm=CLIP, **private
    )
    snapshots = Snapshots()
    trainer.add_callback(snapshots)
    if attach:
        privacy.attach(trainer)
    return trainer, privacy, snapshots


@pytest.mark.parametrize("parts", [1, 3])
def test_recorded_contributions_are_those_of_the_drawn_instances(tmp_path, parts, torch_seed):
    trainer, privacy, snapshots = training(tmp_path, parts=parts)
    trainer.train()
    assert trainer.state.global_step == len(snapshots.weights) == (20 if parts == 1 else 8)
    assert check_steps(privacy.engine, snapshots.weights, own_loss) > 40
    assert privacy.engine.get_epsilon(1e-3) > 0
    assert len(privacy.engine.accountant.history) == 1
    assert privacy.engine.accountant.history[0][2] == trainer.state.global_step
    largest = audit(privacy.engine.ledger, delta=1e-3, tight=False).epsilon.max()
    assert largest == pytest.approx(privacy.engine.get_epsilon(1e-3), rel=0.02)


@pytest.mark.parametrize(("parts", "mode"), [(1, "hooks"), (3, "hooks"), (3, "ghost")])
def test_the_release_is_the_clipped_sum_of_the_drawn_instances(tmp_path, parts, mode, torch_seed):
    trainer, privacy, snapshots = training(
        tmp_path, parts=parts, noise=0.0, max_steps=3, private={"grad_sample_mode": mode}
    )
    trainer.train()
    after = [*snapshots.weights[1:], {n: p.detach() for n, p in trainer.model.named_parameters()}]
    steps = [event for event in privacy.engine.ledger.events() if isinstance(event, Step)]
    for step, before, later in zip(steps, snapshots.weights, after, strict=True):
        total = {name: torch.zeros_like(p) for name, p in before.items()}
        for row in step.positions.tolist():
            leaves = {name: p.clone().requires_grad_() for name, p in before.items()}
            gradients = torch.autograd.grad(own_loss(leaves, row), list(leaves.values()))
            norm = float(sum(g.square().sum() for g in gradients).sqrt())
            for name, g in zip(total, gradients, strict=True):
                total[name] += g * min(1.0, CLIP / norm)
        for name, p in before.items():
            moved = (later[name] - p) / -0.05 * trainer.optimizer.optimizer.expected_batch_size
            torch.testing.assert_close(moved, total[name], rtol=1e-3, atol=2e-5)


def test_attribution_at_fetch_time_would_be_wrong_and_is_caught(tmp_path, monkeypatch, torch_seed):
    """Seeded bug: the tracker hears of a batch when the Trainer fetches it."""
    monkeypatch.setattr(desk.Desk, "collect", lambda self, ticket: None)
    monkeypatch.setattr(desk.Desk, "begin", lambda self, batch: setattr(self, "issued", self.issued + 1))
    trainer, privacy, _ = training(tmp_path)
    with pytest.raises(PiaError, match="PIA00"):
        trainer.train()
    monkeypatch.setattr(desk.Desk, "begin", lambda self, batch: self._tracker.begin(batch))
    trainer, privacy, snapshots = training(tmp_path, parts=3)
    with suppress(PiaError):
        trainer.train()
    with pytest.raises(AssertionError):
        check_steps(privacy.engine, snapshots.weights, own_loss)


@pytest.mark.parametrize("bug", ["scale", "num_items"])
def test_losses_divided_by_the_trainer_are_undone(tmp_path, monkeypatch, bug, torch_seed):
    """Seeded bugs: without the undoing, or with num_items_in_batch, contributions differ."""
    trainer, privacy, snapshots = training(tmp_path, parts=3)
    if bug == "scale":
        trainer.optimizer.gradient_scale = 1.0
    else:
        trainer.model_accepts_loss_kwargs = True
    trainer.train()
    with pytest.raises(AssertionError):
        check_steps(privacy.engine, snapshots.weights, own_loss)


def test_empty_draws_are_steps_that_charge_nobody(tmp_path, torch_seed):
    trainer, privacy, snapshots = training(tmp_path, per_device_train_batch_size=1, num_train_epochs=1)
    trainer.train()
    steps = [event for event in privacy.engine.ledger.events() if isinstance(event, Step)]
    assert sum(len(step.positions) == 0 for step in steps) > 5
    check_steps(privacy.engine, snapshots.weights, own_loss)


def test_sweeps_and_budgets_inside_the_trainer(tmp_path, torch_seed):
    engine = PrivacyEngine(
        accountant="rdp",
        charging=Sweep(every=4, slack=1.1),
        filter=PrivacyFilter(budget=1.5, delta=1e-2),
    )
    trainer, _, snapshots = training(tmp_path, parts=2, engine=engine)
    trainer.train()
    found = [event for event in engine.ledger.events() if isinstance(event, Thresholds)]
    assert len(found) == 3
    for number, thresholds in enumerate(found):
        rows = np.arange(0, SIZE, 7)
        norms = np.minimum(norms_by_hand(own_loss, snapshots.weights[4 * number], rows) * 1.1, CLIP)
        np.testing.assert_allclose(thresholds.values[rows], norms, rtol=3e-5)
    assert engine.dropped.any()
    assert audit(engine.ledger, delta=1e-2).certified_budget.max() <= 1.5


def test_resume_continues_the_ledger(tmp_path, torch_seed):
    engine = PrivacyEngine(accountant="rdp", ledger=tmp_path / "run")
    saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 7}
    trainer, _, _ = training(tmp_path, parts=2, engine=engine, **saving)
    trainer.train()
    engine.close()
    engine = PrivacyEngine(accountant="rdp", ledger=tmp_path / "run")
    trainer, _, snapshots = training(
        tmp_path, parts=2, engine=engine, **{**saving, "max_steps": 9, "ignore_data_skip": True}
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    engine.close()
    ledger = Ledger.open(tmp_path / "run")
    events = list(ledger.events())
    assert [event.at_step for event in events if isinstance(event, Resume)] == [4]
    assert ledger.num_steps == 7 + 5
    assert engine.accountant.history[0][2] == 9
    steps = [event for event in events if isinstance(event, Step)][7:]
    for step, weights in zip(steps, snapshots.weights, strict=True):
        expected = np.minimum(norms_by_hand(own_loss, weights, step.positions), CLIP)
        np.testing.assert_allclose(step.contributions, expected, rtol=3e-5)


@pytest.mark.parametrize("bug", [False, True])
def test_a_resumed_trainer_repeats_neither_noise_nor_draws(tmp_path, monkeypatch, bug, torch_seed):
    """The Trainer restores torch's random state. Seeded bug: noise and draws come from that state."""
    if bug:
        monkeypatch.setattr("per_instance_accountant.integrations.transformers.own_randomness", print)
    weights, draws = [], []
    for resume in (None, str(tmp_path / "checkpoint-10")):
        engine = PrivacyEngine(accountant="rdp", ledger=tmp_path / "run")
        trainer, _, snapshots = training(
            tmp_path, engine=engine, save_strategy="steps", save_steps=10, max_steps=14, ignore_data_skip=True
        )
        trainer.train(resume_from_checkpoint=resume)
        engine.close()
        weights.append(snapshots.weights[-1]["classifier.bias"])
        draws.append(
            [event.positions.tolist() for event in engine.ledger.events() if isinstance(event, Step)]
        )
    assert (draws[1][10:14] == draws[1][14:]) is bug
    assert torch.equal(*weights) is bug


def test_resume_is_refused_without_a_place_or_with_skipped_batches(tmp_path, torch_seed):
    trainer, _, _ = training(tmp_path, save_strategy="steps", save_steps=2, max_steps=3)
    trainer.train()
    again, privacy, _ = training(tmp_path, max_steps=5)
    with pytest.raises(PiaError, match=r"PIA100.*ignore_data_skip"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    # This ledger is in memory: the steps before the checkpoint are not in it.
    again, privacy, _ = training(tmp_path, max_steps=5, ignore_data_skip=True)
    with pytest.raises(PiaError, match="PIA040"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    plain, _, _ = training(tmp_path / "plain", attach=False, save_strategy="steps", save_steps=2, max_steps=3)
    plain.train()
    again, privacy, _ = training(tmp_path, max_steps=5, ignore_data_skip=True)
    with pytest.raises(PiaError, match="PIA040"):
        again.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))
    assert privacy.engine.ledger.num_steps == 0


@pytest.mark.parametrize(
    "changed",
    [
        {"max_grad_norm": 1.0},
        {"label_smoothing_factor": 0.1},
        {"gradient_checkpointing": True},
        {"auto_find_batch_size": True},
        {"restore_callback_states_from_checkpoint": True},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_settings_that_change_or_hide_steps_are_refused(tmp_path, changed):
    trainer, privacy, _ = training(tmp_path, attach=False, **changed)
    with pytest.raises(PiaError, match=rf"PIA100.*{next(iter(changed))}"):
        privacy.attach(trainer)
    assert not privacy.attached
    assert trainer.optimizer is None


def test_wrong_order_is_refused(tmp_path):
    trainer, privacy, _ = training(tmp_path, attach=False)
    trainer.add_callback(privacy)
    with pytest.raises(PiaError, match=r"PIA070.*attach\(trainer\) before"):
        trainer.train()
    with pytest.raises(PiaError, match=r"PIA100.*new Trainer"):
        privacy.attach(trainer)
    trainer, _, _ = training(tmp_path, attach=False)
    trainer.add_callback(privacy)
    privacy.attach(trainer)
    assert sum(callback is privacy for callback in trainer.callback_handler.callbacks) == 1
    with pytest.raises(PiaError, match=r"PIA070.*attached"):
        privacy.attach(trainer)
    second, other, _ = training(tmp_path, attach=False)
    second.add_callback(privacy)
    with pytest.raises(PiaError, match=r"PIA070.*not private"):
        second.train()
    with pytest.raises(PiaError, match=r"PIA100.*new Trainer"):
        other.attach(trainer)


@pytest.mark.parametrize(("parts", "options"), [(3, {}), (2, {"per_device_train_batch_size": 1})])
def test_ghost_clipping(tmp_path, parts, options, torch_seed):
    trainer, privacy, snapshots = training(
        tmp_path, parts=parts, private={"grad_sample_mode": "ghost"}, **options
    )
    trainer.train()
    assert trainer.state.global_step == len(snapshots.weights) == privacy.engine.ledger.num_steps
    assert check_steps(privacy.engine, snapshots.weights, own_loss) > 40
    expected = np.mean([float(own_loss(dict(trainer.model.named_parameters()), row)) for row in range(SIZE)])
    assert trainer.evaluate(Sentences())["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_losses_of_ones_own_under_ghost_clipping(tmp_path, torch_seed):
    def losses(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        return 2.0 * torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="none")

    engine = PrivacyEngine(accountant="rdp", charging=Sweep(every=4))
    private = {"grad_sample_mode": "ghost", "criterion": losses}
    trainer, _, snapshots = training(tmp_path, engine=engine, private=private)
    trainer.train()
    first = next(event for event in engine.ledger.events() if isinstance(event, Thresholds))
    rows = np.arange(SIZE)
    norms = norms_by_hand(lambda weights, row: 2 * own_loss(weights, row), snapshots.weights[0], rows)
    slack = Sweep(every=4).slack
    np.testing.assert_allclose(first.values, np.minimum(norms * slack, CLIP), rtol=1e-4)
    step = next(event for event in engine.ledger.events() if isinstance(event, Step))
    at = step.positions
    np.testing.assert_allclose(step.contributions, np.minimum(norms[at], first.values[at]), rtol=1e-4)


def test_ghost_clipping_asks_for_the_loss_of_each_instance(tmp_path, torch_seed):
    trainer, privacy, _ = training(
        tmp_path,
        attach=False,
        private={"grad_sample_mode": "ghost"},
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum(),
    )
    with pytest.raises(PiaError, match=r"PIA100.*each instance"):
        privacy.attach(trainer)
    targets = torch.rand(SIZE)
    trainer, _, _ = training(
        tmp_path, private={"grad_sample_mode": "ghost"}, dataset=Sentences(targets), model=tiny()
    )
    with pytest.raises(PiaError, match=r"PIA060.*criterion=losses"):
        trainer.train()


def test_losses_over_different_numbers_of_labels_are_refused(tmp_path):
    """Removing an instance would change the scale of the others: by hand, then by the refusal."""
    labels = Sentences().labels.clone()
    labels[::3] = -100
    trainer, _, _ = training(tmp_path, dataset=Sentences(labels))
    with pytest.raises(PiaError, match="PIA101"):
        trainer.train()

    def mean_of_counted(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        assert num_items_in_batch is None
        return torch.nn.functional.cross_entropy(outputs["logits"], labels.clamp(min=0))

    trainer, privacy, _ = training(
        tmp_path, dataset=Sentences(labels), compute_loss_func=mean_of_counted, max_steps=3
    )
    trainer.train()
    assert privacy.engine.ledger.num_steps == 3


def test_token_losses_leak_between_instances_in_the_way_that_is_refused():
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[1, 2, 0, 1], [1, -100, -100, -100]])
    both = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    alone = torch.nn.functional.cross_entropy(logits[:1].flatten(0, 1), labels[:1].flatten())
    first = torch.autograd.grad(both * 2, logits)[0][0].norm()
    assert float(first / torch.autograd.grad(alone, logits)[0][0].norm()) == pytest.approx(8 / 5, rel=1e-5)


def test_running_epsilons_join_the_log(tmp_path, torch_seed):
    engine = PrivacyEngine(accountant="rdp", charging=WorstCase())
    trainer, privacy, _ = training(tmp_path, engine=engine, logging_strategy="steps", logging_steps=2)
    privacy.delta = 1e-3
    trainer.train()
    logged = [entry["privacy/epsilon_worst"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 10 and logged == sorted(logged)


def test_last_seen_is_an_estimate_here_too(tmp_path, torch_seed):
    trainer, privacy, _ = training(tmp_path, engine=PrivacyEngine(charging=LastSeen()), max_steps=2)
    trainer.train()
    assert account(privacy.engine.ledger).basis.name == "ESTIMATE"


def test_training_again_goes_on_in_the_same_ledger(tmp_path, torch_seed):
    trainer, privacy, snapshots = training(tmp_path, parts=2, max_steps=3)
    trainer.train()
    trainer.train()
    assert privacy.engine.ledger.num_steps == 6
    check_steps(privacy.engine, snapshots.weights, own_loss)


def test_evaluation_and_workers_do_not_shift_the_attribution(tmp_path, torch_seed):
    class Evaluating(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_evaluate = True

    trainer, privacy, snapshots = training(
        tmp_path, parts=3, max_steps=5, dataloader_num_workers=1, dataloader_persistent_workers=True
    )
    trainer.eval_dataset = Sentences()
    trainer.add_callback(Evaluating())
    trainer.train()
    trainer.predict(Sentences())
    assert privacy.engine.ledger.num_steps == 5
    check_steps(privacy.engine, snapshots.weights, own_loss)


def test_a_loss_of_two_forward_passes_is_refused(tmp_path, monkeypatch):
    def twice(self: Any, model: Any, inputs: Any, **_: Any) -> torch.Tensor:
        return (model(**inputs).loss + model(**inputs).loss) / 2

    monkeypatch.setattr(Trainer, "compute_loss", twice)
    trainer, privacy, _ = training(tmp_path, max_steps=2)
    with pytest.raises(PiaError, match=r"PIA001.*a second time"):
        trainer.train()
    assert privacy.engine.ledger.num_steps == 0


def test_a_budget_that_stops_the_run_raises_before_the_step(tmp_path, torch_seed):
    budget = PrivacyFilter(budget=1.6, delta=1e-2, on_spent="stop")
    engine = PrivacyEngine(accountant="rdp", charging=WorstCase(), filter=budget)
    trainer, _, _ = training(tmp_path, engine=engine)
    with pytest.raises(PiaError, match="PIA020"):
        trainer.train()
    assert account(engine.ledger).epsilon(1e-2).max() <= 1.6
    assert engine.ledger.num_steps > 0


def test_another_batch_size_after_a_resume_is_a_phase_of_its_own(tmp_path, torch_seed):
    for size, steps, resume in ((4, 3, None), (8, 5, str(tmp_path / "checkpoint-2"))):
        engine = PrivacyEngine(accountant="rdp", ledger=tmp_path / "run")
        trainer, _, _ = training(
            tmp_path,
            engine=engine,
            per_device_train_batch_size=size,
            max_steps=steps,
            save_strategy="steps",
            save_steps=2,
            ignore_data_skip=True,
        )
        trainer.train(resume_from_checkpoint=resume)
        engine.close()
    assert [phase.sample_rate for phase in Ledger.open(tmp_path / "run").phases] == [0.1, 0.2]
    assert engine.accountant.history == [(1.0, 0.1, 2), (1.0, 0.2, 3)]
