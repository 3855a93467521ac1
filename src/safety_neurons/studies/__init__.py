"""Studies: compositions of workers that answer one question each."""

from safety_neurons.studies.answering import Writing
from safety_neurons.studies.arms import Arm, Bench
from safety_neurons.studies.comparison import Comparison, MethodResult, compare
from safety_neurons.studies.evaluation import Evaluation, evaluate
from safety_neurons.studies.examination import Check, Examination, doctor
from safety_neurons.studies.groups import Groups, find_by_group
from safety_neurons.studies.languages import LanguageMatrix, deactivation_matrix
from safety_neurons.studies.progressive import Progressive, progressive
from safety_neurons.studies.ranking import Ranking, rank
from safety_neurons.studies.rsn import ARMS, Lab, Plan, Sets, find_sets, rsn
from safety_neurons.studies.stress import Attack, stress
from safety_neurons.studies.tax import CrossPatching, Trainings, cross_patch, helpfulness, read_trainings
from safety_neurons.studies.transfer import Transfer, transfer
from safety_neurons.studies.tuning import Checking, Tuning, tune
from safety_neurons.studies.verification import SizePoint, Verification, verify_deactivate, verify_patch
from safety_neurons.studies.vocabulary import Card, Cards, strongest, vocabulary, with_cards

__all__ = [
    "ARMS",
    "Arm",
    "Attack",
    "Bench",
    "Card",
    "Cards",
    "Check",
    "Checking",
    "Comparison",
    "CrossPatching",
    "Evaluation",
    "Examination",
    "Groups",
    "Lab",
    "LanguageMatrix",
    "MethodResult",
    "Plan",
    "Progressive",
    "Ranking",
    "Sets",
    "SizePoint",
    "Trainings",
    "Transfer",
    "Tuning",
    "Verification",
    "Writing",
    "compare",
    "cross_patch",
    "deactivation_matrix",
    "doctor",
    "evaluate",
    "find_by_group",
    "find_sets",
    "helpfulness",
    "progressive",
    "rank",
    "read_trainings",
    "rsn",
    "stress",
    "strongest",
    "transfer",
    "tune",
    "verify_deactivate",
    "verify_patch",
    "vocabulary",
    "with_cards",
]
