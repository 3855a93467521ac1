"""Tune only some neurons: deltas beside frozen projections, training, protection, artefacts.

A name is imported when it is first used.
"""

from safety_neurons import lazily

_HOME = {
    "Checked": "stopping",
    "Delta": "artefacts",
    "Deltas": "deltas",
    "Example": "data",
    "Exported": "artefacts",
    "NeuronDelta": "deltas",
    "Protection": "protect",
    "Repair": "protect",
    "Status": "train",
    "StopCheck": "stopping",
    "Tuned": "train",
    "TuningSettings": "settings",
    "applied": "artefacts",
    "apply_delta": "artefacts",
    "attach": "deltas",
    "base_hash": "artefacts",
    "beside": "train",
    "delta_of": "artefacts",
    "export_lora": "artefacts",
    "export_merged": "artefacts",
    "learning_rates": "train",
    "load_delta": "artefacts",
    "merged_base": "artefacts",
    "mix": "data",
    "outside_hash": "artefacts",
    "protected": "protect",
    "repair": "protect",
    "save_delta": "artefacts",
    "survival": "artefacts",
    "tune": "train",
    "tuning_examples": "data",
    "with_own_answers": "data",
}
__all__ = sorted(_HOME)  # noqa: PLE0605 - one table holds both the names and where they live
__getattr__, __dir__ = lazily(__name__, _HOME)
