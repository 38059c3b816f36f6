"""Two processes over gloo train one model: what they wrote is what one process would have written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from per_instance_accountant import Ledger, PrivacyEngine, account
from per_instance_accountant.errors import PiaError
from per_instance_accountant.ledger import Phase, Resume, Step, Thresholds, merge_parts
from per_instance_accountant.opacus_adapter import SGLD
from per_instance_accountant.opacus_adapter.drawing import PoissonSampler
from tests.opacus_adapter.rank_worker import CLIP, COUNT, RATE, examples, network, private

CASES: dict[str, dict[str, Any]] = {
    "hooks": {"noise": 0.0},
    "sum": {"noise": 0.0, "reduction": "sum", "epochs": 1},
    "ghost": {"noise": 0.0, "mode": "ghost"},
    "ddp": {"noise": 0.0, "wrap": "ddp"},
    "ddp ghost": {"noise": 0.0, "wrap": "ddp", "mode": "ghost", "rule": "sweep"},
    "split": {"noise": 0.0, "physical": 3, "rule": "fixed"},
    "functorch": {"noise": 0.0, "mode": "functorch", "wrap": "ddp", "verify": "first_step", "epochs": 1},
    "split ghost": {"noise": 0.0, "physical": 3, "mode": "ghost", "epochs": 1, "workers": 1},
    "sweep": {"noise": 0.0, "rule": "sweep", "verify": "every_step"},
    "unamplified": {"rule": "unamplified"},
    "last seen": {"rule": "last_seen", "epochs": 1},
    "budget": {"rule": "sweep", "budget": 1.5},
    "noisy": {"noise": 1000.0, "epochs": 4},
    "langevin": {
        "langevin": {"step_size": 1e-3, "temperature": 0.5, "power": 0.55, "offset": 4.0},
        "epochs": 4,
    },
    "empty": {"noise": 0.0, "batch_size": 1, "epochs": 1},
    "saved": {"save": 0},
    "continued": {"place": "saved", "load": True, "epochs": 1, "seeds": [31, 32]},
    "same seeds": {"seeds": [1, 1]},
    "seeds in the loop": {"event": {"step": 3, "what": "seed"}},
    "other epoch": {"stuck": [1]},
    "other noise": {"noises": [1.0, 0.9]},
    "other rule": {"rules": ["fixed", "worst_case"]},
    "nan": {"event": {"rank": 1, "step": 3, "what": "nan"}},
    "full disk": {"event": {"rank": 0, "step": 3, "what": "full"}},
    "split ddp": {"wrap": "ddp", "physical": 3},
    "budget alone": {"rule": "unamplified", "budget": 3.0},
    "expanded": {"mode": "ew"},
    "sharded": {"mode": "ghost_fsdp"},
    "shuffled": {"rule": "unamplified", "poisson": False},
}


def start(folder: Path, cases: dict[str, Any], timeout: float) -> list[dict[str, Any]]:
    """Results of both ranks; an empty one where a process was gone."""
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "tests.opacus_adapter.rank_worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([*command, str(rank), "2", str(folder)], env=environment, cwd=Path.cwd())
        for rank in range(2)
    ]
    try:
        for process in running:
            process.wait(timeout)
    finally:
        for process in running:
            process.kill()
    paths = [folder / f"result-{rank}.json" for rank in range(2)]
    return [json.loads(path.read_text()) if path.exists() else {} for path in paths]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    return folder, start(folder, CASES, timeout=240)


def merged(folder: Path) -> Ledger:
    return merge_parts([folder / "run" / f"rank-{rank}" for rank in range(2)], None)


def steps_of(ledger: Ledger) -> list[Step]:
    return [event for event in ledger.events() if isinstance(event, Step)]


def module_at(weights: list[float]) -> nn.Module:
    module = network()
    nn.utils.vector_to_parameters(torch.tensor(weights), module.parameters())
    return module


def gradient_by_hand(weights: list[float], row: int) -> np.ndarray:
    module, (x, y) = module_at(weights), examples()[row]
    loss = nn.functional.cross_entropy(module(x[None]), y[None])
    found = torch.autograd.grad(loss, list(module.parameters()))
    return torch.cat([g.flatten() for g in found]).double().numpy()


RELEASED = [name for name, options in CASES.items() if options.get("noise") == 0.0]


@pytest.mark.parametrize("name", RELEASED)
def test_ranks_release_and_record_the_clipped_sum_of_what_they_drew(pair, name):
    folder, results = pair
    assert [result[name].get("error") for result in results] == [None, None]
    ledger = merged(folder / name)
    weights = results[0][name]["weights"]
    assert results[1][name]["weights"] == weights
    steps, phase = steps_of(ledger), ledger.phases[0]
    assert len(steps) == len(weights) - 1 == results[0][name]["steps"]
    thresholds = np.full(COUNT, CLIP)
    events = iter(ledger.events())
    for step, before, after in zip(steps, weights, weights[1:], strict=False):
        for event in events:
            if isinstance(event, Thresholds):
                thresholds = np.minimum(event.values.astype(np.float64), CLIP)
            if isinstance(event, Step):
                break
        rows = step.positions
        gradients = np.array([gradient_by_hand(before, row) for row in rows]).reshape(len(rows), len(before))
        norms = np.linalg.norm(gradients, axis=1)
        entered = np.minimum(norms, thresholds[rows])
        np.testing.assert_allclose(step.contributions, entered, rtol=3e-5)
        total = (gradients * (entered / np.maximum(norms, 1e-300))[:, None]).sum(axis=0)
        moved = (np.array(after) - np.array(before)) / -RATE * phase.denominator
        scale = max(float(np.abs(total).max()), 1e-12) if len(rows) else 1.0
        assert np.abs(moved - total).max() <= 2e-4 * scale


@pytest.mark.parametrize("name", ["hooks", "sweep", "split"])
def test_the_merged_ledger_equals_that_of_one_process(pair, name, monkeypatch, tmp_path):
    """One process that draws in each step what both ranks drew together."""
    folder, _ = pair
    together = merged(folder / name)
    draws = iter([step.positions.tolist() for step in steps_of(together)])
    length = COUNT // 9 + 1
    monkeypatch.setattr(PoissonSampler, "__iter__", lambda self: (next(draws) for _ in range(length)))
    options = {**CASES[name], "wrap": "none"}
    engine, model, optimizer, criterion, loader = private(0, tmp_path, options, network())
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    alone = engine.ledger
    assert next(draws, None) is None
    assert [type(event) for event in alone.events()] == [type(event) for event in together.events()]
    for one, many in zip(alone.events(), together.events(), strict=True):
        if isinstance(one, Phase):
            assert one == many
        if isinstance(one, Thresholds):
            np.testing.assert_allclose(one.values, many.values, rtol=3e-6)
        if isinstance(one, Step):
            np.testing.assert_array_equal(np.sort(one.positions), many.positions)
            order = np.argsort(one.positions)
            np.testing.assert_allclose(one.contributions[order], many.contributions, rtol=3e-6)


def test_thresholds_of_a_sweep_are_the_same_bits_on_all_ranks(pair):
    folder, results = pair
    for name in ("sweep", "ddp ghost", "budget"):
        parts = [Ledger.open(folder / name / "run" / f"rank-{rank}") for rank in range(2)]
        values = [[e.values for e in part.events() if isinstance(e, Thresholds)] for part in parts]
        assert len(values[0]) == 4
        np.testing.assert_array_equal(values[0], values[1])
    first = [np.linalg.norm(gradient_by_hand(results[0]["sweep"]["weights"][0], i)) for i in range(COUNT)]
    swept = next(e.values for e in merged(folder / "sweep").events() if isinstance(e, Thresholds))
    np.testing.assert_allclose(swept, np.minimum(np.array(first) * 1.1, CLIP), rtol=3e-5)


def test_only_one_rank_adds_noise_and_the_mean_is_over_all_ranks(pair):
    folder, results = pair
    phase = merged(folder / "noisy").phases[0]
    assert phase.noise_std == 1000 * CLIP
    weights = np.array(results[0]["noisy"]["weights"])
    noise = np.diff(weights, axis=0) / -RATE * phase.denominator / phase.noise_std

    def p_value(factor: float) -> float:
        law = stats.chi2(noise.size)
        statistic = float((noise**2).sum()) * factor
        return float(2 * min(law.cdf(statistic), law.sf(statistic)))

    assert p_value(1.0) > 1e-4
    # Noise of both ranks; the mean over the draw of one rank only.
    assert p_value(0.5) < 1e-12 and p_value(4.0) < 1e-12


def test_langevin_steps_of_two_ranks_have_the_injected_variance(pair):
    """The world size is in the formula: what is left of a step without its drift is N(0, 2 eta T)."""
    folder, results = pair
    sampler = SGLD(**CASES["langevin"]["langevin"])
    together = merged(folder / "langevin")
    steps, weights = steps_of(together), np.array(results[0]["langevin"]["weights"])
    left = []
    for number, step in enumerate(steps):
        gradients = np.array([gradient_by_hand(weights[number].tolist(), row) for row in step.positions])
        norms = np.linalg.norm(gradients.reshape(len(gradients), weights.shape[1]), axis=1)
        total = (np.minimum(CLIP / norms, 1.0)[:, None] * gradients).sum(axis=0)
        eta = sampler.step_size_at(number)
        # Sum potential: N / (rate * N) for each unit of the clipped sum.
        drift = -eta / together.phases[0].sample_rate * total
        left.append((weights[number + 1] - weights[number] - drift) / np.sqrt(2 * eta * sampler.temperature))
    law, statistic = stats.chi2(np.size(left)), float(np.square(left).sum())
    assert 2 * min(law.cdf(statistic), law.sf(statistic)) > 1e-4
    # Without the world size in the formula the noise would have four times the variance, or a quarter.
    assert law.cdf(4 * statistic) > 1 - 1e-12 and law.cdf(statistic / 4) < 1e-12


def test_accounting_of_the_merged_ledger(pair):
    folder, _ = pair
    together = merged(folder / "unamplified")
    steps, phase = steps_of(together), together.phases[0]
    squares = np.zeros(COUNT)
    for step in steps:
        squares[step.positions] += (step.contributions.astype(np.float64) / phase.noise_std) ** 2
    loss = account(together, orders=[4.0])
    # Amplification bounds those who were drawn often.
    np.testing.assert_allclose(loss.rdp[:, 0], np.minimum(2 * squares, loss.worst_case_rdp), rtol=1e-9)
    assert (2 * squares < loss.worst_case_rdp).any() and (squares > 0).any()
    with pytest.raises(PiaError, match=r"PIA"):
        account(Ledger.open(folder / "unamplified" / "run" / "rank-0"))
    assert account(merged(folder / "last seen")).basis.name == "ESTIMATE"
    budget = account(merged(folder / "budget"))
    assert budget.certified_budget is not None
    assert float(budget.certified_epsilon(1e-2).max()) <= 1.5


def test_running_epsilons_of_a_rank_are_of_the_whole_run_or_refused(pair):
    folder, results = pair
    for result in results:
        assert result["unamplified"]["running"] == result["last seen"]["running"] == "PIA117"
        whole = account(merged(folder / "budget")).epsilon(1e-3).max()
        assert float(result["budget"]["running"]) == pytest.approx(whole, rel=0.02)


def test_empty_draws_keep_ranks_in_step(pair):
    """Opacus' own sampler leaves empty draws out: this is the seeded bug."""
    folder, results = pair
    steps = steps_of(merged(folder / "empty"))
    assert len(steps) == COUNT
    assert sum(len(step.positions) == 0 for step in steps) > 10
    assert all(result["empty"]["stock"] < COUNT - 10 for result in results)


