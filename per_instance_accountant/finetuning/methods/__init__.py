"""Methods that make a model forget instances, behind one function; only a certified run promises anything."""

from per_instance_accountant.finetuning.methods.adaptive import (
    StepCalibration,
    adversarial_counts,
    calibrate,
    requests_by_loss,
    steps_for,
)
from per_instance_accountant.finetuning.methods.continual import ContinualRun, at_goal, unlearn_in_turn
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
    "ContinualRun",
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
    "StepCalibration",
    "Trace",
    "UnlearnedEnsemble",
    "UnlearnedModel",
    "adversarial_counts",
    "at_goal",
    "calibrate",
    "ensemble_of",
    "instances_of",
    "requests_by_loss",
    "steps_for",
    "unlearn",
    "unlearn_ensemble",
    "unlearn_in_turn",
]
