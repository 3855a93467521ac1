"""The guard: a calibrated classifier on the prompt's neurons that says, before the first token, whether the
answer would be unsafe.
"""

from safety_neurons.guard.answers import AnswerTokens, answers_in, answers_written, fit_answers, score_answers
from safety_neurons.guard.calibration import (
    Calibration,
    Classifier,
    OperatingPoint,
    Recheck,
    expected_calibration_error,
    operating_points,
)
from safety_neurons.guard.features import Features, Pooling, Request, read_features, read_poolings
from safety_neurons.guard.fit import Fitted, Split, fit_guard, fit_on_features, stratified_split
from safety_neurons.guard.generate import GuardedAnswer, GuardedModel, GuardedStream, guarding
from safety_neurons.guard.guard import Bindings, Guard, bindings_of
from safety_neurons.guard.recalibration import recalibrate
from safety_neurons.guard.verdict import FlaggedError, TopNeuron, Verdict
from safety_neurons.guard.watching import REFUSAL

__all__ = [
    "REFUSAL",
    "AnswerTokens",
    "Bindings",
    "Calibration",
    "Classifier",
    "Features",
    "Fitted",
    "FlaggedError",
    "Guard",
    "GuardedAnswer",
    "GuardedModel",
    "GuardedStream",
    "OperatingPoint",
    "Pooling",
    "Recheck",
    "Request",
    "Split",
    "TopNeuron",
    "Verdict",
    "answers_in",
    "answers_written",
    "bindings_of",
    "expected_calibration_error",
    "fit_answers",
    "fit_guard",
    "fit_on_features",
    "guarding",
    "operating_points",
    "read_features",
    "read_poolings",
    "recalibrate",
    "score_answers",
    "stratified_split",
]
