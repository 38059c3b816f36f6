"""``pia forget`` for real: before and after, and a certificate only where a plan carries it."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest
import torch

from per_instance_accountant import FixedThresholds, PrivacyEngine
from per_instance_accountant.unlearning import softmax_regression
from tests.cli.conftest import Pia

PROJECT = """
import torch
from torch.utils.data import TensorDataset

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
features = 0.99 * torch.nn.functional.normalize(torch.randn(80, 6, generator=generator))
labels = (features[:, 0] > 0).long()
training, unseen = TensorDataset(features[:60], labels[:60]), TensorDataset(features[60:], labels[60:])


def model():
    return torch.nn.Linear(6, 2, bias=False)
"""
WHAT = ("--model", "forget_project:model", "--checkpoint", "model.pt", "--data", "forget_project:training")
MEASURED = ("forget", "retain", "test", "attack", "barrier")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "forget_project.py").write_text(PROJECT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "forget_project", raising=False)
    import forget_project

    module = forget_project.model()
    torch.nn.init.zeros_(module.weight)
    x, y = forget_project.training.tensors
    optimizer = torch.optim.SGD(module.parameters(), lr=2.0)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    torch.save(module.state_dict(), "model.pt")
    return tmp_path


def test_before_and_after(pia: Pia, project: Path) -> None:
    options = ("--test", "forget_project:unseen", "--ids", "3,5", "--learning-rate", 0.1, "--radius", 1.0)
    done = pia("forget", *WHAT, *options, "--importance", 0.001, "--output", "out", "--format", "json")
    assert done.code == 0, done.err
    page = json.loads(done.out)
    before, after = page["measured"]
    assert (page["outcome"], page["basis"], page["certificate"]) == ("reached", "ESTIMATE", None)
    assert "without a certificate" in page["statement"]
    assert (before["forget"], after["forget"]) == (1.0, 0.0)
    assert after["attack"] < 0.5 and 0 <= before["barrier"] < 1e-6
    assert 0 < page["attack_success"] <= 1
    assert all(isinstance(row[key], float) for row in (before, after) for key in MEASURED)
    assert json.loads((project / "out" / "report.json").read_text()) == page
    for name in ("model.pt", "report.json"):
        assert stat.S_IMODE((project / "out" / name).stat().st_mode) == 0o600
    weights = torch.load(project / "out" / "model.pt", weights_only=True)["weight"]
    import forget_project

    x, y = (part[[3, 5]] for part in forget_project.training.tensors)
    assert bool(((x @ weights.T).argmax(1) != y).all())
    repeated = pia("forget", *WHAT, *options, "--output", "out")
    assert repeated.code == 2 and "PIA070" in repeated.err


def test_the_table_says_what_it_is(pia: Pia, project: Path) -> None:
    done = pia("forget", *WHAT, "--ids", "3,5", "--method", "salun", "--steps", 5, "--output", "out")
    assert done.code == 0, done.err
    assert "empirical forgetting without a certificate" in done.out
    header = next(line for line in done.out.splitlines() if line.strip().startswith("model"))
    assert all(name in header for name in MEASURED)
    rows = [line.split() for line in done.out.splitlines() if line.strip().startswith(("before", "after"))]
    assert [row[3] for row in rows] == ["-", "-"]


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        (("--ids", "3,3"), "PIA032"),
        (("--ids", "60"), "PIA032"),
        (("--ids", "-1"), "PIA032"),
        (("--ids", "3", "--method", "magic"), "PIA070"),
        (("--ids", "3", "--goal", "both"), "PIA070"),
        (("--ids", "3", "--plan", "plan.json"), "PIA070"),
        (("--ids", "3", "--learning-rate", "nan"), "PIA070"),
        (("--ids", "3", "--test", "forget_project:labels"), "PIA071"),
    ],
)
def test_refusals_write_nothing(pia: Pia, project: Path, extra: tuple[str, ...], code: str) -> None:
    done = pia("forget", *WHAT, *extra, "--output", "out")
    assert (done.code, done.out) == (2, "")
    assert code in done.err
    assert not (project / "out").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_plan_carries_its_certificate_and_the_ledger_divides_the_work(pia: Pia, project: Path) -> None:
    import forget_project

    module = forget_project.model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=0.1)
    known = softmax_regression(feature_norm=1.0, num_instances=60, denominator=6, individual_thresholds=True)
    norms = forget_project.training.tensors[0].norm(dim=1).numpy()
    engine = PrivacyEngine(
        ledger="runs",
        assumptions=known.to_dict(),
        ids=[f"p{n}" for n in range(60)],
        charging=FixedThresholds(thresholds=1.5 * norms),
    )
    loader = torch.utils.data.DataLoader(forget_project.training, batch_size=6)
    private, optimizer, loader = engine.make_private(
        module=module, optimizer=optimizer, data_loader=loader, noise_multiplier=3.0, max_grad_norm=1.5
    )
    for features, labels in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(private(features), labels).backward()
        optimizer.step()
    engine.close()
    torch.save(module.state_dict(), "model.pt")
    where = ("--ledger", "runs", "--ids", "p3,p5", "--format", "json")
    work = pia("forget", *WHAT, *where, "--radius", 2.0, "--output", "divided", "--learning-rate", 0.1)
    assert work.code == 0, work.err
    assert json.loads(work.out)["basis"] == "ESTIMATE"
    target = ("--ids", "p3,p5", "--target-epsilon", 0.1, "--order", 8, "--output", "plan.json")
    assert pia("plan", "runs", *target).code == 0
    method = ("--method", "noisy-fine-tune", "--plan", "plan.json")
    other = pia("forget", *WHAT, "--ledger", "runs", "--ids", "p3", *method, "--output", "certified")
    assert other.code == 2 and "PIA033" in other.err
    done = pia("forget", *WHAT, *where, *method, "--output", "certified")
    assert done.code == 0, done.err
    page = json.loads(done.out)
    assert page["basis"] == "CERTIFIED" and "certificate" in page["statement"]
    verified = pia("verify", page["certificate"], "--ledger", "runs", "--checkpoint", page["model"])
    assert verified.code == 0, verified.out
