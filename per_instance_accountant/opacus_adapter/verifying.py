"""The debug check of a loop: norms of some rows of a batch, computed again from what the loader handed out.

Counts cannot see rows that the loop permuted, mixed or replaced, nor a parameter that is used outside of its
layer. A norm that is computed again from the loader's own row can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch.utils._pytree import tree_map

from per_instance_accountant.errors import AlignmentError, UnsupportedError
from per_instance_accountant.opacus_adapter.clipping import instance_norms
from per_instance_accountant.opacus_adapter.sweeps import to_device

Verify = Literal["off", "first_step", "every_step"]
ROWS = 8
"""Rows of a batch whose norms are computed again."""
TOLERANCE, ROUGH = 1e-3, 5e-2
"""Relative differences that rounding explains, in float32 and under autocast."""


class Verifier:
    """Recomputes norms by reverse differentiation of single rows, without any code of Opacus.

    module, core: the wrapper and the user's own module. optimizer: the tracked one. criterion: of the loop.
    """

    def __init__(
        self, *, module: Any, core: torch.nn.Module, optimizer: Any, criterion: Any, how: Verify, ghost: bool
    ) -> None:
        self.module, self.core, self.optimizer, self.ghost = module, core, optimizer, ghost
        wrapped = isinstance(criterion, DPLossFastGradientClipping)
        self.criterion: Callable[..., Any] = criterion.criterion if wrapped else criterion
        self.how, self.running = how, False
        self._choice = np.random.default_rng(0)
        self._forward: tuple[Any, ...] | None = None
        self._content: Any = None

    def received(self, content: Any) -> None:
        """Keep a copy of the batch that the loader hands out: the loop may write into its tensors."""
        if self.how != "off":
            copied = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, content)
            self._content = copied

    def before_forward(self) -> None:
        """Remember what the random numbers of the pass will be, so that dropout can be repeated."""
        device = next(self.core.parameters()).device
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        kind = device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self._forward = (torch.get_rng_state(), cuda, autocast)

    def check(self, norms: NDArray[np.float64]) -> None:
        """Compare norms (B,) with those of rows of the batch that the loader handed out.

        Raises AlignmentError PIA090 when they differ, UnsupportedError PIA060 for other batches than
        ``(*inputs, target)``.
        """
        if self.how == "off" or not len(norms):
            return
        rows = np.sort(self._choice.choice(len(norms), size=min(ROWS, len(norms)), replace=False))
        expected, rough = self._norms(self._content, rows)
        scale = np.maximum(norms[rows], expected)
        tolerance = (ROUGH if rough else TOLERANCE) * scale + 1e-6 * float(norms.max())
        wrong = int((np.abs(norms[rows] - expected) > tolerance).sum())
        if wrong:
            raise AlignmentError(
                "PIA090",
                f"{wrong} of {len(rows)} norms differ from those of the rows that the loader handed out",
                "What the model was given is not the batch, its loss is not the criterion, or a parameter is "
                "used outside of its layer; nothing was added",
                "model(x) with x as it came from the loader, criterion= the loss of the loop",
            )
        if self.how == "first_step":
            self.how = "off"

    def _norms(self, content: Any, rows: NDArray[np.int64]) -> tuple[NDArray[np.float64], bool]:
        if not isinstance(content, (list, tuple)) or len(content) < 2:
            raise UnsupportedError(
                "PIA060",
                f"verify= got a batch of type {type(content).__name__}",
                "The loss of one row cannot be computed without knowing inputs and target",
                'let the data set return (*inputs, target), or verify="off"',
            )
        parameters = [p for p in self.core.parameters() if p.requires_grad]
        if not self.ghost:
            parameters = list(self.optimizer.params)
        batch = to_device(content, parameters[0].device)
        with self._as_in_the_loop(parameters[0].device) as rough:
            output = self.core(*batch[:-1])
            gradients = [self._row(output, batch[-1], int(row), parameters) for row in rows]
        columns = [torch.stack(column) for column in zip(*gradients, strict=True)]
        measure = instance_norms if self.ghost else self.optimizer.measure
        return measure(columns), rough

    def _row(
        self, output: torch.Tensor, target: Any, row: int, parameters: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        loss = self.criterion(output[row : row + 1], target[row : row + 1]).sum()
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    @contextmanager
    def _as_in_the_loop(self, device: torch.device) -> Iterator[bool]:
        """Random numbers and precision of the loop's forward pass, Opacus' hooks off."""
        cpu, cuda, autocast = self._forward or (torch.get_rng_state(), None, None)
        enabled = getattr(self.module, "hooks_enabled", None)
        devices = [device.index or 0] if device.type == "cuda" else []
        self.running = True
        try:
            with torch.random.fork_rng(devices=devices), torch.enable_grad():
                torch.set_rng_state(cpu)
                if cuda is not None:
                    torch.cuda.set_rng_state(cuda, device)
                if enabled is not None:
                    self.module.hooks_enabled = False
                with torch.autocast(device.type, autocast, enabled=autocast is not None):
                    yield autocast is not None
        finally:
            self.running = False
            if enabled is not None:
                self.module.hooks_enabled = enabled
