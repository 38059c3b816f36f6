"""The paths that the reproductions take: images and a ResNet, the user's own data, pages, floors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import Figure
from benchmarks.evidence.algorithms import compared
from benchmarks.evidence.cases import BUNDLED, images, own, training
from benchmarks.evidence.losses import ledger_losses
from benchmarks.evidence.prediction import hardest_found, probe, resolved_tolerance, spread_over
from benchmarks.evidence.writing import write
from per_instance_accountant.errors import MissingDependencyError, UsageError
from per_instance_accountant.evaluation import loss_barrier, unlearning_course
from per_instance_accountant.evaluation.plots import plot_barriers
from per_instance_accountant.finetuning.methods import Instances

torch.set_num_threads(1)

OWN = """
import torch
from torch.utils.data import TensorDataset

generator = torch.Generator().manual_seed(0)
training = TensorDataset(torch.randn(40, 4, generator=generator), torch.arange(40) % 2)

def model():
    return torch.nn.Linear(4, 2)
"""


def test_a_residual_network_on_images_runs_from_ledger_to_oracle() -> None:
    case = images(12, 2)
    short = training(12, steps=3, weight_decay=1e-2, noise_std=0.2)
    losses, basis = ledger_losses(case, short, range(1))
    assert losses.shape == (1, 12) and (losses > 0).all() and basis == "OUTPUT_SPECIFIC"
    course = unlearning_course(case.start(range(2)), case.train, [[3]], short, seeds=range(2), at=[0, 2])
    assert course.unlearned.shape == (1, 2, 2, 1) and np.isfinite(course.unlearned).all()


def test_the_users_own_data_and_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_project_e7.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    case = own("my_project_e7:training", "my_project_e7:model", 30, 10, 1.0, 5)
    assert (len(case.train), len(case.test)) == (30, 10)
    losses, _ = ledger_losses(case, case.noisy, range(1))
    probes = spread_over(losses[0], 3)
    found = probe(case, "own", losses[0], case.noisy, case.silent, probes=probes, seeds=range(3))
    assert found.steps.settled.shape == (3,) and found.losses.tolist() == losses[0][probes].tolist()
    with pytest.raises(UsageError, match="PIA070"):
        own("my_project_e7:nothing", "my_project_e7:model", 30, 10, 1.0, 5)


def test_the_hardest_are_counted_with_ties_by_chance() -> None:
    steps = np.array([0.0] * 8 + [5.0, 9.0])
    assert hardest_found(steps, steps) == 1.0
    assert hardest_found(-steps, steps) == 0.0
    tied = np.array([0.0] * 5 + [7.0] * 5)
    assert hardest_found(np.arange(10.0), tied) == pytest.approx(0.4)


def test_the_tolerance_looks_at_noise_only() -> None:
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(20, 9, 4))
    level = np.linspace(0, 5, 20)[:, None, None]
    assert resolved_tolerance(0.05 * noise, 0 * noise) == resolved_tolerance(0.05 * noise + level, 0 * noise)
    assert resolved_tolerance(0.05 * noise, 0 * noise) < resolved_tolerance(0.3 * noise, 0 * noise)


def test_the_page_holds_numbers_and_pictures(tmp_path: Path) -> None:
    figures = {"rho": Figure(value=0.6, target=0.7, at_least=True)}
    write(tmp_path, "name", figures, {"a": [1]}, [("title", "line", {"x": ([1, 2], [3, 4])}, "a", "b")])
    document = json.loads((tmp_path / "numbers.json").read_text())
    assert document["figures"]["rho"]["holds"] is False and document["tables"] == {"a": [1]}
    page = (tmp_path / "index.html").read_text()
    assert "does not hold" in page and "data:image/png;base64," in page


def test_barriers_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = Instances(inputs=torch.eye(2), labels=torch.tensor([0, 1]))
    barrier = loss_barrier(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), some, points=3)
    plot_barriers({"before": barrier, "after": barrier.per_instance()}, tmp_path / "line.svg")
    assert (tmp_path / "line.svg").stat().st_size > 1000
    with pytest.raises(UsageError, match="PIA071"):
        plot_barriers({}, tmp_path / "none.svg")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match="PIA061"):
        plot_barriers({"before": barrier}, tmp_path / "none.svg")


def test_six_algorithms_are_compared_with_their_floors_named() -> None:
    figures, tables = compared(BUNDLED["wine"](), 10, range(3), True)
    floors = [figure for key, figure in figures.items() if key.endswith("within_two_steps")]
    assert len(floors) == 6 and all(0 <= floor.value <= 1 for floor in floors)
    pairs = {key: figure for key, figure in figures.items() if "_agreement_" in key}
    assert pairs and all(-1 <= figure.value <= 1 for figure in pairs.values())
    floored = {key for key in pairs if pairs[key].target is None}
    end = "_within_two_steps"
    high = [key.removesuffix(end) for key, f in figures.items() if key.endswith(end) and f.value > 0.5]
    for name in (key.removeprefix("wine_hardest_") for key in high):
        assert {key for key in pairs if name in key} <= floored
    assert {"privacy_loss", "membership", "parameter_shift"} <= set(tables["factors"]["scrub"])
