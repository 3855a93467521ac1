"""Interventions: contexts in which a model runs with some of its neurons deactivated, scaled or patched."""

from safety_neurons.interventions.patch import patched
from safety_neurons.interventions.targets import deactivated, scaled

__all__ = ["deactivated", "patched", "scaled"]
