"""Which models and losses a plan can be carried out with: all that was trained must be unlearned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import nn

from per_instance_accountant.errors import UnsupportedError, UsageError


def refuse_module(module: nn.Module, frozen: Iterable[str]) -> None:
    """Raise UsageError PIA070 for a module in evaluation mode or with parameters that take no part, and
    UnsupportedError PIA060 for statistics of the data beside the parameters.

    frozen: names of parameters that took no part in training either, which the caller vouches for.
    """
    if not module.training:
        raise UsageError(
            "PIA070",
            "the module is in evaluation mode",
            "Its gradients would not be those of the training steps, so no step was taken",
            "module.train() before run_plan(module=module, ...)",
        )
    kept = [one for one in module.modules() if getattr(one, "running_mean", None) is not None]
    if kept:
        raise UnsupportedError(
            "PIA060",
            f"{len(kept)} layers keep running statistics of the data ({type(kept[0]).__name__})",
            "They saw the instances to forget without noise, and no noisy step reaches them",
            "train with opacus.validators.ModuleValidator.fix(module), which uses GroupNorm, and plan again",
        )
    known = {name for name, _ in module.named_parameters()}
    still = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    stated = set(frozen)
    if still - stated or stated - still:
        raise UsageError(
            "PIA070",
            f"{len(still - stated)} parameters are frozen that were not stated as frozen in training, and"
            f" {len(stated - still)} are stated that are not frozen, of {len(known)}",
            "What training wrote into a parameter stays there if the unlearning steps do not move it",
            "module.requires_grad_(True), or run_plan(frozen=[names that training did not move either])",
        )


def refuse_criterion(criterion: Any) -> None:
    """Raise UsageError PIA071 for a loss that says that it is not reduced by its mean."""
    reduction = getattr(criterion, "reduction", "mean")
    if reduction != "mean":
        raise UsageError(
            "PIA071",
            f"the criterion has reduction={reduction!r}",
            "Gradients would have another scale than in training, and the plan's contraction would not hold",
            "the training loss with reduction='mean'",
        )


def same_contributions(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> bool:
    """Whether a repeated step clipped everybody as the recorded one did, up to the rounding of a machine."""
    return first.shape == second.shape and bool(np.allclose(first, second, rtol=1e-3, atol=0.0))
