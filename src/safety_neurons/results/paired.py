"""McNemar's test: whether two treatments of the same prompts differ, told from the prompts on which they disagree."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from safety_neurons.errors import InputError
from safety_neurons.results.rates import Outcomes, scored


@dataclass(frozen=True)
class McNemar:
    """Prompts on which two treatments disagree, and how likely a split this uneven is where neither is better."""

    first_only: int
    """Prompts with outcome 1 under the first treatment and 0 under the second."""
    second_only: int
    """The other way round."""
    p: float | None
    """Two-sided exact p-value; 1 where they never disagree, None where no prompt is scored under both."""
    n: int
    """Prompts scored under both."""
    unscored: int = 0
    """Prompts left out."""

    def __str__(self) -> str:
        shown = "undefined" if self.p is None else f"p {self.p:.2g}"
        return f"{self.first_only} against {self.second_only} of {self.n}, {shown}"

    def to_json(self) -> dict[str, Any]:
        """`{first_only, second_only, p, n, unscored}`."""
        return asdict(self)


def mcnemar(first: Outcomes, second: Outcomes) -> McNemar | None:
    """The exact test (binomial, two-sided) on outcomes that are 0 or 1; None where some outcome is neither, such as a mean over seeds.

    Args:
        first: outcomes under one treatment, one per prompt; `None` or NaN means unscored.
        second: outcomes of the same prompts in the same order under the other.

    Raises:
        InputError: the two differ in length.

    Source: McNemar, Psychometrika 1947.
    Differs: the exact binomial p-value instead of the chi-squared approximation, which is off where few prompts disagree.
    """
    one, other = scored(first), scored(second)
    if one.shape != other.shape:
        raise InputError(f"{len(one)} and {len(other)} outcomes; expected the same prompts in the same order under both treatments")
    usable = ~(np.isnan(one) | np.isnan(other))
    one, other = one[usable], other[usable]
    if not (np.isin(one, (0.0, 1.0)).all() and np.isin(other, (0.0, 1.0)).all()):
        return None
    gained, lost = int(((one == 1) & (other == 0)).sum()), int(((one == 0) & (other == 1)).sum())
    p = binomial_p(min(gained, lost), gained + lost) if len(one) else None
    return McNemar(gained, lost, p, len(one), int((~usable).sum()))


def binomial_p(fewer: int, n: int) -> float:
    """Two-sided p-value of `fewer` heads (at most half) in `n` throws of a fair coin."""
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, float(2 * tail / 2**n)) if n < 1000 else _large(tail, n)


def _large(tail: int, n: int) -> float:
    """The same where 2 to the n is no float: whole numbers are shifted until their quotient is one."""
    shift = max(0, n - 1000)
    return min(1.0, float(2 * (tail >> shift)) / float(1 << (n - shift)))