def test_each_rank_draws_its_own_share(pair):
    folder, _ = pair
    parts = [steps_of(Ledger.open(folder / "hooks" / "run" / f"rank-{rank}")) for rank in range(2)]
    for epoch in range(2):
        share = [
            set(np.concatenate([step.positions for step in part[7 * epoch : 7 * epoch + 7]]).tolist())
            for part in parts
        ]
        assert share[0] and share[1] and not share[0] & share[1]


def test_all_ranks_continue_together_from_their_checkpoints(pair):
    folder, results = pair
    assert [result["continued"].get("error") for result in results] == [None, None]
    ledger = merged(folder / "saved")
    assert ledger.num_steps == 7 + 7 + 7
    assert [e.at_step for e in ledger.events() if isinstance(e, Resume)] == [7]
    sessions = {Ledger.open(folder / "saved" / "run" / f"rank-{rank}").sessions for rank in range(2)}
    ((name, steps),) = sessions.pop()
    assert not sessions and name is not None and steps == 7 + 7
    assert results[0]["continued"]["weights"] == results[1]["continued"]["weights"]
    assert results[0]["continued"]["weights"][0] == results[0]["saved"]["weights"][7]


def test_a_part_is_continued_by_as_many_ranks_as_before(pair):
    folder, _ = pair
    (folder / "alone").mkdir()
    (folder / "saved" / "run" / "rank-1").rename(folder / "alone" / "run")
    (folder / "saved" / "model-1.pt").rename(folder / "alone" / "model-0.pt")
    engine, model, optimizer, *_ = private(0, folder / "alone", {"wrap": "none"}, network())
    before = Ledger.open(folder / "alone" / "run").digest
    with pytest.raises(PiaError, match=r"PIA070.*part of one of several ranks is continued without"):
        engine.load_checkpoint(path=folder / "alone" / "model-0.pt", module=model, optimizer=optimizer)
    assert Ledger.open(folder / "alone" / "run").digest == before


