"""Pictures: one static page, without scripts and without a network, and matplotlib figures of results."""

from per_instance_accountant.report.evidence import BarrierEvidence, ClaimEvidence, Evidence
from per_instance_accountant.report.released import Released
from per_instance_accountant.report.writing import Audience, report_html, write_report

__all__ = [
    "Audience",
    "BarrierEvidence",
    "ClaimEvidence",
    "Evidence",
    "Released",
    "report_html",
    "write_report",
]
