"""Curves, rates and reliability of a classifier of requests, with intervals over groups of requests."""

import bisect
import functools
import math
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Float64, Int

from safety_neurons.guard.calibration import bins_of
from safety_neurons.results import Rate, rate
from safety_neurons.results.estimates import GroupLabels, clusters_of, resampled_share
from safety_neurons.results.records import ReliabilityRecord

POINTS = 201
"""Points of a curve that are kept."""


BINS = 15
"""Of reliability diagrams, of equally many requests each."""


_RESAMPLES, _AT_ONCE = 1000, 100


Scores = Float64[np.ndarray, " request"]


Labels = Bool[np.ndarray, " request"]


def roc_curve(scores: Scores, unsafe: Labels, points: int = POINTS) -> list[tuple[float, float]]:
    """(false-positive rate, true-positive rate) from (0, 0) to (1, 1), thinned to about `points`.

    Ties are one straight step.
    """
    from sklearn import metrics

    if unsafe.all() or not unsafe.any():
        return []
    false, true, _ = metrics.roc_curve(unsafe, scores, drop_intermediate=False)
    return _thinned(false, true, points)


def precision_recall_curve(scores: Scores, unsafe: Labels, points: int = POINTS) -> list[tuple[float, float]]:
    """(recall, precision) by falling threshold, thinned to about `points`."""
    from sklearn import metrics

    if unsafe.all() or not unsafe.any():
        return []
    precision, recall, _ = metrics.precision_recall_curve(unsafe, scores)
    return _thinned(recall[-2::-1], precision[-2::-1], points)


def average_precision(scores: Scores, unsafe: Labels, seed: int = 0, groups: GroupLabels = None) -> Rate:
    """Σ (recallₖ − recallₖ₋₁) · precisionₖ over falling thresholds.

    1,000 resamples of either class, with groups of these.
    """
    return _resampled_rate(_average_precisions, scores, unsafe, seed, groups, len(unsafe))


def macro_f1(
    scores: Scores, unsafe: Labels, cut: float = 0.0, seed: int = 0, groups: GroupLabels = None
) -> Rate:
    """Mean of the F1 of unsafe and the F1 of safe requests, where what scores `cut` or more is called unsafe.

    1,000 resamples of either class, with groups of these.
    """
    called = int((scores >= cut).sum())
    statistic = functools.partial(_macro_f1s, called=called)
    return _resampled_rate(statistic, scores, unsafe, seed, groups, len(unsafe))


def tpr_at_fpr(scores: Scores, unsafe: Labels, fpr: float, groups: GroupLabels = None) -> Rate:
    """Share of the unsafe requests above the threshold that flags at most `fpr` of the safe ones.

    The interval holds the doubt in the threshold too: the rates at all thresholds whose own false-positive
    rate, by its interval, may be `fpr`, and the interval of the rate at this one; squares add. Both are
    intervals of rates, over groups.
    """
    if unsafe.all() or not unsafe.any():
        return Rate(None, None, None, int(unsafe.sum()))
    falling = np.sort(-scores[~unsafe])
    labels = np.array([None] * len(unsafe) if groups is None else list(groups), object)

    def passing(safe: int, kind: Labels) -> Rate:
        """Share of the requests of a kind above the threshold that flags at most so many safe ones."""
        above = scores > -falling[safe] if safe < len(falling) else np.ones(len(scores), bool)
        return rate(above[kind], labels[kind].tolist())

    found, counts = passing(math.floor(fpr * len(falling) + 1e-9), unsafe), range(len(falling) + 1)
    few = bisect.bisect_left(counts, True, key=lambda safe: (passing(safe, ~unsafe).high or 0.0) >= fpr)
    many = bisect.bisect_right(counts, False, key=lambda safe: (passing(safe, ~unsafe).low or 0.0) > fpr) - 1
    # Where none of the safe ones need pass, the threshold lies anywhere above all of them.
    others = [(passing(few, unsafe).value or 0.0) if few else 0.0, passing(many, unsafe).value or 0.0]
    value = found.value or 0.0
    ends = [
        math.hypot((end or 0.0) - value, other - value)
        for end, other in zip((found.low, found.high), others, strict=True)
    ]
    return Rate(value, max(0.0, value - ends[0]), min(1.0, value + ends[1]), int(unsafe.sum()))


