"""Tune only some neurons: deltas beside frozen projections, training, protection, artefacts."""

from safety_neurons.tuning.artefacts import (
    Delta,
    Exported,
    applied,
    apply_delta,
    base_hash,
    delta_of,
    export_lora,
    export_merged,
    load_delta,
    merged_base,
    outside_hash,
    save_delta,
    survival,
)
from safety_neurons.tuning.data import Example, mix, tuning_examples, with_own_answers
from safety_neurons.tuning.deltas import Deltas, NeuronDelta, attach
from safety_neurons.tuning.protect import Protection, Repair, protected, repair
from safety_neurons.tuning.stopping import Checked, StopCheck
from safety_neurons.tuning.train import Settings, Status, Tuned, beside, learning_rates, tune

__all__ = [
    "Checked",
    "Delta",
    "Deltas",
    "Example",
    "Exported",
    "NeuronDelta",
    "Protection",
    "Repair",
    "Settings",
    "Status",
    "StopCheck",
    "Tuned",
    "applied",
    "apply_delta",
    "attach",
    "base_hash",
    "beside",
    "delta_of",
    "export_lora",
    "export_merged",
    "learning_rates",
    "load_delta",
    "merged_base",
    "mix",
    "outside_hash",
    "protected",
    "repair",
    "save_delta",
    "survival",
    "tune",
    "tuning_examples",
    "with_own_answers",
]
