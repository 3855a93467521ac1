"""The alignment tax: do two preference trainings need the same neurons, and do they want different things of them?

Everything is computed from sums over tokens, one row for each group of prompts, so that groups can be drawn anew for the intervals.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from safety_neurons.analysis.chance import Counts, hypergeometric, total
from safety_neurons.analysis.overlap import one_by_one, over_all, over_union, spearman
from safety_neurons.errors import InputError
from safety_neurons.results import Changes, Estimate
from safety_neurons.results.estimates import resampled

DRAWS = 300
"""Bootstrap draws of prompt groups."""
BINS = 10
"""Bins of equal size by activation, within each layer."""


@dataclasses.dataclass(frozen=True)
class Directions:
    """How two trainings move the activations of a set of neurons.

    Attributes:
        cosine: of the two changes, over all tokens and neurons of the set: 1 the same way, 0 unrelated, -1 opposite ways.
        opposed: share of the neurons whose own cosine, over tokens, is below 0.
        difference: root mean square difference between the two trained models over that activation before the trainings.
    """

    cosine: Estimate
    opposed: Estimate
    difference: Estimate

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {name: estimate.to_json() for name, estimate in vars(self).items()}


@dataclasses.dataclass(frozen=True)
class Relation:
    """Two trainings, compared neuron by neuron.

    Attributes:
        first, second: names of the trainings.
        candidates: neurons that were scored.
        size: neurons in each top set.
        overlap: neurons in both top sets, with its interval over prompts.
        chance: what the overlap is if the second set is drawn anew, exactly: among `all` candidates, with as many members `in_layers`, and
            with as many in every layer and tenth of it by activation before the trainings (`in_activation`).
        spearman_all: rank correlation of the change scores over all candidates, beside chance (within layers: `matched`).
        spearman_union: the same over the neurons in either top set, where unrelated scores run against one another.
        spearman_given_activation: over all candidates, with the ranks of the activation before the trainings held fixed.
        intervals: of the three correlations, over prompts.
        shared: how both trainings move the neurons in both sets; None without any.
        others: how both move all other candidates.
    """

    first: str
    second: str
    candidates: int
    size: int
    overlap: Estimate
    chance: Mapping[str, Counts]
    spearman_all: Mapping[str, Any]
    spearman_union: Mapping[str, Any]
    spearman_given_activation: float | None
    intervals: Mapping[str, tuple[float | None, float | None]]
    shared: Directions | None
    others: Directions

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        found = int(self.overlap.value or 0)
        chance = {name: {**counts.expectation().record(), "p_at_least": counts.at_least(found)} for name, counts in self.chance.items()}
        ends = {name: {"interval": list(pair)} for name, pair in self.intervals.items()}
        return {
            "pair": [self.first, self.second],
            "candidates": self.candidates,
            "size": self.size,
            "overlap": self.overlap.to_json(),
            "jaccard": found / (2 * self.size - found),
            "chance": chance,
            "spearman": {
                "all": {**self.spearman_all, **ends["all"]},
                "union": {**self.spearman_union, **ends["union"]},
                "given_activation": {"value": self.spearman_given_activation, **ends["given_activation"]},
            },
            "shared": self.shared.record() if self.shared else None,
            "others": self.others.record(),
        }


def relations(changes: Changes, *, top: float = 0.05, seed: int = 0) -> list[Relation]:
    """Every pair of trainings, in the order they are given.

    Args:
        changes: what was read off the models.
        top: share of the candidates in a top set.
        seed: of the bootstrap and the shuffles.

    Raises:
        InputError: no tokens, or fewer than two groups of prompts.

    Source: Chen et al. (arXiv 2406.14144), section 5: overlap and Spearman correlation of the neurons of several preference trainings.
    Differs: the paper leaves open over which neurons ranks are correlated and gives numbers in a figure only. Both index sets are given,
    each beside what chance gives; so is the correlation that is left once the size of the activations, which scores of every training
    follow, is held fixed.
    """
    if len(changes.tokens) < 2 or not np.sum(changes.tokens) > 0:
        raise InputError(f"{len(changes.tokens)} groups of prompts with {np.sum(changes.tokens):.0f} tokens; expected two groups or more")
    names = list(changes.squares)
    return [_relation(changes, a, b, top, seed) for place, a in enumerate(names) for b in names[place + 1 :]]


def top_neurons(scores: Float[np.ndarray, " neuron"], top: float) -> Bool[np.ndarray, " neuron"]:
    """The share `top` of the neurons with the largest scores, as float32; ties go to the earlier one, as in a selection from scores."""
    chosen = np.zeros(len(scores), bool)
    order = np.argsort(-scores.astype(np.float32).astype(np.float64), kind="stable")
    chosen[order[: max(1, round(top * len(scores)))]] = True
    return chosen


def chance_overlap(first: Bool[np.ndarray, " neuron"], second: Bool[np.ndarray, " neuron"], strata: Int[np.ndarray, " neuron"]) -> Counts:
    """Overlap of the first set with a random one that has as many members in every stratum as the second, exactly."""
    parts = [strata == stratum for stratum in np.unique(strata)]
    return total(hypergeometric(int(part.sum()), int(first[part].sum()), int(second[part].sum())) for part in parts)


def partial_spearman(
    first: Float[np.ndarray, " neuron"], second: Float[np.ndarray, " neuron"], given: Float[np.ndarray, " neuron"]
) -> float | None:
    """Rank correlation of the two with the ranks of a third held fixed; None where that is not defined."""
    both, one, other = spearman(first, second), spearman(first, given), spearman(second, given)
    if both is None or one is None or other is None:
        return None
    spread = np.sqrt(max(1 - one**2, 0) * max(1 - other**2, 0))
    return float(np.clip((both - one * other) / spread, -1, 1)) if spread > 1e-12 else None


def activation_bins(activation: Float[np.ndarray, " neuron"], layers: Int[np.ndarray, " neuron"]) -> Int[np.ndarray, " neuron"]:
    """A stratum for every neuron: its layer and which tenth of the layer it is in by activation."""
    strata = np.zeros(len(layers), np.int64)
    for layer in np.unique(layers):
        inside = np.flatnonzero(layers == layer)
        ranks = np.argsort(np.argsort(activation[inside], kind="stable"), kind="stable")
        strata[inside] = layer * BINS + ranks * BINS // len(inside)
    return strata


def _relation(changes: Changes, a: str, b: str, top: float, seed: int) -> Relation:
    groups = len(changes.tokens)
    draws = np.random.default_rng(seed).integers(0, groups, (DRAWS, groups))
    first, second = (changes.scores(name) for name in (a, b))
    ours, theirs = top_neurons(first, top), top_neurons(second, top)
    both, moves = ours & theirs, one_by_one(changes.layers)
    spread: dict[str, list[float | None]] = {name: [] for name in ("overlap", "all", "union", "given_activation")}
    for draw in draws:
        x, y = (changes.scores(name, draw) for name in (a, b))
        mine, other = top_neurons(x, top), top_neurons(y, top)
        spread["overlap"].append(float((mine & other).sum()))
        spread["all"].append(spearman(x, y))
        spread["union"].append(spearman(x[mine | other], y[mine | other]))
        spread["given_activation"].append(partial_spearman(x, y, changes.activation))
    strata = {
        "all": np.zeros(len(first), np.int64),
        "in_layers": changes.layers,
        "in_activation": activation_bins(changes.activation, changes.layers),
    }
    size, whole, union = int(ours.sum()), over_all(first, second, *moves), over_union(first, second, (ours, theirs), *moves, seed=seed)
    partial = partial_spearman(first, second, changes.activation)
    values = {"all": whole["value"], "union": union["value"], "given_activation": partial}
    correlations = {name: resampled(value, spread[name], groups, (-1.0, 1.0)) for name, value in values.items()}
    share = resampled(
        float(both.sum()) / size, [count / size for count in spread["overlap"] if count is not None], groups, (0.0, 1.0), size
    )
    low, high = (None if end is None else size * end for end in (share.low, share.high))
    overlap = Estimate(float(both.sum()), low, high, groups)
    return Relation(
        a,
        b,
        len(first),
        size,
        overlap,
        {name: chance_overlap(ours, theirs, stratum) for name, stratum in strata.items()},
        whole,
        union,
        partial,
        {name: (one.low, one.high) for name, one in correlations.items()},
        directions(changes, a, b, both, draws) if both.any() else None,
        directions(changes, a, b, ~both, draws),
    )


def directions(changes: Changes, a: str, b: str, members: Bool[np.ndarray, " neuron"], draws: Int[np.ndarray, "draw group"]) -> Directions:
    """How two trainings move the activations of some neurons; products come from the three sums of squares."""
    first, second = changes.squares[a][:, members], changes.squares[b][:, members]
    apart = (changes.between[a, b] if (a, b) in changes.between else changes.between[b, a])[:, members]
    size = changes.activation[members]

    def measured(draw: Int[np.ndarray, " group"]) -> tuple[float, float, float]:
        ours, theirs, gap = (values[draw].sum(0) for values in (first, second, apart))
        product = (ours + theirs - gap) / 2
        moved = (ours > 0) & (theirs > 0)
        whole = np.sqrt(ours.sum() * theirs.sum())
        cosine = float(product.sum() / whole) if whole > 0 else float("nan")
        opposed = float((product[moved] < 0).mean()) if moved.any() else float("nan")
        before = float((size**2).sum())
        return cosine, opposed, float(np.sqrt(gap.sum() / max(changes.tokens[draw].sum(), 1) / before)) if before > 0 else float("nan")

    groups = len(changes.tokens)
    cosine, opposed, difference = measured(np.arange(groups))
    spread = np.array([measured(draw) for draw in draws]).T.tolist()
    moving = int(((first.sum(0) > 0) & (second.sum(0) > 0)).sum())
    return Directions(
        resampled(cosine, spread[0], groups, (-1.0, 1.0)),
        resampled(opposed, spread[1], groups, (0.0, 1.0), moving),
        resampled(difference, spread[2], groups, (0.0, float("inf"))),
    )
