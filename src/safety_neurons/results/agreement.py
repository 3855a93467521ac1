"""Agreement of two judges on the same completions: Cohen's κ with its interval, and how often they say the same."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from safety_neurons.errors import InputError
from safety_neurons.results import notebook
from safety_neurons.results.rates import Outcomes, Rate, interval, rate, resamples, scored


@dataclass(frozen=True)
class Agreement:
    """How far two judges agree beyond chance.

    Differs from a plain rate in that `kappa` is 0 where they agree as often as chance would have it, and 1 where they always do.
    """

    first: str
    second: str
    kappa: Rate
    """Cohen's κ and its 95 % bootstrap interval; `None` where both judges gave one and the same verdict throughout."""
    same: Rate
    """Share of completions with the same verdict."""
    table: tuple[tuple[int, int], tuple[int, int]]
    """Counts: rows are the first judge's no and yes, columns the second's."""

    def __str__(self) -> str:
        return f"κ {self.kappa} ({self.first}, {self.second})"

    def _repr_html_(self) -> str:
        kappa, same = (notebook.interval(each.value, each.low, each.high) for each in (self.kappa, self.same))
        columns = ["judges", "Cohen’s κ", "same verdict", "n"]
        return notebook.html_table("Agreement beyond chance", columns, [[f"{self.first}, {self.second}", kappa, same, self.kappa.n]])

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dataclasses.asdict(self)


def cohen_kappa(first: Outcomes, second: Outcomes, *, names: tuple[str, str] = ("first", "second"), seed: int = 0) -> Agreement:
    """Cohen's κ of two lists of yes and no; completions that either judge left unscored are counted and left out.

    Args:
        first: one verdict per completion; `None` or NaN means unscored.
        second: the other judge's, in the same order.
        names: what the judges are called.
        seed: of the bootstrap over completions.

    Raises:
        InputError: lists of different length, or verdicts that are not yes or no.

    Source: Cohen, "A coefficient of agreement for nominal scales", Educational and Psychological Measurement 20 (1960).
    """
    one, two = scored(first), scored(second)
    if one.shape != two.shape:
        raise InputError(f"{len(one)} and {len(two)} verdicts; expected two judges of the same completions")
    kept = ~(np.isnan(one) | np.isnan(two))
    unscored = int((~kept).sum())
    if not np.isin(one[kept], (0, 1)).all() or not np.isin(two[kept], (0, 1)).all():
        raise InputError("verdicts between 0 and 1; expected yes or no of both judges")
    a, b = one[kept] == 1, two[kept] == 1
    table = tuple(tuple(int(((a == row) & (b == column)).sum()) for column in (False, True)) for row in (False, True))
    same = dataclasses.replace(rate(a == b, seed), unscored=unscored)
    return Agreement(*names, _kappa(a, b, unscored, seed), same, table)  # type: ignore[arg-type]


def _kappa(a: Bool[np.ndarray, " prompt"], b: Bool[np.ndarray, " prompt"], unscored: int, seed: int) -> Rate:
    value = _values(a[None], b[None])[0] if len(a) else np.nan
    if np.isnan(value):
        return Rate(None, None, None, len(a), unscored)
    draws = np.concatenate([_values(a[draw], b[draw]) for draw in resamples(len(a), seed)])
    draws = draws[~np.isnan(draws)]  # a resample in which both judges always say the same has no κ
    low, high = interval(draws)
    return Rate(float(value), min(low, float(value)), max(high, float(value)), len(a), unscored)


def _values(a: Bool[np.ndarray, "resample prompt"], b: Bool[np.ndarray, "resample prompt"]) -> Float[np.ndarray, " resample"]:
    observed = (a == b).mean(axis=1)
    yes, also = a.mean(axis=1), b.mean(axis=1)
    chance = yes * also + (1 - yes) * (1 - also)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(chance < 1, (observed - chance) / (1 - chance), np.nan)
