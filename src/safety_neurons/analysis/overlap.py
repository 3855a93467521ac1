"""Overlap: how far sets and scores agree, each number beside what unrelated sets of the same sizes would give.

Two expectations: `chance` draws both sets from all neurons that both searches looked at; `matched` draws them from every matrix as many as
they have there, so that agreeing on a layer or a site is not counted as agreeing on neurons.

Source: Chen et al., NeurIPS 2025 (stability over seeds, transfer over data sets, Spearman of change scores).
Differs: the paper gives no expectation and leaves the index set of its ranks open; here both index sets (all candidates, the union of the
two sets) stand side by side, each with its own expectation.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from safety_neurons.analysis.chance import Counts, beside, hypergeometric, of_draws, total
from safety_neurons.analysis.named import Named
from safety_neurons.analysis.ranks import by_key, over_all, over_union, undefined
from safety_neurons.errors import NeuronError
from safety_neurons.neurons import SiteTable

Sizes = Mapping[str, tuple[int, int, int]]
"""Per matrix (or kind of unit): candidates, members of the one set, members of the other."""


@dataclasses.dataclass(frozen=True)
class Shared:
    """Two sets of whole numbers over the same candidates.

    Attributes:
        first, second: sizes.
        shared: members of both.
        candidates: what they were taken from.
        chance, matched: distribution of `shared` for unrelated sets, over all candidates and within every matrix.
    """

    first: int
    second: int
    shared: int
    candidates: int
    chance: Counts
    matched: Counts

    @staticmethod
    def of(sizes: Sizes, shared: int) -> "Shared":
        """From the sizes per matrix."""
        population, first, second = (sum(part[place] for part in sizes.values()) for place in range(3))
        matched = total(hypergeometric(*part) for part in sizes.values() if part[1] and part[2])
        return Shared(first, second, shared, population, hypergeometric(population, first, second), matched)

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
        """(shared − expected) ÷ (most possible − expected): 0 for unrelated sets, 1 where the smaller lies in the larger."""
        most, expected = min(self.first, self.second), self.chance.mean
        return (self.shared - expected) / (most - expected) if most > expected else None

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        numbers = {"jaccard": (self.jaccard, self._jaccard), "overlap_coefficient": (self.coefficient, self._coefficient)}
        found: dict[str, Any] = {"sizes": [self.first, self.second], "candidates": self.candidates}
        found["shared"] = self._beside(float(self.shared), lambda counts: counts)
        found |= {name: self._beside(value, function) for name, (value, function) in numbers.items()}
        chances = {"chance": self.chance.at_least(self.shared), "matched": self.matched.at_least(self.shared)}
        return {**found, "corrected": self.corrected, "p_at_least": chances}

    def _beside(self, value: float, function: Any) -> dict[str, Any]:
        return {**beside(value, self.chance.expectation(function)), "matched": beside(value, self.matched.expectation(function))}

    def _jaccard(self, shared: np.ndarray) -> np.ndarray:
        union = self.first + self.second - shared
        return np.where(union > 0, shared / np.maximum(union, 1), 1.0)

    def _coefficient(self, shared: np.ndarray) -> np.ndarray:
        return shared / max(1, min(self.first, self.second))


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two sets held against one another."""

    names: tuple[str, str]
    neurons: Shared
    units: Shared
    outside: tuple[int, int]
    """Members of each set that the other search did not look at, which are left out."""
    spearman: Mapping[str, Any]
    """Rank agreement over all candidates."""
    spearman_union: Mapping[str, Any]
    """Rank agreement over the union of the two sets."""

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "names": list(self.names),
            **self.neurons.record(),
            "outside": list(self.outside),
            "units": self.units.record(),
            "spearman": dict(self.spearman),
            "spearman_union": dict(self.spearman_union),
        }


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Any number of sets, every two of them held against one another."""

    items: tuple[Named, ...]
    pairs: tuple[Pair, ...]
    in_all: Mapping[str, Any]
    """How many neurons are in every set, beside chance."""

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        jaccards = [pair.neurons.jaccard for pair in self.pairs]
        spearmans = [pair.spearman["value"] for pair in self.pairs if pair.spearman["value"] is not None]
        return {
            "sets": [item.record() for item in self.items],
            "pairs": [pair.record() for pair in self.pairs],
            "in_all": dict(self.in_all),
            "mean_jaccard": _spread(jaccards),
            "mean_spearman": _spread(spearmans),
        }


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


def _pair(first: Named, second: Named, seed: int) -> Pair:
    keys = _common([first, second])
    table = first.table
    sizes = {key: (table[key].size, len(first.neurons[key]), len(second.neurons[key])) for key in keys}
    shared = sum(len(np.intersect1d(first.neurons[key], second.neurons[key])) for key in keys)
    outside = tuple(len(item.neurons) - sum(len(item.neurons[key]) for key in keys) for item in (first, second))
    assert len(outside) == 2
    return Pair(
        (first.name, second.name),
        Shared.of(sizes, shared),
        _units(first, second, keys, table),
        outside,
        *_ranked(first, second, keys, table, seed),
    )


def _common(items: Sequence[Named]) -> list[str]:
    """Matrices that all searches looked at."""
    searched = [item.searched for item in items]
    keys = [key for key in searched[0].keys if all(key in part for part in searched)]  # noqa: SIM118 - a field, not a mapping
    if not keys:
        names = " and ".join(repr(item.name) for item in items)
        raise NeuronError(f"{names} were searched at different sites; expected sets that share at least one matrix")
    return keys


def _units(first: Named, second: Named, keys: Sequence[str], table: SiteTable) -> Shared:
    """The same in units, each of which counts once; units are matched within the matrix that shows them first."""
    numbers = table.units()
    units = np.concatenate([numbers[key] for key in keys])
    known, first_seen = np.unique(units, return_index=True)
    home = np.repeat(np.arange(len(keys)), [table[key].size for key in keys])[first_seen]
    held = []
    for item in (first, second):
        chosen = np.concatenate([item.neurons.mask(key) for key in keys])
        held.append(np.isin(known, units[chosen]))
    counts = [np.bincount(home[part], minlength=len(keys)) for part in (np.ones(len(known), bool), *held)]
    sizes = {key: tuple(int(part[place]) for part in counts) for place, key in enumerate(keys) if counts[0][place]}
    return Shared.of(sizes, int((held[0] & held[1]).sum()))  # type: ignore[arg-type]


def _ranked(first: Named, second: Named, keys: Sequence[str], table: SiteTable, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    if first.scores is None or second.scores is None:
        without = " and ".join(repr(item.name) for item in (first, second) if item.scores is None)
        return (undefined(f"{without} came without scores"),) * 2
    blocks = np.repeat(np.arange(len(keys)), [table[key].size for key in keys])
    values = [by_key({key: item.scores[key] for key in keys}, keys) for item in (first, second) if item.scores is not None]
    members = [np.concatenate([item.neurons.mask(key) for key in keys]) for item in (first, second)]
    return over_all(values[0], values[1], blocks), over_union(values[0], values[1], members, blocks, seed)


def _in_all(items: Sequence[Named], seed: int, draws: int = 2000) -> dict[str, Any]:
    """Neurons that every set has, beside unrelated sets with as many members in every matrix (simulated one set after another)."""
    keys = _common(items)
    found = sum(len(set.intersection(*(set(item.neurons[key].tolist()) for item in items))) for key in keys)
    return beside(
        float(found), of_draws(random_intersections([item.neurons.counts() for item in items], keys, items[0].table, seed, draws))
    )


def random_intersections(
    counts: Sequence[Mapping[str, int]], keys: Sequence[str], table: SiteTable, seed: int, draws: int = 2000
) -> np.ndarray:
    """Sizes of the intersection of unrelated sets with the given members per matrix, over simulated draws."""
    generator = np.random.default_rng(seed)
    sizes = np.zeros(draws)
    for key in keys:
        kept = np.full(draws, counts[0].get(key, 0), np.int64)
        for part in counts[1:]:
            taken = part.get(key, 0)
            kept = generator.hypergeometric(kept, table[key].size - kept, taken) if taken else np.zeros(draws, np.int64)
        sizes += kept
    return sizes


def _spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, lowest and highest over pairs."""
    known = list(values)
    mean = sum(known) / len(known) if known else None
    return {"value": mean, "lowest": min(known, default=None), "highest": max(known, default=None), "n_pairs": len(known)}