REFUSED = {
    "same seeds": ("PIA103", "PIA103"),
    "seeds in the loop": ("PIA103", "PIA103"),
    "other epoch": ("PIA102", "PIA102"),
    "other noise": ("PIA102", "PIA102"),
    "other rule": ("PIA102", "PIA102"),
    "nan": ("PIA102", "PIA006"),
    "full disk": ("no space", "PIA102"),
    "split ddp": ("PIA060", "PIA060"),
    "budget alone": ("PIA060", "PIA060"),
    "shuffled": ("PIA060", "PIA060"),
    "expanded": ("PIA060", "PIA060"),
    "sharded": ("PIA060", "PIA060"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_ranks_do_not_agree_on_is_refused_by_all_of_them(pair, name):
    _, results = pair
    for result, code in zip(results, REFUSED[name], strict=True):
        assert code in result[name]["error"]
        assert result[name]["seconds"] < 15


def test_a_step_that_one_rank_could_not_write_is_released_by_none(pair):
    folder, _ = pair
    ledger = merged(folder / "full disk")
    assert ledger.num_steps == 4
    assert ledger.merge is not None and ledger.merge.num_incomplete_steps == 1
    assert not ledger.confirmed


@pytest.mark.parametrize("what", ["die", "die in the sum"])
def test_a_lost_rank_leaves_readable_parts_and_a_clear_error(tmp_path, what):
    first, second = start(tmp_path, {"die": {"event": {"rank": 1, "step": 3, "what": what}}}, timeout=90)
    assert second == {}
    assert "PIA102: a process ended" in first["die"]["error"] and first["die"]["seconds"] < 20
    ledger = merged(tmp_path / "die")
    assert ledger.num_steps == 4 and not ledger.confirmed
    assert ledger.merge is not None
    assert ledger.merge.num_incomplete_steps == (1 if what == "die" else 0)
    assert account(ledger).num_steps == 4


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever(tmp_path):
    late = {"event": {"rank": 1, "step": 3, "what": "sleep"}, "timeout": 3.0}
    (tmp_path / "cases.json").write_text("{}")
    command = [sys.executable, "-m", "tests.opacus_adapter.rank_worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    (tmp_path / "cases.json").write_text(json.dumps({"late": late}))
    running = [
        subprocess.Popen([*command, str(rank), "2", str(tmp_path)], env=environment) for rank in range(2)
    ]
    try:
        running[0].wait(60)
    finally:
        for process in running:
            process.kill()
    error = json.loads((tmp_path / "result-0.json").read_text())["late"]["error"]
    assert "PIA102" in error and "3 seconds" in error


def test_attaching_needs_both_wrappers(monkeypatch):
    """A model for several processes with an optimizer for one."""
    from opacus.distributed import DifferentiallyPrivateDistributedDataParallel as DPDDP

    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_: None)
    monkeypatch.setattr("opacus.privacy_engine.DPDDP", type("Other", (), {}))
    monkeypatch.setattr("opacus.privacy_engine.DDP", type("Other", (), {}))
    module = DPDDP(network())
    with pytest.raises(PiaError, match=r"PIA060.*only one of model and optimizer"):
        PrivacyEngine().make_private(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            data_loader=torch.utils.data.DataLoader(examples(), batch_size=9),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
