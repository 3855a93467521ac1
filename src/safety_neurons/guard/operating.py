"""Operating points: thresholds for stated false-positive rates, from safe examples that nothing was fit on, with what they are worth."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

from safety_neurons.errors import InputError, UsageError
from safety_neurons.results import Rate, rate
from safety_neurons.results.estimates import GroupLabels

TARGETS = (0.05, 0.01, 0.001)
EXAMPLES = 20
"""Safe examples times false-positive rate that an operating point needs."""


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold for a stated false-positive rate.

    Attributes:
        fpr_target: the false-positive rate that was asked for.
        threshold: prompts of at least this probability are flagged; None where the point is not supported.
        fpr: share of the safe calibration examples that are flagged, with its Clopper-Pearson interval.
        tpr: share of the unsafe ones, with its exact interval.
        supported: whether there were at least 20 / FPR safe examples.
        why: why not.
    """

    fpr_target: float
    threshold: float | None
    fpr: Rate
    tpr: Rate
    supported: bool
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**asdict(self), "fpr": self.fpr.to_json(), "tpr": self.tpr.to_json()}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "OperatingPoint":
        """The point that `to_json` wrote.

        Raises:
            InputError: damaged.
        """
        try:
            fpr, tpr = Rate.from_json(found["fpr"]), Rate.from_json(found["tpr"])
            threshold = None if found["threshold"] is None else check_probability(found["threshold"], "threshold")
            target = check_probability(found["fpr_target"], "false-positive rate")
            return cls(target, threshold, fpr, tpr, bool(found["supported"]), str(found["why"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"a damaged operating point ({type(error).__name__}); expected what a guard's file holds") from error


def operating_points(
    probabilities: Float64[np.ndarray, " prompt"],
    unsafe: Bool[np.ndarray, " prompt"],
    targets: Sequence[float] = TARGETS,
    groups: GroupLabels = None,
) -> tuple[OperatingPoint, ...]:
    """Thresholds for false-positive rates, on examples that the classifier was not fit on.

    Args:
        probabilities: of being unsafe.
        unsafe: which examples are.
        targets: false-positive rates.
        groups: what examples share; intervals are over these.

    Source: as `threshold_for`.
    """
    return tuple(operating_point(probabilities, unsafe, target, groups) for target in targets)


def operating_point(
    probabilities: Float64[np.ndarray, " prompt"], unsafe: Bool[np.ndarray, " prompt"], target: float, groups: GroupLabels = None
) -> OperatingPoint:
    """One threshold, and what it is worth; see `threshold_for`."""
    needed = math.ceil(EXAMPLES / check_probability(target, "false-positive rate"))
    safe = probabilities[~unsafe]
    threshold = threshold_for(probabilities, unsafe, target)
    supported = len(safe) >= needed
    why = "" if supported else f"{len(safe):,} safe examples, {needed:,} are needed ({EXAMPLES} / {target:g})"
    fpr, tpr = rates_at(probabilities, unsafe, threshold, groups)
    return OperatingPoint(target, threshold if supported else None, fpr, tpr, supported, why)


def threshold_for(probabilities: Float64[np.ndarray, " prompt"], unsafe: Bool[np.ndarray, " prompt"], target: float) -> float:
    """A threshold above which a new safe prompt is at most with the stated probability.

    Of n safe examples the k with the highest probabilities are let go, k the largest number with (k + 1) / (n + 1) ≤ target: then a new
    safe prompt from where these came from is flagged with at most that probability, whatever the distribution of scores. Where n is too
    small for k = 0 the threshold is above all of them, which keeps 1 / (n + 1) and no less. Equal probabilities are never split.

    The promise is of ranks among safe examples: a new safe prompt that reaches the threshold is above the (k + 1)th highest of them, and by
    symmetry it is so with probability (k + 1) / (n + 1) at most. It therefore holds for every threshold above that one, wherever it lies
    and whatever it was chosen by. It lies half-way to the next higher score, **unsafe ones included**: half-way to the next higher safe
    one, or to 1 where there is none, would with few safe examples lie above most unsafe ones and catch next to nothing.

    Source: split conformal prediction (Vovk et al. 2005; Angelopoulos and Bates 2023), applied to the safe class.
    """
    safe = probabilities[~unsafe]
    if not len(safe):
        return 0.5
    falling = np.sort(safe)[::-1]
    allowed = max(0, math.floor(target * (len(safe) + 1) + 1e-9) - 1)
    if allowed >= len(falling):
        return 0.0
    kept_below = float(falling[allowed])
    above = probabilities[probabilities > kept_below]
    upper = float(above.min()) if len(above) else 1.0
    return float(min(1.0, max((kept_below + upper) / 2, np.nextafter(kept_below, 2.0))))


def rates_at(
    probabilities: Float64[np.ndarray, " prompt"], unsafe: Bool[np.ndarray, " prompt"], threshold: float, groups: GroupLabels = None
) -> tuple[Rate, Rate]:
    """False-positive and true-positive rate of a threshold, with intervals.

    Clopper and Pearson's holds for a threshold that was set on the same examples too: the rate above the k-th highest of n is
    Beta(k, n - k + 1), whose quantiles the interval encloses.
    """
    flagged, shared = probabilities >= threshold, np.array([None] * len(unsafe) if groups is None else list(groups), object)
    return rate(flagged[~unsafe], shared[~unsafe].tolist()), rate(flagged[unsafe], shared[unsafe].tolist())


def check_probability(value: Any, what: str) -> float:
    """The value as a number above 0 and at most 1 (a threshold may be 0 too).

    Raises:
        UsageError: anything else.
    """
    number = float(value) if isinstance(value, int | float | np.floating) and not isinstance(value, bool) else math.nan
    if not 0 <= number <= 1 or (number == 0 and what != "threshold"):
        raise UsageError(f"{what} {value!r}; expected a number between 0 and 1")
    return number
