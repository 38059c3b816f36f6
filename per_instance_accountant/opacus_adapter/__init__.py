"""Hands on Opacus: drop-in engine, loaders that know their instances, individual clipping, norm sweeps,
SGLD."""

from per_instance_accountant.opacus_adapter.accountant import PerInstanceAccountant
from per_instance_accountant.opacus_adapter.capture import Tracker
from per_instance_accountant.opacus_adapter.engine import PrivacyEngine, attach
from per_instance_accountant.opacus_adapter.sgld import SGLD, sgld_configuration
from per_instance_accountant.opacus_adapter.sweeps import sweep_norms

__all__ = [
    "SGLD",
    "PerInstanceAccountant",
    "PrivacyEngine",
    "Tracker",
    "attach",
    "sgld_configuration",
    "sweep_norms",
]
