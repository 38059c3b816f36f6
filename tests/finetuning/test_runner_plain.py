"""A model that was trained by hand in plain PyTorch is unlearned and certified like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import Subset, TensorDataset

from per_instance_accountant import plan, verify
from per_instance_accountant.errors import GuaranteeError
from per_instance_accountant.finetuning import reseed, run_plan, secret_of
from per_instance_accountant.ledger import Ledger, LedgerWriter, Phase, Run, Step
from per_instance_accountant.unlearning import softmax_regression

N, FEATURES, CLASSES, CLIP, BATCH = 40, 4, 3, 1.5, 10.0
PHASE = Phase(
    kind="train",
    sampling="poisson",
    sample_rate=BATCH / N,
    noise_std=4.0,
    max_grad_norm=CLIP,
    charging="worst_case",
    denominator=BATCH,
    learning_rate=0.4,
    weight_decay=0.1,
)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Prototypes(nn.Module):
    """Linear logits from a parameter of its own, for which Opacus has no rule of gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.zeros(CLASSES, FEATURES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.prototypes.T


def instances() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(N, FEATURES, generator=generator)
    return TensorDataset(
        0.9 * features / features.norm(dim=1, keepdim=True),
        torch.randint(0, CLASSES, (N,), generator=generator),
    )


def gradients(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """Per-sample gradients by torch.func, one row per instance."""

    def loss(parameters: Any, row: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(functional_call(module, parameters, (row[None],)), label[None])

    parameters = {name: value.detach() for name, value in module.named_parameters()}
    return vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)


@torch.no_grad()
def noisy_step(
    module: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], noise: torch.Generator
) -> np.ndarray[Any, Any]:
    """One step of the mechanism with nothing but torch; the norms with which instances entered."""
    found = gradients(module, *batch)
    norms = torch.sqrt(sum(g.flatten(1).square().sum(1) for g in found.values()))
    factors = (CLIP / (norms + 1e-6)).clamp(max=1.0)
    for name, parameter in module.named_parameters():
        total = torch.einsum("n,n...->...", factors, found[name])
        total += torch.normal(0.0, PHASE.noise_std, parameter.shape, generator=noise)
        parameter -= PHASE.learning_rate * (total / BATCH + PHASE.weight_decay * parameter)
    return (norms * factors).numpy()


def trained(directory: Path, make: Any, steps: int = 50) -> nn.Module:
    """No optimizer, no engine: each step is recorded by hand, before its noise is drawn."""
    data, module = instances(), make()
    coins, noise = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    known = softmax_regression(feature_norm=1.0, num_instances=N, denominator=BATCH)
    with LedgerWriter.create(directory / "run", Run(num_instances=N, assumptions=known.to_dict())) as writer:
        writer.append(PHASE)
        for _ in range(steps):
            drawn = torch.flatten(torch.nonzero(torch.rand(N, generator=coins) < PHASE.sample_rate))
            bound = np.full(len(drawn), np.nextafter(np.float32(CLIP), np.float32(0)), np.float32)
            # Gradients stay below sqrt(2) * 0.9, so a bound of the norms suffices.
            writer.append(Step(positions=drawn.numpy(), contributions=bound * np.float32(0.9)))
            noisy_step(module, tuple(part[drawn] for part in data.tensors), noise)
    torch.save(module.state_dict(), directory / "before.pt")
    return module


@pytest.mark.parametrize("make", [Prototypes, lambda: nn.Linear(FEATURES, CLASSES, bias=False)])
def test_a_plain_model_is_unlearned_by_the_steps_of_a_plain_loop(tmp_path: Path, make: Any) -> None:
    """The runner against a loop of torch.func on the same batches and noise, to float32."""
    trained(tmp_path, make)
    made = plan(tmp_path / "run", ids=[3], target_epsilon=0.05, order=8)
    retained = np.setdiff1d(np.arange(N), [3])
    module = make()
    run = run_plan(
        made,
        ledger=tmp_path / "run",
        module=module,
        dataset=Subset(instances(), retained.tolist()),
        criterion=nn.CrossEntropyLoss(),
        checkpoint=tmp_path / "before.pt",
        output=tmp_path / "after",
        seed=5,
        progress=False,
    )
    assert made.steps is not None and made.steps > 1 and run.module is module
    assert verify(run.certificate, ledger=tmp_path / "run", checkpoint=run.checkpoint).valid
    again = make()
    again.load_state_dict(torch.load(tmp_path / "before.pt", weights_only=True))
    taken = [e for e in Ledger.open(tmp_path / "run").events() if isinstance(e, Step)][-made.steps :]
    for number, step in enumerate(taken):
        noise = torch.Generator()
        reseed(torch.Generator(), noise, secret=secret_of(5), step=number)
        rows = torch.as_tensor(step.positions)
        entered = noisy_step(again, tuple(part[rows] for part in instances().tensors), noise)
        np.testing.assert_array_less(entered, step.contributions * (1 + 1e-6))
    for after, by_hand in zip(module.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(after, by_hand, rtol=1e-4, atol=1e-6)
        assert not hasattr(after, "grad_sample") or after.grad_sample is None
    assert not any(m._forward_hooks or m._backward_hooks for m in module.modules())


def test_a_loop_that_forgot_to_clip_plans_nothing(tmp_path: Path) -> None:
    """Seeded bug: what was recorded by hand is checked like everything else."""
    with LedgerWriter.create(tmp_path / "run", Run(num_instances=N)) as writer:
        writer.append(PHASE)
        writer.append(Step(positions=np.array([3]), contributions=np.array([2 * CLIP], np.float32)))
    with pytest.raises(GuaranteeError, match="PIA011"):
        plan(tmp_path / "run", ids=[3], target_epsilon=0.05, order=8)
