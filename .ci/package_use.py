"""Uses an installed wheel as a stranger would, one function per extra."""

from __future__ import annotations

import importlib.resources
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


def pia(*args: str, code: int = 0) -> str:
    """Run the command line of this environment."""
    command = [str(Path(sys.executable).with_name("pia")), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != code:
        sys.exit(f"pia {' '.join(args)} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def ledger(path: Path) -> str:
    """A small run, written by hand."""
    import numpy as np

    from per_instance_accountant.ledger import LedgerWriter, Phase, Run, Step

    with LedgerWriter.create(path, Run(num_instances=60)) as writer:
        writer.append(
            Phase(
                kind="train",
                sampling="poisson",
                sample_rate=0.1,
                noise_std=1.0,
                max_grad_norm=1.0,
                charging="worst_case",
                denominator=6.0,
                learning_rate=0.1,
            )
        )
        for _ in range(20):
            writer.append(Step(positions=np.arange(6), contributions=np.ones(6, np.float32)))
    return str(path)


def core(folder: Path) -> None:
    """An auditor: no torch, no matplotlib; audit, page, exports, typing marker."""
    for heavy in ("torch", "opacus", "matplotlib", "jinja2", "hypothesis"):
        if importlib.util.find_spec(heavy):
            sys.exit(f"the core environment holds {heavy}")
    import per_instance_accountant as package

    if "site-packages" not in str(package.__file__):
        sys.exit(f"not the wheel: {package.__file__}")
    if not importlib.resources.files(package).joinpath("py.typed").is_file():
        sys.exit("py.typed is missing")
    path = ledger(folder / "run")
    pia("doctor")
    pia("audit", path, "--format", "json")
    pia("audit", path, "--budget", "0.001", code=1)
    pia("report", path, "--output", str(folder / "report.html"))
    pia("report", path, "--output", str(folder / "report.html"), "--audience", "shareable")
    pia("export", path, "--as", "parquet", "--output", str(folder / "a.parquet"))
    pia("export", path, "--as", "model-card")
    pia("verify", str(folder / "missing.json"), code=3)
    pia("demo", code=2)


def sign(folder: Path) -> None:
    """Keys can be made."""
    from per_instance_accountant.unlearning import generate_keys

    generate_keys(folder / "private.pem", folder / "public.pem")


def testing(folder: Path) -> None:
    """The laws run on the package's own accountant."""
    from per_instance_accountant import testing as laws

    if not laws.CHECKS:
        sys.exit("no law is shipped")
    pia("check", "--help")


def opacus(folder: Path) -> None:
    """Five private steps, recorded and audited."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from per_instance_accountant import PrivacyEngine, audit

    model = torch.nn.Linear(4, 2)
    engine = PrivacyEngine(ledger=str(folder / "run"))
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.randn(40, 4), torch.arange(40) % 2), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for x, y in loader:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    engine.close()
    budgets = audit(folder / "run")
    if budgets.num_steps != 5 or not 0 < budgets.worst_case < float("inf"):
        sys.exit("the steps were not recorded")


def lightning(folder: Path) -> None:
    """The callback can be made."""
    from per_instance_accountant import PrivacyEngine
    from per_instance_accountant.integrations.lightning import IndividualPrivacyCallback

    IndividualPrivacyCallback(PrivacyEngine(accountant="rdp"), noise_multiplier=1.0, max_grad_norm=1.0)


def transformers(folder: Path) -> None:
    """The integration can be imported."""
    importlib.import_module("per_instance_accountant.integrations.transformers")


USES: dict[str, Callable[[Path], None]] = {
    use.__name__: use for use in (core, sign, testing, opacus, lightning, transformers)
}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        USES[sys.argv[1]](Path(scratch))
    sys.stdout.write(f"{sys.argv[1]}: Python {sys.version.split()[0]}, ok\n")
