"""Formulas: numbers in, arrays out. Every function rounds to the safe side and says which side that is."""

from __future__ import annotations

from per_instance_accountant.divergence.conversions import rdp_to_delta, rdp_to_epsilon
from per_instance_accountant.divergence.gaussian import gaussian_delta, gaussian_epsilon, gaussian_mu
from per_instance_accountant.divergence.grid import SensitivityGrid
from per_instance_accountant.divergence.groups import group_gaussian_rdp, group_gaussian_rdp_removal
from per_instance_accountant.divergence.mean_rule import mean_rule_rdp
from per_instance_accountant.divergence.orders import DEFAULT_ORDERS, interpolate_rdp
from per_instance_accountant.divergence.sampled_gaussian import gaussian_rdp, sampled_gaussian_rdp
from per_instance_accountant.divergence.tight import sampled_gaussian_delta, sampled_gaussian_epsilon

__all__ = [
    "DEFAULT_ORDERS",
    "SensitivityGrid",
    "gaussian_delta",
    "gaussian_epsilon",
    "gaussian_mu",
    "gaussian_rdp",
    "group_gaussian_rdp",
    "group_gaussian_rdp_removal",
    "interpolate_rdp",
    "mean_rule_rdp",
    "rdp_to_delta",
    "rdp_to_epsilon",
    "sampled_gaussian_delta",
    "sampled_gaussian_epsilon",
    "sampled_gaussian_rdp",
]
