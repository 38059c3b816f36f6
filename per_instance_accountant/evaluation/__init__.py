"""Doubt: what can be measured about a model that is said to have forgotten. Every number is an
estimate."""

from per_instance_accountant.evaluation.barriers import LossBarrier, loss_barrier
from per_instance_accountant.evaluation.measures import (
    empirical_epsilon,
    forgetting,
    gaussian_renyi,
    klom,
    one_run_epsilon,
    rank_correlation,
    simple_attacks,
    steps_to_oracle,
    u_lira,
    variational_renyi,
)
from per_instance_accountant.evaluation.membership import AttackScore, membership_attack
from per_instance_accountant.evaluation.oracle import Training, checkpoints, unlearning_course
from per_instance_accountant.evaluation.outcomes import accuracies, margins, mean_loss
from per_instance_accountant.evaluation.scores import Difficulty, difficulty, memorisation

__all__ = [
    "AttackScore",
    "Difficulty",
    "LossBarrier",
    "Training",
    "accuracies",
    "checkpoints",
    "difficulty",
    "empirical_epsilon",
    "forgetting",
    "gaussian_renyi",
    "klom",
    "loss_barrier",
    "margins",
    "mean_loss",
    "membership_attack",
    "memorisation",
    "one_run_epsilon",
    "rank_correlation",
    "simple_attacks",
    "steps_to_oracle",
    "u_lira",
    "unlearning_course",
    "variational_renyi",
]
