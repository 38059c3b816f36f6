"""Hands on the model: carries out an unlearning plan."""

from per_instance_accountant.finetuning.estimate import EstimateRun, run_estimate
from per_instance_accountant.finetuning.runner import UnlearningRun, project, reseed, run_plan, secret_of

__all__ = [
    "EstimateRun",
    "UnlearningRun",
    "project",
    "reseed",
    "run_estimate",
    "run_plan",
    "secret_of",
]
