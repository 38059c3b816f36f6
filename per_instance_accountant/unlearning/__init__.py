"""The promise: deletion requests, bounds, plans, certificates and their verification. No torch."""

from per_instance_accountant.unlearning import bounds
from per_instance_accountant.unlearning.assumptions import (
    Assumptions,
    logistic_regression,
    softmax_regression,
)
from per_instance_accountant.unlearning.certificate import CONDITIONS, Certificate, certificate_schema
from per_instance_accountant.unlearning.cheap import largest_threshold
from per_instance_accountant.unlearning.everyone import EveryoneSteps, plan_everyone
from per_instance_accountant.unlearning.issuing import issue
from per_instance_accountant.unlearning.plan_file import InstanceSteps, UnlearningPlan
from per_instance_accountant.unlearning.planner import bound_of, geometric_grid, plan
from per_instance_accountant.unlearning.repeating import plan_once, request_status
from per_instance_accountant.unlearning.signing import generate_keys, save_envelope, sign
from per_instance_accountant.unlearning.verification import Check, VerificationReport, verify

__all__ = [
    "CONDITIONS",
    "Assumptions",
    "Certificate",
    "Check",
    "EveryoneSteps",
    "InstanceSteps",
    "UnlearningPlan",
    "VerificationReport",
    "bound_of",
    "bounds",
    "certificate_schema",
    "generate_keys",
    "geometric_grid",
    "issue",
    "largest_threshold",
    "logistic_regression",
    "plan",
    "plan_everyone",
    "plan_once",
    "request_status",
    "save_envelope",
    "sign",
    "softmax_regression",
    "verify",
]
