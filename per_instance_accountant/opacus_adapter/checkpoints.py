"""Checkpoints that know where in a ledger they were taken, and are read without running code from them."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from opacus.optimizers import DPOptimizer

from per_instance_accountant.errors import GuaranteeError, LedgerError, UnsupportedError
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


@contextmanager
def plain_mechanism(accountant: Any) -> Iterator[None]:
    """Inside, the state of an accountant names its mechanism. Opacus before 1.6 puts a function there, which
    only pickle can read."""
    stock = accountant.state_dict

    def state_dict(destination: Any = None) -> Any:
        state = stock(destination)
        state["mechanism"] = accountant.mechanism()
        return state

    accountant.state_dict = state_dict
    try:
        yield
    finally:
        del accountant.state_dict


def as_expected(state: dict[str, Any], accountant: Any) -> dict[str, Any]:
    """The state of an accountant as the installed Opacus compares it, given the name of its mechanism."""
    expected = type(accountant)().state_dict()["mechanism"]
    named = state.get("mechanism") == accountant.mechanism()
    return {**state, "mechanism": expected} if named else state


class NoiseSessions:
    """The random states that noise was drawn from, so that none is used twice.

    A script that seeds torch and is started again from a checkpoint draws the noise of its first steps a
    second time; a loop that seeds torch in every step draws the same noise always. The difference of two
    releases with the same noise is the difference of their clipped sums, without any noise.
    """

    def __init__(self) -> None:
        self._drawn: set[bytes] = set()
        self._first: list[bytes] = []
        self._began = False

    def check(self, optimizer: Any) -> None:
        """Before noise is drawn. Raises GuaranteeError PIA091; nothing was released then."""
        if not optimizer.noise_multiplier or optimizer.secure_mode or not optimizer.draws_noise():
            return
        digest = _state_digest(optimizer)
        if digest in self._drawn:
            raise GuaranteeError(
                "PIA091",
                "the random state is one that noise of this run was drawn from before",
                "The same noise twice cancels in the difference of two releases, which then has none",
                "torch.seed() once after resuming, no torch.manual_seed(...) in the loop; engine.abandon()",
            )
        self._drawn.add(digest)
        if not self._began:
            self._first.append(digest)
        self._began = True

    def state(self) -> list[str]:
        """Where every session so far began, for a checkpoint."""
        return [digest.hex() for digest in self._first]

    def resume(self, state: Sequence[str]) -> None:
        """A new session begins, after those of a checkpoint."""
        earlier = [bytes.fromhex(digest) for digest in state]
        self._first = [*self._first, *(digest for digest in earlier if digest not in self._first)]
        self._drawn.update(earlier)
        self._began = False


def _state_digest(optimizer: DPOptimizer) -> bytes:
    device = optimizer.params[0].device
    if optimizer.generator is not None:
        state = optimizer.generator.get_state()
    elif device.type == "cuda":
        state = torch.cuda.get_rng_state(device)
    else:
        state = torch.get_rng_state()
    return hashlib.blake2b(state.cpu().numpy().tobytes(), digest_size=16).digest()
