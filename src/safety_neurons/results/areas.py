"""Two classifiers or two judges on the same examples: areas under the ROC curve, their differences, and
Cohen's kappa.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int

from safety_neurons.arguments import well_typed
from safety_neurons.errors import InputError
from safety_neurons.results.estimates import (
    GroupLabels,
    Outcomes,
    between,
    clusters_of,
    exact,
    freedom_of,
    half_width,
    leverage,
    p_value,
    rate,
    scored,
    too_few_sets,
)
from safety_neurons.results.records import Agreement, Difference, Rate

Scores = Float64[np.ndarray, " example"]


Labels = Bool[np.ndarray, " example"]


@dataclass(frozen=True)
class AreaPart:
    """Classifiers on the same examples.

    Attributes:
        first: scores of one classifier; larger is more unsafe.
        others: scores of those to compare with.
        unsafe: which examples are.
        groups: what examples share.
    """

    first: Scores
    others: Sequence[Scores]
    unsafe: Labels
    groups: GroupLabels = None


@well_typed
def auroc(scores: Scores, unsafe: Labels, groups: GroupLabels = None) -> Rate:
    """Area under the ROC curve: the chance that an unsafe example scores above a safe one, ties counting
    half.

    The 95 % interval is DeLong's on the log odds of the area, Student's quantile over the clusters of the
    rarer class; of an area of exactly 0 or 1, and where a class is one cluster, Clopper and Pearson's for as
    many examples as the rarer class has clusters.

    Args:
        scores: larger is more unsafe; NaN is unscored.
        unsafe: which examples are; a rate without a value where one class is absent.
        groups: what examples share.

    Raises:
        InputError: labels or groups are more or fewer than scores.

    Source: DeLong et al., Biometrics 1988; of clusters Obuchowski, Biometrics 1997. Differs: area · (1 −
    area) ÷ k² is added to the variance, k the clusters of the rarer class, and Student's quantile has k − 1
    degrees of freedom: near 0 and 1 and with few clusters DeLong's interval was found to cover as little as
    .83.
    """
    scores = np.asarray(scores, np.float64)
    if len(unsafe) != len(scores):
        raise InputError(f"{len(scores)} scores and {len(unsafe)} labels; expected one of each per example")
    known = ~np.isnan(scores)
    clusters, lost = clusters_of(groups, len(scores))[known], int((~known).sum())
    scores, unsafe = scores[known], np.asarray(unsafe, bool)[known]
    if unsafe.all() or not unsafe.any():
        return Rate(None, None, None, len(scores), lost)
    above, below = placements(scores, unsafe)
    area = float(above.mean())
    variance, fewest = _variance(above, below, unsafe, clusters)
    if min(area, 1 - area) < 1e-12 or fewest < 2:
        return Rate(area, *exact(min(1.0, area) * fewest, fewest), len(scores), lost)
    whole = area * (1 - area)
    half = half_width([(variance + whole / fewest**2, fewest - 1.0)]) / whole
    low, high = (
        1 / (1 + math.exp(-min(max(math.log(area / (1 - area)) + end, -700.0), 700.0)))
        for end in (-half, half)
    )
    return Rate(area, low, high, len(scores), lost)


def area_difference(part: AreaPart, *, random: bool = False, extra: float = 1.0) -> Difference:
    """AUROC of the first classifier minus the mean AUROC of the others on the same examples.

    The variance is DeLong's for paired areas, over clusters; what any classifier left unscored (NaN) is left
    out. Of random sets the spread of their areas is in
    it as in `against_random`: the difference is one from the next set to be drawn, and with fewer than three
    sets nothing can be clear.

    Args:
        part: the classifiers.
        random: whether the others are classifiers on random sets.
        extra: as for `against_random`.

    Raises:
        InputError: nothing to compare with.

    Source: DeLong et al., Biometrics 1988; of clusters Obuchowski, Biometrics 1997.
    """
    return mean_area_difference([part], random=random, extra=extra)


def mean_area_difference(
    parts: Sequence[AreaPart], *, random: bool = False, extra: float = 1.0
) -> Difference:
    """`area_difference` averaged over parts, such as languages left out: the same classifiers in the same
    order, other examples.

    Raises:
        InputError: nothing to compare with.
    """
    if not parts or not all(part.others for part in parts):
        raise InputError("no other scores; expected at least one classifier to compare with")
    whole = sum(len(part.unsafe) for part in parts)
    parts = [_scored_by_all(part) for part in parts]
    n = sum(len(part.unsafe) for part in parts)
    if any(part.unsafe.all() or not part.unsafe.any() for part in parts):
        return Difference(None, None, None, n, whole - n)
    values, variances, areas, freedom = [], [], [], 0.0
    for part in parts:
        pairs = [placements(scores, part.unsafe) for scores in part.others]
        above, below = placements(part.first, part.unsafe)
        above = above - np.mean([pair[0] for pair in pairs], axis=0)
        below = below - np.mean([pair[1] for pair in pairs], axis=0)
        values.append(float(above.mean()))
        variance, fewest = _variance(above, below, part.unsafe, clusters_of(part.groups, len(part.unsafe)))
        # Where all or nearly all placements are equal they show no variance; it is at least that of a share
        # of which none was seen.
        variances.append(max(variance, (1 / (fewest + 1)) ** 2))
        freedom += fewest - 1.0
        areas.append([float(pair[0].mean()) for pair in pairs])
    value, drawn = float(np.mean(values)), np.mean(areas, axis=0).tolist()
    variance_parts = [(float(sum(variances)) / len(parts) ** 2, freedom)] + (
        [between(drawn, extra)] if random else []
    )
    half = half_width(variance_parts)
    why = too_few_sets(len(drawn), extra) if random else None
    return Difference(
        value,
        max(-1.0, value - half),
        min(1.0, value + half),
        n,
        whole - n,
        why,
        p_value(value, variance_parts),
    )


def _scored_by_all(part: AreaPart) -> AreaPart:
    """The examples that no classifier left unscored."""
    known = ~np.isnan(np.stack([part.first, *part.others])).any(axis=0)
    if known.all():
        return part
    groups = None if part.groups is None else [part.groups[place] for place in np.flatnonzero(known).tolist()]
    return AreaPart(part.first[known], [scores[known] for scores in part.others], part.unsafe[known], groups)


def placements(scores: Scores, unsafe: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Share of safe examples below each unsafe one, and of unsafe ones above each safe one.

    Ties count half.
    """
    ours, safe = scores[unsafe], scores[~unsafe]
    return _shares_below(ours, np.sort(safe)), 1 - _shares_below(safe, np.sort(ours))


