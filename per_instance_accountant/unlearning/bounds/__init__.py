"""Upper bounds on the divergence from retraining after K unlearning steps. One file per regime.

Each bound has ``.value(steps)`` and ``.steps(target)``; build it for a measure with ``order=`` or ``delta=``.
The published routes in :mod:`published` are baselines for comparison: no plan and no certificate uses them.
"""

from per_instance_accountant.unlearning.bounds.bounded_domain import BoundedDomain, bounded_domain
from per_instance_accountant.unlearning.bounds.clipped_gradients import ClippedGradients, clipped_gradients
from per_instance_accountant.unlearning.bounds.contractive import Contractive, contractive
from per_instance_accountant.unlearning.bounds.data_processing import DataProcessing, data_processing
from per_instance_accountant.unlearning.bounds.filter_budget import FilterBudget, filter_budget
from per_instance_accountant.unlearning.bounds.fixed_lsi import FixedLsi, fixed_lsi
from per_instance_accountant.unlearning.bounds.interface import MAX_STEPS, REFERENCE, Bound, Measure, Tail
from per_instance_accountant.unlearning.bounds.published import (
    Published,
    langevin_unlearning,
    noisy_sgd_unlearning,
    weak_triangle_reconstruction,
)
from per_instance_accountant.unlearning.bounds.schedule import Schedule, schedule
from per_instance_accountant.unlearning.bounds.shifted_lsi import ShiftedLsi, shifted_lsi
from per_instance_accountant.unlearning.bounds.subsampled import Subsampled, subsampled

__all__ = [
    "MAX_STEPS",
    "REFERENCE",
    "Bound",
    "BoundedDomain",
    "ClippedGradients",
    "Contractive",
    "DataProcessing",
    "FilterBudget",
    "FixedLsi",
    "Measure",
    "Published",
    "Schedule",
    "ShiftedLsi",
    "Subsampled",
    "Tail",
    "bounded_domain",
    "clipped_gradients",
    "contractive",
    "data_processing",
    "filter_budget",
    "fixed_lsi",
    "langevin_unlearning",
    "noisy_sgd_unlearning",
    "schedule",
    "shifted_lsi",
    "subsampled",
    "weak_triangle_reconstruction",
]
