"""Checks of an installation: what is there, and whether known numbers come out."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from per_instance_accountant.audit.rounding import rounded_up

Finding = dict[str, str]

_BASE: Final = ("numpy", "scipy", "pyarrow", "pydantic", "rfc8785", "tqdm", "typer")
_EXTRAS: Final = {
    "opacus": ("torch", "opacus"),
    "demo": ("sklearn",),
    "testing": ("hypothesis", "pytest", "mpmath"),
}
_DISTRIBUTION: Final = {"sklearn": "scikit-learn"}
_SLACK: Final = 1e-6
"""Relative width of the interval [truth, truth * (1 + slack)] in which a published upper bound must lie."""


def examine(*, train: bool = False) -> list[Finding]:
    """All findings: check, status (``ok``, ``missing`` for an absent extra, ``failed``) and detail.

    train: also train a small model with Opacus and compare the accountants (loads torch).
    """
    findings = [*_versions(), _run("owner-only files", _file_modes), _run("known numbers", _known_numbers)]
    findings.append(_run("in-memory ledger", _ledger_fixture))
    if train:
        with warnings.catch_warnings(action="ignore"):
            findings.append(_run("training with Opacus", _train))
    return findings


def _finding(check: str, status: str, detail: str) -> Finding:
    return {"check": check, "status": status, "detail": detail}


def _run(name: str, check: Callable[[], str]) -> Finding:
    """A check that raises has failed; its reason is the detail, and the other checks still run."""
    try:
        return _finding(name, "ok", check())
    except Exception as error:
        return _finding(name, "failed", f"{type(error).__name__}: {error}")


def _versions() -> Iterator[Finding]:
    yield _finding("python", "ok" if sys.version_info >= (3, 11) else "failed", platform.python_version())
    for name in ("per_instance_accountant", *_BASE):
        found = importlib.util.find_spec(name) is not None
        yield _finding(name, "ok" if found else "failed", _version(name) if found else f"pip install {name}")
    for extra, modules in _EXTRAS.items():
        for name in modules:
            found = importlib.util.find_spec(name) is not None
            fix = f'pip install "per-instance-accountant[{extra}]"'
            yield _finding(
                f"{name} (optional)", "ok" if found else "missing", _version(name) if found else fix
            )


def _version(module: str) -> str:
    try:
        return importlib.metadata.version(_DISTRIBUTION.get(module, module))
    except importlib.metadata.PackageNotFoundError:
        return "version unknown"


def _expect(ok: bool, message: str) -> None:
    if not ok:
        raise RuntimeError(message)


def _file_modes() -> str:
    """Ledgers hold private numbers: the file system of the current directory must keep them from others."""
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".pia-doctor-") as folder:
        path = Path(folder) / "probe"
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        mode = stat.S_IMODE(path.stat().st_mode)
    _expect(mode == 0o600, f"mode 600 becomes {mode:o}; keep ledgers on another file system")
    return "mode 600 holds in the current directory"


def _known_numbers() -> str:
    """Upper bounds must lie at or above closed forms, and close to them."""
    from per_instance_accountant.divergence import gaussian_delta, rdp_to_epsilon, sampled_gaussian_rdp

    def normal_cdf(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    order_8 = 8.0
    cases = {
        "Gaussian RDP": (sampled_gaussian_rdp(1.0, [0.5], [order_8]), order_8 * 0.25 / 2),
        "sampled RDP at order 2": (
            sampled_gaussian_rdp(0.01, [1.0], [2.0]),
            math.log1p(1e-4 * math.expm1(1.0)),
        ),
        "epsilon from one order": (
            rdp_to_epsilon([order_8], [0.5], 1e-5),
            0.5 + math.log(7 / 8) - math.log(1e-5 * 8) / 7,
        ),
        "delta of a Gaussian": (gaussian_delta(1.0, 1.0), normal_cdf(-0.5) - math.e * normal_cdf(-1.5)),
    }
    for name, (published, truth) in cases.items():
        value = _scalar(published)
        inside = truth * (1 - 1e-14) <= value <= truth * (1 + _SLACK)
        _expect(inside, f"{name} is {value!r}, the closed form is {truth!r}")
    return f"{len(cases)} closed forms, each met from above within {_SLACK:g}"


def _scalar(value: object) -> float:
    import numpy as np

    return float(np.asarray(value, dtype=np.float64).reshape(()))


def _ledger_fixture() -> str:
    """Four full-batch steps with sensitivity ratio 1/2 cost exactly order / 2 for everybody."""
    import numpy as np

    from per_instance_accountant.accounting import account
    from per_instance_accountant.ledger import LedgerWriter
    from per_instance_accountant.ledger.records import Phase, Run, Step

    phase = Phase(
        kind="train",
        sampling="poisson",
        sample_rate=1.0,
        noise_std=2.0,
        max_grad_norm=1.0,
        charging="worst_case",
        denominator=3.0,
        learning_rate=0.1,
    )
    step = Step(positions=np.arange(3), contributions=np.ones(3, dtype=np.float32))
    with LedgerWriter.create(None, Run(num_instances=3)) as writer:
        for event in (phase, step, step, step, step):
            writer.append(event)
        loss = account(writer.ledger())
    truth = loss.orders / 2
    off = np.max(np.abs(loss.rdp / truth - 1))
    _expect(
        bool(np.all(loss.rdp >= truth * (1 - 1e-14)) and off <= _SLACK), f"individual RDP is off by {off:.2g}"
    )
    return f"4 steps charged to {loss.rdp.shape[0]} instances as the closed form says"


def _train() -> str:
    """Train with tracking and compare the worst case with Opacus' own accountant."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from per_instance_accountant.audit import audit
    from per_instance_accountant.opacus_adapter import PrivacyEngine

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 8, generator=generator)
    dataset = TensorDataset(features, (features[:, 0] > 0).long())
    module = torch.nn.Linear(8, 2)
    engine = PrivacyEngine(accountant="rdp")
    module, optimizer, loader = engine.make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.5),
        data_loader=DataLoader(dataset, batch_size=20, generator=generator),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for x, y in loader:
        optimizer.zero_grad()
        loss: Any = torch.nn.functional.cross_entropy(module(x), y)
        loss.backward()
        optimizer.step()
    ours, theirs = audit(engine.ledger, 1e-5), engine.get_epsilon(1e-5)
    _expect(ours.num_steps == len(loader), f"{ours.num_steps} of {len(loader)} steps were recorded")
    _expect(
        abs(ours.worst_case / theirs - 1) <= _SLACK, f"epsilon is {ours.worst_case}, Opacus says {theirs}"
    )
    return f"{ours.num_steps} steps recorded; worst case {rounded_up(ours.worst_case)} equals Opacus"
