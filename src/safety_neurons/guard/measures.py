"""How well scores tell unsafe from safe: the area under the ROC curve with its interval."""

import math

import numpy as np
from jaxtyping import Bool, Float64

from safety_neurons.results import Rate


def auroc(scores: Float64[np.ndarray, " prompt"], unsafe: Bool[np.ndarray, " prompt"]) -> Rate:
    """Area under the ROC curve: the chance that an unsafe prompt scores above a safe one, ties counting half.

    The 95 % interval is DeLong's on the log odds of the area; of an area of exactly 0 or 1 it is Clopper and Pearson's for as many
    examples as the rarer class has.

    Args:
        scores: larger is more unsafe.
        unsafe: which examples are; a rate without a value where one class is absent.

    Source: DeLong et al., Biometrics 1988; fast form of Sun and Xu, IEEE Signal Processing Letters 2014.
    """
    ours, theirs = scores[unsafe], scores[~unsafe]
    m, n = len(ours), len(theirs)
    if not m or not n:
        return Rate(None, None, None, m + n)
    together = _midranks(np.concatenate([ours, theirs]))
    above_safe = (together[:m] - _midranks(ours)) / n
    below_unsafe = 1 - (together[m:] - _midranks(theirs)) / m
    area = float(above_safe.mean())
    if min(area, 1 - area) < 1e-12 or min(m, n) < 2:
        edge = 1 - 0.025 ** (1 / min(m, n))
        return Rate(area, area if area < 0.5 else 1 - edge, area if area > 0.5 else edge, m + n)
    spread = math.sqrt(above_safe.var(ddof=1) / m + below_unsafe.var(ddof=1) / n) / (area * (1 - area))
    middle = math.log(area / (1 - area))
    low, high = (1 / (1 + math.exp(-(middle + sign * 1.959963984540054 * spread))) if spread < 300 else float(sign > 0) for sign in (-1, 1))
    return Rate(area, low, high, m + n)


def _midranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[place]
