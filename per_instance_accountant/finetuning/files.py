"""Model files of the runner: tensors and plain values only, readable by the owner only, replaced in one
move."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from per_instance_accountant.errors import CertificateError, PlanError, UnsupportedError, UsageError
from per_instance_accountant.ledger import Anchor
from per_instance_accountant.opacus_adapter.checkpoints import CHECKPOINT_KEY

_PROGRESS = "progress.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run has come. secret: what its batches and noise follow from; as private as the noise."""

    steps: int
    secret: bytes
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A file of tensors and plain values. Raises CertificateError PIA051 if unreadable, UnsupportedError
    PIA060 if only pickle could read it."""
    try:
        content: dict[str, Any] = torch.load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsupportedError(
            "PIA060",
            "the checkpoint holds more than tensors and plain values",
            "Reading it could run code from the file, so it was not read",
            "torch.save(model.state_dict(), path)",
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise CertificateError(
            "PIA051",
            f"the checkpoint cannot be read ({type(error).__name__})",
            "The model that the plan starts from is unknown",
            "torch.save(model.state_dict(), path)",
        ) from error
    return content


def load_module(module: nn.Module, path: str | os.PathLike[str], anchor: Anchor | None = None) -> None:
    """Weights from a state dict or from a file of ``save_checkpoint``, which must say ``anchor``.

    Raises UsageError PIA071 for another architecture, PlanError PIA033 for another run or moment. A bare
    state dict says neither: whoever passes it vouches for it.
    """
    content = read_tensors(path)
    stated = content.get(CHECKPOINT_KEY, {}).get("anchor")
    if anchor and stated and (stated["run_id"], stated["steps"]) != (anchor.run_id, anchor.steps):
        raise PlanError(
            "PIA033",
            f"the checkpoint was taken after {stated['steps']} steps of its run, not after {anchor.steps}",
            "The plan says nothing about that model",
            "run_plan(checkpoint=...) with the checkpoint of the run and step that the plan was made for",
        )
    state = content.get("module_state_dict", content)
    try:
        module.load_state_dict({name.removeprefix("_module."): value for name, value in state.items()})
    except (RuntimeError, AttributeError) as error:
        raise UsageError(
            "PIA071",
            "the checkpoint does not fit the model",
            "Nothing was loaded or run",
            "pass the architecture that was trained, unwrapped: run_plan(module=MyModel(), ...)",
        ) from error


def save_module(module: nn.Module, path: Path) -> None:
    """Write the state dict."""
    _replace(path, module.state_dict())


def save_progress(directory: Path, plan_digest: str, progress: Progress, module: nn.Module) -> None:
    """Remember weights after ``progress.steps`` steps of the plan."""
    content = {
        "plan": plan_digest,
        "steps": progress.steps,
        "secret": progress.secret.hex(),
        "weights": module.state_dict(),
    }
    _replace(directory / _PROGRESS, content)


def load_progress(directory: Path, plan_digest: str) -> Progress | None:
    """What an earlier run of this plan left in ``directory``, None if nothing did.

    Raises PlanError PIA033 when another plan's run is there.
    """
    path = directory / _PROGRESS
    if not path.exists():
        return None
    content = read_tensors(path)
    if content.get("plan") != plan_digest:
        raise PlanError(
            "PIA033",
            "the output directory holds the run of another plan",
            "Its weights are not a state of this plan",
            "run_plan(output=another_directory)",
        )
    return Progress(
        steps=content["steps"], secret=bytes.fromhex(content["secret"]), weights=content["weights"]
    )


def secret_beside(ledger: Path, plan_digest: str) -> Path:
    """File in the ledger's directory that holds the secret of an unfinished run of this plan: with it and
    the trained model the run can be repeated step by step where its output directory was lost."""
    return ledger / f"unlearning-{plan_digest.removeprefix('sha256:')[:16]}.secret"


def load_secret(path: Path) -> bytes | None:
    """The secret; None if there is none. Raises CertificateError PIA051 if it cannot be read."""
    if not path.exists():
        return None
    return bytes.fromhex(read_tensors(path)["secret"])


def save_secret(path: Path, secret: bytes) -> None:
    """Write it, readable by the owner only."""
    _replace(path, {"secret": secret.hex()})


def _replace(path: Path, content: Mapping[str, Any]) -> None:
    """Write beside the target, force to the device, then move: a reader sees the old file or the new one."""
    temporary = path.with_name(path.name + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        torch.save(dict(content), stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
