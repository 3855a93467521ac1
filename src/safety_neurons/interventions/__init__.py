"""Interventions: contexts in which a model runs with some of its neurons deactivated, scaled or patched,
without directions of its residual stream, or with experts off.
"""

from safety_neurons.interventions.abliterate import abliterated, refusal_directions
from safety_neurons.interventions.patch import patched
from safety_neurons.interventions.targets import deactivated, rerouted, scaled

__all__ = ["abliterated", "deactivated", "patched", "refusal_directions", "rerouted", "scaled"]
