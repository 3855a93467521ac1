"""Overlap: how far sets and scores agree, each number beside what unrelated sets of the same sizes would give.

A unit whose neurons are chosen together is one choice (see `clumps`), so that sets of whole units are expected to share whole units.

Two expectations: `chance` draws both sets from all neurons that both searches looked at; `matched` draws them from every matrix as many as
they have there, so that agreeing on a layer or a site is not counted as agreeing on neurons.

Source: Chen et al., NeurIPS 2025 (stability over seeds, transfer over data sets, Spearman of change scores).
Differs: the paper gives no expectation and leaves the index set of its ranks open; here both index sets (all candidates, the union of the
two sets) stand side by side, each with its own expectation.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from safety_neurons.analysis.chance import Counts, beside, clumped, hypergeometric, of_draws, simulated_counts, total
from safety_neurons.analysis.clumps import Clumps, simulated
from safety_neurons.analysis.named import Named
from safety_neurons.analysis.ranks import by_key, exchangeable, over_all, over_union, undefined
from safety_neurons.errors import NeuronError
from safety_neurons.neurons import NeuronSet, SiteTable

DRAWS = 4000
"""Simulated pairs of unrelated sets."""
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
    def of(sizes: Sizes, shared: int, *, mean: float | None = None, step: float = 1.0, matched: Counts | None = None) -> "Shared":
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
    table = _part_of(first.table, keys)
    clumps = Clumps(_within(first.neurons, table), table), Clumps(_within(second.neurons, table), table)
    sizes = {key: (table[key].size, len(first.neurons[key]), len(second.neurons[key])) for key in keys}
    shared = sum(len(np.intersect1d(first.neurons[key], second.neurons[key])) for key in keys)
    outside = tuple(len(item.neurons) - sum(len(item.neurons[key]) for key in keys) for item in (first, second))
    assert len(outside) == 2
    return Pair(
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
        raise NeuronError(f"{names} were searched at different sites; expected sets that share at least one matrix")
    return keys


def _part_of(table: SiteTable, keys: Sequence[str]) -> SiteTable:
    return SiteTable(table.architecture, table.n_parameters, tuple(table[key] for key in keys))


def _within(neurons: NeuronSet, table: SiteTable) -> NeuronSet:
    return NeuronSet({key: neurons[key] for key in table.keys}, table)


def _matched(clumps: tuple[Clumps, Clumps], seed: int) -> Counts | None:
    """What sets share that have as many units and neurons in every matrix, simulated; None where one has no whole units."""
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


def _ranked(first: Named, second: Named, table: SiteTable, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    if first.scores is None or second.scores is None:
        without = " and ".join(repr(item.name) for item in (first, second) if item.scores is None)
        return (undefined(f"{without} came without scores"),) * 2
    keys = table.keys
    values = [by_key({key: item.scores[key] for key in keys}, keys) for item in (first, second) if item.scores is not None]
    members = [np.concatenate([item.neurons.mask(key) for key in keys]) for item in (first, second)]
    moves = exchangeable(values[1], table)
    return over_all(values[0], values[1], *moves), over_union(values[0], values[1], members, *moves, seed=seed)


def _in_all(items: Sequence[Named], seed: int) -> dict[str, Any]:
    """Neurons that every set has, beside unrelated sets with as many units and members in every matrix (simulated)."""
    table = _part_of(items[0].table, _common(items))
    sets = [_within(item.neurons, table) for item in items]
    found = sum(len(functools.reduce(np.intersect1d, [part[key] for part in sets])) for key in table.keys)
    return beside(float(found), of_draws(simulated(sets, table, seed, DRAWS)))


def _spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, lowest and highest over pairs."""
    known = list(values)
    mean = sum(known) / len(known) if known else None
    return {"value": mean, "lowest": min(known, default=None), "highest": max(known, default=None), "n_pairs": len(known)}
