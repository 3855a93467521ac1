"""Detectors: each scores every neuron of the searched sites and chooses a set; one method a file."""

from safety_neurons.detectors.activation_magnitude import find_activation_magnitude
from safety_neurons.detectors.attribution import find_attribution
from safety_neurons.detectors.attribution_patching import find_attribution_patching
from safety_neurons.detectors.contrast import ContrastStatistics, find_contrast
from safety_neurons.detectors.found import Found, PromptCounts
from safety_neurons.detectors.importance import find_importance
from safety_neurons.detectors.importance_contrast import find_importance_contrast
from safety_neurons.detectors.mask import find_mask
from safety_neurons.detectors.probe_weights import find_probe_weights
from safety_neurons.detectors.random_neurons import find_random
from safety_neurons.detectors.refusal_direction import find_refusal_direction
from safety_neurons.detectors.snip import find_snip
from safety_neurons.detectors.wanda import find_wanda
from safety_neurons.detectors.weight_change import find_weight_change, find_weight_magnitude

__all__ = [
    "ContrastStatistics",
    "Found",
    "PromptCounts",
    "find_activation_magnitude",
    "find_attribution",
    "find_attribution_patching",
    "find_contrast",
    "find_importance",
    "find_importance_contrast",
    "find_mask",
    "find_probe_weights",
    "find_random",
    "find_refusal_direction",
    "find_snip",
    "find_wanda",
    "find_weight_change",
    "find_weight_magnitude",
]
