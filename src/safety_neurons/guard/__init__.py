"""The guard: a calibrated classifier on the prompt's neurons that says, before the first token, whether the answer would be unsafe."""

import importlib
from typing import TYPE_CHECKING, Any

from safety_neurons.guard.bindings import Bindings, bindings_of
from safety_neurons.guard.calibration import Calibration, expected_calibration_error
from safety_neurons.guard.classifier import Classifier
from safety_neurons.guard.features import Features, read_features, read_poolings
from safety_neurons.guard.generating import REFUSAL, GuardedAnswer, GuardedModel, guarding
from safety_neurons.guard.guard import Guard
from safety_neurons.guard.operating import OperatingPoint, operating_points
from safety_neurons.guard.pooling import Pooling
from safety_neurons.guard.rechecks import Recheck
from safety_neurons.guard.requests import Request
from safety_neurons.guard.streaming import GuardedStream
from safety_neurons.guard.verdicts import FlaggedError, TopNeuron, Verdict

if TYPE_CHECKING:
    from safety_neurons.guard.fit_features import Fitted, Split, fit_on_features, stratified_split
    from safety_neurons.guard.fitting import fit_guard
    from safety_neurons.guard.recalibrating import calibrate_recheck, recalibrate

_LATER = {"Fitted": "fit_features", "Split": "fit_features", "fit_on_features": "fit_features", "stratified_split": "fit_features"}
_LATER |= {"fit_guard": "fitting", "calibrate_recheck": "recalibrating", "recalibrate": "recalibrating"}

__all__ = [
    "REFUSAL",
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
    "bindings_of",
    "calibrate_recheck",
    "expected_calibration_error",
    "fit_guard",
    "fit_on_features",
    "guarding",
    "operating_points",
    "read_features",
    "read_poolings",
    "recalibrate",
    "stratified_split",
]


def __getattr__(name: str) -> Any:
    """What fits a guard is imported when it is asked for: using one does without."""
    if name in _LATER:
        return getattr(importlib.import_module(f"safety_neurons.guard.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
