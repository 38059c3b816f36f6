"""Models of one architecture side by side: weights with a leading dimension, one forward pass for all.

A single model is an ensemble of one, and goes through ``functional_call`` without any vectorisation.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from per_instance_accountant.errors import UnsupportedError
from per_instance_accountant.finetuning.methods.instances import refuse

Weights = dict[str, Tensor]
"""Name -> (K, ...) tensor."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ensemble:
    """K models. module: the architecture, in evaluation mode; parameters: what may change; fixed: buffers
    (running statistics of batch normalisation among them) and parameters that need no gradient.

    Evaluation mode throughout: a method that sees the instances to forget alone would otherwise move the
    running statistics towards them, and dropout would make it random.
    """

    module: nn.Module
    parameters: Weights
    fixed: Weights

    @property
    def size(self) -> int:
        """K."""
        return len(next(iter(self.parameters.values())))

    def with_parameters(self, parameters: Weights) -> Ensemble:
        return replace(self, parameters=parameters)

    def logits(self, inputs: Tensor, parameters: Weights | None = None) -> Tensor:
        """(K, n, classes) outputs for (K, n, ...) inputs, with other parameters if given."""
        chosen = self.parameters if parameters is None else parameters
        if self.size == 1:
            state = {name: value[0] for name, value in (chosen | self.fixed).items()}
            outputs: Tensor = functional_call(self.module, state, (inputs[0],))[None]
            return outputs
        return vmap(self._one)(chosen, self.fixed, inputs)

    def _one(self, parameters: Weights, fixed: Weights, inputs: Tensor) -> Tensor:
        outputs: Tensor = functional_call(self.module, parameters | fixed, (inputs,))
        return outputs

    def member(self, number: int) -> nn.Module:
        """A copy of one model, in evaluation mode."""
        module = copy.deepcopy(self.module)
        state = {
            name: value[number].detach().clone() for name, value in (self.parameters | self.fixed).items()
        }
        module.load_state_dict(state, strict=False)
        return module


def ensemble_of(models: Sequence[nn.Module]) -> Ensemble:
    """Models of one architecture, copied. Raises UsageError PIA071 for none, for parameters that are NaN or
    infinite, and for models in which nothing needs a gradient; UnsupportedError PIA060 off the CPU.

    >>> ensemble_of([nn.Linear(2, 3), nn.Linear(2, 3)]).logits(torch.zeros(2, 5, 2)).shape
    torch.Size([2, 5, 3])
    """
    copies = [copy.deepcopy(model).eval() for model in models]
    trainable = {n for n, p in copies[0].named_parameters() if p.requires_grad} if copies else set()
    if not trainable:
        raise refuse(
            "no parameter needs a gradient", "Nothing could be unlearned", "unlearn(method, MyModel(), ...)"
        )
    elsewhere = {str(p.device) for p in copies[0].parameters() if p.device.type != "cpu"}
    if elsewhere:
        raise UnsupportedError(
            "PIA060",
            f"the model lies on {', '.join(sorted(elsewhere))}",
            "Random draws and the models beside each other are kept on the CPU",
            "model.cpu()",
        )
    parameters, buffers = stack_module_state(copies)
    values = {name: value.detach().clone() for name, value in (parameters | buffers).items()}
    bad = sum(int((~torch.isfinite(value)).sum()) for value in values.values() if value.is_floating_point())
    if bad:
        raise refuse(
            f"{bad} weights are NaN or infinite",
            "A model that diverged cannot be repaired by unlearning",
            "load the checkpoint of a model that was trained to the end",
        )
    return Ensemble(
        module=copies[0],
        parameters={name: value for name, value in values.items() if name in trainable},
        fixed={name: value for name, value in values.items() if name not in trainable},
    )


def fresh(module: nn.Module, seeds: Sequence[int]) -> Ensemble:
    """The architecture with newly drawn weights, one model per seed; the global generator is left alone.

    Raises UnsupportedError PIA060 if some module holds parameters and cannot draw them anew.
    """
    own = [part for part in module.modules() if any(True for _ in part.parameters(recurse=False))]
    fixed = [type(part).__name__ for part in own if not callable(getattr(part, "reset_parameters", None))]
    if fixed:
        raise UnsupportedError(
            "PIA060",
            f"{fixed[0]} holds parameters and has no reset_parameters()",
            "A retrained model must owe nothing to the weights it replaces",
            "give the module a reset_parameters() method",
        )
    models = []
    for seed in seeds:
        model = copy.deepcopy(module)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for part in model.modules():
                reset = getattr(part, "reset_parameters", None)
                if callable(reset):
                    reset()
        models.append(model)
    return ensemble_of(models)
