"""Find the neurons which make a language model safe, prove it causally, and use them.

Every public name is imported on first use, so that `import safety_neurons` and the command line start at once.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Completion": "results",
    "Completions": "results",
    "Effect": "results",
    "Endpoint": "model.endpoint",
    "Evaluation": "studies",
    "Found": "detectors",
    "Gate": "results",
    "Guard": "guard",
    "GuardEvaluation": "studies.guard_evaluation",
    "GuardedModel": "guard",
    "LanguageModel": "model",
    "Message": "prompts",
    "NeuronSet": "neurons",
    "Pair": "model",
    "Prompt": "prompts",
    "Prompts": "prompts",
    "Provenance": "neurons",
    "Rate": "results",
    "SafetyNeuronsError": "errors",
    "Scores": "neurons",
    "Selection": "neurons",
    "SiteTable": "neurons",
    "Verdict": "guard",
    "activation_statistics": "model",
    "attack": "suites",
    "causal_effect": "results",
    "compare": "studies",
    "deactivated": "interventions",
    "demo": "cli.story",
    "doctor": "studies",
    "evaluate": "studies",
    "evaluate_guard": "studies.guard_evaluation",
    "find_activation_magnitude": "detectors",
    "find_attribution": "detectors",
    "find_attribution_patching": "detectors",
    "find_contrast": "detectors",
    "find_importance": "detectors",
    "find_importance_contrast": "detectors",
    "find_mask": "detectors",
    "find_probe_weights": "detectors",
    "find_random": "detectors",
    "find_refusal_direction": "detectors",
    "find_snip": "detectors",
    "find_wanda": "detectors",
    "find_weight_change": "detectors",
    "find_weight_magnitude": "detectors",
    "fit_guard": "guard",
    "gcg": "suites",
    "import_attacks": "suites",
    "judge_refusal": "judges",
    "load": "organism",
    "load_pair": "organism",
    "paired_difference": "results",
    "patched": "interventions",
    "prompts": "prompts",
    "protected": "tuning",
    "rate": "results",
    "repair": "tuning",
    "suite": "suites",
    "tune": "studies",
    "verify_deactivate": "studies",
    "verify_patch": "studies",
}
_BOXES = (
    "analysis",
    "detectors",
    "errors",
    "guard",
    "interventions",
    "judges",
    "model",
    "neurons",
    "organism",
    "report",
    "results",
    "studies",
    "suites",
    "tuning",
)
__all__ = sorted(_HOME)  # noqa: PLE0605 - one table holds both the names and where they live


def __getattr__(name: str) -> Any:
    if name in _BOXES:
        return importlib.import_module(f"safety_neurons.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'safety_neurons' has no attribute {name!r}")
    home = importlib.import_module(f"safety_neurons.{_HOME[name]}")
    value = getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_BOXES})
