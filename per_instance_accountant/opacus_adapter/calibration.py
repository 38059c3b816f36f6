"""Noise for a target epsilon, for the loader that will really be iterated."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
from opacus.accountants.utils import get_noise_multiplier
from torch.utils.data import DataLoader

from per_instance_accountant.errors import GuaranteeError, UsageError


def split_options(accountant: Any, arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options for the calibration of noise (those of ``get_epsilon``, and the tolerance), and the others."""
    known = {"epsilon_tolerance", *inspect.signature(accountant.get_epsilon).parameters}
    known -= {"delta", "kwargs", "_"}
    options = {name: value for name, value in arguments.items() if name in known}
    return options, {name: value for name, value in arguments.items() if name not in known}


def calibrate(loader: DataLoader[Any], *, poisson: bool, epochs: float, **options: Any) -> float:
    """The noise multiplier for this many epochs over the Poisson loader that Opacus makes of ``loader``.

    Opacus plans ``epochs * len(loader)`` steps at rate ``1 / len(loader)``; its own loader may have one step
    less, and its accountant a larger rate. Raises GuaranteeError PIA010 without Poisson sampling.
    """
    if not poisson:
        raise GuaranteeError(
            "PIA010",
            "make_private_with_epsilon with poisson_sampling=False",
            "Noise would be calibrated for sampling that does not happen",
            "make_private(noise_multiplier=get_noise_multiplier(sample_rate=1, steps=epochs, ...), ...)",
        )
    # Opacus returns the noise 10 for a target that is NaN, and never returns for a delta of 1 or no steps.
    targets = (("target_epsilon", 0, math.inf), ("target_delta", 0, 1), ("epochs", 0, math.inf))
    for name, low, high in targets:
        value = epochs if name == "epochs" else options[name]
        if not (isinstance(value, int | float | np.number) and low < value < high):
            raise UsageError(
                "PIA070",
                f"{name} is {value!r}, allowed is ({low}, {high})",
                "No noise multiplier belongs to it",
                "make_private_with_epsilon(target_epsilon=8.0, target_delta=1e-5, epochs=10, ...)",
            )
    length = int(1 / (1 / len(loader)))
    steps = math.ceil(epochs * length)
    try:
        return float(get_noise_multiplier(sample_rate=1 / length, steps=steps, **options))
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise _too_low(float(options["target_epsilon"])) from None


def _too_low(target: float) -> GuaranteeError:
    return GuaranteeError(
        "PIA011",
        f"no noise multiplier up to 1e6 reaches epsilon {target:g}",
        "Training at any of them would spend more",
        "fewer epochs, a larger data set, or a larger target_epsilon",
    )
