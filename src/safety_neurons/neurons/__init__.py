"""Neurons: their names, the table of a model's matrices, sets, scores and the selection between them.

Needs only numpy.
"""

from safety_neurons.neurons.scores import Scores, Selection, Votes
from safety_neurons.neurons.sets import HandMadeWarning, NeuronSet
from safety_neurons.neurons.table import (
    ATTENTION_SITES,
    INPUT_SITES,
    MLP_SITES,
    OUTPUT_SITES,
    SITES,
    Key,
    Provenance,
    SiteInfo,
    SiteTable,
    check_sites,
    parse_key,
    parse_layers,
    sort_keys,
)

__all__ = [
    "ATTENTION_SITES",
    "INPUT_SITES",
    "MLP_SITES",
    "OUTPUT_SITES",
    "SITES",
    "HandMadeWarning",
    "Key",
    "NeuronSet",
    "Provenance",
    "Scores",
    "Selection",
    "SiteInfo",
    "SiteTable",
    "Votes",
    "check_sites",
    "parse_key",
    "parse_layers",
    "sort_keys",
]
