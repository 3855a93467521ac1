"""Studies: compositions of workers that answer one question each."""

from safety_neurons.studies.answering import Writing
from safety_neurons.studies.arms import Arm, Bench
from safety_neurons.studies.comparison import METHODS, Comparison, MethodResult, compare
from safety_neurons.studies.evaluation import Evaluation, evaluate
from safety_neurons.studies.examination import Check, Examination, doctor
from safety_neurons.studies.ranking import Ranking, rank
from safety_neurons.studies.rsn import ARMS, Lab, Plan, Sets, find_sets, rsn
from safety_neurons.studies.stress import Attack, stress
from safety_neurons.studies.tax import CrossPatching, Trainings, cross_patch, helpfulness, read_trainings
from safety_neurons.studies.tuning import Checking, Tuning, tune
from safety_neurons.studies.verification import SizePoint, Verification, verify_deactivate, verify_patch

__all__ = [
    "ARMS",
    "METHODS",
    "Arm",
    "Attack",
    "Bench",
    "Check",
    "Checking",
    "Comparison",
    "CrossPatching",
    "Evaluation",
    "Examination",
    "Lab",
    "MethodResult",
    "Plan",
    "Ranking",
    "Sets",
    "SizePoint",
    "Trainings",
    "Tuning",
    "Verification",
    "Writing",
    "compare",
    "cross_patch",
    "doctor",
    "evaluate",
    "find_sets",
    "helpfulness",
    "rank",
    "read_trainings",
    "rsn",
    "stress",
    "tune",
    "verify_deactivate",
    "verify_patch",
]
