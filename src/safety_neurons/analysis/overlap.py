"""Overlap: how far sets and scores agree, each number beside what unrelated sets of the same sizes would
give.

A unit whose neurons are chosen together is one choice (see `chance`), so that sets of whole units are
expected to share whole units.

Two expectations: `chance` draws both sets from all neurons that both searches looked at; `matched` draws them
from every matrix as many as they have there, so that agreeing on a layer or a site is not counted as agreeing
on neurons.

Of sets found in several languages it is told what they share and what is specific to one, by both published
definitions. A neuron of a language's set is **specific, minus intersection** where not every language has it,
and **specific, minus union** where no other language has it. The first leaves neurons that all languages but
one share "specific" to each of these; the second does not.

Source: Chen et al., NeurIPS 2025 (stability over seeds, transfer over data sets, Spearman of change scores).
Differs: the paper gives no expectation and leaves the index set of its ranks open; here both index sets (all
candidates, the union of the two sets) stand side by side, each with its own expectation.

Of two preference trainings it is told whether they change the same neurons, and move them the same way (the
alignment tax). All of that is computed from sums over tokens, one row for each group of prompts, so that
groups can be drawn anew for the intervals.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from safety_neurons.analysis.chance import (
    Clumps,
    Counts,
    Expectation,
    Kind,
    Named,
    beside,
    clumped,
    groups,
    hypergeometric,
    name_sets,
    of_draws,
    simulated,
    simulated_counts,
    total,
)
from safety_neurons.arguments import well_typed
from safety_neurons.display import Displayed
from safety_neurons.errors import InputError, NeuronError
from safety_neurons.neurons import NeuronSet, SiteTable
from safety_neurons.results import Estimate
from safety_neurons.results.estimates import resampled
from safety_neurons.results.records import ChanceRecord, Recorded, SetPairRecord, SharedRecord, called
from safety_neurons.strict_json import JsonObject

INTERSECTION, UNION, SHARED = "specific, minus intersection", "specific, minus union", "shared by all"
LANGUAGE_DRAWS = 2000
"""Simulated sets of languages."""
DRAWS = 4000
"""Simulated pairs of unrelated sets."""
Exchange = Sequence[tuple[np.ndarray, np.ndarray]]
"""What may be exchanged for what: rows of positions that move together, all rows of one length in one array,
and the block of each row.
"""
RANK_DRAWS, FEWEST_DRAWS, WORK = 200, 40, 20_000_000
"""Draws of what is simulated, fewer where there are many neurons."""
_FEWEST, _TOGETHER = 3, 0.1
Sizes = Mapping[str, tuple[int, int, int]]
"""Per matrix (or kind of unit): candidates, members of the one set, members of the other."""


@dataclasses.dataclass(frozen=True)
class Shared:
    """Two sets of whole numbers over the same candidates.

    Attributes:
        first, second: sizes.
        shared: members of both.
        candidates: what they were taken from.
        chance, matched: distribution of `shared` for unrelated sets, over all candidates and within every
            matrix.
    """

    first: int
    second: int
    shared: int
    candidates: int
    chance: Counts
    matched: Counts

    @staticmethod
    def of(
        sizes: Sizes,
        shared: int,
        *,
        mean: float | None = None,
        step: float = 1.0,
        matched: Counts | None = None,
    ) -> "Shared":
        """From the sizes per matrix.

        Args:
            sizes: candidates and members.
            shared: members of both.
            mean: expected over all candidates; None for what members drawn one by one would share.
            step: how many of the shared come together.
            matched: the distribution within matrices; None for members drawn one by one.
        """
        population, first, second = (sum(part[place] for part in sizes.values()) for place in range(3))
        matched = matched or total(hypergeometric(*part) for part in sizes.values() if part[1] and part[2])
        mean = first * second / population if mean is None else mean
        chance = clumped(mean, first / population, second / population, step)
        return Shared(first, second, shared, population, chance, matched)

    @property
    def jaccard(self) -> float:
        """Shared members ÷ members of either; 1 for two empty sets."""
        return float(self._jaccard(np.array([self.shared]))[0])

    @property
    def coefficient(self) -> float:
        """Shared members ÷ members of the smaller set."""
        return self.shared / max(1, min(self.first, self.second))

    @property
    def corrected(self) -> float | None:
        """(shared − expected) ÷ (most possible − expected): 0 for unrelated sets, 1 where the smaller lies in
        the larger.
        """
        most, expected = min(self.first, self.second), self.chance.mean
        return (self.shared - expected) / (most - expected) if most > expected else None

    def record(self) -> SharedRecord:
        """As JSON values."""
        return {
            "sizes": [self.first, self.second],
            "candidates": self.candidates,
            "shared": self._beside(float(self.shared), lambda counts: counts),
            "jaccard": self._beside(self.jaccard, self._jaccard),
            "overlap_coefficient": self._beside(self.coefficient, self._coefficient),
            "corrected": self.corrected,
            "p_at_least": {
                "chance": self.chance.at_least(self.shared),
                "matched": self.matched.at_least(self.shared),
            },
        }

    def _beside(self, value: float, function: Callable[[np.ndarray], np.ndarray]) -> ChanceRecord:
        return {
            **beside(value, self.chance.expectation(function)),
            "matched": beside(value, self.matched.expectation(function)),
        }

    def _jaccard(self, shared: np.ndarray) -> np.ndarray:
        union = self.first + self.second - shared
        return np.where(union > 0, shared / np.maximum(union, 1), 1.0)

    def _coefficient(self, shared: np.ndarray) -> np.ndarray:
        return shared / max(1, min(self.first, self.second))


@dataclasses.dataclass(frozen=True)
class SetPair(Recorded[SetPairRecord]):
    """Two sets held against one another."""

    names: tuple[str, str]
    neurons: Shared = dataclasses.field(metadata=called(None))
    units: Shared
    outside: tuple[int, int]
    """Members of each set that the other search did not look at, which are left out."""
    spearman: ChanceRecord
    """Rank agreement over all candidates."""
    spearman_union: ChanceRecord
    """Rank agreement over the union of the two sets."""

    def record(self) -> SetPairRecord:
        """As JSON values."""
        return {**self.neurons.record(), **super().record()}


@dataclasses.dataclass(frozen=True)
class Overlap(Recorded[JsonObject], Displayed):
    """Any number of sets, every two of them held against one another."""

    verb = "analyze-overlap"

    items: tuple[Named, ...] = dataclasses.field(metadata=called("sets"))
    pairs: tuple[SetPair, ...]
    in_all: ChanceRecord
    """How many neurons are in every set, beside chance."""

    def record(self) -> JsonObject:
        """As JSON values."""
        jaccards = [pair.neurons.jaccard for pair in self.pairs]
        spearmans = [pair.spearman["value"] for pair in self.pairs if pair.spearman["value"] is not None]
        return {**super().record(), "mean_jaccard": _spread(jaccards), "mean_spearman": _spread(spearmans)}


@well_typed
def overlap(items: Sequence[Named], *, seed: int = 0) -> Overlap:
    """Every two of the sets (and their scores) held against one another.

    Args:
        items: at least two sets of one architecture.
        seed: of what is simulated.

    Raises:
        NeuronError: fewer than two sets, or two searches that have no matrix in common.
    """
    if len(items) < 2:
        raise NeuronError(f"{len(items)} set given; expected at least two to hold against one another")
    pairs = tuple(_pair(first, second, seed) for first, second in itertools.combinations(items, 2))
    return Overlap(tuple(items), pairs, _in_all(items, seed))


def _pair(first: Named, second: Named, seed: int) -> SetPair:
    keys = _common([first, second])
    table = _part_of(first.table, keys)
    clumps = Clumps(_within(first.neurons, table), table), Clumps(_within(second.neurons, table), table)
    sizes = {key: (table[key].size, len(first.neurons[key]), len(second.neurons[key])) for key in keys}
    shared = sum(len(np.intersect1d(first.neurons[key], second.neurons[key])) for key in keys)
    outside = tuple(
        len(item.neurons) - sum(len(item.neurons[key]) for key in keys) for item in (first, second)
    )
    assert len(outside) == 2
    return SetPair(
        (first.name, second.name),
        Shared.of(sizes, shared, step=clumps[0].shared_step(clumps[1]), matched=_matched(clumps, seed)),
        _units(clumps),
        outside,
        *_ranked(first, second, table, seed),
    )


def _common(items: Sequence[Named]) -> list[str]:
    """Matrices that all searches looked at."""
    searched = [item.searched for item in items]
    keys = [key for key in searched[0].keys if all(key in part for part in searched)]  # noqa: SIM118 - a field, not a mapping
    if not keys:
        names = " and ".join(repr(item.name) for item in items)
        raise NeuronError(
            f"{names} were searched at different sites; expected sets that share at least one matrix"
        )
    return keys


def _part_of(table: SiteTable, keys: Sequence[str]) -> SiteTable:
    return SiteTable(table.architecture, table.n_parameters, tuple(table[key] for key in keys))


def _within(neurons: NeuronSet, table: SiteTable) -> NeuronSet:
    return NeuronSet({key: neurons[key] for key in table.keys}, table)


def _matched(clumps: tuple[Clumps, Clumps], seed: int) -> Counts | None:
    """What sets share that have as many units and neurons in every matrix, simulated.

    None where one has no whole units.
    """
    if not any(one and other for one, other in zip(clumps[0].whole, clumps[1].whole, strict=True)):
        return None
    first, second = clumps
    return simulated_counts(simulated([first.neurons, second.neurons], first.table, seed, DRAWS))


def _units(clumps: tuple[Clumps, Clumps]) -> Shared:
    """The same in units, each of which counts once; units are matched within their layer (and expert)."""
    held = [[group.held(part.neurons).any(axis=1) for group in part.groups] for part in clumps]
    sizes = {
        str(number): (group.n_units, int(held[0][number].sum()), int(held[1][number].sum()))
        for number, group in enumerate(clumps[0].groups)
    }
    shared = sum(int((one & other).sum()) for one, other in zip(*held, strict=True))
    units = np.array([group.n_units for group in clumps[0].groups], np.float64)
    rates = [np.array(part.touched()) for part in clumps]
    expected = [sum(part[place] for part in sizes.values()) for place in (1, 2)]
    scale = [total / max(1e-300, float(units @ rate)) for total, rate in zip(expected, rates, strict=True)]
    return Shared.of(sizes, shared, mean=float(units @ (rates[0] * rates[1])) * scale[0] * scale[1])


def _ranked(first: Named, second: Named, table: SiteTable, seed: int) -> tuple[ChanceRecord, ChanceRecord]:
    if first.scores is None or second.scores is None:
        without = " and ".join(repr(item.name) for item in (first, second) if item.scores is None)
        return undefined(f"{without} came without scores"), undefined(f"{without} came without scores")
    keys = table.keys
    values = [
        by_key({key: item.scores[key] for key in keys}, keys)
        for item in (first, second)
        if item.scores is not None
    ]
    members = [np.concatenate([item.neurons.mask(key) for key in keys]) for item in (first, second)]
    moves = exchangeable(values[1], table)
    return over_all(values[0], values[1], *moves), over_union(
        values[0], values[1], members, *moves, seed=seed
    )


def _in_all(items: Sequence[Named], seed: int) -> ChanceRecord:
    """Neurons that every set has, beside unrelated sets with as many units and members in every matrix
    (simulated).
    """
    table = _part_of(items[0].table, _common(items))
    sets = [_within(item.neurons, table) for item in items]
    found = sum(len(functools.reduce(np.intersect1d, [part[key] for part in sets])) for key in table.keys)
    return beside(float(found), of_draws(simulated(sets, table, seed, DRAWS)))


def _spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, lowest and highest over pairs."""
    known = list(values)
    mean = sum(known) / len(known) if known else None
    return {
        "value": mean,
        "lowest": min(known, default=None),
        "highest": max(known, default=None),
        "n_pairs": len(known),
    }


