"""Checkpoints that know where in a ledger they were taken, and are read without running code from them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import torch

from per_instance_accountant.errors import LedgerError, UnsupportedError
from per_instance_accountant.ledger import Anchor

CHECKPOINT_KEY = "per_instance_accountant"


def load_plain(path: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint of tensors and plain values. Raises UnsupportedError PIA060 when only pickle
    could read it."""
    try:
        content: dict[str, Any] = torch.load(path, **{**options, "weights_only": True})
    except pickle.UnpicklingError as error:
        raise UnsupportedError(
            "PIA060",
            "the checkpoint holds more than tensors and plain values",
            "Reading it could run code from the file, so it was not read",
            "engine.save_checkpoint(..., checkpoint_dict={...}) with plain values only",
        ) from error
    return content


def read_anchor(checkpoint: Mapping[str, Any]) -> Anchor:
    """Where in its ledger a checkpoint was taken. Raises LedgerError PIA040 when the file does not
    say it."""
    position = checkpoint.get(CHECKPOINT_KEY)
    if not isinstance(position, dict) or position.get("version") != 1:
        raise LedgerError(
            "PIA040",
            "the checkpoint does not say where in a ledger it was taken",
            "The steps before it are in no ledger, so every loss would be too small",
            "engine.save_checkpoint(path=..., module=model) of this package's PrivacyEngine",
        )
    return Anchor.from_dict(position["anchor"])
