"""Neurons: their names, the table of a model's matrices, sets, scores and the selection between them. Needs only numpy."""

from safety_neurons.neurons.keys import (
    ATTENTION_SITES,
    INPUT_SITES,
    MLP_SITES,
    OUTPUT_SITES,
    SITES,
    Key,
    check_sites,
    parse_key,
    parse_layers,
    sort_keys,
)
from safety_neurons.neurons.provenance import Provenance
from safety_neurons.neurons.scores import Scores
from safety_neurons.neurons.selection import Selection, Votes
from safety_neurons.neurons.sets import HandMadeWarning, NeuronSet
from safety_neurons.neurons.site_table import SiteInfo, SiteTable

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