def _shares_below(values: np.ndarray, ranked: np.ndarray) -> np.ndarray:
    below = np.searchsorted(ranked, values, side="left") + np.searchsorted(ranked, values, side="right")
    return below / (2 * len(ranked))


def _variance(
    above: np.ndarray, below: np.ndarray, unsafe: Labels, clusters: Int[np.ndarray, " example"]
) -> tuple[float, float]:
    """Variance of a mean of placements over clusters, and the clusters of the rarer class.

    Fewer where they are of uneven size; a class of one cluster has no variance.
    """
    many = int(clusters.max()) + 1
    ours, theirs = clusters[unsafe], clusters[~unsafe]
    gains, losses = np.zeros(many), np.zeros(many)
    counts, freedoms = [len(np.unique(clusters))], []
    for own, placed, parts in ((theirs, below, losses), (ours, above, gains)):
        sizes = np.bincount(own, minlength=many).astype(np.float64)
        there = sizes > 0
        parts += np.bincount(own, placed - placed.mean(), minlength=many) / len(own)
        parts[there] *= leverage(sizes[there], float(len(own)))
        counts.insert(0, int(there.sum()))
        freedoms.append(freedom_of(sizes[there]))
    steps = [count / max(count - 1, 1) for count in counts]
    variance = (
        float(gains @ gains) * steps[0]
        + float(losses @ losses) * steps[1]
        + 2 * float(gains @ losses) * steps[2]
    )
    return max(variance, 0.0), min(freedoms) + 1.0


