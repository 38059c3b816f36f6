"""Bad inputs and faults as tables: what is done, and what is promised to happen. One test runs each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from per_instance_accountant.errors import PiaError
from per_instance_accountant.ledger import Ledger, LedgerWriter, Phase, Run, Step

Check = Callable[..., Any]
N = 6


def refused(call: Callable[[], Any], code: str) -> PiaError:
    """The call raises the typed error of this code."""
    with pytest.raises(PiaError) as caught:
        call()
    assert caught.value.code == code, str(caught.value)
    return caught.value


def make_phase(**changes: Any) -> Phase:
    settings = {
        "kind": "train",
        "sampling": "poisson",
        "sample_rate": 0.25,
        "noise_std": 1.5,
        "max_grad_norm": 1.0,
        "charging": "worst_case",
        "denominator": 2.0,
        "learning_rate": 0.1,
    }
    return Phase(**(settings | changes))


def step_of(*positions: int, norm: float = 0.5) -> Step:
    return Step(
        positions=np.array(positions, np.int64), contributions=np.full(len(positions), norm, np.float32)
    )


def writer_of(*events: Any, path: Any = None, **run: Any) -> LedgerWriter:
    writer = LedgerWriter.create(path, Run(**({"num_instances": N} | run)))
    for event in events:
        writer.append(event)
    return writer


def ledger_of(*events: Any, **run: Any) -> Ledger:
    writer = writer_of(*events, **run)
    writer.close()
    return writer.ledger()


def unchanged_after(writer: LedgerWriter, event: Any, code: str) -> None:
    """The event is refused, and neither the facts nor one byte of the log changed."""
    before = writer.anchor
    refused(lambda: writer.append(event), code)
    assert writer.anchor == before
    writer.append(step_of(0))
