"""Analysis: what sets and scores say, each number beside what chance gives. Nouns in, tables out.

No model is loaded.
"""

from safety_neurons.analysis.chance import Expectation, Named, name_sets, read_named
from safety_neurons.analysis.layers import Layers, layers
from safety_neurons.analysis.overlap import LanguageSets, Overlap, languages, overlap

__all__ = [
    "Expectation",
    "LanguageSets",
    "Layers",
    "Named",
    "Overlap",
    "languages",
    "layers",
    "name_sets",
    "overlap",
    "read_named",
]
