"""One instance whose gradient is not finite: refused before anything is added, written or released."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from per_instance_accountant.errors import AlignmentError


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_is_refused(start: Any, value: float) -> None:
    training = start()
    for batch in training.loader:
        if len(batch[0]):
            break
    before = training.weights.clone()
    training.optimizer.zero_grad()
    loss = training.criterion(training.model(batch[0]), batch[1])
    # The forward pass is finite; the gradient of one instance is not.
    loss.backward()
    for p in training.module.parameters():
        p.grad_sample[0] = value
    with pytest.raises(AlignmentError) as caught:
        training.optimizer.step()
    assert caught.value.code == "PIA006"
    assert torch.equal(training.weights, before) and training.engine.ledger.num_steps == 0
