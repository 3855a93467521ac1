"""Numbers over several seeds: the same prompts answered by models that differ in their seed only."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from safety_neurons.results.rates import RESAMPLES, interval, scored, wilson

Verdicts = Sequence[Sequence[bool | None]]
"""One list a seed, one outcome a prompt in every list, in the same order; None is unscored."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """A mean over seeds and prompts, with what every seed gave."""

    value: float | None
    low: float | None
    """Lower end of the 95 % interval over seeds and prompts."""
    high: float | None
    """Upper end of the 95 % interval over seeds and prompts."""
    n: int
    """Scored outcomes of all seeds."""
    unscored: int
    by_seed: tuple[float | None, ...]

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0 (of a difference)."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def record(self) -> dict[str, Any]:
        """As JSON values, with the lowest and the highest seed."""
        known = [value for value in self.by_seed if value is not None]
        ends = {"lowest": min(known, default=None), "highest": max(known, default=None)}
        return {**dataclasses.asdict(self), "by_seed": list(self.by_seed), **ends}


def over_seeds(verdicts: Verdicts, seed: int = 0) -> Spread:
    """The mean of all scored outcomes; seeds and prompts are resampled for the interval, apart from one another.

    Where every outcome is the same there is nothing to resample: the interval is then Wilson's for the prompts, seeds not counted.
    """
    values = _matrix(verdicts)
    spread = _spread(values, seed)
    if spread.value not in (0.0, 1.0):
        return spread
    low, high = wilson(spread.value, int((~np.isnan(values)).any(axis=0).sum()))
    return dataclasses.replace(spread, low=low, high=high)


def difference_over_seeds(first: Verdicts, second: Verdicts, seed: int = 0) -> Spread:
    """The mean of first − second over the pairs of a seed and a prompt that both scored."""
    return _spread(_matrix(first) - _matrix(second), seed)


def mean_of(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, lowest and highest of one number a seed."""
    known = [value for value in values if value is not None]
    mean = sum(known) / len(known) if known else None
    return {"value": mean, "lowest": min(known, default=None), "highest": max(known, default=None), "by_seed": list(values)}


def _matrix(verdicts: Verdicts) -> Float[np.ndarray, "seed prompt"]:
    return np.stack([scored(row) for row in verdicts])


def _spread(values: Float[np.ndarray, "seed prompt"], seed: int) -> Spread:
    known = ~np.isnan(values)
    by_seed = tuple(float(np.nanmean(row)) if usable.any() else None for row, usable in zip(values, known, strict=True))
    n = int(known.sum())
    if not n:
        return Spread(None, None, None, 0, values.size, by_seed)
    generator = np.random.default_rng(seed)
    seeds, prompts = values.shape
    sums, counts = np.where(known, values, 0.0), known.astype(float)
    draws = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        rows = generator.integers(0, seeds, seeds)
        weights = np.bincount(generator.integers(0, prompts, prompts), minlength=prompts)
        total = float((counts[rows] @ weights).sum())
        draws[number] = float((sums[rows] @ weights).sum()) / total if total else np.nan
    low, high = interval(draws[~np.isnan(draws)])
    return Spread(float(sums.sum() / n), low, high, n, values.size - n, by_seed)