# Rank agreement of two lists of scores beside what chance gives: over all candidates, and over the union of
# the two sets


def spearman(first: Float[np.ndarray, " neuron"], second: Float[np.ndarray, " neuron"]) -> float | None:
    """Spearman's rank correlation; None for fewer than three neurons or a constant side."""
    if len(first) < _FEWEST:
        return None
    mine, theirs = (_centred(_ranks(side)) for side in (first, second))
    spread = math.sqrt(float(mine @ mine) * float(theirs @ theirs))
    return float(np.clip(mine @ theirs / spread, -1.0, 1.0)) if spread > 0 else None


def _ranks(values: Float[np.ndarray, " neuron"]) -> Float[np.ndarray, " neuron"]:
    from scipy.stats import rankdata  # It takes seconds to import.

    return rankdata(values)


def one_by_one(blocks: Int[np.ndarray, " neuron"]) -> tuple[Exchange, Exchange]:
    """Neurons that are exchanged one by one: over all, and within blocks."""
    alone = np.arange(len(blocks))[:, None]
    return [(alone, np.zeros(len(blocks), np.int64))], [(alone, np.asarray(blocks, np.int64))]


def exchangeable(values: Float[np.ndarray, " neuron"], table: SiteTable) -> tuple[Exchange, Exchange]:
    """What may be exchanged in a list of scores over a table: over all, and within matrices.

    Kinds of units whose neurons often have one and the same score (`gate`, `up` and `down`, mostly) are
    exchanged as units, among their like, which is right for their other units too; other neurons one by one.

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
        together = (
            len(kind) > 1
            and np.isclose(scores, scores[:, :1], rtol=1e-4, atol=0).all(axis=1).mean() > _TOGETHER
        )
        for part in parts:
            for piece in [part] if together else part.T[:, :, None]:
                block = number + 1 if together else 0
                anywhere.setdefault(piece.shape[1], []).append((piece, np.full(len(piece), block)))
                within.setdefault(piece.shape[1], []).append(
                    (piece, np.full(len(piece), len(within.get(piece.shape[1], []))))
                )
    return _joined(anywhere), _joined(within)


def _joined(parts: Mapping[int, list[tuple[np.ndarray, np.ndarray]]]) -> Exchange:
    return [
        (np.concatenate([rows for rows, _ in part]), np.concatenate([blocks for _, blocks in part]))
        for part in parts.values()
    ]


def over_all(first: np.ndarray, second: np.ndarray, anywhere: Exchange, within: Exchange) -> ChanceRecord:
    """Spearman over all candidates, as JSON values with `chance` (scores permuted over all) and `matched`
    (within every matrix).

    Both expectations are exact in mean and variance: a permutation of the one list against the other. Within
    matrices the mean is what the two lists share because some matrices score higher than others in both.
    """
    value = spearman(first, second)
    if value is None:
        return undefined("fewer than three candidates, or all scores equal")
    mine, theirs = _centred(_ranks(first)), _centred(_ranks(second))
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
) -> ChanceRecord:
    """Spearman over the neurons that are in at least one of the two sets, as JSON values like `over_all`.

    Two unrelated lists do not give 0 here: a neuron is in the union because one of the lists has it high, so
    that their ranks there run against one another. The expectation is simulated: the second list, scores and
    set together, is permuted.
    """
    union = members[0] | members[1]
    value = spearman(first[union], second[union])
    if value is None:
        return undefined("fewer than three neurons in the two sets together, or all their scores equal")
    generator = np.random.default_rng(seed)
    draws = max(FEWEST_DRAWS, min(RANK_DRAWS, WORK // max(1, len(first))))
    chance, matched = (
        _simulated(first, second, members, part, generator, draws) for part in (anywhere, within)
    )
    return {**beside(value, chance), "matched": beside(value, matched), "n": int(union.sum())}


def undefined(why: str) -> ChanceRecord:
    """The record of a number that does not exist."""
    return {"value": None, "why": why}


def by_key(values: Mapping[str, np.ndarray], keys: Sequence[str]) -> Float[np.ndarray, " neuron"]:
    """The vectors of some keys in one, as float64."""
    return np.concatenate([np.asarray(values[key], np.float64) for key in keys])


def _centred(values: np.ndarray) -> np.ndarray:
    return values - values.mean()


def _permuted(mine: np.ndarray, theirs: np.ndarray, moves: Exchange) -> Expectation:
    """Mean and variance of the correlation where rows of the second side are permuted within their blocks,
    exactly.
    """
    spread = math.sqrt(float(mine @ mine) * float(theirs @ theirs))
    mean = variance = 0.0
    for rows, block in moves:
        sizes = np.bincount(block).astype(np.float64)
        sizes[sizes == 0] = 1.0
        a, b = (
            np.stack([np.bincount(block, side[part]) for part in rows.T], axis=1) for side in (mine, theirs)
        )
        mean += float((a * b / sizes[:, None]).sum())
        for one in range(rows.shape[1]):
            for other in range(rows.shape[1]):
                joint = [
                    np.bincount(block, side[rows[:, one]] * side[rows[:, other]]) for side in (mine, theirs)
                ]
                around = [
                    part - sums[:, one] * sums[:, other] / sizes
                    for part, sums in zip(joint, (a, b), strict=True)
                ]
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
            order[rows] = rows[
                generator.permutation(len(block))
                if one_block
                else np.lexsort((generator.random(len(block)), block))
            ]
        union = members[0] | members[1][order]
        value = spearman(first[union], second[order][union])
        if value is not None:
            found.append(value)
    if not found:
        return Expectation(0.0, -1.0, 1.0)
    mean, half = float(np.mean(found)), 1.959963984540054 * float(np.std(found))
    return Expectation(mean, max(-1.0, mean - half), min(1.0, mean + half))


# Sets of several languages


@dataclasses.dataclass(frozen=True)
class LanguageSets(Displayed):
    """One set per language, and what follows from them.

    Attributes:
        sets: as found.
        shared: in every language's set.
        minus_intersection: of each language what is not shared by all.
        minus_union: of each language what no other language has.
        overlap: every two languages held against one another.
        seed: of what is simulated.
    """

    verb = "analyze-languages"

    sets: Mapping[str, NeuronSet]
    shared: NeuronSet
    minus_intersection: Mapping[str, NeuronSet]
    minus_union: Mapping[str, NeuronSet]
    overlap: Overlap
    seed: int = 0

    def named(self) -> dict[str, NeuronSet]:
        """All sets by the names they have in tables: each language's, both kinds of specific ones, the shared
        one.
        """
        found = {**self.sets}
        found |= {f"{name} {INTERSECTION}": part for name, part in self.minus_intersection.items()}
        found |= {f"{name} {UNION}": part for name, part in self.minus_union.items()}
        return {**found, SHARED: self.shared}

    def record(self) -> JsonObject:
        """As JSON values; expected are unrelated sets with as many neurons in every matrix."""
        rows = []
        for name, neurons in self.sets.items():
            others = [part for other, part in self.sets.items() if other != name]
            drawn = _draws(neurons, others, self.overlap.items[0].table, self.seed)
            parts = {
                "minus_intersection": self.minus_intersection[name],
                "minus_union": self.minus_union[name],
            }
            row: JsonObject = {"language": name, "n_neurons": len(neurons), "n_units": neurons.n_units}
            for kind, part in parts.items():
                share = len(part) / max(1, len(neurons))
                row[kind] = {
                    "n_units": part.n_units,
                    "share": share,
                    **beside(len(part), of_draws(drawn[kind])),
                }
            rows.append(row)
        return {
            "languages": rows,
            "shared": {"n_units": self.shared.n_units, **self.overlap.in_all},
            "pairs": [pair.record() for pair in self.overlap.pairs],
            "mean_jaccard": self.overlap.record()["mean_jaccard"],
        }


@well_typed
def languages(sets: Mapping[str, NeuronSet], *, seed: int = 0) -> LanguageSets:
    """What the sets of several languages share.

    Args:
        sets: by language, of one architecture; at least two.
        seed: of what is simulated.

    Raises:
        NeuronError: fewer than two languages.

    Source: Zhao et al., ICLR 2025, section 2.3, and its predecessor's public code (a language's neurons minus
    those of all languages). Differs: the definition minus the union of the others stands beside it; both
    beside what unrelated sets give.
    """
    if len(sets) < 2:
        raise NeuronError(
            f"{len(sets)} language given; expected at least two to tell what is specific to one"
        )
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


def _draws(
    neurons: NeuronSet, others: Sequence[NeuronSet], table: SiteTable, seed: int
) -> dict[str, np.ndarray]:
    """Sizes of both kinds of specific sets where the sets of all languages are unrelated, as many units and
    members in every matrix.
    """
    sets = [neurons, *others]
    in_all = simulated(sets, table, seed, LANGUAGE_DRAWS)
    return {
        "minus_intersection": len(neurons) - in_all,
        "minus_union": simulated(sets, table, seed, LANGUAGE_DRAWS, shared=False),
    }


# What several trainings changed in one model


PROMPT_DRAWS = 300
"""Bootstrap draws of prompt groups."""
BINS = 10
"""Bins of equal size by activation, within each layer."""


@dataclasses.dataclass(frozen=True)
class Changes:
    """Sums over tokens, one row for each group of prompts, so that groups can be drawn anew for an interval.

    Attributes:
        squares: for each training the sum of the squared change of activation, trained minus before.
        between: for each pair of trainings the sum of the squared difference between the two trained models.
        tokens: tokens of each group of prompts.
        layers: layer of every neuron.
        activation: root mean square activation of every neuron before the trainings.
    """

    squares: Mapping[str, Float[np.ndarray, "group neuron"]]
    between: Mapping[tuple[str, str], Float[np.ndarray, "group neuron"]]
    tokens: Float[np.ndarray, " group"]
    layers: Int[np.ndarray, " neuron"]
    activation: Float[np.ndarray, " neuron"]

    def scores(self, name: str, groups: Any = slice(None)) -> Float[np.ndarray, " neuron"]:
        """Change scores of a training on some groups of prompts, which may repeat: root mean square over
        their tokens.
        """
        return np.sqrt(self.squares[name][groups].sum(0) / max(self.tokens[groups].sum(), 1))


@dataclasses.dataclass(frozen=True)
class Directions(Recorded[JsonObject]):
    """How two trainings move the activations of a set of neurons.

    Attributes:
        cosine: of the two changes, over all tokens and neurons of the set: 1 the same way, 0 unrelated, -1
            opposite ways.
        opposed: share of the neurons whose own cosine, over tokens, is below 0.
        difference: root mean square difference between the two trained models over that activation before the
            trainings.
    """

    cosine: Estimate
    opposed: Estimate
    difference: Estimate


@dataclasses.dataclass(frozen=True)
class Relation:
    """Two trainings, compared neuron by neuron.

    Attributes:
        first, second: names of the trainings.
        candidates: neurons that were scored.
        size: neurons in each top set.
        overlap: neurons in both top sets, with its interval over prompts.
        chance: what the overlap is if the second set is drawn anew, exactly: among `all` candidates, with as
            many members `in_layers`, and with as many in every layer and tenth of it by activation before the
            trainings (`in_activation`).
        spearman_all: rank correlation of the change scores over all candidates, beside chance (within layers:
            `matched`).
        spearman_union: the same over the neurons in either top set, where unrelated scores run against one
            another.
        spearman_given_activation: over all candidates, with the ranks of the activation before the trainings
            held fixed.
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
    spearman_all: ChanceRecord
    spearman_union: ChanceRecord
    spearman_given_activation: float | None
    intervals: Mapping[str, tuple[float | None, float | None]]
    shared: Directions | None
    others: Directions

    def record(self) -> JsonObject:
        """As JSON values."""
        found = int(self.overlap.value or 0)
        chance = {
            name: {**counts.expectation().record(), "p_at_least": counts.at_least(found)}
            for name, counts in self.chance.items()
        }
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

    Source: Chen et al. (arXiv 2406.14144), section 5: overlap and Spearman correlation of the neurons of
    several preference trainings. Differs: the paper leaves open over which neurons ranks are correlated and
    gives numbers in a figure only. Both index sets are given, each beside what chance gives; so is the
    correlation that is left once the size of the activations, which scores of every training follow, is held
    fixed.
    """
    if len(changes.tokens) < 2 or not np.sum(changes.tokens) > 0:
        raise InputError(
            f"{len(changes.tokens)} groups of prompts with {np.sum(changes.tokens):.0f} tokens; expected "
            "two groups or more"
        )
    names = list(changes.squares)
    return [_relation(changes, a, b, top, seed) for place, a in enumerate(names) for b in names[place + 1 :]]


def top_neurons(scores: Float[np.ndarray, " neuron"], top: float) -> Bool[np.ndarray, " neuron"]:
    """The share `top` of the neurons with the largest scores, as float32.

    Ties go to the earlier one, as in a selection from scores.
    """
    chosen = np.zeros(len(scores), bool)
    order = np.argsort(-scores.astype(np.float32).astype(np.float64), kind="stable")
    chosen[order[: max(1, round(top * len(scores)))]] = True
    return chosen


def chance_overlap(
    first: Bool[np.ndarray, " neuron"],
    second: Bool[np.ndarray, " neuron"],
    strata: Int[np.ndarray, " neuron"],
) -> Counts:
    """Overlap of the first set with a random one that has as many members in every stratum as the second,
    exactly.
    """
    parts = [strata == stratum for stratum in np.unique(strata)]
    return total(
        hypergeometric(int(part.sum()), int(first[part].sum()), int(second[part].sum())) for part in parts
    )


def partial_spearman(
    first: Float[np.ndarray, " neuron"],
    second: Float[np.ndarray, " neuron"],
    given: Float[np.ndarray, " neuron"],
) -> float | None:
    """Rank correlation of the two with the ranks of a third held fixed; None where that is not defined."""
    both, one, other = spearman(first, second), spearman(first, given), spearman(second, given)
    if both is None or one is None or other is None:
        return None
    spread = np.sqrt(max(1 - one**2, 0) * max(1 - other**2, 0))
    return float(np.clip((both - one * other) / spread, -1, 1)) if spread > 1e-12 else None


def activation_bins(
    activation: Float[np.ndarray, " neuron"], layers: Int[np.ndarray, " neuron"]
) -> Int[np.ndarray, " neuron"]:
    """A stratum for every neuron: its layer and which tenth of the layer it is in by activation."""
    strata = np.zeros(len(layers), np.int64)
    for layer in np.unique(layers):
        inside = np.flatnonzero(layers == layer)
        ranks = np.argsort(np.argsort(activation[inside], kind="stable"), kind="stable")
        strata[inside] = layer * BINS + ranks * BINS // len(inside)
    return strata


def _relation(changes: Changes, a: str, b: str, top: float, seed: int) -> Relation:
    groups = len(changes.tokens)
    draws = np.random.default_rng(seed).integers(0, groups, (PROMPT_DRAWS, groups))
    first, second = (changes.scores(name) for name in (a, b))
    ours, theirs = top_neurons(first, top), top_neurons(second, top)
    both, moves = ours & theirs, one_by_one(changes.layers)
    spread: dict[str, list[float | None]] = {
        name: [] for name in ("overlap", "all", "union", "given_activation")
    }
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
    size, whole, union = (
        int(ours.sum()),
        over_all(first, second, *moves),
        over_union(first, second, (ours, theirs), *moves, seed=seed),
    )
    partial = partial_spearman(first, second, changes.activation)
    values = {"all": whole["value"], "union": union["value"], "given_activation": partial}
    correlations = {
        name: resampled(value, spread[name], groups, (-1.0, 1.0)) for name, value in values.items()
    }
    share = resampled(
        float(both.sum()) / size,
        [count / size for count in spread["overlap"] if count is not None],
        groups,
        (0.0, 1.0),
        size,
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


def directions(
    changes: Changes,
    a: str,
    b: str,
    members: Bool[np.ndarray, " neuron"],
    draws: Int[np.ndarray, "draw group"],
) -> Directions:
    """How two trainings move the activations of some neurons.

    Products come from the three sums of squares.
    """
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
        return (
            cosine,
            opposed,
            float(np.sqrt(gap.sum() / max(changes.tokens[draw].sum(), 1) / before))
            if before > 0
            else float("nan"),
        )

    groups = len(changes.tokens)
    cosine, opposed, difference = measured(np.arange(groups))
    spread = np.array([measured(draw) for draw in draws]).T.tolist()
    moving = int(((first.sum(0) > 0) & (second.sum(0) > 0)).sum())
    return Directions(
        resampled(cosine, spread[0], groups, (-1.0, 1.0)),
        resampled(opposed, spread[1], groups, (0.0, 1.0), moving),
        resampled(difference, spread[2], groups, (0.0, float("inf"))),
    )
