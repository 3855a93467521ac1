"""Interventions: contexts in which a model runs with some of its neurons deactivated, scaled or patched, or
without directions of its residual stream.
"""

from safety_neurons.interventions.abliterate import abliterated, refusal_directions
from safety_neurons.interventions.patch import patched
from safety_neurons.interventions.targets import deactivated, scaled

__all__ = ["abliterated", "deactivated", "patched", "refusal_directions", "scaled"]
