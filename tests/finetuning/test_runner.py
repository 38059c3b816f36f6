"""The runner takes exactly the planned steps, whatever interrupts it, on nobody's data but the retained."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.utils.data import Subset, TensorDataset
from tqdm.auto import tqdm

from per_instance_accountant import FixedThresholds, PrivacyEngine, PrivacyFilter, account, plan, verify
from per_instance_accountant.errors import PiaError, PlanError, UnsupportedError, UsageError
from per_instance_accountant.finetuning import (
    UnlearningRun,
    project,
    reseed,
    run_estimate,
    run_plan,
    runner,
    secret_of,
)
from per_instance_accountant.finetuning.files import save_secret
from per_instance_accountant.ledger import Ledger
from per_instance_accountant.ledger.records import Drop, Phase, Step, Thresholds
from per_instance_accountant.unlearning import UnlearningPlan, bound_of, issue, softmax_regression

N, FEATURES, CLASSES = 60, 5, 3
FORGET = [4, 17]
CLIP = 1.5
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(N, FEATURES, generator=generator)
    features *= (0.2 + 0.79 * torch.rand(N, 1, generator=generator)) / features.norm(dim=1, keepdim=True)
    return TensorDataset(features, torch.randint(0, CLASSES, (N,), generator=generator))


def linear() -> nn.Linear:
    model = nn.Linear(FEATURES, CLASSES, bias=False)
    nn.init.zeros_(model.weight)
    return model


@dataclass
class Trained:
    """A training run on disk, and what is needed to unlearn from it."""

    directory: Path
    batch_size: int = 15
    noise_multiplier: float = 2.0

    @property
    def ledger(self) -> Path:
        return self.directory / "run"

    @property
    def checkpoint(self) -> Path:
        return self.directory / "before.pt"

    def train(
        self,
        steps: int = 60,
        thresholds_of_zero: list[int] | None = None,
        budget: PrivacyFilter | None = None,
    ) -> Trained:
        data, model = dataset(), linear()
        thresholds = np.sqrt(2) * data.tensors[0].norm(dim=1).numpy() * 1.01
        thresholds[thresholds_of_zero or []] = 0
        known = softmax_regression(
            feature_norm=1.0, num_instances=N, denominator=self.batch_size, individual_thresholds=True
        )
        engine = PrivacyEngine(
            ledger=self.ledger,
            charging=FixedThresholds(thresholds=thresholds),
            assumptions=known.to_dict(),
            filter=budget,
        )
        private, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.4, weight_decay=0.1),
            data_loader=torch.utils.data.DataLoader(
                data, batch_size=self.batch_size, generator=torch.Generator().manual_seed(1)
            ),
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=CLIP,
            noise_generator=torch.Generator().manual_seed(0),
        )
        taken = 0
        while taken < steps:
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(private(x), y).backward()
                optimizer.step()
                taken += 1
        engine.close()
        torch.save(model.state_dict(), self.checkpoint)
        return self

    def plan(self, ids: list[int] = FORGET, target: float = 0.05) -> UnlearningPlan:
        return plan(self.ledger, ids=ids, target_epsilon=target, order=8)

    def run(self, made: UnlearningPlan, **changes: Any) -> UnlearningRun:
        retained = np.setdiff1d(np.arange(N), list(made.ids)).tolist()
        arguments: dict[str, Any] = {
            "ledger": self.ledger,
            "module": linear(),
            "dataset": Subset(dataset(), retained),
            "criterion": nn.CrossEntropyLoss(),
            "checkpoint": self.checkpoint,
            "output": self.directory / "after",
            "seed": 5,
            "progress": False,
        }
        return run_plan(made, **(arguments | changes))


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    return Trained(tmp_path).train()


def unlearn_steps(ledger: Path) -> list[Step]:
    kind, steps = "", []
    for event in Ledger.open(ledger).events():
        kind = event.kind if isinstance(event, Phase) else kind
        steps += [event] if isinstance(event, Step) and kind == "unlearn" else []
    return steps


def test_a_finished_run_has_the_planned_steps_and_a_valid_certificate(trained: Trained) -> None:
    made = trained.plan()
    assert made.steps is not None and 1 < made.steps < 60
    owed_before = account(trained.ledger).rdp
    run = trained.run(made)
    steps = unlearn_steps(trained.ledger)
    assert len(steps) == run.steps == made.steps
    assert not any(np.isin(step.positions, FORGET).any() for step in steps)
    assert verify(run.certificate, ledger=trained.ledger, checkpoint=run.checkpoint).valid
    assert {stat.S_IMODE(path.stat().st_mode) for path in (run.checkpoint, run.certificate)} == {0o600}
    owed_now = account(trained.ledger).rdp
    np.testing.assert_array_equal(owed_now[FORGET], owed_before[FORGET])
    others = np.setdiff1d(np.arange(N), FORGET)
    assert (owed_now[others] > owed_before[others]).all(), "the retained pay for the noisy steps"


def test_each_step_is_the_mechanism_of_the_plan(trained: Trained) -> None:
    """Full arithmetic by hand: batch, clipped sum, noise, normaliser, regulariser."""
    made = trained.plan()
    run = trained.run(made)
    m = made.mechanism
    data, theta = dataset(), torch.load(trained.checkpoint, weights_only=True)["weight"].double()
    thresholds = torch.tensor(np.sqrt(2) * data.tensors[0].norm(dim=1).numpy() * 1.01)
    for number, step in enumerate(unlearn_steps(trained.ledger)):
        sampling, noise = torch.Generator(), torch.Generator()
        reseed(sampling, noise, secret=secret_of(5), step=number)
        total = torch.zeros_like(theta)
        for i in step.positions.tolist():
            x, y = data.tensors[0][i].double(), data.tensors[1][i]
            residual = torch.softmax(theta @ x, 0) - nn.functional.one_hot(y, CLASSES)
            gradient = torch.outer(residual, x)
            assert gradient.norm() <= thresholds[i]
            total += gradient
        drawn = torch.normal(0.0, m.noise_std, theta.shape, generator=noise)
        theta -= m.learning_rate * ((total + drawn.double()) / m.denominator + m.weight_decay * theta)
    torch.testing.assert_close(run.module.weight.double(), theta, rtol=1e-4, atol=1e-5)


class Killed(BaseException):
    """Stands for the end of the process."""


def kill_before_noise(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The step is in the ledger, its noise is not drawn yet."""
    original, count = DPOptimizer.add_noise, [0]

    def add_noise(self: DPOptimizer) -> None:
        count[0] += 1
        if count[0] == at:
            raise Killed
        original(self)

    monkeypatch.setattr(DPOptimizer, "add_noise", add_noise)


