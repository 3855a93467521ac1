"""Rank agreement of two lists of scores beside what chance gives: over all candidates, and over the union of the two sets."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from safety_neurons.analysis.chance import Expectation, beside
from safety_neurons.analysis.clumps import Kind, groups
from safety_neurons.neurons import SiteTable

Exchange = Sequence[tuple[np.ndarray, np.ndarray]]
"""What may be exchanged for what: rows of positions that move together, all rows of one length in one array, and the block of each row."""
DRAWS, FEWEST_DRAWS, WORK = 200, 40, 20_000_000
"""Draws of what is simulated, fewer where there are many neurons."""
_FEWEST, _TOGETHER = 3, 0.1


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


def one_by_one(blocks: Int[np.ndarray, " neuron"]) -> tuple[Exchange, Exchange]:
    """Neurons that are exchanged one by one: over all, and within blocks."""
    alone = np.arange(len(blocks))[:, None]
    return [(alone, np.zeros(len(blocks), np.int64))], [(alone, np.asarray(blocks, np.int64))]


def exchangeable(values: Float[np.ndarray, " neuron"], table: SiteTable) -> tuple[Exchange, Exchange]:
    """What may be exchanged in a list of scores over a table: over all, and within matrices.

    Kinds of units whose neurons often have one and the same score (`gate`, `up` and `down`, mostly) are exchanged as units, among their
    like, which is right for their other units too; other neurons one by one.

    Args:
        values: the scores, key after key.
        table: its matrices.
    """
    starts = dict(zip(table.keys, np.cumsum([0, *(info.size for info in table.sites)]), strict=False))
    rows: dict[Kind, list[np.ndarray]] = {}
    for group in groups(table):
        offsets = np.array([starts[key] for key in group.keys])
        rows.setdefault(group.kind, []).append(group.places + offsets)
    anywhere: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    within: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for number, (kind, parts) in enumerate(rows.items()):
        whole = np.concatenate(parts)
        scores = values[whole]
        together = len(kind) > 1 and np.isclose(scores, scores[:, :1], rtol=1e-4, atol=0).all(axis=1).mean() > _TOGETHER
        for part in parts:
            for piece in [part] if together else part.T[:, :, None]:
                block = number + 1 if together else 0
                anywhere.setdefault(piece.shape[1], []).append((piece, np.full(len(piece), block)))
                within.setdefault(piece.shape[1], []).append((piece, np.full(len(piece), len(within.get(piece.shape[1], [])))))
    return _joined(anywhere), _joined(within)


def _joined(parts: Mapping[int, list[tuple[np.ndarray, np.ndarray]]]) -> Exchange:
    return [(np.concatenate([rows for rows, _ in part]), np.concatenate([blocks for _, blocks in part])) for part in parts.values()]


def over_all(first: np.ndarray, second: np.ndarray, anywhere: Exchange, within: Exchange) -> dict[str, Any]:
    """Spearman over all candidates, as JSON values with `chance` (scores permuted over all) and `matched` (within every matrix).

    Both expectations are exact in mean and variance: a permutation of the one list against the other. Within matrices the mean is what
    the two lists share because some matrices score higher than others in both.
    """
    value = spearman(first, second)
    if value is None:
        return undefined("fewer than three candidates, or all scores equal")
    mine, theirs = _centred(ranks(first)), _centred(ranks(second))
    chance, matched = (_permuted(mine, theirs, part) for part in (anywhere, within))
    return {**beside(value, chance), "matched": beside(value, matched), "n": len(first)}


def over_union(
    first: np.ndarray,
    second: np.ndarray,
    members: Sequence[Bool[np.ndarray, " neuron"]],
    anywhere: Exchange,
    within: Exchange,
    *,
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
    chance, matched = (_simulated(first, second, members, part, generator, draws) for part in (anywhere, within))
    return {**beside(value, chance), "matched": beside(value, matched), "n": int(union.sum())}


def undefined(why: str) -> dict[str, Any]:
    """The record of a number that does not exist."""
    return {"value": None, "why": why}


def by_key(values: Mapping[str, np.ndarray], keys: Sequence[str]) -> Float[np.ndarray, " neuron"]:
    """The vectors of some keys in one, as float64."""
    return np.concatenate([np.asarray(values[key], np.float64) for key in keys])


def _centred(values: np.ndarray) -> np.ndarray:
    return values - values.mean()


def _permuted(mine: np.ndarray, theirs: np.ndarray, moves: Exchange) -> Expectation:
    """Mean and variance of the correlation where rows of the second side are permuted within their blocks, exactly."""
    spread = math.sqrt(float(mine @ mine) * float(theirs @ theirs))
    mean = variance = 0.0
    for rows, block in moves:
        sizes = np.bincount(block).astype(np.float64)
        sizes[sizes == 0] = 1.0
        a, b = (np.stack([np.bincount(block, side[part]) for part in rows.T], axis=1) for side in (mine, theirs))
        mean += float((a * b / sizes[:, None]).sum())
        for one in range(rows.shape[1]):
            for other in range(rows.shape[1]):
                joint = [np.bincount(block, side[rows[:, one]] * side[rows[:, other]]) for side in (mine, theirs)]
                around = [part - sums[:, one] * sums[:, other] / sizes for part, sums in zip(joint, (a, b), strict=True)]
                variance += float((around[0] * around[1] / np.maximum(sizes - 1, 1.0)).sum())
    half = 1.959963984540054 * math.sqrt(max(variance, 0.0))
    return Expectation(mean / spread, max(-1.0, (mean - half) / spread), min(1.0, (mean + half) / spread))


def _simulated(
    first: np.ndarray,
    second: np.ndarray,
    members: Sequence[np.ndarray],
    moves: Exchange,
    generator: np.random.Generator,
    draws: int,
) -> Expectation:
    found = []
    by_block = [(rows[np.argsort(block, kind="stable")], np.sort(block)) for rows, block in moves]
    for _ in range(draws):
        order = np.empty(len(first), np.int64)
        for rows, block in by_block:
            one_block = block[0] == block[-1]
            order[rows] = rows[generator.permutation(len(block)) if one_block else np.lexsort((generator.random(len(block)), block))]
        union = members[0] | members[1][order]
        value = spearman(first[union], second[order][union])
        if value is not None:
            found.append(value)
    if not found:
        return Expectation(0.0, -1.0, 1.0)
    mean, half = float(np.mean(found)), 1.959963984540054 * float(np.std(found))
    return Expectation(mean, max(-1.0, mean - half), min(1.0, mean + half))
