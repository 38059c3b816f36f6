"""Measures of forgetting against the retrained reference, each with its null and an interval."""

from per_instance_accountant.evaluation.measures.attacks import (
    LikelihoodAttack,
    attack_statistics,
    simple_attacks,
    u_lira,
)
from per_instance_accountant.evaluation.measures.distances import (
    Distance,
    gaussian_renyi,
    klom,
    variational_renyi,
)
from per_instance_accountant.evaluation.measures.empirical import (
    EmpiricalEpsilon,
    empirical_epsilon,
    one_run_epsilon,
)
from per_instance_accountant.evaluation.measures.forgetting import (
    Forgetting,
    StepsToOracle,
    forgetting,
    harmonic_score,
    relearn_steps,
    steps_to_oracle,
)
from per_instance_accountant.evaluation.measures.intervals import Interval, mean_interval, rank_correlation

__all__ = [
    "Distance",
    "EmpiricalEpsilon",
    "Forgetting",
    "Interval",
    "LikelihoodAttack",
    "StepsToOracle",
    "attack_statistics",
    "empirical_epsilon",
    "forgetting",
    "gaussian_renyi",
    "harmonic_score",
    "klom",
    "mean_interval",
    "one_run_epsilon",
    "rank_correlation",
    "relearn_steps",
    "simple_attacks",
    "steps_to_oracle",
    "u_lira",
    "variational_renyi",
]