def _resampled_rate(
    statistic: Callable[..., Float64[np.ndarray, " draw"]],
    scores: Scores,
    unsafe: Labels,
    seed: int,
    groups: GroupLabels,
    n: int,
) -> Rate:
    """A statistic of labels by falling score, of how often each counts, and of where equal scores end.

    Undefined without both classes.
    """
    if unsafe.all() or not unsafe.any():
        return Rate(None, None, None, n)
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    labels, clusters = unsafe[order], clusters_of(groups, len(order))
    draws = np.concatenate(
        [statistic(labels, weights[:, order], ends) for weights in _weights(unsafe, clusters, seed)]
    )
    value = float(statistic(labels, np.ones((1, len(order))), ends)[0])
    return Rate(value, *resampled_share(value, draws, len(np.unique(clusters[unsafe]))), n)


def _weights(
    unsafe: Labels, clusters: Int[np.ndarray, " request"], seed: int
) -> Iterator[Float64[np.ndarray, "draw request"]]:
    """How often every request is in each resample that holds both classes: of either class, or of clusters
    where one holds both.
    """
    generator = np.random.default_rng(seed)
    mixed = bool(np.isin(clusters[unsafe], clusters[~unsafe]).any())
    for _ in range(_RESAMPLES // _AT_ONCE):
        weights = np.zeros((_AT_ONCE, len(unsafe)))
        for part in [np.ones(len(unsafe), bool)] if mixed else [unsafe, ~unsafe]:
            numbers, own = np.unique(clusters[part], return_inverse=True)
            weights[:, part] = generator.multinomial(
                len(numbers), np.full(len(numbers), 1 / len(numbers)), _AT_ONCE
            )[:, own]
        yield weights[weights[:, unsafe].any(axis=1) & weights[:, ~unsafe].any(axis=1)]


def _average_precisions(
    unsafe: Labels, weights: Float64[np.ndarray, "draw request"], ends: np.ndarray
) -> Float64[np.ndarray, " draw"]:
    true, seen = np.cumsum(weights * unsafe, axis=1)[:, ends], np.cumsum(weights, axis=1)[:, ends]
    steps = np.diff(true, prepend=0.0, axis=1)
    return (steps * true / np.maximum(seen, 1e-300)).sum(axis=1) / true[:, -1]


def _macro_f1s(
    unsafe: Labels,
    weights: Float64[np.ndarray, "draw request"],
    ends: np.ndarray,  # noqa: ARG001 - of statistics that try every threshold
    called: int,
) -> Float64[np.ndarray, " draw"]:
    flagged = np.arange(len(unsafe)) < called
    wrong = weights @ (flagged != unsafe)
    hits = (2 * (weights @ (flagged & kind)) for flagged, kind in ((flagged, unsafe), (~flagged, ~unsafe)))
    return np.mean([hit / np.maximum(hit + wrong, 1e-300) for hit in hits], axis=0)


def reliability(
    probabilities: Scores, unsafe: Labels, bins: int = BINS, groups: GroupLabels = None
) -> list[ReliabilityRecord]:
    """Bins of equally many requests by rising probability, equal ones together: `{probability, unsafe, low,
    high, n}` with the interval of the share.
    """
    labels = [None] * len(probabilities) if groups is None else list(groups)
    found: list[ReliabilityRecord] = []
    for part in bins_of(probabilities, bins):
        share, mean = rate(unsafe[part], [labels[place] for place in part]), float(probabilities[part].mean())
        found.append(
            {"probability": mean, "unsafe": share.value, "low": share.low, "high": share.high, "n": share.n}
        )
    return found


def _thinned(x: np.ndarray, y: np.ndarray, points: int) -> list[tuple[float, float]]:
    """Points at about equal distances along the curve, both ends kept."""
    if len(x) > points:
        path = np.append(0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y))))
        kept = np.unique(np.searchsorted(path, np.linspace(0, path[-1], points)).clip(0, len(x) - 1))
        kept = np.unique(np.append(kept, [0, len(x) - 1]))
        x, y = x[kept], y[kept]
    return [(round(float(a), 6), round(float(b), 6)) for a, b in zip(x, y, strict=True)]
