"""The privacy losses of the product itself: PrivacyEngine records, account() charges."""

from __future__ import annotations

import math
import warnings
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.evidence.cases import Case
from per_instance_accountant import PrivacyEngine, Sweep, account
from per_instance_accountant.accounting import FixedThresholds
from per_instance_accountant.divergence import sampled_gaussian_rdp
from per_instance_accountant.evaluation.oracle import Training
from per_instance_accountant.finetuning.methods.ensemble import fresh
from per_instance_accountant.ledger import Ledger

Reals = NDArray[np.float64]
ORDER = 2.0
TIGHT = Sweep(every=1, slack=1.0)
"""Charges every step by the instance's own norm at that step: neither slack nor an old measurement decides
the order of the instances."""
COARSE = Sweep(every=20, slack=2.0)
"""What costs a user less, with thresholds up to four times too large in square."""


def recorded_run(
    case: Case, setting: Training, seed: int, charging: Any = TIGHT, assumptions: Any = None
) -> Ledger:
    """One Opacus training of the case with noise, recorded by a PrivacyEngine."""
    warnings.filterwarnings("ignore", module="opacus")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    module = fresh(case.module, [seed]).member(0).train()
    engine = PrivacyEngine(accountant="rdp", charging=charging, assumptions=assumptions)
    data = TensorDataset(case.train.inputs, case.train.labels)
    private, optimizer, loader = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(
            module.parameters(), lr=setting.learning_rate, weight_decay=setting.weight_decay
        ),
        data_loader=DataLoader(
            data,
            batch_size=max(1, round(setting.sample_rate * len(data))),
            generator=torch.Generator().manual_seed(seed),
        ),
        noise_multiplier=setting.noise_std / case.clip,
        max_grad_norm=case.clip,
        criterion=nn.CrossEntropyLoss(),
        noise_generator=torch.Generator().manual_seed(seed + 1_000_003),
    )
    taken = count(1)
    while True:
        for inputs, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(private(inputs), labels).backward()
            optimizer.step()
            if next(taken) == setting.steps:
                return engine.ledger


def ledger_losses(case: Case, setting: Training, seeds: range, charging: Any = TIGHT) -> tuple[Reals, str]:
    """(seeds, N) Renyi losses of order 2 in nats, and their basis."""
    losses = [account(recorded_run(case, setting, seed, charging), orders=[ORDER]) for seed in seeds]
    return np.stack([loss.rdp[:, 0] for loss in losses]), str(losses[0].basis)


def hypothetical_losses(norms: Reals, setting: Training, noise_std: float, every: int) -> Reals:
    """(K, N) what a noise-free run would have cost had it been noisy: norms (checkpoints, K, N), each
    charged for ``every`` steps. An ESTIMATE: no noise was added."""
    flat = norms.reshape(-1) / noise_std
    charged = sampled_gaussian_rdp(setting.sample_rate, flat, [ORDER])[:, 0].reshape(norms.shape)
    total: Reals = every * charged.sum(0)
    return total


def softmax_thresholds(case: Case) -> FixedThresholds:
    """A softmax gradient with bias is (p - e_y) (x, 1): at most sqrt(2) times the norm of (x, 1)."""
    norms = (case.train.inputs.flatten(1).double().square().sum(1) + 1).sqrt().numpy()
    return FixedThresholds(thresholds=math.sqrt(2) * 1.001 * norms)
