"""The paths that the reproductions take: images and a ResNet, the user's own data, pages, floors."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks import Figure
from benchmarks.evidence.agreement import FACTORS, Compared, compared
from benchmarks.evidence.algorithms import LOOKS, NAMES, Outcome, methods, outcome, started, tuned
from benchmarks.evidence.cases import BUNDLED, images, own, training
from benchmarks.evidence.losses import ledger_losses
from benchmarks.evidence.prediction import (
    attainable,
    false_steps,
    halves_agree,
    hardest_found,
    looks_of,
    probe,
    spread_over,
    tolerance_of,
)
from benchmarks.evidence.writing import Plot, drawn, write
from benchmarks.reproduce_difficulty import pictures
from per_instance_accountant.errors import MissingDependencyError, UsageError
from per_instance_accountant.evaluation import loss_barrier, unlearning_course
from per_instance_accountant.evaluation.measures import rank_correlation
from per_instance_accountant.evaluation.measures.intervals import spearman
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
    found = probe(case, "own", losses, case.noisy, case.silent, probes=probes, seeds=range(3))
    assert found.steps.settled.shape == (3,) and found.losses.tolist() == losses[0][probes].tolist()
    with pytest.raises(UsageError, match="PIA070"):
        own("my_project_e7:nothing", "my_project_e7:model", 30, 10, 1.0, 5)


def test_the_hardest_are_counted_with_ties_by_chance() -> None:
    steps = np.array([0.0] * 8 + [5.0, 9.0])
    assert hardest_found(steps, steps) == 1.0
    assert hardest_found(-steps, steps) == 0.0
    tied = np.array([0.0] * 5 + [7.0] * 5)
    assert hardest_found(np.arange(10.0), tied) == pytest.approx(0.4)


def test_the_tolerance_is_that_of_an_instance_and_looks_at_the_reference_only() -> None:
    generator = np.random.default_rng(0)
    oracle = generator.normal(size=(20, 9, 4, 30))
    scatter = float(np.median(oracle[:, :, -1].std(1, ddof=1)))
    assert tolerance_of(oracle) == pytest.approx(0.1 * scatter)
    assert tolerance_of(oracle) == pytest.approx(tolerance_of(oracle[..., :1]), rel=0.3)
    averaged = 0.1 * float(np.median(oracle[:, :, -1].mean(2).std(1, ddof=1)))
    assert averaged < 0.3 * tolerance_of(oracle)


def test_the_null_gives_no_steps() -> None:
    """Oracles of one half of the seeds against the other half, whatever the seeds have in common."""
    generator = np.random.default_rng(0)
    oracle = generator.normal(size=(30, 12, 6, 1)) + generator.normal(size=(30, 1, 1, 1))
    assert false_steps(oracle, np.arange(6), 0.01) < 0.05


def test_halves_of_the_seeds_agree_as_far_as_the_noise_lets_them() -> None:
    generator = np.random.default_rng(0)
    truth = np.linspace(0.2, 3, 12)[:, None, None] * np.exp(-np.arange(30) / 6)
    agreed = []
    for noise in (0.01, 5.0):
        unlearned = truth + noise * generator.normal(size=(12, 8, 30))
        agreed.append(halves_agree(unlearned, np.zeros_like(unlearned), np.arange(30), 0.05))
    assert agreed[0] > 0.9 and not agreed[1] > 0.6


def test_ties_bound_the_correlation_that_can_be_reached() -> None:
    steps = np.array([0] * 12 + [3, 3, 7, 20])
    perfect = steps + np.random.default_rng(0).random(steps.size)
    assert attainable(steps) == pytest.approx(spearman(perfect, steps)) and attainable(steps) < 0.8
    assert attainable(np.arange(9)) == 1


def test_the_interval_covers_the_recorded_runs_too() -> None:
    generator = np.random.default_rng(0)
    truth = np.linspace(0, 3, 40)
    runs = truth + generator.normal(scale=1.5, size=(4, 40))

    def again(source: np.random.Generator) -> NDArray[np.float64]:
        return runs[source.integers(0, 4, 4)].mean(0)

    fixed = rank_correlation(runs.mean(0), truth)
    both = rank_correlation(runs.mean(0), truth, redraw_first=again)
    assert both.value == fixed.value and both.low < fixed.low


def test_the_horizon_is_three_contractions() -> None:
    assert looks_of(training(10, steps=5, weight_decay=5e-3, noise_std=1.0))[-1] == 1200
    assert looks_of(training(10, steps=5, weight_decay=1e-2, noise_std=1.0))[-1] == 600


def test_the_page_holds_numbers_and_pictures(tmp_path: Path) -> None:
    figures = {
        "wine_rho": Figure(value=0.6, target=0.7, at_least=True),
        "wine_rho_low": Figure(value=0.4),
        "wine_rho_high": Figure(value=0.8),
    }
    plots: list[Plot] = [
        ("wine: lines", "line", {"x": ([1, 2], [3, 4])}, "a", "b"),
        ("wine: fields", "matrix", {"x": (["c", "d"], [0.5, None])}, "", ""),
    ]
    write(tmp_path, "name", "what < this", figures, {"a": [1]}, plots)
    document = json.loads((tmp_path / "numbers.json").read_text())
    assert document["figures"]["wine_rho"]["holds"] is False and document["tables"] == {"a": [1]}
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and page.count("<h2>wine</h2>") == 1
    assert "at least 0.7" in page and "does not hold" in page and "what &lt; this" in page
    assert "<td>wine rho</td><td>0.6</td><td>[0.4, 0.8]</td>" in page


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
    case = BUNDLED["wine"]()
    losses = np.random.default_rng(0).random(len(case.train))
    figures, table = compared(case, losses, dict.fromkeys(NAMES, 0.3), 24, range(6), draws=20)
    traced = figures["wine_traced"].value
    assert traced == round(24 * (1 - figures["wine_floor_of_all"].value)) and traced >= 10
    floors = {name: figures[f"wine_{name}_within_two_steps"].value for name in NAMES}
    ends = {name: max(floor, figures[f"wine_{name}_never"].value) for name, floor in floors.items()}
    assert max(floors.values()) > 0.5 > min(ends.values())
    pairs = [pair for pair in combinations(NAMES, 2) if f"wine_agreement_{'_'.join(pair)}" in figures]
    assert pairs
    for pair in pairs:
        figure = figures[f"wine_agreement_{'_'.join(pair)}"]
        assert -1 <= figure.value <= 1
        assert (figure.target is None) == (max(ends[name] for name in pair) > 0.5)
    assert set(table["factors"]["traced"]["scrub"]) == set(FACTORS)
    matrix = pictures("wine", table)[0]
    assert matrix[1] == "matrix" and len(drawn(matrix)) > 1000


def test_ties_at_the_floor_would_make_any_two_algorithms_agree() -> None:
    """Two algorithms that order what left a trace at random agree over all instances, and are not said to."""
    generator = np.random.default_rng(0)
    traced = np.arange(60) >= 40

    def one() -> Outcome:
        first = generator.integers(1, len(LOOKS), 60)
        gap = traced[:, None] * (np.arange(len(LOOKS)) < first[:, None])
        unlearned = np.repeat(gap[:, None].astype(float), 6, axis=1)
        return Outcome(
            unlearned=unlearned, oracle=np.zeros_like(unlearned), shift=np.ones(60), damage=np.ones(60)
        )

    both = Compared(found={"a": one(), "b": one()}, tolerance=0.1, traced=traced)
    everything = both.agreement("a", "b", np.ones(60, dtype=bool), draws=20)
    off_floor = both.agreement("a", "b", traced, draws=20)
    assert everything is not None and everything.value > 0.8
    assert off_floor is not None and abs(off_floor.value) < 0.5
    assert both.across_halves("a", "a", traced) == pytest.approx(1.0)


def test_fine_tuning_and_its_reference_see_the_same_batches() -> None:
    """Where base and retrained model are the same model, every later difference would be that of batches."""
    case = BUNDLED["wine"]()
    course = started(case, np.array([3, 119, 40]), range(3))
    same = replace(course, kept=((course.kept[0][0],), (course.kept[0][0],)))
    found = methods(case, dict.fromkeys(NAMES, 0.3))
    paired = outcome(case, same, found["fine_tune"], range(3), {})
    assert paired.unlearned.shape == (3, 3, len(LOOKS))
    assert np.abs(paired.unlearned[..., -1] - paired.unlearned[..., 0]).min() > 1e-4
    np.testing.assert_allclose(paired.unlearned, paired.oracle, rtol=1e-6)
    still = outcome(case, same, found["gradient_ascent"], range(3), {})
    assert (np.ptp(still.oracle, axis=-1) == 0).all() and (np.ptp(still.unlearned, axis=-1) > 0).any()


def test_a_rate_that_costs_accuracy_is_not_taken() -> None:
    case = BUNDLED["wine"]()
    rates = tuned(case, np.array([5, 9]), range(100, 103), (1e6, 0.1))
    assert set(rates) == set(NAMES) and set(rates.values()) == {0.1}
