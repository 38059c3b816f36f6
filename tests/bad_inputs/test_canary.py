"""The witness that watches every test: it hears ids and norms, and errors and logs that repeat them."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from per_instance_accountant.errors import UsageError
from tests.bad_inputs.cases import make_phase, step_of, writer_of
from tests.canary import WITNESS


@pytest.mark.parametrize("secret", ["canary-7731", repr(float(np.float32(0.77312345)))])
@pytest.mark.parametrize("way", ["error", "log"])
def test_the_witness_hears_what_must_not_be_said(secret: str, way: str) -> None:
    writer = writer_of(make_phase(), num_instances=2, ids=np.array(["canary-7731", "b"]))
    writer.append(step_of(0, norm=0.77312345))
    assert WITNESS.leaks() == 0
    if way == "error":
        str(UsageError("PIA070", f"instance {secret} is bad", "Nothing", "nothing"))
    else:
        logging.getLogger("anywhere").warning("a line about %s", secret)
    assert WITNESS.leaks() == 1
    WITNESS.said.clear()
