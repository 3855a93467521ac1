"""Routing contrast: which experts of a mixture are chosen more often on harmful than on harmless prompts."""

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from safety_neurons.detectors.activity import FoldedTexts, Reducer, folded_texts, signed, text_of
from safety_neurons.detectors.methods import RoutingContrast
from safety_neurons.detectors.parts import ScoredPart, scored
from safety_neurons.detectors.runner import Run, Scored, Sums
from safety_neurons.neurons import parse_key


class Choices:
    """Every expert's share of the choices of a prompt, summed over prompts.

    Args:
        site: of the experts, at which rows are counted.
    """

    def __init__(self, site: str) -> None:
        self.site = site
        self._counts: dict[int, dict[str, Tensor]] = {}
        self._broken: set[int] = set()

    def take(self, key: str, values: Float[Tensor, "row neuron"], owner: Int[Tensor, " row"]) -> None:
        """Count the rows of an expert, one for each time it was chosen."""
        parsed = parse_key(key)
        if parsed.expert is None or parsed.site != self.site:
            return
        self._counts.setdefault(parsed.layer, {})[key] = torch.bincount(owner.cpu()).double()
        if not bool(values.isfinite().all()):
            self._broken.add(parsed.layer)

    def sums(self) -> Sums:
        """Summed shares, and the prompts that have any, of every expert; NaN in a layer that has NaN."""
        added = Sums()
        for layer, counts in self._counts.items():
            n = max(len(count) for count in counts.values())
            chosen = torch.stack(
                [torch.nn.functional.pad(count, (0, n - len(count))) for count in counts.values()]
            )
            total = chosen.sum(0)
            shares = chosen[:, total > 0] / total[total > 0]
            for key, share in zip(counts, shares.sum(1), strict=True):
                value = float("nan") if layer in self._broken else float(share)
                added[f"share/{key}"] = np.array([value])
                added[f"prompts/{key}"] = np.array([float((total > 0).sum())])
        return added


def score(method: RoutingContrast, run: Run) -> Scored:
    """Difference of the mean shares of every expert, by its sign."""
    assert run.harmless is not None
    lists = {"harmful": run.prompts, "harmless": run.harmless}
    read = {
        name: text_of(run, name, prompts, method.positions, method.max_new_tokens)
        for name, prompts in lists.items()
    }
    experts = [key for key in run.sizes if parse_key(key).expert is not None]
    site = parse_key(experts[0]).site
    reducer: Callable[[], Reducer] = partial(Choices, site)
    folded = folded_texts(run, read, dict.fromkeys(read, reducer))
    counted = [key for key in experts if parse_key(key).site == site]
    harmful, harmless = (mean_shares(folded, name, counted) for name in lists)
    scores = signed({key: harmful[key] - harmless[key] for key in counted}, method.sign)
    parts = []
    for key in counted:
        parsed = parse_key(key)
        assert parsed.expert is not None
        mine = [one for one in experts if one.rpartition(".")[0] == key.rpartition(".")[0]]
        neurons = {one: range(run.sizes[one]) for one in mine}
        parts.append(ScoredPart(parsed.layer, parsed.expert, float(scores[key][0]), neurons))
    found = scored(method, run, parts, folded.counts)
    shares = {key.rpartition(".")[0]: [float(harmful[key][0]), float(harmless[key][0])] for key in counted}
    return dataclasses.replace(found, config={"shares": shares})


def mean_shares(folded: FoldedTexts, name: str, keys: list[str]) -> dict[str, np.ndarray]:
    """Mean over the prompts of a text of every expert's share of the choices."""
    sums = folded.sums[name]
    return {key: sums[f"share/{key}"] / np.maximum(sums[f"prompts/{key}"], 1) for key in keys}
