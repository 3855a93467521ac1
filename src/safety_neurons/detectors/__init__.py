"""Detectors: each scores every neuron of the searched sites and chooses a set.

A name is imported when it is first used.
"""

from safety_neurons import lazily

_HOME = {
    "ContrastStatistics": "contrast",
    "Found": "runner",
    "METHODS": "methods",
    "Method": "methods",
    "PromptCounts": "runner",
    "Run": "runner",
    "Scored": "runner",
    "find": "runner",
    "find_activation_magnitude": "runner",
    "find_attribution": "runner",
    "find_attribution_patching": "runner",
    "find_cna": "runner",
    "find_contrast": "runner",
    "find_effect_size": "runner",
    "find_heads": "runner",
    "find_importance": "runner",
    "find_importance_contrast": "runner",
    "find_mask": "runner",
    "find_probe": "runner",
    "find_probe_weights": "runner",
    "find_random": "baselines",
    "find_refusal_direction": "runner",
    "find_relp": "runner",
    "find_routing": "runner",
    "find_snip": "runner",
    "find_swap_attribution": "runner",
    "find_wanda": "runner",
    "find_weight_change": "runner",
    "find_weight_magnitude": "runner",
    "register": "methods",
}
__all__ = sorted(_HOME)  # noqa: PLE0605 - one table holds both the names and where they live
__getattr__, __dir__ = lazily(__name__, _HOME)
