"""Detectors: each scores every neuron of the searched sites and chooses a set; one method a file."""

from safety_neurons.detectors.attribution import find_attribution
from safety_neurons.detectors.attribution_patching import find_attribution_patching
from safety_neurons.detectors.contrast import find_contrast
from safety_neurons.detectors.found import Found, PromptCounts

__all__ = ["Found", "PromptCounts", "find_attribution", "find_attribution_patching", "find_contrast"]
