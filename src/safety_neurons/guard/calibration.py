"""The linear classifier on features, its calibrated probabilities, and the thresholds of stated
false-positive rates.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from types import UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int
from torch import Tensor

from safety_neurons.arguments import well_typed
from safety_neurons.counting import numbered
from safety_neurons.errors import InputError, UsageError
from safety_neurons.results import Rate, rate
from safety_neurons.results.estimates import Estimate, GroupLabels, clusters_of

StoredT = TypeVar("StoredT")
LATER = "later"
"""In the metadata of a field that files of earlier versions do not have; it needs a default."""


def from_json(kind: type[StoredT], found: Any) -> StoredT:
    """The dataclass that `plain` wrote as JSON values, every field of the type that it is declared with.

    Fields marked `LATER` may be missing: files of earlier versions do not have them.

    Raises:
        InputError: damaged: something is missing or of another type, or the dataclass itself refuses it.
    """
    try:
        if not isinstance(found, Mapping):
            raise TypeError(f"{str(found)[:20]!r}; expected an object")
        hints = get_type_hints(kind)
        given = [one for one in fields(cast(Any, kind)) if one.name in found or LATER not in one.metadata]
        return kind(**{one.name: _typed(hints[one.name], found[one.name]) for one in given})
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind.__name__).lower()
        raise InputError(
            f"a damaged {words} ({type(error).__name__}: {str(error)[:60]}); expected what Guard.save "
            "wrote: fit or copy the guard again"
        ) from error


def _typed(kind: Any, found: Any) -> Any:
    inner, several = get_args(kind), get_origin(kind) or kind
    if several is UnionType:
        return None if found is None else _typed(inner[0], found)
    if several is tuple and isinstance(found, list):
        return tuple(_typed(inner[0], one) for one in found)
    if issubclass(several, Estimate):
        return several.from_json(found)
    if is_dataclass(several):
        return from_json(cast(type, several), found)
    if not isinstance(found, (float, int) if several is float else several) or (
        isinstance(found, bool) and several is not bool
    ):
        raise TypeError(f"{str(found)[:20]!r}; expected {several.__name__}")
    return float(found) if several is float else found


KINDS = ("temperature", "isotonic")
FOLDS = 5
FEW = 100
"""Fewer calibration examples of either kind than this leave isotonic regression aside."""


@dataclass(frozen=True)
class Calibration:
    """A strictly rising map from scores (log odds before calibration) to log odds.

    Attributes:
        kind: `temperature`: score / temperature + shift. `isotonic`: straight lines between knots, and beyond
            the ends the slope 1 / temperature.
        temperature: positive.
        shift: of the log odds.
        scores: of the knots, rising; empty for `temperature`.
        log_odds: of the knots, rising.
    """

    kind: str = "temperature"
    temperature: float = 1.0
    shift: float = 0.0
    scores: tuple[float, ...] = ()
    log_odds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        numbers = (self.temperature, self.shift, *self.scores, *self.log_odds)
        rising = all(
            b > a for knots in (self.scores, self.log_odds) for a, b in zip(knots, knots[1:], strict=False)
        )
        whole = len(self.scores) == len(self.log_odds) and (self.kind == "temperature") == (not self.scores)
        if (
            self.kind not in KINDS
            or not all(map(math.isfinite, numbers))
            or self.temperature <= 0
            or not rising
            or not whole
        ):
            raise InputError(
                f"a damaged calibration of kind {self.kind!r}; expected a positive temperature, or "
                "rising finite knots"
            )

    def __call__(self, scores: Float[Tensor, " prompt"]) -> Float[Tensor, " prompt"]:
        """Calibrated log odds; their sigmoid is the probability."""
        if self.kind == "temperature":
            return scores / self.temperature + self.shift
        return torch.tensor([self.of_one(score) for score in scores.tolist()], dtype=scores.dtype)

    def of_one(self, score: float) -> float:
        """The same of one score, without a tensor."""
        if self.kind == "temperature":
            return score / self.temperature + self.shift
        knots, values = self.scores, self.log_odds
        if score < knots[0] or len(knots) == 1:
            return values[0] + (score - knots[0]) / self.temperature
        if not score <= knots[-1]:
            return values[-1] + (score - knots[-1]) / self.temperature
        place = min(max(bisect_left(knots, score), 1), len(knots) - 1)
        slope = (values[place] - values[place - 1]) / (knots[place] - knots[place - 1])
        return values[place - 1] + (score - knots[place - 1]) * slope


Scores = Float64[np.ndarray, " prompt"]
Labels = Bool[np.ndarray, " prompt"]


def fit_calibration(
    scores: Scores, unsafe: Labels, kind: str = "auto", seed: int = 0
) -> tuple[Calibration, dict[str, float]]:
    """A calibration on examples that the classifier was not fit on.

    Args:
        scores: of the classifier, in log odds.
        unsafe: which examples are.
        kind: `temperature`, `isotonic`, or `auto` for the smaller log loss in five-fold cross-validation on
            these examples.
        seed: of the folds.

    Returns:
        The calibration on all examples, and the cross-validated log loss of each kind that was tried.

    Raises:
        UsageError: an unknown kind. InputError: examples of one class only.

    Source: temperature: Guo et al., ICML 2017, with the shift and the smoothed targets of Platt 1999;
        isotonic: Zadrozny and Elkan, KDD 2002.
    """
    if kind not in (*KINDS, "auto"):
        raise UsageError(f"calibration {kind!r} is unknown; expected auto, {' or '.join(KINDS)}")
    if unsafe.all() or not unsafe.any():
        raise InputError(
            f"{int(unsafe.sum())} unsafe of {len(unsafe)} calibration examples; expected some of both kinds"
        )
    losses = {
        name: _held_out_loss(scores, unsafe, name, seed) for name in (KINDS if kind == "auto" else (kind,))
    }
    few = int(min(unsafe.sum(), (~unsafe).sum())) < FEW
    chosen = kind if kind != "auto" else "temperature" if few else min(KINDS, key=lambda name: losses[name])
    return _FITS[chosen](scores, unsafe), losses


def temperature(scores: Scores, unsafe: Labels) -> Calibration:
    """Temperature and shift with the smallest log loss against Platt's smoothed targets, which keeps them
    finite on separable scores.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    n_unsafe, n_safe = int(unsafe.sum()), int((~unsafe).sum())
    targets = np.where(unsafe, (n_unsafe + 1) / (n_unsafe + 2), 1 / (n_safe + 2))
    centre, spread = float(np.median(scores)), float(np.ptp(scores)) or 1.0
    scaled = (scores - centre) / spread

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        slope = np.exp(parameters[0])
        odds = slope * scaled + parameters[1]
        miss = expit(odds) - targets
        return float(np.mean(np.logaddexp(0, odds) - targets * odds)), np.array(
            [np.mean(miss * scaled) * slope, np.mean(miss)]
        )

    found = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=[(-12, 12), (-200, 200)])
    slope = float(np.exp(found.x[0])) / spread
    return Calibration("temperature", 1 / slope, float(found.x[1]) - slope * centre)


