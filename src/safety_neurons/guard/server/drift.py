"""Drift: how far recent traffic is from what the guard was validated on."""

import bisect
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

FEWEST = 100
"""Scores below which a comparison says more about chance than about drift."""
_SMALLEST_SHARE = 1e-4
Numbers = Sequence[int | float]


def population_stability(counts: Numbers, reference: Numbers) -> float:
    """Population stability index, Σ (p − q) ln(p ÷ q) over the bins of two histograms; 0 where they are alike.

    Below 0.1 is commonly read as no change, above 0.25 as a change to look into. Shares are at least 1e-4, so an empty bin is finite.

    Args:
        counts: Of recent scores.
        reference: Of validation, over the same bins.

    Raises:
        ValueError: Histograms of different lengths, or without any count.
    """
    if len(counts) != len(reference) or sum(counts) <= 0 or sum(reference) <= 0:
        raise ValueError(f"histograms of {len(counts)} and {len(reference)} bins: expected two of the same bins with counts")
    total = 0.0
    for found, known in zip(counts, reference, strict=True):
        p = max(found / sum(counts), _SMALLEST_SHARE)
        q = max(known / sum(reference), _SMALLEST_SHARE)
        total += (p - q) * math.log(p / q)
    return total


class Drift:
    """Values of late, against a histogram of validation.

    Args:
        bounds: Between the bins, rising; the first and the last bin are open.
        reference: Counts of validation, one more than bounds.
        window: Values that are remembered.
    """

    def __init__(self, bounds: Numbers, reference: Numbers, window: int = 2000) -> None:
        self._bounds, self._reference = list(bounds), list(reference)
        self._recent: deque[int] = deque(maxlen=window)
        self._counts = [0] * len(self._reference)

    def add(self, value: int | float) -> None:
        """Takes a value in; the oldest falls out."""
        if len(self._recent) == self._recent.maxlen:
            self._counts[self._recent[0]] -= 1
        place = bisect.bisect_right(self._bounds, value)
        self._recent.append(place)
        self._counts[place] += 1

    @property
    def index(self) -> float:
        """The population stability index; NaN as long as there are fewer than 100 values, or none of validation."""
        if len(self._recent) < FEWEST or sum(self._reference) <= 0:
            return math.nan
        return population_stability(self._counts, self._reference)


def drifts_of(reference: Mapping[str, Any]) -> dict[str, Drift]:
    """What a guard's traffic is compared with, by name; what the guard has no histogram of is left out.

    `score`: all scores of validation. `score_of_safe`: those of safe prompts, for traffic is mostly safe. `distance`: how far validation's
    prompts were from the mean of the fit.
    """
    found: dict[str, Drift] = {}
    scores, distances = reference.get("p_unsafe"), reference.get("distance")
    if scores:
        bounds = scores["edges"][1:-1]
        found["score"] = Drift(bounds, [safe + unsafe for safe, unsafe in zip(scores["safe"], scores["unsafe"], strict=True)])
        found["score_of_safe"] = Drift(bounds, scores["safe"])
    if distances:
        found["distance"] = Drift(distances["edges"], distances["counts"])
    return found
