"""Doubt: what can be measured about a model that is said to have forgotten. Every number is an estimate."""

from per_instance_accountant.evaluation.barriers import LossBarrier, loss_barrier
from per_instance_accountant.evaluation.membership import AttackScore, membership_attack
from per_instance_accountant.evaluation.outcomes import accuracies, margins, mean_loss

__all__ = [
    "AttackScore",
    "LossBarrier",
    "accuracies",
    "loss_barrier",
    "margins",
    "mean_loss",
    "membership_attack",
]
