"""Studies: compositions of workers that answer one question each."""

from safety_neurons.studies.attacks import Attack, stress
from safety_neurons.studies.bench import Arm, ArmOutcome, Bench, Writing, contrast
from safety_neurons.studies.comparison import Comparison, MethodResult, compare
from safety_neurons.studies.defences import DEFENCES, Grid, defences
from safety_neurons.studies.evaluation import Evaluation, evaluate
from safety_neurons.studies.examination import Check, Examination, doctor
from safety_neurons.studies.groups import (
    Groups,
    LanguageMatrix,
    Transfer,
    ability_tasks,
    deactivation_matrix,
    find_by_group,
    transfer,
)
from safety_neurons.studies.lasting import ARMS, Lab, Plan, Sets, cut_short, find_sets, rsn
from safety_neurons.studies.ranking import Ranking, rank
from safety_neurons.studies.scaling import Scaling, verify_scale
from safety_neurons.studies.tax import CrossPatching, Trainings, cross_patch, helpfulness, read_trainings
from safety_neurons.studies.tuning import Checking, Tuning, tune
from safety_neurons.studies.verification import (
    Progressive,
    SizePoint,
    TwoSided,
    Verification,
    progressive,
    verify_both,
    verify_deactivate,
    verify_patch,
)
from safety_neurons.studies.vocabulary import Card, Cards, strongest, vocabulary, with_cards

__all__ = [
    "ARMS",
    "DEFENCES",
    "Arm",
    "ArmOutcome",
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
    "Grid",
    "Groups",
    "Lab",
    "LanguageMatrix",
    "MethodResult",
    "Plan",
    "Progressive",
    "Ranking",
    "Scaling",
    "Sets",
    "SizePoint",
    "Trainings",
    "Transfer",
    "Tuning",
    "TwoSided",
    "Verification",
    "Writing",
    "ability_tasks",
    "compare",
    "contrast",
    "cross_patch",
    "cut_short",
    "deactivation_matrix",
    "defences",
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
    "verify_both",
    "verify_deactivate",
    "verify_patch",
    "verify_scale",
    "vocabulary",
    "with_cards",
]
