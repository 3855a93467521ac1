"""Contrastive neuron attribution: which neurons differ most between harmful and harmless prompts at the last
token, those left out that are active on everything.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from safety_neurons.detectors.activity import (
    Moments,
    Reducer,
    folded_texts,
    said_of_signs,
    signed,
    statistics_of,
    text_of,
)
from safety_neurons.detectors.methods import Cna
from safety_neurons.detectors.runner import Run, Scored, Sums
from safety_neurons.neurons import parse_key

PART = 0.1
"""Share of a layer's units that are its most active ones at most."""


class MostActive:
    """On how many prompts each neuron is among the largest activations of its layer and site, by size; the
    experts of a layer are one.

    Rows are kept until the batch ends: a layer's experts come one after the other, and there is one row a
    prompt.

    Args:
        number: of the largest.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._seen: dict[tuple[int, str], dict[str, tuple[Tensor, Tensor]]] = {}

    def take(self, key: str, values: Float[Tensor, "row neuron"], owner: Int[Tensor, " row"]) -> None:
        """Keep the rows of a site."""
        parsed = parse_key(key)
        self._seen.setdefault((parsed.layer, parsed.site), {})[key] = values.abs().cpu(), owner.cpu()

    def sums(self) -> Sums:
        """Prompts by neuron, under `active/`; NaN throughout a layer that has NaN."""
        counted = Sums()
        for rows in self._seen.values():
            n = max((int(owner.max()) + 1 for _, owner in rows.values() if len(owner)), default=0)
            # No size is below 0: what an expert did not read is behind everything.
            whole = torch.cat(
                [
                    values.new_full((n, values.shape[1]), -1.0).index_copy_(0, owner, values)
                    for values, owner in rows.values()
                ],
                1,
            )
            largest = whole.topk(most_of(self.number, whole.shape[1]), 1)
            counts = torch.zeros(whole.shape[1], dtype=torch.float64)
            counts.index_add_(0, largest.indices.flatten(), (largest.values.flatten() > 0).double())
            if not bool(whole.isfinite().all()):
                counts[:] = torch.nan
            widths = [values.shape[1] for values, _ in rows.values()]
            for key, part in zip(rows, counts.split(widths), strict=True):
                counted[f"active/{key}"] = part.numpy()
        return counted


def most_of(number: int, size: int) -> int:
    """How many of a layer's units are its most active ones."""
    return min(number, max(1, int(PART * size)))


def score(method: Cna, run: Run) -> Scored:
    """The difference of the means at the last token, 0 for what is universal."""
    assert run.harmless is not None
    assert run.general is not None
    lists = {"harmful": run.prompts, "harmless": run.harmless}
    lists |= {"general": run.general} if method.most_active else {}

    def tally() -> Reducer:
        return MostActive(method.most_active)

    read = {name: text_of(run, name, prompts, "prompt-last") for name, prompts in lists.items()}
    folded = folded_texts(run, read, {"harmful": Moments, "harmless": Moments, "general": tally})
    harmful, harmless = (
        statistics_of(run.sizes, folded.sums[name]).mean() for name in ("harmful", "harmless")
    )
    differences = {key: harmful[key] - harmless[key] for key in run.sizes}
    scores = signed(differences, method.sign)
    left_out = 0
    if method.most_active:
        needed = method.universal * folded.used["general"] - 1e-9
        for key, values in scores.items():
            universal = folded.sums["general"].get(f"active/{key}", np.zeros(len(values))) >= needed
            values[universal] = 0.0
            left_out += int(universal.sum())
        run.notes += _said_of_universal(method, run, left_out, folded.used["general"])
    if method.sign == "both":
        said_of_signs(run, scores, differences)
    return Scored(scores, folded.counts, config={"universal_neurons": left_out})


def _said_of_universal(method: Cna, run: Run, left_out: int, n: int) -> list[str]:
    layers: dict[tuple[int, str], int] = {}
    for key, size in run.sizes.items():
        place = parse_key(key).layer, parse_key(key).site
        layers[place] = layers.get(place, 0) + size
    numbers = sorted({most_of(method.most_active, size) for size in layers.values()})
    most = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    return [
        f"{left_out:,} of {sum(run.sizes.values()):,} neurons are universal and left out: among the {most} "
        f"most active of their layer on at least {method.universal:.0%} of {n} general prompts"
    ]
