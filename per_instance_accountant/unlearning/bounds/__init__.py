"""Upper bounds on the divergence from retraining after K unlearning steps. One file per regime.

Each bound has ``.value(steps)`` and ``.steps(target)``; build it for a measure with ``order=`` or ``delta=``.
"""

from per_instance_accountant.unlearning.bounds.contractive import Contractive, contractive
from per_instance_accountant.unlearning.bounds.data_processing import DataProcessing, data_processing
from per_instance_accountant.unlearning.bounds.interface import MAX_STEPS, REFERENCE, Bound, Measure, Tail
from per_instance_accountant.unlearning.bounds.schedule import Schedule, schedule
from per_instance_accountant.unlearning.bounds.shifted_lsi import ShiftedLsi, shifted_lsi
from per_instance_accountant.unlearning.bounds.subsampled import Subsampled, subsampled

__all__ = [
    "MAX_STEPS",
    "REFERENCE",
    "Bound",
    "Contractive",
    "DataProcessing",
    "Measure",
    "Schedule",
    "ShiftedLsi",
    "Subsampled",
    "Tail",
    "contractive",
    "data_processing",
    "schedule",
    "shifted_lsi",
    "subsampled",
]