def isotonic(scores: Scores, unsafe: Labels) -> Calibration:
    """Pooled shares, joined by straight lines in log odds; beyond the ends the slope of the temperature.

    A pool of several scores is a line that rises by at most a tenth of a nat, and by no more than a quarter
    of the way to either neighbour at each end, so that the order of scores inside a pool is kept.
    """
    from sklearn.isotonic import isotonic_regression

    order = np.lexsort((unsafe, scores))
    levels, start = np.unique(scores[order], return_index=True)
    weights = np.diff([*start, len(scores)]).astype(np.float64)
    shares = np.add.reduceat(unsafe[order].astype(np.float64), start) / weights
    fitted = isotonic_regression(shares, sample_weight=weights)
    edges = [0, *(np.flatnonzero(np.diff(fitted) > 1e-12) + 1), len(fitted)]
    limit = 1 / (2 * len(scores) + 2)
    pools = np.clip(fitted[edges[:-1]], limit, 1 - limit)
    odds = np.log(pools / (1 - pools))
    room = np.minimum(np.diff(odds, prepend=-np.inf), np.diff(odds, append=np.inf)) / 4
    rise = np.minimum(room, 0.05)
    knots: list[tuple[float, float]] = []
    for number, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        ends = [(low, -1.0), (high - 1, 1.0)] if high - low > 1 else [(low, 0.0)]
        knots += [(float(levels[place]), float(odds[number] + side * rise[number])) for place, side in ends]
    kept = [knots[0]]
    for knot in knots[1:]:
        if knot[0] > kept[-1][0] and knot[1] > kept[-1][1]:
            kept.append(knot)
    beyond = temperature(scores, unsafe)
    return Calibration(
        "isotonic", beyond.temperature, beyond.shift, tuple(x for x, _ in kept), tuple(y for _, y in kept)
    )


