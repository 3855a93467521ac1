"""Tune only some neurons: deltas beside frozen projections, training, protection, artefacts."""

from safety_neurons.tuning.attach import Deltas, attach
from safety_neurons.tuning.deltas import NeuronDelta

__all__ = ["Deltas", "NeuronDelta", "attach"]
