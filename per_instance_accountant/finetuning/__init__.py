"""Hands on the model: carries out an unlearning plan."""

from per_instance_accountant.finetuning.runner import UnlearningRun, reseed, run_plan, secret_of

__all__ = ["UnlearningRun", "reseed", "run_plan", "secret_of"]
