"""Rank agreement of two lists of scores beside what chance gives: over all candidates, and over the union of the two sets."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from safety_neurons.analysis.chance import Expectation, beside

DRAWS, FEWEST_DRAWS, WORK = 200, 40, 20_000_000
"""Draws of what is simulated, fewer where there are many neurons."""
_FEWEST = 3


def ranks(values: Float[np.ndarray, " neuron"]) -> Float[np.ndarray, " neuron"]:
    """Ranks from 1 on, ties given their mean rank."""
    _, place, number = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(number)
    return (last - (number - 1) / 2)[place].astype(np.float64)


def spearman(first: Float[np.ndarray, " neuron"], second: Float[np.ndarray, " neuron"]) -> float | None:
    """Spearman's rank correlation; None for fewer than three neurons or a constant side."""
    if len(first) < _FEWEST:
        return None
    mine, theirs = (_centred(ranks(side)) for side in (first, second))
    spread = math.sqrt(float(mine @ mine) * float(theirs @ theirs))
    return float(np.clip(mine @ theirs / spread, -1.0, 1.0)) if spread > 0 else None


def over_all(first: np.ndarray, second: np.ndarray, blocks: Int[np.ndarray, " neuron"]) -> dict[str, Any]:
    """Spearman over all candidates, as JSON values with `chance` (scores permuted over all) and `matched` (within every matrix).

    Both expectations are exact in mean and variance: a permutation of the one list against the other. Within matrices the mean is what
    the two lists share because some matrices score higher than others in both.
    """
    value = spearman(first, second)
    if value is None:
        return undefined("fewer than three candidates, or all scores equal")
    mine, theirs = _centred(ranks(first)), _centred(ranks(second))
    everything = np.zeros(len(mine), np.int64)
    chance, matched = (_permuted(mine, theirs, part) for part in (everything, blocks))
    return {**beside(value, chance), "matched": beside(value, matched), "n": len(first)}


def over_union(
    first: np.ndarray,
    second: np.ndarray,
    members: Sequence[Bool[np.ndarray, " neuron"]],
    blocks: Int[np.ndarray, " neuron"],
    seed: int = 0,
) -> dict[str, Any]:
    """Spearman over the neurons that are in at least one of the two sets, as JSON values like `over_all`.

    Two unrelated lists do not give 0 here: a neuron is in the union because one of the lists has it high, so that their ranks there run
    against one another. The expectation is simulated: the second list, scores and set together, is permuted.
    """
    union = members[0] | members[1]
    value = spearman(first[union], second[union])
    if value is None:
        return undefined("fewer than three neurons in the two sets together, or all their scores equal")
    generator = np.random.default_rng(seed)
    draws = max(FEWEST_DRAWS, min(DRAWS, WORK // max(1, len(first))))
    chance = _simulated(first, second, members, np.zeros(len(first), np.int64), generator, draws)
    matched = _simulated(first, second, members, blocks, generator, draws)
    return {**beside(value, chance), "matched": beside(value, matched), "n": int(union.sum())}


def undefined(why: str) -> dict[str, Any]:
    """The record of a number that does not exist."""
    return {"value": None, "why": why}


def by_key(values: Mapping[str, np.ndarray], keys: Sequence[str]) -> Float[np.ndarray, " neuron"]:
    """The vectors of some keys in one, as float64."""
    return np.concatenate([np.asarray(values[key], np.float64) for key in keys])


def _centred(values: np.ndarray) -> np.ndarray:
    return values - values.mean()


def _permuted(mine: np.ndarray, theirs: np.ndarray, blocks: np.ndarray) -> Expectation:
    """Mean and variance of the correlation where the second side is permuted within blocks."""
    spread = math.sqrt(float(mine @ mine) * float(theirs @ theirs))
    sizes = np.bincount(blocks).astype(np.float64)
    sums = [np.bincount(blocks, side) for side in (mine, theirs)]
    squares = [np.bincount(blocks, side**2) for side in (mine, theirs)]
    kept = sizes > 0
    sizes = sizes[kept]
    (a, b), (aa, bb) = ([part[kept] for part in group] for group in (sums, squares))
    mean = float((a * b / sizes).sum())
    around = [np.maximum(square - whole**2 / sizes, 0.0) for square, whole in ((aa, a), (bb, b))]
    variance = float((around[0] * around[1] / np.maximum(sizes - 1, 1.0)).sum())
    half = 1.959963984540054 * math.sqrt(variance)
    return Expectation(mean / spread, max(-1.0, (mean - half) / spread), min(1.0, (mean + half) / spread))


def _simulated(
    first: np.ndarray,
    second: np.ndarray,
    members: Sequence[np.ndarray],
    blocks: np.ndarray,
    generator: np.random.Generator,
    draws: int,
) -> Expectation:
    places = np.argsort(blocks, kind="stable")
    whole = len(blocks) == 0 or bool((blocks == blocks[0]).all())
    found = []
    for _ in range(draws):
        order = generator.permutation(len(blocks))
        if not whole:
            order = np.empty(len(blocks), np.int64)
            order[places] = np.lexsort((generator.random(len(blocks)), blocks))
        union = members[0] | members[1][order]
        value = spearman(first[union], second[order][union])
        if value is not None:
            found.append(value)
    if not found:
        return Expectation(0.0, -1.0, 1.0)
    mean, half = float(np.mean(found)), 1.959963984540054 * float(np.std(found))
    return Expectation(mean, max(-1.0, mean - half), min(1.0, mean + half))
