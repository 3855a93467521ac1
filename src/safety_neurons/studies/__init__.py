"""Studies: compositions of workers that answer one question each."""

from safety_neurons.studies.arms import Arm, Bench
from safety_neurons.studies.comparison import METHODS, Comparison, MethodResult, compare
from safety_neurons.studies.verification import SizePoint, Verification, verify_deactivate, verify_patch

__all__ = [
    "METHODS",
    "Arm",
    "Bench",
    "Comparison",
    "MethodResult",
    "SizePoint",
    "Verification",
    "compare",
    "verify_deactivate",
    "verify_patch",
]
