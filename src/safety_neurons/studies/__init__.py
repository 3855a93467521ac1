"""Studies: compositions of workers that answer one question each."""

from safety_neurons.studies.arms import Arm, Bench
from safety_neurons.studies.comparison import METHODS, Comparison, MethodResult, compare
from safety_neurons.studies.examination import Check, Examination, doctor
from safety_neurons.studies.verification import SizePoint, Verification, verify_deactivate, verify_patch

__all__ = [
    "METHODS",
    "Arm",
    "Bench",
    "Check",
    "Comparison",
    "Examination",
    "MethodResult",
    "SizePoint",
    "Verification",
    "compare",
    "doctor",
    "verify_deactivate",
    "verify_patch",
]
