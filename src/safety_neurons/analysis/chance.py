"""What chance gives: how many of some marked neurons a random draw holds, exactly, and what that makes of a number that was found."""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from safety_neurons.errors import UsageError

_TAIL = 1e-16
_FIXED = 1e-3
"""Clumps smaller than this hold a number fixed."""


@dataclass(frozen=True)
class Expectation:
    """What chance gives for a number: its mean and the range that holds 95 % of random draws."""

    expected: float
    low: float
    """2.5 % point of random draws."""
    high: float
    """97.5 % point of random draws."""

    def verdict(self, value: float | int) -> str:
        """`more` above the range, `fewer` below it, `as chance` inside."""
        return "more" if value > self.high else "fewer" if value < self.low else "as chance"

    def record(self) -> dict[str, float]:
        """`{expected, low, high}`."""
        return asdict(self)


@dataclass(frozen=True)
class Counts:
    """The distribution of a whole number: probabilities of `start`, `start + 1` and so on."""

    start: int
    weights: Float[np.ndarray, " count"]
    least: float = 0.0
    """The smallest probability that can be told: 0 where the distribution is exact."""

    @property
    def values(self) -> np.ndarray:
        """The numbers that have a probability here."""
        return self.start + np.arange(len(self.weights))

    @property
    def mean(self) -> float:
        """Expected value."""
        return float(self.values @ self.weights)

    def at_least(self, count: int) -> float:
        """Probability of `count` or more."""
        return float(min(1.0, max(self.least, self.weights[max(0, count - self.start) :].sum())))

    def expectation(self, function: Callable[[np.ndarray], np.ndarray] = lambda counts: counts) -> Expectation:
        """Mean and 95 % range of a function of the number that never falls where the number rises."""
        cumulative = np.cumsum(self.weights)
        low, high = (int(np.searchsorted(cumulative, share - 1e-12)) for share in (0.025, 0.975))
        found = np.asarray(function(self.values.astype(np.float64)), np.float64)
        last = len(found) - 1
        return Expectation(float(found @ self.weights), float(found[min(low, last)]), float(found[min(high, last)]))


@functools.lru_cache(maxsize=4096)
def hypergeometric(population: int, marked: int, drawn: int) -> Counts:
    """How many of `marked` among `population` a draw of `drawn` without replacement holds.

    Probabilities come from their ratios, so that a population of millions costs as much as its likely counts and loses no digits.

    Raises:
        UsageError: more marked or drawn than there are.
    """
    if not (0 <= marked <= population and 0 <= drawn <= population):
        raise UsageError(f"{marked} marked and {drawn} drawn of {population}; expected at most as many as there are")
    first, last = max(0, marked + drawn - population), min(marked, drawn)
    count = np.arange(first, last, dtype=np.float64)
    with np.errstate(divide="ignore"):
        steps = np.log((marked - count) * (drawn - count)) - np.log((count + 1) * (population - marked - drawn + count + 1))
    logarithms = np.concatenate([[0.0], np.cumsum(steps)])
    weights = np.exp(logarithms - logarithms.max())
    return _trimmed(first, weights / weights.sum())


def clumped(mean: float, first: float, second: float, step: float = 1.0) -> Counts:
    """How many candidates two unrelated choices share where what is chosen comes in clumps: hypergeometric in clumps.

    Args:
        mean: expected number, in neurons.
        first: share of the candidates that the one choice has.
        second: share of the candidates that the other has.
        step: neurons of a clump; below 1 where clumps hold the number nearly fixed.
    """
    if mean <= 0 or step < _FIXED:
        return _on_numbers(np.array([mean]), np.ones(1))
    population = max(1, round(mean / (step * first * second)))
    marked, drawn = (min(population, max(1, round(share * population))) for share in (first, second))
    clumps = hypergeometric(population, marked, drawn)
    return _on_numbers(clumps.values * (mean / clumps.mean), clumps.weights)


def _on_numbers(values: np.ndarray, weights: np.ndarray) -> Counts:
    """A distribution on whole numbers with the mean of one on others: what lies between two goes to both."""
    below = np.floor(values + 1e-9).astype(np.int64)
    rest = np.clip(values - below, 0.0, 1.0)
    found = np.zeros(int(below[-1]) - int(below[0]) + 2)
    np.add.at(found, below - below[0], weights * (1 - rest))
    np.add.at(found, below - below[0] + 1, weights * rest)
    return _trimmed(int(below[0]), found)


def simulated_counts(draws: Float[np.ndarray, " draw"]) -> Counts:
    """The distribution of simulated whole numbers; what never came is not impossible, so a tail is never less likely than one draw."""
    whole = draws.astype(np.int64)
    return Counts(int(whole.min()), np.bincount(whole - whole.min()) / len(whole), 1 / (1 + len(whole)))


def total(parts: Iterable[Counts]) -> Counts:
    """The distribution of a sum of independent counts; 0 for sure where there is none."""
    whole = Counts(0, np.ones(1))
    for part in parts:
        whole = _trimmed(whole.start + part.start, np.convolve(whole.weights, part.weights))
    return whole


def _trimmed(start: int, weights: np.ndarray) -> Counts:
    """Without the ends that have no weight to speak of."""
    kept = np.flatnonzero(weights > _TAIL * weights.max())
    part = weights[kept[0] : kept[-1] + 1]
    return Counts(start + int(kept[0]), part / part.sum())


def mean_of_draw(values: Float[np.ndarray, " candidate"], counts: Float[np.ndarray, " candidate"], drawn: int | float) -> Expectation:
    """Mean of a value over `drawn` of the candidates without replacement, with its 95 % range (normal).

    Args:
        values: a value per kind of candidate.
        counts: candidates of each kind.
        drawn: how many are drawn, at least one.
    """
    population = float(counts.sum())
    mean = float(values @ counts / population)
    variance = float((values - mean) ** 2 @ counts / population) / drawn
    variance *= (population - drawn) / (population - 1) if population > 1 else 0.0
    half = 1.959963984540054 * math.sqrt(max(variance, 0.0))
    return Expectation(mean, mean - half, mean + half)


def of_draws(draws: Float[np.ndarray, " draw"]) -> Expectation:
    """Mean and 95 % range of simulated values."""
    low, high = np.quantile(draws, (0.025, 0.975), method="inverted_cdf")
    return Expectation(float(draws.mean()), float(low), float(high))


def beside(value: float | int, chance: Expectation) -> dict[str, Any]:
    """A value as JSON beside what chance gives: `{value, expected, low, high, verdict}`."""
    return {"value": value, **chance.record(), "verdict": chance.verdict(value)}
