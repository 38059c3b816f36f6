"""Two processes train one model, and each writes its part of the ledger; rank 0 merges and audits.

torchrun --nproc-per-node 2 docs/examples/two_ranks.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel as DPDDP
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from per_instance_accountant import PrivacyEngine, Sweep, audit
from per_instance_accountant.ledger import merge_parts


def main() -> None:
    """The same script on every rank; the seed after building the model differs."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    x, y = load_digits(return_X_y=True)
    dataset = TensorDataset(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y))
    torch.manual_seed(0)
    model = DPDDP(torch.nn.Linear(64, 10))
    torch.manual_seed(1000 + rank)
    engine = PrivacyEngine(accountant="rdp", ledger="parts", charging=Sweep(every=20), rank_timeout=60)
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.3),
        data_loader=DataLoader(dataset, batch_size=60),
        noise_multiplier=1.0,
        max_grad_norm=4.0,
    )
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        for inputs, target in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), target).backward()
            optimizer.step()
    engine.close()
    dist.barrier()
    if rank == 0:
        merge_parts([f"parts/rank-{number}" for number in range(world_size)], "merged")
        print(audit("merged", delta=1e-4))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
