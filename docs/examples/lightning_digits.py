"""An ordinary LightningModule, made private by a callback: sweeps, accumulated batches, resumption.

python docs/examples/lightning_digits.py
"""

from __future__ import annotations

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from per_instance_accountant import PrivacyEngine, Sweep, audit
from per_instance_accountant.integrations.lightning import IndividualPrivacyCallback


class Digits(L.LightningModule):
    """Knows nothing about privacy."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        inputs, target = batch
        return torch.nn.functional.cross_entropy(self.net(inputs), target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def fit(dataset: TensorDataset, epochs: int, checkpoint: str | None = None) -> PrivacyEngine:
    """Train to ``epochs`` epochs, from the beginning or from a checkpoint."""
    engine = PrivacyEngine(accountant="rdp", ledger="digits", charging=Sweep(every=30, slack=1.2))
    privacy = IndividualPrivacyCallback(engine, noise_multiplier=1.0, max_grad_norm=4.0)
    trainer = L.Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=2,
        callbacks=[privacy],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    # Draws of 60 instances on average, each in two batches.
    loader = privacy.loader(DataLoader(dataset, batch_size=30))
    trainer.fit(Digits(), loader, ckpt_path=checkpoint)
    trainer.save_checkpoint("digits.ckpt")
    engine.close()
    return engine


def main() -> None:
    """Two epochs, then one more from the checkpoint; the ledger goes on."""
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    dataset = TensorDataset(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y))
    fit(dataset, epochs=2)
    engine = fit(dataset, epochs=3, checkpoint="digits.ckpt")
    print(f"worst case for everybody: epsilon {engine.get_epsilon(1e-4):.2f}")
    print(audit("digits", delta=1e-4))


if __name__ == "__main__":
    main()
