"""Agreement of two judges on the same completions: Cohen's κ with its interval, and how often they say the same."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

from safety_neurons.errors import InputError
from safety_neurons.results import notebook
from safety_neurons.results.estimates import Outcomes, Rate, rate, scored


@dataclass(frozen=True)
class Agreement:
    """How far two judges agree beyond chance.

    Differs from a plain rate in that `kappa` is 0 where they agree as often as chance would have it, and 1 where they always do.
    """

    first: str
    second: str
    kappa: Rate
    """Cohen's κ and its 95 % interval; `None` where both judges gave one and the same verdict throughout."""
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
        return {**dataclasses.asdict(self), "kappa": self.kappa.to_json(), "same": self.same.to_json()}


def cohen_kappa(first: Outcomes, second: Outcomes, *, names: tuple[str, str] = ("first", "second")) -> Agreement:
    """Cohen's κ of two lists of yes and no; completions that either judge left unscored are counted and left out.

    Args:
        first: one verdict per completion; `None` or NaN means unscored.
        second: the other judge's, in the same order.
        names: what the judges are called.

    Raises:
        InputError: lists of different length, or verdicts that are not yes or no.

    Source: Cohen, "A coefficient of agreement for nominal scales", Educational and Psychological Measurement 20 (1960).
    Differs: the interval is the exact one of the share of equal verdicts, in place of the normal one.
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
    same = dataclasses.replace(rate(a == b), unscored=unscored)
    return Agreement(*names, _kappa(a, b, same), same, table)  # type: ignore[arg-type]


def _kappa(a: Bool[np.ndarray, " prompt"], b: Bool[np.ndarray, " prompt"], same: Rate) -> Rate:
    """κ is a line in the share of equal verdicts once the verdicts' shares are given, and so are the ends of its interval."""
    yes, also = (float(verdicts.mean()) if len(verdicts) else 1.0 for verdicts in (a, b))
    chance = yes * also + (1 - yes) * (1 - also)
    if same.value is None or chance >= 1:
        return Rate(None, None, None, same.n, same.unscored)
    value, low, high = ((end - chance) / (1 - chance) for end in (same.value, same.low or 0.0, 1.0 if same.high is None else same.high))
    return Rate(value, max(-1.0, low), high, same.n, same.unscored)
