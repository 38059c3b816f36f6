"""What models make of instances: accuracy, loss, margin."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from per_instance_accountant.errors import GuaranteeError
from per_instance_accountant.finetuning.methods import Ensemble, Instances
from per_instance_accountant.finetuning.methods.losses import cross_entropies

_BATCH = 4096


def outputs(models: Ensemble, instances: Instances) -> Tensor:
    """(K, n, classes) logits in float64. Raises GuaranteeError PIA011 if some are not finite."""
    part = instances.stacked
    with torch.no_grad():
        chunks = [models.logits(chunk) for chunk in torch.split(part.inputs, _BATCH, 1)]
    logits = torch.cat(chunks, 1).double()
    bad = int((~torch.isfinite(logits)).any(-1).sum())
    if bad:
        raise GuaranteeError(
            "PIA011",
            f"the outputs for {bad} instances are NaN or infinite",
            "No accuracy, loss or attack score of such a model means anything",
            "unlearn(...) from the checkpoint again with a smaller learning rate",
        )
    return logits


def accuracies(models: Ensemble, instances: Instances) -> NDArray[np.float64]:
    """(K,) share of the instances that each model classifies as their label.

    >>> from per_instance_accountant.finetuning.methods import ensemble_of
    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> _ = model.load_state_dict({"weight": torch.eye(2)})
    >>> accuracies(ensemble_of([model]), Instances(inputs=torch.eye(2), labels=torch.tensor([0, 0]))).tolist()
    [0.5]
    """
    right = outputs(models, instances).argmax(-1) == instances.stacked.labels
    share: NDArray[np.float64] = right.double().mean(1).numpy()
    return share


def mean_loss(models: Ensemble, instances: Instances) -> NDArray[np.float64]:
    """(K,) mean cross-entropy in nats."""
    losses = cross_entropies(outputs(models, instances), instances.stacked.labels)
    means: NDArray[np.float64] = losses.mean(1).numpy()
    return means


def margins(models: Ensemble, instances: Instances) -> NDArray[np.float64]:
    """(K, n) ``z_y - log sum_{c != y} exp z_c``: the log odds of the label, the usual attack
    statistic."""
    logits, labels = outputs(models, instances), instances.stacked.labels[..., None]
    own = logits.gather(-1, labels)[..., 0]
    others = logits.scatter(-1, labels, -torch.inf).logsumexp(-1)
    values: NDArray[np.float64] = (own - others).numpy()
    return values
