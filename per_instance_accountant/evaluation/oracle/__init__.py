"""The retrained reference: the same training without the instances, same start, same batches, same
noise."""

from per_instance_accountant.evaluation.oracle.course import Course, checked_requests, unlearning_course
from per_instance_accountant.evaluation.oracle.training import PairedTraining, Training, checkpoints

__all__ = ["Course", "PairedTraining", "Training", "checked_requests", "checkpoints", "unlearning_course"]
