"""Checkpoints that know where in a ledger they were taken, and are read without running code from them."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from opacus.optimizers import DPOptimizer

from per_instance_accountant.errors import GuaranteeError, LedgerError, UnsupportedError
from per_instance_accountant.ledger import Anchor
from per_instance_accountant.opacus_adapter.drawing import FIRST_WORD, MERSENNE, PHILOX

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


def stored_again(checkpoint: Mapping[str, Any], accountant: Any) -> io.BytesIO:
    """A checkpoint that was read without pickle, as a file for Opacus, which reads with pickle allowed."""
    name, buffer = "privacy_accountant_state_dict", io.BytesIO()
    torch.save({**checkpoint, name: as_expected(checkpoint.get(name, {}), accountant)}, buffer)
    buffer.seek(0)
    return buffer


class NoiseSessions:
    """The random states that noise was drawn from, so that none is used twice.

    A script that seeds torch and is started again from a checkpoint draws the noise of its first steps a
    second time; a loop that seeds torch in every step draws the same noise always. The difference of two
    releases with the same noise is the difference of their clipped sums, without any noise.
    """

    def __init__(self) -> None:
        self._drawn: set[bytes] = set()
        self._reached: dict[bytes, float] = {}
        """Block of a generator's numbers -> position up to which noise of this session has used it."""
        self._first: list[bytes] = []
        self._began, self._block = False, b""
        self._left: bytes | None = None
        """The state that the last noise left behind."""

    def check(self, optimizer: Any) -> None:
        """Before noise is drawn. Raises GuaranteeError PIA091; nothing was released then."""
        if not _draws(optimizer):
            return
        self._take_note()
        state = _random_state(optimizer)
        mark, (block, position) = _digest(state), _place(state)
        if mark in self._drawn or position < self._reached.get(block, 0):
            raise GuaranteeError(
                "PIA091",
                "the random state is one that noise of this run was drawn from before",
                "The same noise twice cancels in the difference of two releases, which then has none",
                "torch.seed() once after resuming, no torch.manual_seed(...) in the loop; engine.abandon()",
            )
        self._drawn.add(mark)
        self._block = block
        if not self._began:
            self._first.append(mark)
        self._began = True

    def drawn(self, optimizer: Any) -> None:
        """After noise was drawn: what it used is not to be used again, not even a part of it."""
        if _draws(optimizer):
            self._left = _random_state(optimizer)

    def _take_note(self) -> None:
        if self._left is None:
            return
        block, position = _place(self._left)
        self._left = None
        if block != self._block:
            self._reached[self._block] = float("inf")
        self._reached[block] = position

    def state(self) -> list[str]:
        """Where every session so far began, for a checkpoint."""
        return [mark.hex() for mark in self._first]

    def resume(self, state: Sequence[str]) -> None:
        """A new session begins, after those of a checkpoint."""
        earlier = [bytes.fromhex(mark) for mark in state]
        self._first = [*self._first, *(mark for mark in earlier if mark not in self._first)]
        self._drawn.update(earlier)
        self._began = False


def _draws(optimizer: Any) -> bool:
    return bool(optimizer.noise_multiplier) and not optimizer.secure_mode and bool(optimizer.draws_noise())


def _random_state(optimizer: DPOptimizer) -> bytes:
    device = optimizer.params[0].device
    if optimizer.generator is not None:
        state = optimizer.generator.get_state()
    elif device.type == "cuda":
        state = torch.cuda.get_rng_state(device)
    else:
        state = torch.get_rng_state()
    return state.numpy().tobytes()


def _digest(state: bytes) -> bytes:
    return hashlib.blake2b(state, digest_size=16).digest()


_WORDS = slice(FIRST_WORD, FIRST_WORD + 8 * 8)
"""The first 8 of the 624 words of a Mersenne twister's block, which tell it from others."""


def _place(state: bytes) -> tuple[bytes, int]:
    """What tells the block of numbers that the generator is in from others, and its position there.

    Equal blocks always look equal, different ones of one generator never but by chance. Mersenne twister:
    seed, words left plus one, position, 624 words, cached normals. Philox: seed and offset. Of other
    generators nothing is known but their whole state.
    """
    if len(state) == MERSENNE and int.from_bytes(state[8:12], "little") == 1:
        # Nothing is left, as after a seed: what is drawn next comes from the block that follows.
        ahead = torch.Generator()
        ahead.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
        torch.rand(1, generator=ahead)
        return ahead.get_state().numpy().tobytes()[_WORDS], 0
    if len(state) == MERSENNE:
        return state[_WORDS], int.from_bytes(state[16:24], "little")
    if len(state) == PHILOX:
        return state[:8], int.from_bytes(state[8:], "little")
    return _digest(state), 0
