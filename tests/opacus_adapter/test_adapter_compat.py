"""One run from the first step to the audit and back from its checkpoint, with the installed Opacus."""

from __future__ import annotations

import numpy as np
import opacus
import pytest
import torch
from opacus.accountants.utils import get_noise_multiplier

from per_instance_accountant import PrivacyFilter, Sweep, WorstCase, account, audit
from per_instance_accountant.opacus_adapter import PrivacyEngine
from per_instance_accountant.opacus_adapter.optimizers import OLD

pytestmark = pytest.mark.compat


def test_the_version_is_one_that_is_tested():
    assert opacus.__version__ in ("1.5.3", "1.5.4", "1.6.0")
    assert OLD is not (opacus.__version__ == "1.6.0")


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_from_training_to_audit_and_back(start, tmp_path, mode):
    def engine():
        return PrivacyEngine(
            accountant="per_instance",
            ledger=tmp_path / "run",
            charging=Sweep(every=5),
            filter=PrivacyFilter(budget=50.0, delta=1e-3),
            verify="every_step",
        )

    first = start(engine(), mode=mode, noise_multiplier=1.0, max_grad_norm=3.0).train(1, 5)
    first.engine.save_checkpoint(path=tmp_path / "model.pt", module=first.model, optimizer=first.optimizer)
    first.engine.close()
    again = start(engine(), mode=mode, noise_multiplier=1.0, max_grad_norm=3.0, seed=2)
    again.engine.load_checkpoint(path=tmp_path / "model.pt", module=again.model, optimizer=again.optimizer)
    again.train()
    report = audit(again.engine.ledger, delta=1e-3)
    assert again.engine.ledger.num_steps == 2 * len(again.loader)
    assert (report.epsilon > 0).all() and (report.epsilon <= report.worst_case).all()
    assert len(np.unique(report.epsilon)) > 10
    worst = account(again.engine.ledger, charging=WorstCase(), orders=[8.0]).rdp[0, 0]
    assert worst > 0 and again.engine.get_epsilon(1e-3) > 0


def test_noise_is_calibrated_with_the_accountant_of_this_package():
    noise = get_noise_multiplier(
        target_epsilon=2.0, target_delta=1e-5, sample_rate=0.01, steps=100, accountant="per_instance"
    )
    assert 0.5 < noise < 1.5


def test_the_noise_multiplier_of_adaptive_clipping_is_the_pairs(start):
    """Before 1.6 Opacus stores the sum's in its place, and its accountant promises too little loss."""
    training = start(
        noise_multiplier=1.0,
        clipping="adaptive",
        target_unclipped_quantile=0.5,
        clipbound_learning_rate=0.2,
        max_clipbound=3.0,
        min_clipbound=0.05,
        unclipped_num_std=1.0,
    )
    assert training.optimizer.noise_multiplier == pytest.approx(1.0, rel=1e-12)
    assert training.optimizer.query.gradient_noise_multiplier == pytest.approx(2 / np.sqrt(3))
    training.train()
    assert [entry[0] for entry in training.engine.accountant.history] == pytest.approx([1.0])
    assert torch.isfinite(training.weights).all()
