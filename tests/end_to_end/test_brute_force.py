"""A real Opacus run against gradients and sums computed by hand, for every instance at every step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from opacus.accountants import RDPAccountant
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from per_instance_accountant import (
    LastSeen,
    Ledger,
    PrivacyEngine,
    Sweep,
    Unamplified,
    WorstCase,
    account,
    audit,
)
from per_instance_accountant.divergence import sampled_gaussian_rdp
from per_instance_accountant.ledger.records import Step

N, RATE, CLIP, NOISE, EPOCHS = 48, 0.25, 2.0, 1.3, 5
ORDERS = [1.5, 2.0, 8.0, 32.0]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    scale = torch.exp(torch.randn(N, 1, generator=generator))
    features = torch.randn(N, 6, generator=generator) * scale
    return TensorDataset(features, torch.randint(0, 3, (N,), generator=generator))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def norms_by_hand(model: nn.Module, data: TensorDataset) -> NDArray[np.float64]:
    """(N,) gradient norms in float64, one instance at a time under vmap."""
    parameters = {name: value.detach().double() for name, value in model.named_parameters()}
    untouched = network()

    def loss(values: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(functional_call(untouched, values, (x[None],)), y[None])

    x, y = data.tensors
    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x.double(), y)
    squares = sum(g.flatten(1).square().sum(1) for g in gradients.values())
    assert isinstance(squares, torch.Tensor)
    return squares.sqrt().numpy()


@pytest.fixture(scope="module", params=["hooks", "ghost"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """Directory of the ledger, and (steps, N) norms by hand at the parameters before each step."""
    torch.manual_seed(0)
    data, directory = dataset(), tmp_path_factory.mktemp(request.param) / "run"
    bare = network()
    engine = PrivacyEngine(accountant="rdp", ledger=directory, charging=Sweep(every=1, slack=1.0))
    made = engine.make_private(
        module=bare,
        optimizer=torch.optim.SGD(bare.parameters(), lr=0.5),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(data, batch_size=int(N * RATE)),
        noise_multiplier=NOISE,
        max_grad_norm=CLIP,
        grad_sample_mode=request.param,
    )
    model, optimizer, criterion, loader = (
        made if len(made) == 4 else (*made[:2], nn.CrossEntropyLoss(), made[2])
    )
    norms = []
    for _ in range(EPOCHS):
        for x, y in loader:
            norms.append(norms_by_hand(bare, data))
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    engine.close()
    return directory, np.array(norms)


def by_hand(bounds: np.ndarray) -> np.ndarray:
    """(N, orders): the sum over all steps, drawn or not, of the exact one-step values."""
    ratios = np.minimum(bounds, CLIP) / (NOISE * CLIP)
    return np.array([sampled_gaussian_rdp(RATE, ratios[:, i], ORDERS).sum(axis=0) for i in range(N)])


def test_individual_losses_equal_brute_force(run: tuple[Path, np.ndarray]) -> None:
    directory, norms = run
    truth = by_hand(norms)
    loss = account(directory, orders=ORDERS)
    assert loss.num_steps == len(norms) == EPOCHS * 4
    assert (loss.rdp >= truth * (1 - 1e-6)).all()
    assert (loss.rdp <= truth * 1.03).all()
    assert np.std(loss.rdp[:, 1]) > 0.1 * np.mean(loss.rdp[:, 1]), "instances differ"


def test_the_law_notices_a_charge_for_the_drawn_only(run: tuple[Path, np.ndarray]) -> None:
    directory, norms = run
    drawn = np.zeros_like(norms, dtype=bool)
    for t, step in enumerate(e for e in Ledger.open(directory).events() if isinstance(e, Step)):
        drawn[t, step.positions] = True
    only_drawn = by_hand(np.where(drawn, norms, 0.0))
    assert (only_drawn < 0.9 * account(directory, orders=ORDERS).rdp).any()


def test_recorded_contributions_are_the_clipped_norms(run: tuple[Path, np.ndarray]) -> None:
    directory, norms = run
    steps = [event for event in Ledger.open(directory).events() if isinstance(event, Step)]
    for step, row in zip(steps, norms, strict=True):
        clipped = np.minimum(row[step.positions], CLIP)
        np.testing.assert_allclose(step.contributions, clipped, rtol=1e-4)
        assert (step.contributions >= clipped * (1 - 2e-6)).all()


def test_unamplified_is_the_sum_over_draws(run: tuple[Path, np.ndarray]) -> None:
    directory, norms = run
    squares = np.zeros(N)
    for step, row in zip(
        (e for e in Ledger.open(directory).events() if isinstance(e, Step)), norms, strict=True
    ):
        squares[step.positions] += (np.minimum(row[step.positions], CLIP) / (NOISE * CLIP)) ** 2
    truth = np.minimum(squares[:, None] * np.array(ORDERS) / 2, by_hand(np.full_like(norms, CLIP)))
    loss = account(directory, charging=Unamplified(), orders=ORDERS)
    np.testing.assert_allclose(loss.rdp, truth, rtol=1e-3)
    assert (loss.rdp >= truth * (1 - 1e-5)).all()


def test_worst_case_is_opacus_and_bounds_every_rule(run: tuple[Path, np.ndarray]) -> None:
    directory, norms = run
    opacus = RDPAccountant()
    for _ in norms:
        opacus.step(noise_multiplier=NOISE, sample_rate=RATE)
    worst = audit(directory, charging=WorstCase(), tight=False)
    assert worst.worst_case == pytest.approx(opacus.get_epsilon(1e-5), rel=1e-8)
    np.testing.assert_allclose(worst.epsilon, worst.worst_case, rtol=1e-12)
    assert (audit(directory, charging=WorstCase()).epsilon < worst.worst_case).all(), "tight is smaller"
    for rule in (None, LastSeen(), Unamplified()):
        assert (audit(directory, charging=rule).epsilon <= worst.worst_case).all()
