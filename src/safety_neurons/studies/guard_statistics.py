"""What scores of unsafe and safe requests are worth: curves, areas, rates at fixed thresholds, calibration, paired differences."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

from safety_neurons.errors import InputError
from safety_neurons.results import Difference, Rate
from safety_neurons.results.estimates import between, exact, half_width, p_value, percentiles, too_few_sets

POINTS = 201
"""Points of a curve that are kept."""
BINS = 15
"""Of reliability diagrams, of equally many requests each."""
_RESAMPLES = 1000

Scores = Float64[np.ndarray, " request"]
Labels = Bool[np.ndarray, " request"]
Part = tuple[Float64[np.ndarray, " _"], Sequence[Float64[np.ndarray, " _"]], Bool[np.ndarray, " _"]]
"""Scores of one classifier, scores of others, labels, on the same requests."""


def roc_curve(scores: Scores, unsafe: Labels, points: int = POINTS) -> list[tuple[float, float]]:
    """(false-positive rate, true-positive rate) from (0, 0) to (1, 1), thinned to about `points`; ties are one straight step."""
    false, true = _passed(scores, unsafe)
    return _thinned(false / max(1, int((~unsafe).sum())), true / max(1, int(unsafe.sum())), points)


def precision_recall_curve(scores: Scores, unsafe: Labels, points: int = POINTS) -> list[tuple[float, float]]:
    """(recall, precision) by falling threshold, thinned to about `points`."""
    false, true = (part[1:] for part in _passed(scores, unsafe))
    return _thinned(true / max(1, int(unsafe.sum())), true / np.maximum(1, true + false), points)


def average_precision(scores: Scores, unsafe: Labels, seed: int = 0) -> Rate:
    """Σ (recallₖ − recallₖ₋₁) · precisionₖ over falling thresholds, with a percentile bootstrap of 1,000 resamples of either class."""
    n_unsafe, n_safe = int(unsafe.sum()), int((~unsafe).sum())
    if not n_unsafe or not n_safe:
        return Rate(None, None, None, n_unsafe + n_safe)
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    label = unsafe[order]
    generator, draws = np.random.default_rng(seed), []
    for _ in range(_RESAMPLES):
        weight = np.zeros(len(order))
        weight[label] = np.bincount(generator.integers(0, n_unsafe, n_unsafe), minlength=n_unsafe)
        weight[~label] = np.bincount(generator.integers(0, n_safe, n_safe), minlength=n_safe)
        draws.append(_average_precision(label, weight, ends))
    value = _average_precision(label, np.ones(len(order)), ends)
    low, high = _widened(value, percentiles(np.array(draws)), n_unsafe)
    return Rate(value, low, high, len(order))


def _average_precision(unsafe: Labels, weight: np.ndarray, ends: np.ndarray) -> float:
    true, seen = np.cumsum(weight * unsafe)[ends], np.cumsum(weight)[ends]
    steps = np.diff(true, prepend=0.0)
    return float((steps * true / np.maximum(seen, 1e-300)).sum() / true[-1])


def threshold_at(scores: Scores, unsafe: Labels, fpr: float) -> float:
    """The lowest score that flags at most the share `fpr` of the safe requests; infinity where none does."""
    safe = np.sort(scores[~unsafe])[::-1]
    allowed = math.floor(fpr * len(safe) + 1e-9)
    if allowed >= len(safe):
        return float("-inf")
    return float(np.nextafter(safe[allowed], np.inf))


def tpr_at_fpr(scores: Scores, unsafe: Labels, fpr: float, seed: int = 0) -> Rate:
    """Share of the unsafe requests above the threshold that flags at most `fpr` of the safe ones.

    The interval is a percentile bootstrap of both classes, so that it holds the doubt in the threshold too. A resample needs no sorting:
    the rank of its threshold among the sorted safe scores is that of an order statistic of uniform numbers, and the count above it is
    binomial.
    """
    n_unsafe, n_safe = int(unsafe.sum()), int((~unsafe).sum())
    if not n_unsafe or not n_safe:
        return Rate(None, None, None, n_unsafe)
    ours, safe = np.sort(scores[unsafe]), np.sort(scores[~unsafe])[::-1]
    allowed = math.floor(fpr * n_safe + 1e-9)
    if allowed >= n_safe:
        return Rate(1.0, *exact(n_unsafe, n_unsafe), n_unsafe)
    generator = np.random.default_rng(seed)
    place = np.floor(generator.beta(allowed + 1, n_safe - allowed, _RESAMPLES) * n_safe).astype(np.int64)
    shares = 1 - np.searchsorted(ours, safe[np.minimum(place, n_safe - 1)], side="right") / n_unsafe
    value = float(1 - np.searchsorted(ours, safe[allowed], side="right") / n_unsafe)
    low, high = _widened(value, percentiles(generator.binomial(n_unsafe, shares) / n_unsafe), n_unsafe)
    return Rate(value, low, high, n_unsafe)


def _widened(value: float, ends: tuple[float, float], n: int) -> tuple[float, float]:
    """The ends of a bootstrap, at least as far apart as those of a share of `n`: near 0 and 1 resampling alone knows little doubt."""
    low, high = exact(value * n, n)
    return min(value, low, ends[0]), max(value, high, ends[1])


def reliability(probabilities: Scores, unsafe: Labels, bins: int = BINS) -> list[dict[str, Any]]:
    """Bins of equally many requests by rising probability: `{probability, unsafe, low, high, n}` with the exact interval."""
    found = []
    for part in np.array_split(np.argsort(probabilities, kind="stable"), min(bins, len(probabilities))):
        share = float(unsafe[part].mean())
        low, high = exact(int(unsafe[part].sum()), len(part))
        found.append({"probability": float(probabilities[part].mean()), "unsafe": share, "low": low, "high": high, "n": len(part)})
    return found


def calibration_error(bins: Sequence[dict[str, Any]]) -> float:
    """Mean distance between predicted and true share over the bins, weighted by their size (expected calibration error)."""
    return float(sum(abs(row["probability"] - row["unsafe"]) * row["n"] for row in bins) / sum(row["n"] for row in bins))


def area_difference(first: Scores, others: Sequence[Scores], unsafe: Labels, *, random: bool = False) -> Difference:
    """AUROC of `first` minus the mean AUROC of `others` on the same requests.

    The variance is DeLong's for paired areas. Of random sets the spread of their areas is in it as in `against_random`: the difference is
    one from the next set to be drawn, and with fewer than three sets nothing can be clear.

    Args:
        first: scores of one classifier.
        others: of those to compare with, on the same requests.
        unsafe: which requests are.
        random: whether the others are classifiers on random sets.

    Raises:
        InputError: nothing to compare with.

    Source: DeLong et al., Biometrics 1988.
    """
    return mean_area_difference([(first, others, unsafe)], random=random)


def mean_area_difference(parts: Sequence[Part], *, random: bool = False) -> Difference:
    """`area_difference` averaged over parts, such as languages left out: the same classifiers in the same order, other requests.

    Raises:
        InputError: nothing to compare with.
    """
    if not parts or not all(others for _, others, _ in parts):
        raise InputError("no other scores; expected at least one classifier to compare with")
    n = sum(len(unsafe) for _, _, unsafe in parts)
    if any(min(int(unsafe.sum()), int((~unsafe).sum())) < 2 for _, _, unsafe in parts):
        return Difference(None, None, None, n)
    values, variances, areas, freedom = [], [], [], 0.0
    for first, others, unsafe in parts:
        pairs = [_placements(scores, unsafe) for scores in others]
        above, below = _placements(first, unsafe)
        above = above - np.mean([pair[0] for pair in pairs], axis=0)
        below = below - np.mean([pair[1] for pair in pairs], axis=0)
        values.append(float(above.mean()))
        # Where all or nearly all placements are equal they show no variance; it is at least that of a share of which none was seen.
        fewest = min(len(above), len(below))
        variances.append(max(above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below), (1 / (fewest + 1)) ** 2))
        freedom += fewest - 1.0
        areas.append([float(pair[0].mean()) for pair in pairs])
    value, drawn = float(np.mean(values)), np.mean(areas, axis=0).tolist()
    variance = [(float(sum(variances)) / len(parts) ** 2, freedom)] + ([between(drawn, 1.0)] if random else [])
    half = half_width(variance)
    why = too_few_sets(len(drawn)) if random else None
    return Difference(value, max(-1.0, value - half), min(1.0, value + half), n, 0, why, p_value(value, variance))


def _placements(scores: Scores, unsafe: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Share of safe requests below each unsafe one, and of unsafe ones above each safe one; ties count half."""
    ours, safe = scores[unsafe], scores[~unsafe]
    return _shares_below(ours, np.sort(safe)), 1 - _shares_below(safe, np.sort(ours))


def _shares_below(values: np.ndarray, ranked: np.ndarray) -> np.ndarray:
    below = np.searchsorted(ranked, values, side="left") + np.searchsorted(ranked, values, side="right")
    return below / (2 * len(ranked))


def _passed(scores: Scores, unsafe: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Safe and unsafe requests at or above every threshold, falling, from none to all."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    label = unsafe[order]
    return np.append(0, np.cumsum(~label)[ends]), np.append(0, np.cumsum(label)[ends])


def _thinned(x: np.ndarray, y: np.ndarray, points: int) -> list[tuple[float, float]]:
    """Points at about equal distances along the curve, both ends kept."""
    if len(x) > points:
        path = np.append(0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y))))
        kept = np.unique(np.searchsorted(path, np.linspace(0, path[-1], points)).clip(0, len(x) - 1))
        kept = np.unique(np.append(kept, [0, len(x) - 1]))
        x, y = x[kept], y[kept]
    return [(round(float(a), 6), round(float(b), 6)) for a, b in zip(x, y, strict=True)]
