"""One pass of per-instance gradient norms over a whole data set, without leaving a trace on the training
state."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModuleExpandedWeights
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch.utils.data import DataLoader

from per_instance_accountant.errors import AlignmentError, UnsupportedError
from per_instance_accountant.opacus_adapter.clipping import round_up
from per_instance_accountant.opacus_adapter.ghost import ghost_norms
from per_instance_accountant.opacus_adapter.loader import IndexedCollate, IndexedDataset
from per_instance_accountant.opacus_adapter.optimizers import TrackedOptimizer
from per_instance_accountant.opacus_adapter.ranks import inner_module

_PARAMETER_STATE = (
    *("grad", "grad_sample", "summed_grad"),
    *("_current_grad_sample", "_norm_sample", "_forward_counter"),
)
_MODULE_STATE = ("training", "activations", "max_batch_len")


def sweep_norms(
    module: Any,
    optimizer: TrackedOptimizer,
    data_loader: DataLoader[Any],
    criterion: Callable[..., Any],
    *,
    batch_size: int = 256,
) -> NDArray[np.float32]:
    """Upper bounds of the gradient norms of ALL instances at the present parameters, before clipping (with
    per-layer clipping, after it).

    module, optimizer, data_loader, criterion: as returned by ``make_private`` (the plain criterion unless
    the mode is ghost). The data set is read in order with the loader's collate function; a batch is
    ``(*inputs, target)``, or a mapping, whose loss is ``criterion(module(**batch), batch)``. Dropout is
    off. Parameters, gradients, training flags and random states stay as they were. Returns (N,) float32.
    These norms are not private. Raises UnsupportedError PIA060 for other batches, AlignmentError PIA006
    for a norm that is not finite.
    """
    dataset, collate = data_loader.dataset, data_loader.collate_fn
    dataset = dataset.inner if isinstance(dataset, IndexedDataset) else dataset
    collate = collate.inner if isinstance(collate, IndexedCollate) else collate
    core = inner_module(getattr(module, "_module", module))
    parameters = list(core.parameters())
    with ExitStack() as stack:
        stack.enter_context(_random_states(parameters))
        stack.enter_context(_attributes(parameters, _PARAMETER_STATE))
        stack.enter_context(_attributes(list(core.modules()), _MODULE_STATE))
        stack.enter_context(
            _attributes([module], ("_per_sample_gradient_norms", "grad_accumulation_allowed"))
        )
        stack.enter_context(torch.enable_grad())
        _deterministic(core)
        for p in parameters:
            vars(p).pop("_current_grad_sample", None)  # Of a backward pass that nobody finished.
            vars(p)["_forward_counter"] = 0
        device = parameters[0].device
        batches = DataLoader(dataset, batch_size=batch_size, collate_fn=collate)
        parts = [_batch_norms(module, optimizer, criterion, to_device(batch, device)) for batch in batches]
    norms = np.concatenate(parts)
    bad = int(np.count_nonzero(~np.isfinite(norms)))
    if bad:
        raise AlignmentError(
            "PIA006",
            f"{bad} of {len(norms)} gradient norms of the sweep are NaN or infinite",
            "No threshold can be set for these instances; nothing was written",
            "remove or repair these instances, or lower the learning rate",
        )
    return round_up(norms)


def _batch_norms(
    module: Any, optimizer: TrackedOptimizer, criterion: Callable[..., Any], batch: Any
) -> NDArray[np.float64]:
    mapping = isinstance(batch, Mapping)
    if not mapping and (not isinstance(batch, (list, tuple)) or len(batch) < 2):
        raise UnsupportedError(
            "PIA060",
            f"a sweep got a batch of type {type(batch).__name__}",
            "The loss of an instance cannot be computed without knowing inputs and target",
            "let the data set return (*inputs, target) or a dict, or use charging=WorstCase()",
        )
    parameters = optimizer.params
    core: Any = inner_module(getattr(module, "_module", module))
    for p in core.parameters():
        p.grad = p.grad_sample = None
    # Only their wrapper can run expanded weights; the other modes are hooks on the module itself.
    run = module if isinstance(module, GradSampleModuleExpandedWeights) else core
    loss = criterion(run(**batch), batch) if mapping else criterion(run(*batch[:-1]), batch[-1])
    if isinstance(criterion, DPLossFastGradientClipping):
        per_instance = loss.loss_per_sample
        (per_instance.mean() if module.loss_reduction == "mean" else per_instance.sum()).backward()
        norms: NDArray[np.float64] = ghost_norms(module).cpu().numpy()
        return norms
    loss.backward()
    return optimizer.measure([optimizer._get_flat_grad_sample(p).to(p.dtype) for p in parameters])


def _deterministic(core: torch.nn.Module) -> None:
    """Evaluation mode everywhere but in the layers whose hooks record per-sample gradients only while
    training."""
    core.eval()
    for layer in core.modules():
        if any(p.requires_grad for p in layer.parameters(recurse=False)):
            layer.training = True


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on this device."""
    if isinstance(batch, (list, tuple)):
        return [to_device(item, device) for item in batch]
    if isinstance(batch, Mapping):
        return {name: to_device(item, device) for name, item in batch.items()}
    return batch.to(device) if isinstance(batch, torch.Tensor) else batch


_ABSENT = object()


@contextmanager
def _attributes(owners: list[Any], names: tuple[str, ...]) -> Iterator[None]:
    """Put these attributes back as they were, absent ones included."""
    before = [(owner, name, getattr(owner, name, _ABSENT)) for owner in owners for name in names]
    try:
        yield
    finally:
        for owner, name, value in before:
            if value is not _ABSENT:
                setattr(owner, name, value)
            elif hasattr(owner, name):
                delattr(owner, name)


@contextmanager
def _random_states(parameters: list[Any]) -> Iterator[None]:
    devices = {p.device.index for p in parameters if p.device.type == "cuda"}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
