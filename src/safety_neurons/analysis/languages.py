"""Languages: what the sets found in several languages share, and what is specific to one, by both published definitions.

A neuron of a language's set is **specific, minus intersection** where not every language has it, and **specific, minus union** where no
other language has it. The first leaves neurons that all languages but one share "specific" to each of these; the second does not.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from safety_neurons.analysis.chance import beside, of_draws
from safety_neurons.analysis.clumps import simulated
from safety_neurons.analysis.named import name_sets
from safety_neurons.analysis.overlap import Overlap, overlap
from safety_neurons.errors import NeuronError
from safety_neurons.neurons import NeuronSet, SiteTable

DRAWS = 2000
INTERSECTION, UNION, SHARED = "specific, minus intersection", "specific, minus union", "shared by all"


@dataclasses.dataclass(frozen=True)
class LanguageSets:
    """One set per language, and what follows from them.

    Attributes:
        sets: as found.
        shared: in every language's set.
        minus_intersection: of each language what is not shared by all.
        minus_union: of each language what no other language has.
        overlap: every two languages held against one another.
        seed: of what is simulated.
    """

    sets: Mapping[str, NeuronSet]
    shared: NeuronSet
    minus_intersection: Mapping[str, NeuronSet]
    minus_union: Mapping[str, NeuronSet]
    overlap: Overlap
    seed: int = 0

    def named(self) -> dict[str, NeuronSet]:
        """All sets by the names they have in tables: each language's, both kinds of specific ones, the shared one."""
        found = {**self.sets}
        found |= {f"{name} {INTERSECTION}": part for name, part in self.minus_intersection.items()}
        found |= {f"{name} {UNION}": part for name, part in self.minus_union.items()}
        return {**found, SHARED: self.shared}

    def record(self) -> dict[str, Any]:
        """As JSON values; expected are unrelated sets with as many neurons in every matrix."""
        rows = []
        for name, neurons in self.sets.items():
            others = [part for other, part in self.sets.items() if other != name]
            drawn = _draws(neurons, others, self.overlap.items[0].table, self.seed)
            parts = {"minus_intersection": self.minus_intersection[name], "minus_union": self.minus_union[name]}
            row: dict[str, Any] = {"language": name, "n_neurons": len(neurons), "n_units": neurons.n_units}
            for kind, part in parts.items():
                share = len(part) / max(1, len(neurons))
                row[kind] = {"n_units": part.n_units, "share": share, **beside(len(part), of_draws(drawn[kind]))}
            rows.append(row)
        return {
            "languages": rows,
            "shared": {"n_units": self.shared.n_units, **self.overlap.in_all},
            "pairs": [pair.record() for pair in self.overlap.pairs],
            "mean_jaccard": self.overlap.record()["mean_jaccard"],
        }


def languages(sets: Mapping[str, NeuronSet], *, seed: int = 0) -> LanguageSets:
    """What the sets of several languages share.

    Args:
        sets: by language, of one architecture; at least two.
        seed: of what is simulated.

    Raises:
        NeuronError: fewer than two languages.

    Source: Zhao et al., ICLR 2025, section 2.3, and its predecessor's public code (a language's neurons minus those of all languages).
    Differs: the definition minus the union of the others stands beside it; both beside what unrelated sets give.
    """
    if len(sets) < 2:
        raise NeuronError(f"{len(sets)} language given; expected at least two to tell what is specific to one")
    parts = list(sets.values())
    shared = parts[0]
    for part in parts[1:]:
        shared = shared & part
    union: dict[str, NeuronSet] = {}
    for name, neurons in sets.items():
        own = neurons
        for other, part in sets.items():
            own = own - part if other != name else own
        union[name] = own
    less = {name: neurons - shared for name, neurons in sets.items()}
    return LanguageSets(dict(sets), shared, less, union, overlap(name_sets(sets.items()), seed=seed), seed)


def _draws(neurons: NeuronSet, others: Sequence[NeuronSet], table: SiteTable, seed: int) -> dict[str, np.ndarray]:
    """Sizes of both kinds of specific sets where the sets of all languages are unrelated, as many units and members in every matrix."""
    sets = [neurons, *others]
    in_all = simulated(sets, table, seed, DRAWS)
    return {"minus_intersection": len(neurons) - in_all, "minus_union": simulated(sets, table, seed, DRAWS, shared=False)}
