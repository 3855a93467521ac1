"""Scores of parts that hold many neurons, attention heads and experts: every neuron has its part's score, and
whole parts are chosen.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from safety_neurons.detectors.rules import RULES, WholeParts
from safety_neurons.detectors.runner import PromptCounts, Run, Scored
from safety_neurons.errors import UsageError
from safety_neurons.neurons import Selection

SAID = 5
"""Parts that a note names."""


@dataclasses.dataclass(frozen=True)
class ScoredPart:
    """One head or expert.

    Attributes:
        layer: number of its layer.
        number: among those of the layer.
        score: of the part.
        neurons: its neurons, by site key.
    """

    layer: int
    number: int
    score: float
    neurons: Mapping[str, range]


def scored(method: WholeParts, run: Run, parts: Sequence[ScoredPart], counts: PromptCounts) -> Scored:
    """The scores of all searched neurons, 0 outside of all parts, and the set that is made of the best parts.

    A rule of selection that was given acts on neurons, as for any method; a part that it cuts is noted.

    Raises:
        UsageError: more parts are asked for than there are.
    """
    values = {key: np.zeros(size) for key, size in run.sizes.items()}
    for part in parts:
        for key, span in part.neurons.items():
            values[key][span.start : span.stop] = part.score
    ranking = sorted(parts, key=lambda part: (-np.float32(part.score), part.layer, part.number))
    rows = tuple((part.layer, part.number, float(part.score)) for part in ranking)
    what = method.PART
    best = ", ".join(f"layer {layer} {what} {number} ({score:.3g})" for layer, number, score in rows[:SAID])
    run.notes.append(f"of {len(rows)} {what}s the first are {best}")
    found = Scored(values, counts, ranking=rows)
    if any(getattr(method, rule) is not None for rule in RULES):
        cut = _cut(run.selection.choose(values), parts)
        if cut:
            run.notes.append(f"{what}s that are only partly in the set: {cut}; --{what}s keeps whole ones")
        return found
    wanted = method.wanted or max(1, round(method.DEFAULT_TOP * len(parts)))
    if wanted > len(parts):
        raise UsageError(f"{wanted} {what}s asked, but {len(parts)} are scored; ask for fewer")
    members: dict[str, list[np.ndarray]] = {}
    for part in ranking[:wanted]:
        for key, span in part.neurons.items():
            members.setdefault(key, []).append(np.arange(span.start, span.stop))
    chosen = {key: np.sort(np.concatenate(spans)) for key, spans in members.items()}
    size = sum(len(indices) for indices in chosen.values())
    run.notes.append(f"the set is made of whole {what}s: {wanted}")
    return dataclasses.replace(found, selection=Selection(count=size), members=chosen)


def _cut(chosen: Mapping[str, np.ndarray], parts: Sequence[ScoredPart]) -> int:
    """How many parts are neither in nor out."""
    shares = (
        np.mean(np.concatenate([chosen[key][span.start : span.stop] for key, span in part.neurons.items()]))
        for part in parts
    )
    return sum(bool(0 < share < 1) for share in shares)