_FITS = {"temperature": temperature, "isotonic": isotonic}


def log_loss(log_odds: Scores, unsafe: Labels) -> float:
    """Mean negative log likelihood in nats."""
    return float(np.mean(np.logaddexp(0, log_odds) - unsafe * log_odds))


@well_typed
def expected_calibration_error(probabilities: Scores, unsafe: Labels, bins: int = 15) -> float:
    """Mean distance between predicted probability and share of unsafe examples, over `bins_of` the
    probabilities.

    Source: Nixon et al., CVPR workshops 2019 (adaptive bins).
    """
    parts = bins_of(probabilities, bins)
    gaps = [abs(float(probabilities[part].mean() - unsafe[part].mean())) * len(part) for part in parts]
    return float(sum(gaps) / len(probabilities))


def bins_of(probabilities: Scores, bins: int) -> list[Int[np.ndarray, " _"]]:
    """Places of examples in bins of equally many by rising probability; those of one probability are in one
    bin, that of the middle one of them, so that their order plays no part.
    """
    order = np.argsort(probabilities, kind="stable")
    bin_of = np.repeat(np.arange(bins), [len(part) for part in np.array_split(order, bins)])
    _, first, count = np.unique(probabilities[order], return_index=True, return_counts=True)
    bin_of = np.repeat(bin_of[first + (count - 1) // 2], count)
    return [order[bin_of == number] for number in np.unique(bin_of)]


def _held_out_loss(scores: Scores, unsafe: Labels, kind: str, seed: int) -> float:
    """Log loss on folds that the calibration was not fit on.

    Infinite where a fold would have one class only.
    """
    generator = np.random.default_rng(seed)
    fold = np.empty(len(scores), np.int64)
    for members in (np.flatnonzero(unsafe), np.flatnonzero(~unsafe)):
        fold[generator.permutation(members)] = np.arange(len(members)) % FOLDS
    if min(int(unsafe.sum()), int((~unsafe).sum())) < 2:
        return math.inf
    total = 0.0
    for number in range(FOLDS):
        out = fold == number
        if out.any():
            odds = _FITS[kind](scores[~out], unsafe[~out])(torch.from_numpy(scores[out])).numpy()
            total += log_loss(odds, unsafe[out]) * int(out.sum())
    return total / len(scores)


LIMIT = 30.0
"""Log odds are cut off here, so that a probability is never exactly 0 or 1."""


@dataclass(frozen=True, eq=False)
class Classifier:
    """Logistic regression on standardised features, with calibration: p = σ(calibration(bias + Σ wᵢ (xᵢ −
    meanᵢ) / scaleᵢ)).

    Attributes:
        mean: of each feature where the classifier was fit.
        scale: standard deviation there; 1 for a feature that never changed, whose weight is 0.
        weights: of the standardised features.
        bias: log odds of the mean prompt, before calibration.
        calibration: from log odds to calibrated log odds.
    """

    mean: Float32[Tensor, " neuron"]
    scale: Float32[Tensor, " neuron"]
    weights: Float32[Tensor, " neuron"]
    bias: float
    calibration: Calibration = Calibration()

    def __post_init__(self) -> None:
        vectors = (self.mean, self.scale, self.weights)
        finite = all(bool(vector.isfinite().all()) for vector in vectors) and abs(self.bias) < float("inf")
        if len({len(vector) for vector in vectors}) != 1 or not finite or not bool((self.scale > 0).all()):
            raise InputError(
                "a damaged classifier; expected finite means, scales above 0 and weights, one of each "
                "per neuron"
            )

    @property
    def n_features(self) -> int:
        """Features it takes."""
        return len(self.weights)

    @cached_property
    def wide(
        self,
    ) -> tuple[
        Float64[np.ndarray, " neuron"], Float64[np.ndarray, " neuron"], Float64[np.ndarray, " neuron"]
    ]:
        """Means, 1 / scale, and weights of the features before standardisation, in float64: for a few rows at
        a time.
        """
        mean, scale, weights = (vector.double().numpy() for vector in (self.mean, self.scale, self.weights))
        return mean, 1 / scale, weights / scale

    @property
    def direction(self) -> Float32[Tensor, " neuron"]:
        """Weights of the features before standardisation: they order tokens as the scores do."""
        return self.weights / self.scale

    def scores(self, features: Float[Tensor, "prompt neuron"]) -> Float64[Tensor, " prompt"]:
        """Log odds before calibration, on the processor in float64, whatever the features are in."""
        if features.ndim != 2 or features.shape[1] != self.n_features:
            raise InputError(
                f"features of shape {tuple(features.shape)}; expected [prompt, {self.n_features}]: read "
                "them with this guard"
            )
        mean, _, weights = self.wide
        with np.errstate(invalid="ignore", over="ignore"):
            parts = (float_rows(features) - mean) * weights
        return torch.from_numpy(summed(parts) + self.bias)

    def probabilities(self, features: Float[Tensor, "prompt neuron"]) -> Float64[Tensor, " prompt"]:
        """Calibrated probability of being unsafe; NaN where a feature is."""
        return self.chances(self.scores(features))

    def chances(self, scores: Float64[Tensor, " prompt"]) -> Float64[Tensor, " prompt"]:
        """Calibrated probabilities of scores, whose log odds are cut off at ±30."""
        return self.calibration(scores).clamp(-LIMIT, LIMIT).sigmoid()

    def standardised(self, features: Float[Tensor, "prompt neuron"]) -> Float64[Tensor, "prompt neuron"]:
        """Distance of each feature from its mean, in standard deviations."""
        mean, inverse, _ = map(torch.from_numpy, self.wide)
        return (features.to("cpu", torch.float64) - mean) * inverse


def summed(parts: Float64[np.ndarray, "prompt neuron"]) -> Float64[np.ndarray, " prompt"]:
    """What the neurons of each prompt add up to, every row by itself: a product of matrices rounds a prompt's
    score by what is judged beside it, and a threshold may lie right on a score.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        found: Float64[np.ndarray, " prompt"] = parts.sum(axis=1)
    return found


def float_rows(features: Float[Tensor, "prompt neuron"]) -> np.ndarray:
    """Features as an array in the number type they are in, where numpy has it.

    What is computed with float64 vectors is float64.
    """
    if features.dtype is not torch.float32:
        features = features.double()
    return (features if features.device.type == "cpu" else features.cpu()).numpy()


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
        supported: whether there were at least 20 / FPR safe examples, in groups that are small enough
            for it.
        why: why not.
    """

    fpr_target: float
    threshold: float | None
    fpr: Rate
    tpr: Rate
    supported: bool
    why: str = ""

    def __post_init__(self) -> None:
        check_probability(self.fpr_target, "false-positive rate")
        check_probability(self.threshold or 0.0, "threshold")


@well_typed
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
    probabilities: Float64[np.ndarray, " prompt"],
    unsafe: Bool[np.ndarray, " prompt"],
    target: float,
    groups: GroupLabels = None,
) -> OperatingPoint:
    """One threshold, and what it is worth; see `threshold_for`."""
    check_probability(target, "false-positive rate")
    threshold = threshold_for(probabilities, unsafe, target, groups)
    why = unsupported(unsafe, target, groups)
    fpr, tpr = rates_at(probabilities, unsafe, threshold, groups)
    return OperatingPoint(target, None if why else threshold, fpr, tpr, not why, why)


def unsupported(
    unsafe: Bool[np.ndarray, " prompt"], target: float, groups: GroupLabels = None, what: str = "safe example"
) -> str:
    """Why so many safe examples do not support a false-positive rate; empty where they do.

    Args:
        unsafe: which examples are.
        target: the false-positive rate.
        groups: what examples share.
        what: the word for a safe example.
    """
    n, alike = int((~unsafe).sum()), _alike(unsafe, groups)
    few, apart = math.ceil(EXAMPLES / target), math.ceil(alike / target - alike - 1e-9)
    if n >= max(few, apart):
        return ""
    if few >= apart:
        return f"{numbered(n, what)}, {few:,} are needed ({EXAMPLES} / {target:g})"
    return f"{numbered(n, what)} in groups of {alike:.3g}, of such {apart:,} are needed"


def _alike(unsafe: Bool[np.ndarray, " prompt"], groups: GroupLabels) -> float:
    """Safe examples in the group of a mean one; 1 where they share nothing."""
    sizes = np.bincount(clusters_of(groups, len(unsafe))[~unsafe])
    return float(sizes @ sizes / max(sizes.sum(), 1)) or 1.0


def threshold_for(
    probabilities: Float64[np.ndarray, " prompt"],
    unsafe: Bool[np.ndarray, " prompt"],
    target: float,
    groups: GroupLabels = None,
) -> float:
    """A threshold above which a new safe prompt is at most with the stated probability.

    Of n safe examples the k with the highest probabilities are let go, k the largest number with (k + 1) / (n
    + 1) ≤ target: then a new safe prompt from where these came from is flagged with at most that probability,
    whatever the distribution of scores. Where n is too small for k = 0 the threshold is above all of them,
    which keeps 1 / (n + 1) and no less. Equal probabilities are never split.

    The promise is of ranks among safe examples: a new safe prompt that reaches the threshold is above the (k
    + 1)th highest of them, and by symmetry it is so with probability (k + 1) / (n + 1) at most. It therefore
    holds for every threshold above that one, wherever it lies and whatever it was chosen by. It lies half-way
    to the next higher score, **unsafe ones included**: half-way to the next higher safe one, or to 1 where
    there is none, would with few safe examples lie above most unsafe ones and catch next to nothing.

    Examples of one group may lie above it all at once, and so may those of a new one: of n safe examples in
    groups of m, k is the largest number with (k + m) / (n + m) ≤ target, and the promise is of a prompt of a
    new group. Of groups of uneven size m is that of the group of a mean example.

    Source: split conformal prediction (Vovk et al. 2005; Angelopoulos and Bates 2023), applied to the safe
    class; of groups Dunn, Wasserman and Ramdas, Journal of the American Statistical Association 2023
    (exchangeable groups in place of exchangeable examples). Differs: a group counts by its examples.
    """
    safe, alike = probabilities[~unsafe], _alike(unsafe, groups)
    if not len(safe):
        return 0.5
    falling = np.sort(safe)[::-1]
    allowed = max(0, math.floor(target * (len(safe) + alike) - alike + 1e-9))
    if allowed >= len(falling):
        return 0.0
    kept_below = float(falling[allowed])
    above = probabilities[probabilities > kept_below]
    upper = float(above.min()) if len(above) else 1.0
    return float(min(1.0, max((kept_below + upper) / 2, np.nextafter(kept_below, 2.0))))


def rates_at(
    probabilities: Float64[np.ndarray, " prompt"],
    unsafe: Bool[np.ndarray, " prompt"],
    threshold: float,
    groups: GroupLabels = None,
) -> tuple[Rate, Rate]:
    """False-positive and true-positive rate of a threshold, with intervals.

    Clopper and Pearson's holds for a threshold that was set on the same examples too: the rate above the k-th
    highest of n is Beta(k, n - k + 1), whose quantiles the interval encloses.
    """
    flagged, shared = (
        probabilities >= threshold,
        np.array([None] * len(unsafe) if groups is None else list(groups), object),
    )
    return rate(flagged[~unsafe], shared[~unsafe].tolist()), rate(flagged[unsafe], shared[unsafe].tolist())


def check_probability(value: Any, what: str) -> float:
    """The value as a number above 0 and at most 1 (a threshold may be 0 too).

    Raises:
        UsageError: anything else.
    """
    number = (
        float(value)
        if isinstance(value, int | float | np.floating) and not isinstance(value, bool)
        else math.nan
    )
    if not 0 <= number <= 1 or (number == 0 and what != "threshold"):
        raise UsageError(f"{what} {value!r}; expected a number between 0 and 1")
    return number


@dataclass(frozen=True)
class Recheck:
    """The threshold of re-checks, per answer: an answer is stopped if any of its checks reaches it.

    Attributes:
        every: generated tokens between checks.
        max_new_tokens: longest answer it was measured on.
        threshold: of the probability at generated positions: of the classifier for answers, or of the one
            for prompts where there is none.
        fpr_target: share of the answers to safe prompts that may be stopped.
        fpr: share of those measured that are, with its Clopper-Pearson interval.
        tpr: share of the unsafe answers that are; undefined where none was given.
        supported: whether there were 20 / FPR answers to safe prompts.
        why: why not.
        own: whether the guard has a classifier of its own for answers.
        auroc: how well the largest check of an answer tells unsafe answers from safe ones; None where it was
            not measured.
    """

    every: int
    max_new_tokens: int
    threshold: float
    fpr_target: float
    fpr: Rate
    tpr: Rate
    supported: bool
    why: str = ""
    own: bool = field(default=False, metadata={LATER: True})
    auroc: Rate | None = field(default=None, metadata={LATER: True})

    def __post_init__(self) -> None:
        check_probability(self.threshold, "threshold")
        check_probability(self.fpr_target, "false-positive rate")
        if self.every < 1 or self.max_new_tokens < 1:
            raise UsageError(
                f"re-checks every {self.every} tokens of {self.max_new_tokens}; expected numbers of at "
                "least 1"
            )
