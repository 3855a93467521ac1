"""Interventions: contexts in which a model runs with some of its neurons deactivated or patched."""

from safety_neurons.interventions.edits import deactivated
from safety_neurons.interventions.patch import patched

__all__ = ["deactivated", "patched"]
