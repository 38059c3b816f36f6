"""Two processes that clip every parameter on its own."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from per_instance_accountant.ledger import Step, Thresholds
from tests.opacus_adapter.rank_worker import CLIP, COUNT, RATE, network
from tests.opacus_adapter.test_adapter_ranks import gradient_by_hand, merged, start

CASES: dict[str, dict[str, Any]] = {
    "worst case": {"noise": 0.0},
    "fixed": {"noise": 0.0, "rule": "fixed"},
    "sweep": {"noise": 0.0, "rule": "sweep"},
    "split": {"noise": 0.0, "physical": 3},
    "noisy": {"noise": 1000.0, "epochs": 6},
    "ddp": {"noise": 0.0, "wrap": "ddp", "epochs": 1},
    "other layers": {"layers": [[0.4, 0.4, 0.4, 0.4], [0.5, 0.3, 0.5, 0.229128784747792]]},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("layers")
    return folder, start(folder, {k: {"clipping": "per_layer", **v} for k, v in CASES.items()}, timeout=60)


def clipped(weights: list[float], row: int) -> np.ndarray:
    ends = np.cumsum([p.numel() for p in network().parameters()])[:-1]
    layers = np.split(gradient_by_hand(weights, row), ends)
    return np.concatenate([g * min(1.0, CLIP / 2 / max(np.linalg.norm(g), 1e-300)) for g in layers])


@pytest.mark.parametrize("name", ["worst case", "fixed", "sweep", "split", "ddp"])
def test_ranks_release_and_record_the_sum_of_gradients_clipped_by_layer(pair, name):
    folder, results = pair
    assert [result[name].get("error") for result in results] == [None, None]
    ledger, weights = merged(folder / name), results[0][name]["weights"]
    assert results[1][name]["weights"] == weights
    assert len(weights) == ledger.num_steps + 1
    thresholds, events, strict = np.full(COUNT, CLIP), iter(ledger.events()), False
    for before, after in itertools.pairwise(weights):
        for event in events:
            if isinstance(event, Thresholds):
                thresholds = np.minimum(event.values.astype(np.float64), CLIP)
            if isinstance(event, Step):
                break
        own = np.array([clipped(before, row) for row in event.positions]).reshape(-1, len(before))
        norms = np.linalg.norm(own, axis=1)
        entered = np.minimum(norms, thresholds[event.positions])
        np.testing.assert_allclose(event.contributions, entered, rtol=3e-5)
        total = (own * (entered / norms)[:, None]).sum(axis=0)
        moved = (np.array(after) - np.array(before)) / -RATE * ledger.phases[0].denominator
        assert np.abs(moved - total).max() <= 2e-4 * max(np.abs(total).max(), 1e-12)
        # One clip norm for all layers would have let more in.
        flat = [min(float(np.linalg.norm(gradient_by_hand(before, row))), CLIP) for row in event.positions]
        strict = strict or bool((entered < 0.99 * np.array(flat)).any())
    assert strict


def test_one_rank_adds_the_recorded_noise(pair):
    folder, results = pair
    phase, weights = merged(folder / "noisy").phases[0], np.array(results[0]["noisy"]["weights"])
    assert phase.noise_std == pytest.approx(1000 * CLIP)
    noise = np.diff(weights, axis=0) / -RATE * phase.denominator / phase.noise_std
    law, statistic = stats.chi2(noise.size), float((noise**2).sum())
    assert 2 * min(law.cdf(statistic), law.sf(statistic)) > 1e-4
    assert law.cdf(statistic / 2) < 1e-12 and law.sf(statistic * 4) < 1e-12


def test_ranks_that_clip_layers_at_other_norms_are_refused(pair):
    _, results = pair
    for result in results:
        assert "PIA102" in result["other layers"]["error"]