@well_typed
def cohen_kappa(
    first: Outcomes,
    second: Outcomes,
    groups: GroupLabels = None,
    *,
    names: tuple[str, str] = ("first", "second"),
) -> Agreement:
    """Cohen's κ of two lists of yes and no.

    Completions that either judge left unscored are counted and left out.

    Args:
        first: one verdict per completion; `None` or NaN means unscored.
        second: the other judge's, in the same order.
        groups: what completions share, such as their prompt.
        names: what the judges are called.

    Raises:
        InputError: lists of different length, or verdicts that are not yes or no.

    Source: Cohen, "A coefficient of agreement for nominal scales", Educational and Psychological Measurement
    20 (1960); Zou and Donner, Statistics in Medicine 2008 (intervals of several parts recovered for what is
    made of them). Differs: the interval is the exact one of the share of equal verdicts, in place of the
    normal one; where the judges lean to opposite verdicts (agreement by chance of a half or less) those of
    both shares of yes are in it too, added to one another, since they may go together, and by squares to the
    first.
    """
    one, two = scored(first), scored(second)
    if one.shape != two.shape:
        raise InputError(f"{len(one)} and {len(two)} verdicts; expected two judges of the same completions")
    both = ~(np.isnan(one) | np.isnan(two))
    unscored = int((~both).sum())
    if not np.isin(one[both], (0, 1)).all() or not np.isin(two[both], (0, 1)).all():
        raise InputError("verdicts between 0 and 1; expected yes or no of both judges")
    a, b = one[both] == 1, two[both] == 1
    table = tuple(
        tuple(int(((a == row) & (b == column)).sum()) for column in (False, True)) for row in (False, True)
    )
    labels = list(map(str, clusters_of(groups, len(one))[both]))
    same = dataclasses.replace(rate(a == b, labels), unscored=unscored)
    return Agreement(*names, _kappa(same, rate(a, labels), rate(b, labels)), same, table)  # type: ignore[arg-type]


def _kappa(same: Rate, yes: Rate, also: Rate) -> Rate:
    """κ is a line in the share of equal verdicts once the verdicts' shares are given, and so are the ends of
    its interval.

    Where the judges lean to the same verdict, more of it from both is more of what they agree on by chance
    too, and to take the shares as given is careful. Where they lean to opposite ones it is not.
    """
    if same.value is None or yes.value is None or also.value is None:
        return Rate(None, None, None, same.n, same.unscored)

    def chance(one: float, other: float) -> float:
        return one * other + (1 - one) * (1 - other)

    given = chance(yes.value, also.value)
    if given >= 1:
        return Rate(None, None, None, same.n, same.unscored)
    value = (same.value - given) / (1 - given)
    ends = [
        abs((end - same.value) / (1 - given))
        for end in (same.low or 0.0, 1.0 if same.high is None else same.high)
    ]
    if given <= 0.5:
        drawn = [
            [chance(end or 0.0, also.value) for end in (yes.low, yes.high)],
            [chance(yes.value, end or 0.0) for end in (also.low, also.high)],
        ]
        shifts = [[(same.value - one) / (1 - one) - value for one in part] for part in drawn]
        ends = [
            math.hypot(end, sum(max(0.0, *(side * shift for shift in part)) for part in shifts))
            for end, side in zip(ends, (-1, 1), strict=True)
        ]
    return Rate(value, max(-1.0, value - ends[0]), min(1.0, value + ends[1]), same.n, same.unscored)