def kill_in_loss(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The batch is drawn, the step is not in the ledger yet."""
    original, count = nn.CrossEntropyLoss.forward, [0]

    def forward(self: nn.CrossEntropyLoss, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        count[0] += 1
        if count[0] == at:
            raise Killed
        return original(self, x, y)

    monkeypatch.setattr(nn.CrossEntropyLoss, "forward", forward)


@pytest.mark.parametrize("kill", [kill_before_noise, kill_in_loss])
@pytest.mark.parametrize("at", [1, 2, 26, 30])
def test_a_killed_run_continues_without_losing_or_repeating_a_step(
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill: Callable[[pytest.MonkeyPatch, int], None],
    at: int,
) -> None:
    made = trained.plan()
    with monkeypatch.context() as patched:
        kill(patched, at)
        with pytest.raises(Killed):
            trained.run(made)
    run = trained.run(made)
    assert len(unlearn_steps(trained.ledger)) == made.steps
    assert verify(run.certificate, ledger=trained.ledger, checkpoint=run.checkpoint).valid
    other = Trained(tmp_path / "undisturbed")
    other.directory.mkdir()
    undisturbed = other.train().run(other.plan())
    torch.testing.assert_close(run.module.weight, undisturbed.module.weight, rtol=0, atol=0)


def test_a_killed_run_continues_without_those_whom_the_filter_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repeated steps are taken beside the ledger, where nobody would be known to have left."""

    def prepared(name: str) -> Trained:
        (tmp_path / name).mkdir()
        return Trained(tmp_path / name).train(budget=PrivacyFilter(budget=1.2, order=8))

    trained, other = prepared("killed"), prepared("undisturbed")
    gone = {
        p for e in Ledger.open(trained.ledger).events() if isinstance(e, Drop) for p in e.positions.tolist()
    }
    assert 10 < len(gone) < N - 10
    made = trained.plan()
    with monkeypatch.context() as patched:
        kill_before_noise(patched, 9)
        with pytest.raises(Killed):
            trained.run(made)
    run = trained.run(made)
    undisturbed = other.run(other.plan())
    assert run.steps > 9 and verify(run.content, ledger=trained.ledger, checkpoint=run.checkpoint).valid
    torch.testing.assert_close(run.module.weight, undisturbed.module.weight, rtol=0, atol=0)
    drawn = [e for e in unlearn_steps(trained.ledger) if set(e.positions.tolist()) & gone]
    assert drawn and all(e.contributions[np.isin(e.positions, list(gone))].max() == 0 for e in drawn)


def test_an_interrupted_step_is_never_released_with_fresh_noise(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeded bug: batches and noise that do not follow from the secret are noticed."""
    made = trained.plan()
    with monkeypatch.context() as patched:
        kill_before_noise(patched, 3)
        with pytest.raises(Killed):
            trained.run(made)
    calls = iter(range(1000))

    def careless(sampling: torch.Generator, noise: torch.Generator, *, secret: bytes, step: int) -> None:
        noise.manual_seed(next(calls))
        sampling.manual_seed(next(calls))

    monkeypatch.setattr("per_instance_accountant.finetuning.runner.reseed", careless)
    with pytest.raises(PlanError, match="PIA033"):
        trained.run(made)


@pytest.mark.parametrize("at", [1, 3, 30])
def test_a_run_whose_output_was_lost_is_repeated_and_goes_on(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Same batches, same noise: the model is the one that the lost directory would have led to."""
    made = trained.plan()
    with monkeypatch.context() as patched:
        kill_before_noise(patched, at)
        with pytest.raises(Killed):
            trained.run(made, seed=None)
    (kept,) = trained.ledger.glob("*.secret")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    shutil.copytree(trained.directory, tmp_path / "copy", ignore=shutil.ignore_patterns("copy"))
    expected = Trained(tmp_path / "copy").run(made, seed=None)
    shutil.rmtree(trained.directory / "after")
    run = trained.run(made, seed=None)
    assert torch.equal(run.module.weight, expected.module.weight)
    assert len(unlearn_steps(trained.ledger)) == made.steps and not kept.exists()
    assert verify(run.certificate, ledger=trained.ledger, checkpoint=run.checkpoint).valid


@pytest.mark.parametrize("bug", ["another secret", "another model", "no secret"])
def test_a_lost_run_is_not_repeated_with_other_noise_or_from_another_model(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, bug: str
) -> None:
    """Seeded bugs: each would be a second release of recorded steps."""
    made = trained.plan()
    with monkeypatch.context() as patched:
        kill_before_noise(patched, 5)
        with pytest.raises(Killed):
            trained.run(made, seed=None)
    shutil.rmtree(trained.directory / "after")
    (kept,), right = trained.ledger.glob("*.secret"), torch.load(trained.checkpoint, weights_only=True)
    if bug == "another secret":
        save_secret(kept, b"0" * 16)
    elif bug == "another model":
        torch.save({"weight": torch.randn(CLASSES, FEATURES)}, trained.checkpoint)
    else:
        kept.unlink()
    before = Ledger.open(trained.ledger).num_steps
    with pytest.raises(PlanError, match="PIA033"):
        trained.run(made, seed=None)
    assert Ledger.open(trained.ledger).num_steps == before
    assert not (trained.directory / "after" / "certificate.json").exists()
    if bug == "another model":
        torch.save(right, trained.checkpoint)
        assert trained.run(made, seed=None).steps == made.steps, "the mistake left nothing behind"


def test_without_a_seed_two_runs_differ(tmp_path: Path) -> None:
    weights = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        one = Trained(tmp_path / name).train()
        weights.append(one.run(one.plan(), seed=None).module.weight.detach())
    assert not torch.equal(*weights)


def test_a_second_request_builds_on_the_first(trained: Trained) -> None:
    first = trained.run(trained.plan())
    with pytest.raises(PlanError, match="PIA032"):
        trained.plan([FORGET[0], 30])
    second = trained.plan([30])
    retained = np.setdiff1d(np.arange(N), [*FORGET, 30]).tolist()
    run = trained.run(
        second,
        dataset=Subset(dataset(), retained),
        checkpoint=first.checkpoint,
        output=trained.directory / "second",
    )
    assert verify(run.certificate, ledger=trained.ledger, checkpoint=run.checkpoint).valid
    still_there = Subset(dataset(), np.setdiff1d(np.arange(N), [30, 31]).tolist())
    third = trained.plan([31])
    with pytest.raises(PlanError, match="PIA034"):
        trained.run(third, dataset=still_there, output=trained.directory / "third")


def test_a_retained_instance_with_a_zero_threshold_is_not_taken_for_forgotten(tmp_path: Path) -> None:
    one = Trained(tmp_path)
    one.train(thresholds_of_zero=[9])
    made = one.plan()
    run = one.run(made)
    event = [e for e in Ledger.open(one.ledger).events() if isinstance(e, Thresholds)][-1]
    assert np.flatnonzero(event.values == 0).tolist() == FORGET and event.values[9] > 0
    assert verify(run.certificate, ledger=one.ledger, checkpoint=run.checkpoint).valid


def refusals(trained: Trained, made: UnlearningPlan) -> dict[str, tuple[type[PiaError], dict[str, Any]]]:
    all_rows, retained = list(range(N)), np.setdiff1d(np.arange(N), FORGET).tolist()
    harmful = trained.directory / "pickle.pt"
    torch.save({"weight": trained}, harmful)
    misfit = trained.directory / "misfit.pt"
    torch.save(nn.Linear(2, 2).state_dict(), misfit)
    return {
        "evaluation mode": (UsageError, {"module": linear().eval()}),
        "running statistics": (
            UnsupportedError,
            {"module": nn.Sequential(linear(), nn.BatchNorm1d(CLASSES))},
        ),
        "frozen parameters": (UsageError, {"module": linear().requires_grad_(False)}),
        "parameters that are not frozen": (UsageError, {"frozen": ["weight"]}),
        "a summed loss": (UsageError, {"criterion": nn.CrossEntropyLoss(reduction="sum")}),
        "a forgotten row": (PlanError, {"dataset": Subset(dataset(), all_rows)}),
        "a missing row": (PlanError, {"dataset": Subset(dataset(), retained[1:])}),
        "a repeated row": (PlanError, {"dataset": Subset(dataset(), [*retained[1:], retained[1]])}),
        "unknown positions": (UsageError, {"dataset": dataset()}),
        "wrong positions": (UsageError, {"dataset": dataset(), "positions": [1, 2]}),
        "a pickle": (UnsupportedError, {"checkpoint": harmful}),
        "another model": (UsageError, {"checkpoint": misfit}),
    }


@pytest.mark.parametrize(
    "case",
    [
        "evaluation mode",
        "running statistics",
        "frozen parameters",
        "parameters that are not frozen",
        "a summed loss",
        "a forgotten row",
        "a missing row",
        "a repeated row",
        "unknown positions",
        "wrong positions",
        "a pickle",
        "another model",
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(trained: Trained, case: str) -> None:
    made = trained.plan()
    error, change = refusals(trained, made)[case]
    before = Ledger.open(trained.ledger).digest
    with pytest.raises(error):
        trained.run(made, **change)
    assert Ledger.open(trained.ledger).digest == before
    assert not (trained.directory / "after").exists()


def test_a_plan_of_another_moment_is_refused(trained: Trained) -> None:
    stale = trained.plan([30])
    trained.run(trained.plan())
    with pytest.raises(PlanError, match="PIA033"):
        trained.run(stale, output=trained.directory / "other")


def test_an_unreachable_plan_is_refused(trained: Trained) -> None:
    hopeless = plan(trained.ledger, ids=FORGET, target_epsilon=1e-9, order=8, assumptions={})
    assert not hopeless.reachable and hopeless.steps is None
    with pytest.raises(PlanError, match="PIA030"):
        trained.run(hopeless)


def test_an_output_directory_of_another_plan_is_refused(trained: Trained) -> None:
    trained.run(trained.plan())
    with pytest.raises(PlanError, match="PIA033"):
        trained.run(trained.plan([30]))


def test_a_model_that_diverged_gets_no_certificate(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trained.plan()
    original = DPOptimizer.add_noise

    def infinite(self: DPOptimizer) -> None:
        original(self)
        for p in self.params:
            p.grad.mul_(float("inf"))

    monkeypatch.setattr(DPOptimizer, "add_noise", infinite)
    with pytest.raises(PiaError):
        trained.run(made)
    assert not (trained.directory / "after" / "certificate.json").exists()


RADIUS = 0.05


@pytest.fixture
def loud(tmp_path: Path) -> Trained:
    """Noise that drowns a batch: what a bound without any assumption on the loss needs."""
    return Trained(tmp_path, noise_multiplier=15.0).train()


def projected(loud: Trained) -> UnlearningPlan:
    made = plan(
        loud.ledger,
        ids=FORGET,
        target_epsilon=0.02,
        target_delta=1e-3,
        assumptions={},
        projection_radius=RADIUS,
        max_steps=500,
    )
    assert made.bound == "R5 bounded domain" and made.steps and made.steps > 1
    return made


def test_a_projected_plan_projects_before_every_step_and_is_certified(loud: Trained) -> None:
    """No assumption on the loss: the ball alone carries the bound, and the ledger states it."""
    made, trained = projected(loud), loud
    module, seen = linear(), []

    def watched(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append(float(module.weight.detach().norm()))
        return nn.functional.cross_entropy(output, target)

    run = trained.run(made, module=module, criterion=watched)
    assert len(seen) == made.steps and max(seen) <= RADIUS * (1 + 1e-6)
    assert verify(run.certificate, ledger=trained.ledger, checkpoint=run.checkpoint).valid
    phases = [event for event in Ledger.open(trained.ledger).events() if isinstance(event, Phase)]
    assert phases[-1].projection_radius == RADIUS and phases[0].projection_radius is None


def test_a_run_that_does_not_project_as_planned_is_not_certified(
    loud: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, trained = projected(loud), loud
    attach = runner.attach
    monkeypatch.setattr(runner, "attach", lambda *a, **k: attach(*a, **(k | {"projection_radius": None})))
    with pytest.raises(PlanError, match=r"PIA033.*mechanism"):
        trained.run(made)


def test_projection_is_onto_the_ball_over_all_parameters() -> None:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.bias.fill_(4.0)
    project(model, 100.0)
    assert float(model.weight[0, 0]) == 3.0
    project(model, None)
    project(model, 1.0)
    whole = torch.cat([p.detach().ravel() for p in model.parameters()])
    assert float(whole.norm()) == pytest.approx(1.0, rel=1e-6)
    assert float(model.bias[0] / model.weight[0, 0]) == pytest.approx(4 / 3, rel=1e-6)


def test_full_batch_langevin_runs_end_to_end(tmp_path: Path) -> None:
    langevin = Trained(tmp_path, batch_size=N).train(steps=40)
    made = langevin.plan(target=0.02)
    assert made.mechanism.sample_rate == 1.0 and made.bound == "R3 contractive" and made.steps
    run = langevin.run(made)
    assert {len(step.positions) for step in unlearn_steps(langevin.ledger)} == {N - len(FORGET)}
    assert verify(run.certificate, ledger=langevin.ledger, checkpoint=run.checkpoint).valid


def test_an_estimate_is_labelled_and_never_certified(trained: Trained) -> None:
    made, before = trained.plan(), Ledger.open(trained.ledger).anchor
    retained = np.setdiff1d(np.arange(N), FORGET).tolist()
    arguments: dict[str, Any] = {
        "ledger": trained.ledger,
        "module": linear(),
        "dataset": Subset(dataset(), retained),
        "criterion": nn.CrossEntropyLoss(),
        "checkpoint": trained.checkpoint,
        "output": trained.directory / "estimate",
        "seed": 1,
        "progress": False,
    }
    done = run_estimate(FORGET, steps=made.steps or 0, **arguments)
    assert done.basis == "ESTIMATE" and "ESTIMATE" in done.note.read_text()
    assert not torch.equal(torch.load(done.checkpoint)["weight"], torch.load(trained.checkpoint)["weight"])
    assert (
        Ledger.open(trained.ledger).anchor == before
        and not (done.checkpoint.parent / "certificate.json").exists()
    )
    with pytest.raises(PlanError, match="PIA033"):
        issue(made, trained.ledger, trained.checkpoint, done.checkpoint)
    with pytest.raises(PlanError, match="PIA034"):
        run_estimate(FORGET, steps=1, **(arguments | {"dataset": Subset(dataset(), list(range(N)))}))
    with pytest.raises(UsageError, match="PIA070"):
        run_estimate(FORGET, steps=-1, **arguments)
    run = trained.run(made)
    with pytest.raises(PlanError, match="PIA033"):
        run_estimate(
            [20],
            steps=1,
            **(
                arguments
                | {
                    "output": run.checkpoint.parent,
                    "dataset": Subset(dataset(), np.setdiff1d(np.arange(N), [*FORGET, 20]).tolist()),
                }
            ),
        )


def test_sequential_requests_are_planned_run_and_certified_one_after_the_other(trained: Trained) -> None:
    """The second plan builds on the first run; both certificates stay valid afterwards."""
    first = trained.run(trained.plan())
    second_plan = trained.plan([20, 33])
    second = run_plan(
        second_plan,
        ledger=trained.ledger,
        module=linear(),
        dataset=Subset(dataset(), np.setdiff1d(np.arange(N), [*FORGET, 20, 33]).tolist()),
        criterion=nn.CrossEntropyLoss(),
        checkpoint=first.checkpoint,
        output=trained.directory / "second",
        seed=6,
        progress=False,
    )
    assert second_plan.training_steps == 60 + first.steps
    for run in (first, second):
        assert verify(run.certificate, ledger=trained.ledger, checkpoint=run.checkpoint).valid
    assert not verify(first.certificate, ledger=trained.ledger, checkpoint=second.checkpoint).valid
    assert not any(np.isin(step.positions, [*FORGET]).any() for step in unlearn_steps(trained.ledger))
    with pytest.raises(PlanError, match="PIA032"):
        trained.plan([20])


def test_the_secret_of_the_noise_does_not_outlive_the_run(trained: Trained) -> None:
    made = trained.plan()
    first = trained.run(made, seed=None)
    left = torch.load(trained.directory / "after" / "progress.pt", weights_only=True)
    assert left["secret"] == "" and left["steps"] == made.steps
    digest = Ledger.open(trained.ledger).digest
    again = trained.run(made, seed=None)
    assert torch.equal(first.module.weight, again.module.weight)
    assert Ledger.open(trained.ledger).digest == digest, "a finished run takes no further step"


def test_the_checkpoint_of_another_run_is_refused(trained: Trained, tmp_path: Path) -> None:
    """A file of ``save_checkpoint`` says which run and step it is of."""
    made = trained.plan()
    anchor = made.anchor.to_dict()
    stated = {"module_state_dict": linear().state_dict(), "per_instance_accountant": {"anchor": anchor}}
    torch.save(stated, tmp_path / "right.pt")
    stated["per_instance_accountant"] = {"anchor": anchor | {"run_id": "0" * 32}}
    torch.save(stated, tmp_path / "other.pt")
    before = Ledger.open(trained.ledger).digest
    with pytest.raises(PlanError, match="PIA033"):
        trained.run(made, checkpoint=tmp_path / "other.pt")
    assert Ledger.open(trained.ledger).digest == before
    assert trained.run(made, checkpoint=tmp_path / "right.pt").steps == made.steps


def test_the_bar_shows_the_bound_after_the_steps_so_far(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trained.plan()
    monkeypatch.setattr(runner, "tqdm", lambda **given: tqdm(**(given | {"disable": False})))
    shown: list[tuple[int, str]] = []
    original = tqdm.set_postfix_str

    def keep(bar: tqdm, text: str = "", refresh: bool = True) -> None:
        shown.append((bar.n, text))
        original(bar, text, refresh)

    monkeypatch.setattr(tqdm, "set_postfix_str", keep)
    bar = runner._Bar(SimpleNamespace(plan=made, steps=made.steps), trained.ledger, 0, shown=True)
    for _ in range(made.steps or 0):
        bar.update()
    bar.close()
    bound = bound_of(made, trained.ledger)
    assert len(shown) >= 10 and shown[-1][0] == made.steps
    for steps, text in shown:
        stated = float(text.removeprefix("epsilon <= "))
        assert bound.value(steps) <= stated <= bound.value(steps) * 1.002
    assert bound.value(made.steps or 0) == made.value <= 0.05 < bound.value((made.steps or 0) - 1)


def test_frozen_parameters_that_are_stated_are_left_alone() -> None:
    from per_instance_accountant.finetuning.admission import refuse_module

    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    module[0].requires_grad_(False)
    refuse_module(module, ["0.weight", "0.bias"])
    for wrong in ([], ["0.weight"], ["0.weight", "0.bias", "1.bias"]):
        with pytest.raises(UsageError, match="PIA070"):
            refuse_module(module, wrong)
