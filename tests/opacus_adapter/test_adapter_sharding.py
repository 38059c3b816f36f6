"""Two processes over gloo train one model that FSDP2 has spread over them, with ghost clipping."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.func import functional_call, grad, vmap

from per_instance_accountant import Ledger, account
from per_instance_accountant.ledger import Resume, Step, Thresholds
from tests.opacus_adapter.rank_worker import CLIP, COUNT, RATE, examples, network
from tests.opacus_adapter.test_adapter_ranks import CASES as RANKS
from tests.opacus_adapter.test_adapter_ranks import merged, start, steps_of
from tests.opacus_adapter.test_adapter_ranks import (
    test_langevin_steps_of_two_ranks_have_the_injected_variance as check_langevin,
)

pytest.importorskip("opacus.grad_sample.grad_sample_module_fast_gradient_clipping_fsdp")

CASES: dict[str, dict[str, Any]] = {
    "worst case": {"noise": 0.0},
    "tokens": {"noise": 0.0, "network": "tokens"},
    "unclipped": {"noise": 0.0, "network": "tokens", "epochs": 1, "clip": 50.0},
    "fixed": {"noise": 0.0, "network": "tokens", "rule": "fixed"},
    "sweep": {"noise": 0.0, "network": "tokens", "rule": "sweep", "clip": 50.0},
    "sum": {"noise": 0.0, "reduction": "sum", "epochs": 1},
    "empty": {"noise": 0.0, "batch_size": 1, "epochs": 1},
    "dpddp": {
        "noise": 0.0,
        "network": "tokens",
        "wrap": "dpddp",
        "mode": "ghost",
        "rule": "sweep",
        "clip": 50.0,
    },
    "noisy": {"noise": 1000.0, "network": "tokens", "epochs": 4},
    "noisy sum": {"noise": 1000.0, "epochs": 8, "reduction": "sum"},
    "unamplified": {"rule": "unamplified"},
    "last seen": {"rule": "last_seen", "epochs": 1},
    "langevin": RANKS["langevin"],
    "budget": {"rule": "sweep", "budget": 1.5},
    "undivided": {"noise": 0.0, "event": {"step": 0, "what": "undivided"}, "unguarded": True},
    "saved": {"save": 0},
    "continued": {"place": "saved", "load": True, "epochs": 1, "seeds": [31, 32]},
    "split": {"physical": 3},
    "mean is changed": {"event": {"step": 2, "what": "undivided"}},
    "sum of one rank": {"event": {"step": 2, "what": "unsynchronised"}},
    "low precision": {"wrap": "fsdp low"},
    "not sharded": {"wrap": "fsdp ignored"},
    "verify": {"verify": "first_step"},
    "per layer": {"clipping": "per_layer"},
    "hooks": {"mode": "hooks"},
    "ghost": {"mode": "ghost"},
    "no sampler": {"network": "scaled"},
    "forgetful": {"network": "forgetful"},
    "nan": {"event": {"rank": 1, "step": 3, "what": "nan"}},
    "full disk": {"event": {"rank": 0, "step": 3, "what": "full"}},
    "same seeds": {"seeds": [1, 1]},
    "noise again": {"event": {"rank": 1, "what": "seed again"}},
}
# "unguarded" stays in force for what follows it in the same process.
ORDER = sorted(CASES, key=lambda name: "unguarded" in CASES[name])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("sharded")
    cases = {name: {"wrap": "fsdp", "mode": "ghost_fsdp", **CASES[name]} for name in ORDER}
    return folder, start(folder, cases, timeout=100)


def gradients(name: str, weights: list[float]) -> np.ndarray:
    """(COUNT, P) gradients of all instances at the gathered weights, in float64, by torch.func."""
    module = network(CASES[name].get("network", "plain")).double()
    nn.utils.vector_to_parameters(torch.tensor(weights, dtype=torch.float64), module.parameters())
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(values: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(functional_call(module, values, x[None]), y[None])

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, *examples_in_float64())
    return torch.cat([g.reshape(COUNT, -1) for g in found.values()], dim=1).numpy()


def examples_in_float64() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = examples().tensors
    return x.double(), y


def errors(name: str, folder: Path, results: list[dict[str, Any]]) -> tuple[float, float]:
    """Largest relative error of a recorded contribution, and of a release against the clipped sum."""
    ledger, weights = merged(folder / name), results[0][name]["weights"]
    assert results[1][name]["weights"] == weights
    phase, events, thresholds = (
        ledger.phases[0],
        iter(ledger.events()),
        np.full(COUNT, CASES[name].get("clip", CLIP)),
    )
    recorded = released = 0.0
    for before, after in itertools.pairwise(weights):
        for event in events:
            if isinstance(event, Thresholds):
                thresholds = np.minimum(event.values.astype(np.float64), phase.max_grad_norm)
            if isinstance(event, Step):
                break
        own = gradients(name, before)[event.positions]
        norms = np.linalg.norm(own, axis=1)
        entered = np.minimum(norms, thresholds[event.positions])
        total = (own * (entered / norms)[:, None]).sum(axis=0)
        moved = (np.array(after) - np.array(before)) / -RATE * phase.denominator
        recorded = max([recorded, *np.abs(event.contributions / entered - 1)])
        released = max(released, float(np.abs(moved - total).max() / (np.linalg.norm(total) or 1e-6)))
    assert next((event for event in events if isinstance(event, Step)), None) is None
    return recorded, released


EXACT = [name for name, options in CASES.items() if options.get("noise") == 0.0 and "event" not in options]


@pytest.mark.parametrize("name", EXACT)
def test_contributions_are_those_of_the_gathered_model(pair, name):
    folder, results = pair
    assert [result[name].get("error") for result in results] == [None, None]
    recorded, released = errors(name, folder, results)
    print(f"{name}: recorded {recorded:.1e}, released {released:.1e}")
    assert recorded <= 1e-5
    # Parameters are float32 and are moved by a small multiple of the sum.
    assert released <= 1e-3


def test_a_sum_that_is_not_divided_by_the_number_of_ranks_breaks_the_law(pair):
    """What ``set_gradient_divide_factor(1.0)`` does to stock Opacus: noise for one half of the sum."""
    folder, results = pair
    recorded, released = errors("undivided", folder, results)
    assert recorded <= 1e-5
    assert released > 0.1


def noise_of(name: str, folder: Path, results: list[dict[str, Any]]) -> np.ndarray:
    """(steps, P) what was added to the sums, in units of the recorded noise."""
    phase, weights = merged(folder / name).phases[0], np.array(results[0][name]["weights"])
    assert phase.noise_std == 1000 * CLIP
    return np.diff(weights, axis=0) / -RATE * phase.denominator / phase.noise_std


def p_value(noise: np.ndarray, factor: float) -> float:
    """Of noise as the ledger states it, if it were ``factor`` times as large in variance."""
    law, statistic = stats.chi2(noise.size), float((noise**2).sum()) * factor
    return float(2 * min(law.cdf(statistic), law.sf(statistic)))


@pytest.mark.parametrize("name", ["noisy", "noisy sum"])
def test_every_entry_gets_the_recorded_noise_once(pair, name):
    folder, results = pair
    noise = noise_of(name, folder, results)
    sizes = [p.shape for p in network(CASES[name].get("network", "plain")).parameters()]
    first = np.concatenate([_held_by_first(shape) for shape in sizes])
    print(f"{name}: {noise.size} draws, std {noise.std():.4f} of the recorded one")
    for part in (noise[:, first], noise[:, ~first]):
        assert part.size > 1000
        assert p_value(part, 1.0) > 1e-4
        # Noise of both ranks, noise of the mean, and the sum of one rank alone with the noise of all.
        assert all(p_value(part, factor) < 1e-12 for factor in (0.5, 2.0, 4.0))
    together = noise[:, first][:, : (~first).sum()].ravel()
    other = noise[:, ~first][:, : first.sum()].ravel()
    assert abs(np.corrcoef(together, other)[0, 1]) < 4 / np.sqrt(together.size)
    assert len(np.unique(noise.round(7))) > 0.99 * noise.size


def _held_by_first(shape: torch.Size) -> np.ndarray:
    """Which entries of a parameter, sharded by rows, the first of two ranks holds."""
    rows = -(-shape[0] // 2)
    return np.repeat(np.arange(shape[0]) < rows, int(np.prod(shape[1:])))


def test_sharded_and_replicated_training_write_the_same_ledger(pair):
    """The same seeds give the same draws; thresholds of the sweeps agree as well."""
    folder, _ = pair
    sharded, replicated = merged(folder / "sweep"), merged(folder / "dpddp")
    assert [type(event) for event in sharded.events()] == [type(event) for event in replicated.events()]
    for one, other in zip(sharded.events(), replicated.events(), strict=True):
        if isinstance(one, Thresholds):
            np.testing.assert_allclose(one.values, other.values, rtol=1e-4)
        if isinstance(one, Step):
            np.testing.assert_array_equal(one.positions, other.positions)
            np.testing.assert_allclose(one.contributions, other.contributions, rtol=1e-4)


def test_empty_draws_keep_ranks_in_step(pair):
    folder, _ = pair
    steps = steps_of(merged(folder / "empty"))
    assert len(steps) == COUNT
    assert sum(len(step.positions) == 0 for step in steps) > 10


def test_accounting_of_the_merged_ledger(pair):
    folder, _ = pair
    together = merged(folder / "unamplified")
    squares = np.zeros(COUNT)
    for step in steps_of(together):
        squares[step.positions] += (step.contributions.astype(np.float64) / together.phases[0].noise_std) ** 2
    loss = account(together, orders=[4.0])
    np.testing.assert_allclose(loss.rdp[:, 0], np.minimum(2 * squares, loss.worst_case_rdp), rtol=1e-9)
    assert account(merged(folder / "last seen")).basis.name == "ESTIMATE"
    assert together.phases[0].grad_sample_mode == "ghost_fsdp"
    assert float(account(merged(folder / "budget")).certified_epsilon(1e-2).max()) <= 1.5
    parts = [Ledger.open(folder / "budget" / "run" / f"rank-{rank}") for rank in range(2)]
    values = [[e.values for e in part.events() if isinstance(e, Thresholds)] for part in parts]
    np.testing.assert_array_equal(values[0], values[1])


def test_langevin_steps_have_the_injected_variance(pair):
    check_langevin(pair)


def test_all_ranks_continue_together_from_their_checkpoints(pair):
    folder, results = pair
    assert [result["continued"].get("error") for result in results] == [None, None]
    ledger = merged(folder / "saved")
    assert [e.at_step for e in ledger.events() if isinstance(e, Resume)] == [7]
    assert results[0]["continued"]["weights"][0] == results[0]["saved"]["weights"][7]


REFUSED = {
    "split": ("PIA060", "PIA060"),
    "mean is changed": ("PIA060.*reduction", "PIA060"),
    "sum of one rank": ("PIA060.*reduction", "PIA060"),
    "low precision": ("PIA060.*low precision", "PIA060"),
    "not sharded": ("PIA060.*does not shard", "PIA060"),
    "verify": ("PIA060.*verify", "PIA060"),
    "per layer": ("PIA060.*per_layer", "PIA060"),
    "hooks": ("PIA060.*hooks", "PIA060"),
    "ghost": ("PIA060.*ghost", "PIA060"),
    "no sampler": ("PIA060.*no sampler", "PIA060"),
    "forgetful": ("PIA003", "PIA003"),
    "nan": ("PIA102", "PIA006"),
    "full disk": ("no space", "PIA102"),
    "same seeds": ("PIA103", "PIA103"),
    "noise again": ("PIA102", "PIA091"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_give_wrong_numbers_is_refused_by_all_ranks(pair, name):
    _, results = pair
    for result, code in zip(results, REFUSED[name], strict=True):
        assert re.search(code, result[name]["error"])
        assert result[name]["seconds"] < 15
