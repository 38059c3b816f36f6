"""Hands on Opacus: the drop-in engine, the loader that knows its instances, individual clipping, norm sweeps."""

from per_instance_accountant.opacus_adapter.capture import Tracker
from per_instance_accountant.opacus_adapter.engine import PrivacyEngine, attach
from per_instance_accountant.opacus_adapter.sweeps import sweep_norms

__all__ = ["PrivacyEngine", "Tracker", "attach", "sweep_norms"]
