"""What a merged ledger says about its parts: whose they were, what was missing, and when one of them may have
been anchored."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import rfc8785
from numpy.typing import NDArray

from per_instance_accountant.ledger.records import MAX_RANKS

MOMENT: Final = np.dtype(
    [("rank", "<u4"), ("sequence", "<u8"), ("steps", "<u8"), ("merged_steps", "<u8"), ("digest", "V32")]
)
"""The part of ``rank`` held ``steps`` steps at the end of frame ``sequence``; they are the first
``merged_steps`` of the merged ledger. digest: SHA-256 of the bytes of the part up to there."""
MAX_MOMENTS: Final = 1 << 19
_U32: Final = struct.Struct("<I")
_NAMES: Final = {"world_size", "ranks", "incomplete", "confirmed"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Merge:
    """Stated once, at the end of the merge.

    world_size: processes of the run. ranks: whose parts were merged, rising.
    incomplete: disjoint rising half-open intervals of steps that some of these parts does not hold.
    confirmed: whether every part of the run said that its last step was released.
    moments: (k,) of dtype ``MOMENT``, the latest ones if there were more than ``MAX_MOMENTS``.
    """

    world_size: int
    ranks: tuple[int, ...]
    incomplete: tuple[tuple[int, int], ...]
    confirmed: bool
    moments: NDArray[Any]

    @property
    def missing_ranks(self) -> tuple[int, ...]:
        """Ranks whose part was lost."""
        return tuple(sorted(set(range(self.world_size)) - set(self.ranks)))

    @property
    def num_incomplete_steps(self) -> int:
        """Steps that some part does not hold although its rank is known."""
        return sum(end - start for start, end in self.incomplete)

    def statement(self) -> str:
        """One or two sentences for people: what was merged, what was missing and how that was charged."""
        text = f"Merged from the parts of {len(self.ranks)} of {self.world_size} ranks."
        if not (self.missing_ranks or self.incomplete):
            return text
        return (
            f"{text} {len(self.missing_ranks)} parts are missing, and {self.num_incomplete_steps} steps"
            " are not in all the others: each is charged, and where the charge depends on who was drawn, to"
            " everybody who may have been."
        )

    def steps_at(self, sequence: int, steps: int, digest: str) -> int | None:
        """Steps of the merged ledger at that moment of one of the parts; None if no part was there."""
        found = self.moments[(self.moments["sequence"] == sequence) & (self.moments["steps"] == steps)]
        same = [row for row in found if row["digest"].tobytes().hex() == digest.removeprefix("sha256:")]
        return int(same[0]["merged_steps"]) if same else None


def encode_merge(merge: Merge) -> bytes:
    """Payload of the frame: length of the JSON (4) | canonical JSON | moments."""
    content: dict[str, Any] = {
        "world_size": merge.world_size,
        "ranks": list(merge.ranks),
        "incomplete": [list(interval) for interval in merge.incomplete],
        "confirmed": merge.confirmed,
    }
    text = rfc8785.dumps(content)
    return _U32.pack(len(text)) + text + merge.moments[-MAX_MOMENTS:].tobytes()


def decode_merge(payload: bytes, num_steps: int) -> Merge:
    """Inverse of :func:`encode_merge`. Any exception means that the payload is malformed."""
    end = _U32.size + _U32.unpack_from(payload)[0]
    content = json.loads(payload[_U32.size : end])
    if set(content) != _NAMES or rfc8785.dumps(content) != payload[_U32.size : end]:
        raise ValueError("not the canonical form of the record")
    moments = np.frombuffer(payload[end:], MOMENT)
    world_size, ranks = content["world_size"], tuple(content["ranks"])
    edges = [-1, *(edge for interval in content["incomplete"] for edge in interval), num_steps]
    sound = all(type(value) is int for value in (world_size, *ranks, *edges))
    sound &= all(len(interval) == 2 for interval in content["incomplete"])
    sound &= type(content["confirmed"]) is bool and ranks == tuple(sorted(set(ranks)))
    sound &= bool(ranks) and ranks[0] >= 0 and ranks[-1] < world_size <= MAX_RANKS
    rising = all(low < high for low, high in pairwise(edges[:-1]))
    if not (sound and rising and edges[-2] <= num_steps):
        raise ValueError("not the record of a merge")
    incomplete = tuple((start, stop) for start, stop in content["incomplete"])
    return Merge(
        world_size=world_size,
        ranks=ranks,
        incomplete=incomplete,
        confirmed=content["confirmed"],
        moments=moments,
    )
