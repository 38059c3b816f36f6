"""Methods that make a model forget instances, behind one function; only a certified run promises anything."""

from per_instance_accountant.finetuning.methods.ensemble import Ensemble, ensemble_of
from per_instance_accountant.finetuning.methods.instances import Instances, instances_of
from per_instance_accountant.finetuning.methods.records import (
    METHODS,
    Attack,
    CertifiedRun,
    FineTune,
    GradientAscent,
    InstanceWise,
    Method,
    NegGradPlus,
    NoisyFineTune,
    RandomRelabel,
    Retrain,
    SalUn,
    Schedule,
    Scrub,
    SparseFineTune,
)
from per_instance_accountant.finetuning.methods.unlearning import (
    Trace,
    UnlearnedEnsemble,
    UnlearnedModel,
    unlearn,
    unlearn_ensemble,
)

__all__ = [
    "METHODS",
    "Attack",
    "CertifiedRun",
    "Ensemble",
    "FineTune",
    "GradientAscent",
    "InstanceWise",
    "Instances",
    "Method",
    "NegGradPlus",
    "NoisyFineTune",
    "RandomRelabel",
    "Retrain",
    "SalUn",
    "Schedule",
    "Scrub",
    "SparseFineTune",
    "Trace",
    "UnlearnedEnsemble",
    "UnlearnedModel",
    "ensemble_of",
    "instances_of",
    "unlearn",
    "unlearn_ensemble",
]
