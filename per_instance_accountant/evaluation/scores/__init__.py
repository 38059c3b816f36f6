"""Scores that are said to tell which instances are hard, beside the privacy loss."""

from per_instance_accountant.evaluation.scores.boundary import boundary_distance
from per_instance_accountant.evaluation.scores.difficulty import Difficulty, difficulty
from per_instance_accountant.evaluation.scores.gradients import expansion, gradient_norms, self_influence
from per_instance_accountant.evaluation.scores.memorisation import Memorisation, memorisation
from per_instance_accountant.evaluation.scores.stein import SteinScores, stein_scores

__all__ = [
    "Difficulty",
    "Memorisation",
    "SteinScores",
    "boundary_distance",
    "difficulty",
    "expansion",
    "gradient_norms",
    "memorisation",
    "self_influence",
    "stein_scores",
]
