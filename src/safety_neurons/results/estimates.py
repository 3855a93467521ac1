"""Estimates: rates, differences and causal effects with intervals that keep their nominal coverage.

Prompts that share a group (a deed, a conversation) count as one cluster; without groups every prompt is its
own. docs/statistics.md says in words what is computed here, and how often each interval covered in simulation
(`benchmarks/coverage.py`).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from safety_neurons.arguments import well_typed
from safety_neurons.errors import InputError, first_line
from safety_neurons.results.records import COMPARED, LEVEL, Difference, Effect, Estimate, McNemar, Rate

Outcomes = Sequence[bool | int | float | np.generic | None] | np.ndarray
"""One outcome per prompt; `None` or NaN means unscored."""
GroupLabels = Sequence[str | None] | None
"""What every prompt shares with others; None, for one or for all, means a group of its own."""
FEWEST_SETS = 3
"""Random sets below which nothing can be clear: the spread of one or two says next to nothing of the next
one.
"""
FEWEST_SEEDS = 5
"""Seeds below which nothing can be clear."""
MANY = 10
"""Comparisons of one table above which their family-wise rate is held."""
_PSEUDO = 1.5
"""Pseudo-observations at either end of the range. Bonett and Price add one.

With one and a half no truth is covered less than .944.
"""
_FEWEST_OF_A_TAIL = 8
"""Texts or clusters below which their skewness says nothing."""
_FLIPS = 4999
_ENUMERATED = 12


# Rates


@well_typed
def rate(outcomes: Outcomes, groups: GroupLabels = None) -> Rate:
    """The mean of the scored outcomes.

    The interval is Clopper and Pearson's where every outcome is 0 or 1 and no prompt shares its group.
    Otherwise outcomes between 0 and 1 get that interval for the number of such outcomes that would vary as
    the mean over groups does, and any others Student's with Hall's correction for a long tail.

    Args:
        outcomes: one per prompt; `None` or NaN means unscored.
        groups: what prompts share; None where they share nothing.

    Raises:
        InputError: an outcome is infinite, or groups are more or fewer than outcomes.

    Source: Korn and Graubard, Survey Methodology 1998 (effective number of outcomes in Clopper and Pearson's
    interval).
    """
    values = scored(outcomes)
    clusters, usable = clusters_of(groups, len(values)), ~np.isnan(values)
    return _rate(values[None, usable], clusters[usable], int((~usable).sum()))


def rate_over_seeds(outcomes: Sequence[Outcomes], groups: GroupLabels = None) -> Rate:
    """The mean of the scored outcomes of all seeds: seeds and prompts both vary, Student's quantile over the
    seeds.

    Args:
        outcomes: one list a seed, in each one outcome a prompt in the same order.
        groups: what prompts share.
    """
    rows = _rows(outcomes)
    return _rate(rows, clusters_of(groups, rows.shape[1]), int(np.isnan(rows).sum()), seeds=True)


def _rate(
    rows: Float[np.ndarray, "seed prompt"],
    clusters: Int[np.ndarray, " prompt"],
    unscored: int,
    seeds: bool = False,
) -> Rate:
    means = tuple(_mean(row) for row in rows) if seeds else ()
    sample, why = _sample(rows, clusters), _too_few_seeds(len(rows)) if seeds else None
    if sample is None:
        return Rate(None, None, None, 0, unscored, why, means)
    values = rows[~np.isnan(rows)]
    n, mean = len(values), float(values.mean())
    if sample.plain and not seeds and np.isin(values, (0.0, 1.0)).all():
        return Rate(mean, *exact(values.sum(), n), n, unscored)
    bounded = bool(values.min() >= 0 and values.max() <= 1)
    parts = [
        sample.variance(bounded, one_sided=True),
        *([between([mean for mean in means if mean is not None], 0.0)] if seeds else []),
    ]
    half = half_width(parts)
    if not math.isfinite(half) or (not bounded and half == 0):
        return Rate(mean, None, None, n, unscored, why or "no spread to tell an interval from", means)
    if not bounded:
        low, high = (mean - half, mean + half) if seeds else sample.ends(mean, half)
        return Rate(mean, low, high, n, unscored, why, means)
    middle = (sample.total + sample.size) / (sample.n + 2 * sample.size)
    effective = max(1.0, middle * (1 - middle) * (_quantile(math.inf) / half) ** 2 - 2)
    return Rate(mean, *exact(mean * effective, effective), n, unscored, why, means)


def from_error(value: float | int, error: float | int, n: int) -> Rate:
    """A rate of which only the standard error is known; without one there is no interval."""
    half = _quantile(max(n - 1.0, 1.0)) * error
    return (
        Rate(value, value - half, value + half, n)
        if half > 0
        else Rate(value, None, None, n, 0, "no spread to tell an interval from")
    )


def exact(successes: float | int, n: float | int) -> tuple[float, float]:
    """The exact 95 % interval of a share; both may be effective numbers and no whole ones.

    Source: Clopper and Pearson, Biometrika 1934.
    """
    from scipy.stats import beta

    successes, n = float(successes), float(n)
    low = float(beta.ppf(LEVEL / 2, successes, n - successes + 1)) if successes > 0 else 0.0
    high = float(beta.ppf(1 - LEVEL / 2, successes + 1, n - successes)) if successes < n else 1.0
    return low, high


def per_token(totals: Outcomes, token_counts: Sequence[int] | np.ndarray, groups: GroupLabels = None) -> Rate:
    """Sum of the totals ÷ sum of the token counts.

    Student's interval of the ratio over texts with Hall's correction for a long tail, none for a single text.

    Args:
        totals: a sum over the tokens of each text; `None` or NaN means unscored.
        token_counts: tokens of each text; a text without any is unscored.
        groups: what texts share.

    Raises:
        InputError: the two differ in length.
    """
    losses, counts = scored(totals), np.asarray(token_counts, np.float64)
    if losses.shape != counts.shape:
        raise InputError(
            f"{len(losses)} losses and {len(counts)} token counts; expected one of each per text"
        )
    usable = ~np.isnan(losses) & (counts > 0)
    clusters = clusters_of(groups, len(losses))[usable]
    losses, counts, unscored = losses[usable], counts[usable], int((~usable).sum())
    if not len(losses):
        return Rate(None, None, None, 0, unscored)
    mean = float(losses.sum() / counts.sum())
    sizes = np.bincount(clusters, counts)
    sample = _Sample(np.bincount(clusters, losses)[sizes > 0], sizes[sizes > 0])
    half = half_width([sample.variance(False)])
    if not math.isfinite(half) or half <= 1e-12 * abs(mean):
        return Rate(mean, None, None, len(losses), unscored, "no spread to tell an interval from")
    return Rate(mean, *sample.ends(mean, half), len(losses), unscored)


def perplexity(
    log_likelihood_losses: Outcomes, token_counts: Sequence[int] | np.ndarray, groups: GroupLabels = None
) -> Rate:
    """exp(mean negative log-likelihood per token) over texts, and of the ends of its interval.

    Args:
        log_likelihood_losses: summed negative log-likelihood of each text, in nats; `None` or NaN means
            unscored.
        token_counts: predicted tokens of each text; a text without any is unscored.
        groups: what texts share.
    """
    mean = per_token(log_likelihood_losses, token_counts, groups)
    with np.errstate(over="ignore"):
        value, low, high = (
            None if number is None else float(np.exp(number)) for number in (mean.value, mean.low, mean.high)
        )
    return Rate(value, low, high, mean.n, mean.unscored, mean.why)


# Differences


@well_typed
def paired_difference(first: Outcomes, second: Outcomes, groups: GroupLabels = None) -> Difference:
    """The mean of first − second over the prompts both scored.

    The interval is that of a mean with one and a half pseudo-differences of the largest size on either side,
    Student's quantile over groups, and where no largest size is known Student's with Hall's correction for a
    long tail; it holds 0 where McNemar's exact test (of other outcomes the test by
    changing signs) does not reject.

    Args:
        first: outcomes under one treatment, one per prompt; `None` or NaN means unscored.
        second: outcomes of the same prompts in the same order under the other.
        groups: what prompts share.

    Raises:
        InputError: the two differ in length.

    Source: Bonett and Price, Journal of Educational and Behavioral Statistics 2012 (adjusted Wald interval of
    paired proportions). Differs: 1.5 pseudo-observations in place of 1, outcomes between 0 and 1, clusters,
    Student's quantile.
    """
    rows = _stack(first=first, second=second)
    return _difference((rows[0] - rows[1])[None], groups, _scale(rows), [])


def difference_over_seeds(
    first: Sequence[Outcomes], second: Sequence[Outcomes], groups: GroupLabels = None, what: str = "seed"
) -> Difference:
    """The mean of first − second over seeds and prompts: both vary, Student's quantile over the seeds.

    Clear from five seeds on.

    Args:
        first: one list a seed, in each one outcome a prompt in the same order.
        second: the same seeds and prompts under the other treatment.
        groups: what prompts share.
        what: the word for a seed, where something else is drawn anew.
    """
    ours, theirs = _rows(first), _rows(second)
    if ours.shape != theirs.shape:
        raise InputError(
            f"outcomes of {ours.shape} and {theirs.shape} seeds and prompts; expected the same on both sides"
        )
    rows = ours - theirs
    means = tuple(_mean(row) for row in rows)
    spread = [between([mean for mean in means if mean is not None], 0.0)]
    difference = _difference(
        rows, groups, _scale(np.concatenate([ours, theirs])), spread, _too_few_seeds(len(rows), what)
    )
    return dataclasses.replace(difference, by_seed=means)


def against_random(
    treated: Outcomes, random: Sequence[Outcomes], groups: GroupLabels = None, extra: float = 1.0
) -> Difference:
    """A treatment against random sets: treated − the mean of the sets, told as a difference from the next set
    to be drawn.

    Variance over prompts (paired) and variance between the sets × (extra + 1/R), Student's quantile with R −
    1 degrees of freedom for the latter. With fewer than three sets nothing can be clear.

    Args:
        treated: outcomes under the treatment, one per prompt.
        random: outcomes of the same prompts under every random set.
        groups: what prompts share.
        extra: variance of a set beside random ones in units of that between these: 1, and more where they
            keep clear of the set (`NeuronSet.extra_variance`).

    Raises:
        InputError: no random set, or lists of different length.
    """
    if not len(random):
        raise InputError(
            "no random set to compare with; expected at least one, and three to tell a difference"
        )
    rows = _stack(treated=treated, **{f"random {number}": outcomes for number, outcomes in enumerate(random)})
    usable = ~np.isnan(rows[0])
    rows = np.stack([rows[0], *(row for row in rows[1:] if not np.isnan(row[usable]).all())])
    differences = (rows[0] - _column_means(rows[1:]))[None]
    if len(rows) == 1 or np.isnan(differences).all():
        return Difference(None, None, None, 0, rows.shape[1], too_few_sets(len(rows) - 1))
    means, bounded = (
        [float(np.nanmean(row[usable])) for row in rows],
        bool(np.nanmin(rows) >= 0 and np.nanmax(rows) <= 1),
    )
    # Means of sets near 0 or 1 are skewed, and three or five then look closer together than they are: with
    # the spread of logistic-normal
    # rates .10 of the next sets were "clear". On the scale of the arcsine, where their variance is steadier,
    # they have to be apart too.
    steady = [math.asin(math.sqrt(mean)) for mean in means] if bounded else []
    also = (
        p_value(steady[0] - sum(steady[1:]) / len(steady[1:]), [between(steady[1:], extra)])
        if steady
        else 0.0
    )
    spread, why = [between(means[1:], extra)], too_few_sets(len(means) - 1, extra)
    return _difference(differences, groups, _scale(rows), spread, why, also)


def too_few_sets(sets: int, extra: float = 1.0) -> str | None:
    """Why nothing can be clear against so few random sets; None where something can."""
    if math.isinf(extra):
        return "not shown: random sets that keep clear of half of the units are one and the same"
    many = f"{sets} random set{'' if sets == 1 else 's'}"
    return (
        None
        if sets >= FEWEST_SETS
        else f"not shown: {many}, at least {FEWEST_SETS} are needed to know how much they differ"
    )


def _too_few_seeds(seeds: int, what: str = "seed") -> str | None:
    many = f"{seeds} {what}{'' if seeds == 1 else 's'}"
    return None if seeds >= FEWEST_SEEDS else f"not shown: {many}, at least {FEWEST_SEEDS} are needed"


def _difference(
    rows: Float[np.ndarray, "seed prompt"],
    groups: GroupLabels,
    scale: float,
    spread: Sequence[tuple[float, float]],
    why: str | None = None,
    least: float = 0.0,
) -> Difference:
    """The mean of the differences.

    Args:
        rows: differences, one row a seed.
        groups: what prompts share.
        scale: the largest difference there can be, 0 where that is not known.
        spread: variances beside the one over prompts, with their degrees of freedom.
        why: what keeps it from being clear.
        least: the p-value of another test that has to reject too.
    """
    clusters = clusters_of(groups, rows.shape[1])
    sample = _sample(rows, clusters)
    known = ~np.isnan(rows).all(axis=0)
    n, unscored = int(known.sum()), int((~known).sum())
    if sample is None:
        return Difference(None, None, None, 0, unscored, why)
    mean = float(rows[~np.isnan(rows)].mean())
    scaled = dataclasses.replace(sample, totals=sample.totals / (scale or 1.0))
    factor, padding = (scale, 2 * _PSEUDO * scaled.size) if scale else (1.0, 0.0)
    middle = factor * scaled.total / (scaled.n + padding)
    variance, freedom = scaled.variance(bool(scale))
    parts = [(variance * factor**2, freedom), *spread]
    half = half_width(parts)
    if not scale and (half == 0 or not math.isfinite(half)):
        return Difference(mean, None, None, n, unscored, why or "no spread to tell an interval from")
    reach = scale or math.inf
    tailed = not scale and not spread  # without a bound and over prompts alone a long tail is seen
    ends = sample.ends(mean, half) if tailed else (middle - half, middle + half)
    low, high = max(-reach, min(ends[0], mean)), min(reach, max(ends[1], mean))
    if (
        not spread and sample.exact_test
    ):  # McNemar's: it decides alone, and the interval excludes 0 wherever it rejects
        p = sample.flip_p()
    else:
        p = p_value(middle, parts)
        p = max(p, least, sample.flip_p()) if p <= LEVEL else p
    if tailed and p <= LEVEL:
        p = max(p, _level(lambda level: _excluded(sample.ends(mean, half_width(parts, level)))))
    if p > LEVEL:
        low, high = min(low, 0.0), max(high, 0.0)
    return Difference(mean, low, high, n, unscored, why, p)


def holm(differences: Sequence[Difference]) -> list[Difference]:
    """The comparisons of one table; of more than ten, the family-wise rate is held.

    Source: Holm, Scandinavian Journal of Statistics 1979.
    """
    tested = [one.p for one in differences if one.p is not None]
    if len(tested) <= MANY:
        return list(differences)
    order = sorted(tested)
    adjusted: dict[float, float] = {}
    largest = 0.0
    for rank, p in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted.setdefault(p, largest)
    return [one if one.p is None else dataclasses.replace(one, p_holm=adjusted[one.p]) for one in differences]


def comparisons(table: Any) -> Iterator[Mapping[str, Any]]:
    """The differences in what was written as JSON values, however deep they lie, in order."""
    if isinstance(table, Mapping):
        if table.keys() >= COMPARED:
            yield table
        else:
            for part in table.values():
                yield from comparisons(part)
    elif isinstance(table, Sequence) and not isinstance(table, str):
        for part in table:
            yield from comparisons(part)


def holm_in(table: Any) -> Any:
    """`holm` of all differences in a table of JSON values; everything else stays as it is."""
    held = iter(holm([Difference.from_json(record) for record in comparisons(table)]))

    def written(part: Any) -> Any:
        if isinstance(part, Mapping):
            if part.keys() >= COMPARED:
                return {**part, **next(held).to_json()}
            return {name: written(value) for name, value in part.items()}
        return [written(value) for value in part] if isinstance(part, list | tuple) else part

    return written(table)


def family(table: Any) -> str:
    """What a caption says of a table of JSON values.

    Empty where its comparisons are few and nothing was held.
    """
    held = sum(record.get("p_holm") is not None for record in comparisons(table))
    return f"Of {held} comparisons the family-wise rate is held (Holm)." if held else ""


def captioned(words: str, table: Any, between: str = ". ") -> str:
    """The words of a caption, and behind them what is to be said of many comparisons."""
    return between.join(part for part in (words, family(table)) if part)


# Causal effects


@well_typed
def causal_effect(
    base: Outcomes, aligned: Outcomes, patched: Outcomes, measure: str = "refused", groups: GroupLabels = None
) -> Effect:
    """(mean patched − mean base) / (mean aligned − mean base) over the prompts that all three arms scored.

    Fieller's interval of a ratio of paired means, with pseudo-observations as in `paired_difference`. The
    effect is undefined where the gap, mean aligned − mean base, is about 0: where its sign is not clear.

    Args:
        base: scores of the untreated base model, one per prompt; `None` means unscored.
        aligned: scores of the aligned model for the same prompts in the same order.
        patched: scores of the patched base model, likewise.
        measure: name of the score.
        groups: what prompts share.

    Raises:
        InputError: the three differ in length.

    Source: Fieller, Journal of the Royal Statistical Society B 1954.
    """
    rows = _stack(base=base, aligned=aligned, patched=patched)
    usable = ~np.isnan(rows).any(axis=0)
    n, unscored = int(usable.sum()), int((~usable).sum())
    if not n:
        return Effect(
            None,
            None,
            None,
            0,
            unscored,
            f"no prompt is scored in all three arms ({unscored} unscored)",
            measure,
        )
    rows, labels = (
        rows[:, usable],
        None if groups is None else [label for label, kept in zip(groups, usable, strict=True) if kept],
    )
    gap = paired_difference(rows[1], rows[0], labels)
    nought = f"base and aligned differ by {gap.value:.3g} in {measure}"
    if not gap.clear:
        shown = (
            "no interval"
            if gap.low is None
            else f"95 % interval {gap.low:.3g} to {gap.high:.3g}, which includes 0"
        )
        return Effect(None, None, None, n, unscored, f"{nought}, {shown}", measure)
    ends = _fieller(rows[2] - rows[0], rows[1] - rows[0], clusters_of(labels, n), _scale(rows))
    if ends is None:
        return Effect(
            None,
            None,
            None,
            n,
            unscored,
            f"{nought}, too little to divide by: the interval of the share has no end",
            measure,
        )
    value = float((rows[2] - rows[0]).mean() / (rows[1] - rows[0]).mean())
    return Effect(value, *ends, n, unscored, None, measure)


def share_of(change: Outcomes, whole: Outcomes, groups: GroupLabels = None) -> Estimate:
    """The mean change over the mean whole, paired, with Fieller's interval.

    Undefined where the whole may be 0.
    """
    rows = _stack(change=change, whole=whole)
    usable = ~np.isnan(rows).any(axis=0)
    n, unscored = int(usable.sum()), int((~usable).sum())
    rows = rows[:, usable]
    if not n or not rows[1].sum():
        return Estimate(None, None, None, n, unscored, "there is nothing to take a share of")
    ends = _fieller(rows[0], rows[1], clusters_of(groups, len(usable))[usable], _scale(rows))
    value = float(rows[0].sum() / rows[1].sum())
    if ends is None:
        return Estimate(
            value, None, None, n, unscored, "the whole may be 0: the interval of the share has no end"
        )
    return Estimate(value, *ends, n, unscored)


def _fieller(
    gains: np.ndarray, gaps: np.ndarray, clusters: Int[np.ndarray, " prompt"], scale: float
) -> tuple[float, float] | None:
    """Ends of the interval of mean gain ÷ mean gap; None where it is not bounded."""
    unit = scale or 1.0
    pairs = np.stack([gains, gaps]) / unit
    sizes = np.bincount(clusters)
    sizes = sizes[sizes > 0]
    size, used = len(gains) / len(sizes), len(sizes)
    padding = 2 * _PSEUDO * size if scale else 0.0
    sums = pairs.sum(axis=1)
    means = sums / (len(gains) + padding)
    totals = np.stack([_totals(row, clusters) for row in pairs]) - means[:, None] * sizes
    totals *= leverage(sizes.astype(np.float64), len(gains) + padding)
    moments, freedom = totals @ totals.T, freedom_of(sizes.astype(np.float64))
    if scale:
        # Gain and gap share the base model: their pseudo-observations correlate by one half, as differences
        # from one coin do.
        moments += 2 * _PSEUDO * size**2 * (np.array([[1.0, 0.5], [0.5, 1.0]]) + np.outer(means, means))
        freedom += 2.0
    else:
        moments *= used / max(used - 1, 1)
    moments *= _quantile(freedom) ** 2
    square = sums[1] ** 2 - moments[1, 1]
    if not square > 0:
        return None
    linear, constant = sums[0] * sums[1] - moments[0, 1], sums[0] ** 2 - moments[0, 0]
    root = math.sqrt(max(linear**2 - square * constant, 0.0))
    return (linear - root) / square, (linear + root) / square


# McNemar's test


@well_typed
def mcnemar(first: Outcomes, second: Outcomes, groups: GroupLabels = None) -> McNemar | None:
    """The exact test (binomial, two-sided) on outcomes that are 0 or 1.

    None where some outcome is neither, such as a mean over seeds, and where prompts share groups, of which it
    knows nothing.

    Args:
        first: outcomes under one treatment, one per prompt; `None` or NaN means unscored.
        second: outcomes of the same prompts in the same order under the other.
        groups: what prompts share.

    Raises:
        InputError: the two differ in length.

    Source: McNemar, Psychometrika 1947. Differs: the exact binomial p-value instead of the chi-squared
    approximation, which is off where few prompts disagree.
    """
    rows = _stack(first=first, second=second)
    usable = ~np.isnan(rows).any(axis=0)
    one, other = rows[:, usable]
    clusters = clusters_of(groups, len(usable))[usable]
    if not np.isin(rows[:, usable], (0.0, 1.0)).all() or len(np.unique(clusters)) < len(clusters):
        return None
    gained, lost = int(((one == 1) & (other == 0)).sum()), int(((one == 0) & (other == 1)).sum())
    p = _coin_p(gained, gained + lost) if len(one) else None
    return McNemar(gained, lost, p, len(one), int((~usable).sum()))


def _coin_p(heads: int, n: int) -> float:
    """Two-sided p-value of so many heads in `n` throws of a fair coin."""
    from scipy.stats import binom

    return min(1.0, 2 * float(binom.cdf(min(heads, n - heads), n, 0.5)))


# What all of them rest on


@dataclass(frozen=True)
class _Sample:
    """Outcomes or differences of prompts in clusters, averaged over seeds."""

    totals: Float[np.ndarray, " cluster"]
    sizes: Float[np.ndarray, " cluster"]

    @property
    def n(self) -> float:
        return float(self.sizes.sum())

    @property
    def total(self) -> float:
        return float(self.totals.sum())

    @property
    def mean(self) -> float:
        return self.total / self.n

    @property
    def size(self) -> float:
        """Prompts of a mean cluster."""
        return self.n / len(self.sizes)

    @property
    def plain(self) -> bool:
        """Whether every prompt is its own cluster."""
        return bool((self.sizes == 1).all())

    @property
    def exact_test(self) -> bool:
        """Whether the test by changing signs is McNemar's: all differences are of one size."""
        moved = np.abs(self.totals[self.totals != 0])
        return self.plain and (not len(moved) or bool(np.ptp(moved) <= 1e-12 * moved[0]))

    def variance(self, padded: bool, *, one_sided: bool = False) -> tuple[float, float]:
        """Variance of the mean over clusters, and its degrees of freedom.

        Padded by pseudo-clusters at both ends of the range.

        Differences range from −1 to 1, rates (`one_sided`) from 0 to 1.
        """
        used, freedom = len(self.sizes), freedom_of(self.sizes)
        if not padded:
            residuals = (self.totals - self.mean * self.sizes) * leverage(self.sizes, self.n)
            return float(residuals @ residuals) * used / max(used - 1, 1) / self.n**2, freedom
        count, low = (1.0, 0.0) if one_sided else (_PSEUDO, -1.0)
        whole = self.n + 2 * count * self.size
        middle = (self.total + count * self.size * (1 + low)) / whole
        residuals = (self.totals - middle * self.sizes) * leverage(self.sizes, whole)
        ends = count * self.size**2 * ((1 - middle) ** 2 + (low - middle) ** 2)
        return (float(residuals @ residuals) + ends) / whole**2, freedom + 2.0

    def ends(self, mean: float, half: float) -> tuple[float, float]:
        """Student's interval of that half, longer on the side of a long tail: where a few texts make up the
        sum, a sample without them has a mean and a spread that are both too small.

        Source: Hall, Journal of the Royal Statistical Society B 1992 (monotone cubic transformation of
        Student's statistic). Differs: never shorter than Student's.
        """
        residuals = (self.totals - self.mean * self.sizes) * leverage(self.sizes, self.n)
        error = math.sqrt(self.variance(False)[0])
        skew = float(np.mean(residuals**3)) / float(np.mean(residuals**2)) ** 1.5 / math.sqrt(len(residuals))
        if abs(skew) < 1e-6 or len(residuals) < _FEWEST_OF_A_TAIL:
            return mean - half, mean + half
        few, many = (
            mean - error * 3 / skew * (math.cbrt(1 + skew * (end / error - skew / 6)) - 1)
            for end in (half, -half)
        )
        return min(few, mean - half), max(many, mean + half)

    def flip_p(self) -> float:
        """Two-sided p-value of the total where every cluster's sign might as well be the other: McNemar's
        test where all are 1 or −1.
        """
        moved = np.abs(self.totals[np.abs(self.totals) > 1e-12])
        if not len(moved):
            return 1.0
        if np.ptp(moved) <= 1e-12 * moved[0]:
            return _coin_p(int((self.totals > 1e-12).sum()), len(moved))
        seen = abs(self.total) * (1 - 1e-9)
        if len(moved) <= _ENUMERATED:
            signs = 1.0 - 2.0 * (np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved)) & 1)
            return float((np.abs(signs @ moved) >= seen).mean())
        generator, larger = np.random.default_rng(len(moved)), 0
        for _ in range(10):
            signs = generator.integers(0, 2, (-(-_FLIPS // 10), len(moved)), np.int8) * 2.0 - 1.0
            larger += int((np.abs(signs @ moved) >= seen).sum())
        return (larger + 1) / (10 * -(-_FLIPS // 10) + 1)


def _sample(rows: Float[np.ndarray, "seed prompt"], clusters: Int[np.ndarray, " prompt"]) -> _Sample | None:
    """Means over seeds in clusters; None where nothing is scored."""
    means = _column_means(rows)
    known = ~np.isnan(means)
    if not known.any():
        return None
    sizes = np.bincount(clusters[known])
    totals = np.bincount(clusters[known], means[known])
    return _Sample(totals[sizes > 0], sizes[sizes > 0].astype(np.float64))


def leverage(sizes: Float[np.ndarray, " cluster"], whole: float) -> Float[np.ndarray, " cluster"]:
    """What the residuals of clusters are multiplied by, since a large cluster draws the mean to itself: the
    jackknife's 1 ÷ (1 − share), in units of a mean cluster, so that among clusters of one size it is 1.

    Source: Bell and McCaffrey, Survey Methodology 2002 (bias of the variance over few and uneven clusters).
    """
    others = whole - sizes
    return np.where(others > 0, (whole - sizes.mean()) / np.where(others > 0, others, 1.0), 1.0)


def freedom_of(sizes: Float[np.ndarray, " cluster"]) -> float:
    """Degrees of freedom of a variance over clusters: their number less one, and fewer where they are of
    uneven size.

    Source: Satterthwaite's approximation for the jackknife, as Bell and McCaffrey.
    """
    used = len(sizes)
    if used < 2 or np.ptp(sizes) == 0:
        return used - 1.0
    shares = sizes / sizes.sum()
    square = float(shares @ shares)
    weights = (shares / (1 - shares)) ** 2  # of the squared residuals, which covary by square − share − share
    zero, first, second = (float(weights @ shares**power) for power in range(3))
    mean = zero - 2 * first + square * zero
    spread = 2 * second * zero + 2 * first**2 - 4 * square * first * zero + square**2 * zero**2
    spread += float((weights**2) @ (1 - 4 * shares + 2 * square))
    return min(max(mean**2 / spread, 1.0), used - 1.0)


def _totals(values: np.ndarray, clusters: Int[np.ndarray, " prompt"]) -> np.ndarray:
    return np.bincount(clusters, values)[np.bincount(clusters) > 0]


def between(means: Sequence[float], extra: float) -> tuple[float, float]:
    """Variance of the mean of sets or seeds, with `extra` times that of a single one added.

    Infinite where there is only one.
    """
    many = len(means)
    if many < 2 or math.isinf(extra):
        return math.inf, 0.0
    return float(np.var(means, ddof=1)) * (extra + 1 / many), many - 1.0


def half_width(parts: Sequence[tuple[float, float]], level: float = LEVEL) -> float:
    """Half of an interval from variances with their degrees of freedom, each by its own Student quantile.

    Squares add, so that a part that is known from few sets or seeds counts for as much as it may be and no
    part can be lost: where one is all, this is Student's interval.
    """
    if any(freedom < 1 for _, freedom in parts):
        return math.inf
    return math.sqrt(sum(_quantile(freedom, level) ** 2 * variance for variance, freedom in parts))


def p_value(middle: float, parts: Sequence[tuple[float, float]]) -> float:
    """The level at which the interval of that half around the middle would just touch 0."""
    if any(freedom < 1 for _, freedom in parts) or not middle:
        return 1.0
    return _level(lambda level: half_width(parts, level) < abs(middle))


def _level(excludes: Callable[[float], bool]) -> float:
    """The least level at which an interval excludes 0, by halving."""
    low, high = -40.0, 0.0  # exponents of the level
    for _ in range(60):
        level = (low + high) / 2
        low, high = (low, level) if excludes(math.exp(level)) else (level, high)
    return math.exp(high)


def _excluded(ends: tuple[float, float]) -> bool:
    return ends[0] > 0 or ends[1] < 0


def _quantile(freedom: float, level: float = LEVEL) -> float:
    """Two-sided quantile of Student's distribution.

    Of the normal one where the degrees of freedom are infinite.
    """
    from scipy.special import ndtri, stdtrit

    return float(-ndtri(level / 2) if math.isinf(freedom) else -stdtrit(freedom, level / 2))


def resampled(
    value: float | None,
    draws: Sequence[float | None],
    clusters: int,
    ends: tuple[float, float],
    members: int = 0,
) -> Estimate:
    """A number of which resamples of clusters alone say how much it varies: Student's interval with the
    spread they have.

    Percentiles would not do: two clusters have three different resamples, and a top set drawn anew agrees
    less with itself, so that they need not hold the value.

    Args:
        value: the number; None or NaN is undefined.
        draws: the same of every resample; those without a number are left out.
        clusters: how many were drawn from.
        ends: the least and the most it can be.
        members: of a share, how many it is a share of; it then has at least the exact interval of that share.
    """
    if value is None or math.isnan(value):
        return Estimate(None, None, None, clusters, 0, "undefined on these data")
    known = np.array([draw for draw in draws if draw is not None and not math.isnan(draw)], np.float64)
    spread = float(np.var(known, ddof=1)) * clusters / max(clusters - 1, 1) if len(known) > 1 else 0.0
    half = half_width([(spread, clusters - 1.0)])
    low, high = value - half, value + half
    if members:
        shared = exact(value * members, members)
        low, high = min(low, shared[0]), max(high, shared[1])
    if not math.isfinite(low) or high - low <= 1e-12 * max(1.0, abs(value)):
        return Estimate(value, None, None, clusters, 0, "no spread to tell an interval from")
    return Estimate(value, max(ends[0], low), min(ends[1], high), clusters)


def resampled_share(
    value: float, draws: Float[np.ndarray, " resample"], clusters: int
) -> tuple[float, float]:
    """Percentiles of resamples of a share, at least as far apart as its exact interval: near 0 and 1
    resamples alone know little doubt.
    """
    low, high = exact(value * clusters, clusters)
    few, many = np.quantile(draws, (LEVEL / 2, 1 - LEVEL / 2)) if len(draws) else (low, high)
    return min(value, low, float(few)), max(value, high, float(many))


def scored(outcomes: Outcomes) -> Float[np.ndarray, " prompt"]:
    """The outcomes as float64, unscored ones as NaN.

    Raises:
        InputError: an outcome is infinite.
    """
    try:
        values = np.array([math.nan if one is None else float(one) for one in outcomes], np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"outcomes are no numbers ({first_line(error)}); expected one a prompt, such as True, or None "
            "for unscored"
        ) from error
    if np.isinf(values).any():
        raise InputError(
            f"{int(np.isinf(values).sum())} of {len(values)} outcomes are infinite; expected numbers, or "
            "None for unscored"
        )
    return values


def _stack(**arms: Outcomes) -> Float[np.ndarray, "arm prompt"]:
    lengths = {name: len(outcomes) for name, outcomes in arms.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(
            f"outcomes per arm are {lengths}; expected the same prompts in the same order in every arm"
        )
    return np.stack([scored(outcomes) for outcomes in arms.values()])


def _rows(outcomes: Sequence[Outcomes]) -> Float[np.ndarray, "seed prompt"]:
    if not len(outcomes):
        raise InputError("no seed given; expected the outcomes of one or more")
    return _stack(**{f"seed {number}": row for number, row in enumerate(outcomes)})


def clusters_of(groups: GroupLabels, n: int) -> Int[np.ndarray, " prompt"]:
    """A number for the group of every prompt; those without a group have one of their own."""
    if groups is None:
        return np.arange(n)
    if len(groups) != n:
        raise InputError(
            f"{len(groups)} groups for {n} outcomes; expected one a prompt, None where it shares nothing"
        )
    numbers: dict[Any, int] = {}
    return np.array(
        [
            numbers.setdefault(place if label is None else (label,), len(numbers))
            for place, label in enumerate(groups)
        ],
        np.int64,
    )


def _scale(rows: Float[np.ndarray, "arm prompt"]) -> float:
    """The largest difference two outcomes can have; 0 where it is not known.

    Outcomes between 0 and 1 are known to stay there, and what only ever takes two values, for more than one
    prompt, is yes and no on another scale.
    """
    known = ~np.isnan(rows)
    levels, several = np.unique(rows[known]), np.count_nonzero(known.any(axis=0)) > 1
    if not len(levels) or (levels[0] >= 0 and levels[-1] <= 1):
        return 1.0
    return float(levels[1] - levels[0]) if len(levels) == 2 and several else 0.0


def _mean(row: np.ndarray) -> float | None:
    known = row[~np.isnan(row)]
    return float(known.mean()) if len(known) else None


def _column_means(rows: Float[np.ndarray, "row prompt"]) -> Float[np.ndarray, " prompt"]:
    """Prompt by prompt the mean of what is scored; NaN where nothing is."""
    known = ~np.isnan(rows)
    with np.errstate(invalid="ignore"):
        return np.where(known, rows, 0.0).sum(axis=0) / known.sum(axis=0)
