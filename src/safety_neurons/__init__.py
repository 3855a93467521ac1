"""Find the neurons which make a language model safe, prove it causally, and use them.

Every public name is imported on first use, so that `import safety_neurons` and the command line start at
once.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Completion": "results",
    "Completions": "results",
    "Effect": "results",
    "Endpoint": "model",
    "Evaluation": "studies",
    "Found": "detectors",
    "Gate": "results",
    "Guard": "guard",
    "GuardEvaluation": "studies.guard_evaluation",
    "GuardedModel": "guard",
    "LanguageModel": "model",
    "Message": "prompt_lists",
    "NeuronSet": "neurons",
    "Pair": "model",
    "Prompt": "prompt_lists",
    "Prompts": "prompt_lists",
    "Provenance": "neurons",
    "Rate": "results",
    "SafetyNeuronsError": "errors",
    "Scores": "neurons",
    "Selection": "neurons",
    "SiteTable": "neurons",
    "Verdict": "guard",
    "abliterated": "interventions",
    "activation_statistics": "model",
    "attack": "suites",
    "causal_effect": "results",
    "compare": "studies",
    "deactivated": "interventions",
    "demo": "cli.runs",
    "doctor": "studies",
    "evaluate": "studies",
    "evaluate_guard": "studies.guard_evaluation",
    "find_activation_magnitude": "detectors",
    "find_attribution": "detectors",
    "find_attribution_patching": "detectors",
    "find_cna": "detectors",
    "find_contrast": "detectors",
    "find_effect_size": "detectors",
    "find_heads": "detectors",
    "find_importance": "detectors",
    "find_importance_contrast": "detectors",
    "find_mask": "detectors",
    "find_probe": "detectors",
    "find_probe_weights": "detectors",
    "find_random": "detectors",
    "find_refusal_direction": "detectors",
    "find_relp": "detectors",
    "find_routing": "detectors",
    "find_snip": "detectors",
    "find_wanda": "detectors",
    "find_swap_attribution": "detectors",
    "find_weight_change": "detectors",
    "find_weight_magnitude": "detectors",
    "fit_answers": "guard",
    "fit_guard": "guard",
    "gcg": "suites",
    "import_attacks": "suites",
    "judge_refusal": "judges",
    "load": "model",
    "load_pair": "model",
    "paired_difference": "results",
    "patched": "interventions",
    "prompts": "prompt_lists",
    "protected": "tuning",
    "rate": "results",
    "refusal_directions": "interventions",
    "repair": "tuning",
    "rerouted": "interventions",
    "scaled": "interventions",
    "suite": "suites",
    "tune": "studies",
    "verify_both": "studies",
    "verify_deactivate": "studies",
    "verify_patch": "studies",
    "verify_scale": "studies",
}
_BOXES = (
    "analysis",
    "capability",
    "detectors",
    "errors",
    "guard",
    "interventions",
    "judges",
    "model",
    "neurons",
    "organism",
    "prompt_lists",
    "report",
    "results",
    "studies",
    "suites",
    "tuning",
)
__all__ = sorted(_HOME)  # noqa: PLE0605 - one table holds both the names and where they live


def lazily(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose names are imported on first use.

    Args:
        package: its full name.
        homes: by public name the module below the package that defines it.
    """

    def getattribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def listing() -> list[str]:  # Without what the package itself imports.
        return sorted({*homes, *(name for name in vars(sys.modules[package]) if name.startswith("_"))})

    return getattribute, listing


_named, __dir__ = lazily(__name__, _HOME | dict.fromkeys(_BOXES, ""))


def __getattr__(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}") if name in _BOXES else _named(name)
