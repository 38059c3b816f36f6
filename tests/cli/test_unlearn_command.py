"""``pia unlearn`` for real: a model trained with Opacus, a plan, its steps, a certificate that verifies."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from per_instance_accountant import Ledger, PrivacyEngine
from per_instance_accountant.unlearning import softmax_regression
from tests.cli.conftest import Pia

PROJECT = """
import torch
from torch.utils.data import Subset, TensorDataset

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
features = 0.99 * torch.nn.functional.normalize(torch.randn(80, 6, generator=generator))
training = TensorDataset(features, (features[:, 0] > 0).long())
retained = Subset(training, [i for i in range(80) if i not in (3, 5)])


def model():
    return torch.nn.Linear(6, 2, bias=False)
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cli_project.py").write_text(PROJECT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cli_project", raising=False)
    return tmp_path


def train() -> None:
    import cli_project

    module = cli_project.model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=0.1)
    known = softmax_regression(feature_norm=1.0, num_instances=80, denominator=8)
    engine = PrivacyEngine(ledger="runs", assumptions=known.to_dict())
    loader = torch.utils.data.DataLoader(cli_project.training, batch_size=8)
    private, optimizer, loader = engine.make_private(
        module=module, optimizer=optimizer, data_loader=loader, noise_multiplier=3.0, max_grad_norm=1.5
    )
    for features, labels in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(private(features), labels).backward()
        optimizer.step()
    engine.close()
    torch.save(module.state_dict(), "model.pt")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_train_plan_unlearn_verify(pia: Pia, project: Path) -> None:
    train()
    target = ("--target-epsilon", 0.1, "--order", 8)
    planned = pia("plan", "runs", "--ids", "3,5", *target, "--output", "plan.json", "--format", "json")
    assert planned.code == 0, planned.err
    where = ("--ledger", "runs", "--checkpoint", "model.pt", "--output", "forgotten", "--format", "json")
    what = ("--model", "cli_project:model", "--data")
    kept_everything = pia("unlearn", "plan.json", *where, *what, "cli_project:training")
    assert (kept_everything.code, kept_everything.out) == (2, "")
    done = pia("unlearn", "plan.json", *where, *what, "cli_project:retained")
    assert done.code == 0, done.err
    run = json.loads(done.out)
    assert run["steps"] == json.loads(planned.out)["steps"]
    assert Ledger.open("runs").num_steps == 10 + run["steps"]
    verified = pia(
        "verify", run["certificate"], "--ledger", "runs", "--checkpoint", run["model"], "--format", "json"
    )
    assert verified.code == 0, verified.out
    before = torch.load("model.pt", weights_only=True)["weight"]
    after = torch.load(run["model"], weights_only=True)["weight"]
    assert not torch.equal(before, after)
    assert math.isfinite(float(after.norm()))
    assert pia("verify", run["certificate"], "--ledger", "runs", "--checkpoint", "model.pt").code == 1
