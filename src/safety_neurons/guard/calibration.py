"""From the classifier's score to a probability: temperature scaling with a shift, or isotonic regression, chosen by held-out log loss.

Both rise strictly with the score, so calibrating changes no order and no operating point.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from safety_neurons.errors import InputError, UsageError

KINDS = ("temperature", "isotonic")
FOLDS = 5
FEW = 100
"""Fewer calibration examples of either kind than this leave isotonic regression aside."""


@dataclass(frozen=True)
class Calibration:
    """A strictly rising map from scores (log odds before calibration) to log odds.

    Attributes:
        kind: `temperature`: score / temperature + shift. `isotonic`: straight lines between knots, and beyond the ends the slope
            1 / temperature.
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
        rising = all(b > a for knots in (self.scores, self.log_odds) for a, b in zip(knots, knots[1:], strict=False))
        whole = len(self.scores) == len(self.log_odds) and (self.kind == "temperature") == (not self.scores)
        if self.kind not in KINDS or not all(map(math.isfinite, numbers)) or self.temperature <= 0 or not rising or not whole:
            raise InputError(f"a damaged calibration of kind {self.kind!r}; expected a positive temperature, or rising finite knots")

    def __call__(self, scores: Float[Tensor, " prompt"]) -> Float[Tensor, " prompt"]:
        """Calibrated log odds; their sigmoid is the probability."""
        if self.kind == "temperature":
            return scores / self.temperature + self.shift
        knots = torch.tensor(self.scores, dtype=scores.dtype, device=scores.device)
        values = torch.tensor(self.log_odds, dtype=scores.dtype, device=scores.device)
        if len(knots) == 1:
            return values + (scores - knots) / self.temperature
        place = torch.searchsorted(knots, scores).clamp(1, len(knots) - 1)
        x0, x1, y0, y1 = knots[place - 1], knots[place], values[place - 1], values[place]
        inside = y0 + (scores - x0) * ((y1 - y0) / (x1 - x0))
        below, above = values[0] + (scores - knots[0]) / self.temperature, values[-1] + (scores - knots[-1]) / self.temperature
        return torch.where(scores < knots[0], below, torch.where(scores > knots[-1], above, inside))

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

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**asdict(self), "scores": list(self.scores), "log_odds": list(self.log_odds)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Calibration":
        """The calibration that `to_json` wrote.

        Raises:
            InputError: damaged.
        """
        try:
            knots = [tuple(float(value) for value in found[name]) for name in ("scores", "log_odds")]
            return cls(str(found["kind"]), float(found["temperature"]), float(found["shift"]), *knots)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"a damaged calibration ({type(error).__name__}: {str(error)[:60]}); expected what a guard's file holds"
            ) from error


Scores = Float64[np.ndarray, " prompt"]
Labels = Bool[np.ndarray, " prompt"]


def fit_calibration(scores: Scores, unsafe: Labels, kind: str = "auto", seed: int = 0) -> tuple[Calibration, dict[str, float]]:
    """A calibration on examples that the classifier was not fit on.

    Args:
        scores: of the classifier, in log odds.
        unsafe: which examples are.
        kind: `temperature`, `isotonic`, or `auto` for the smaller log loss in five-fold cross-validation on these examples.
        seed: of the folds.

    Returns:
        The calibration on all examples, and the cross-validated log loss of each kind that was tried.

    Raises:
        UsageError: an unknown kind. InputError: examples of one class only.

    Source: temperature: Guo et al., ICML 2017, with the shift and the smoothed targets of Platt 1999; isotonic: Zadrozny and Elkan, KDD
        2002.
    """
    if kind not in (*KINDS, "auto"):
        raise UsageError(f"calibration {kind!r} is unknown; expected auto, {' or '.join(KINDS)}")
    if unsafe.all() or not unsafe.any():
        raise InputError(f"{int(unsafe.sum())} unsafe of {len(unsafe)} calibration examples; expected some of both kinds")
    losses = {name: _held_out_loss(scores, unsafe, name, seed) for name in (KINDS if kind == "auto" else (kind,))}
    few = int(min(unsafe.sum(), (~unsafe).sum())) < FEW
    chosen = kind if kind != "auto" else "temperature" if few else min(KINDS, key=lambda name: losses[name])
    return _FITS[chosen](scores, unsafe), losses


def temperature(scores: Scores, unsafe: Labels) -> Calibration:
    """Temperature and shift with the smallest log loss against Platt's smoothed targets, which keeps them finite on separable scores."""
    from scipy.optimize import minimize

    n_unsafe, n_safe = int(unsafe.sum()), int((~unsafe).sum())
    targets = np.where(unsafe, (n_unsafe + 1) / (n_unsafe + 2), 1 / (n_safe + 2))
    centre, spread = float(np.median(scores)), float(np.ptp(scores)) or 1.0
    scaled = (scores - centre) / spread

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        slope = np.exp(parameters[0])
        odds = slope * scaled + parameters[1]
        miss = _sigmoid(odds) - targets
        return float(np.mean(np.logaddexp(0, odds) - targets * odds)), np.array([np.mean(miss * scaled) * slope, np.mean(miss)])

    found = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=[(-12, 12), (-200, 200)])
    slope = float(np.exp(found.x[0])) / spread
    return Calibration("temperature", 1 / slope, float(found.x[1]) - slope * centre)


def isotonic(scores: Scores, unsafe: Labels) -> Calibration:
    """Pooled shares, joined by straight lines in log odds; beyond the ends the slope of the temperature.

    A pool of several scores is a line that rises by at most a tenth of a nat, and by no more than a quarter of the way to either
    neighbour at each end, so that the order of scores inside a pool is kept.
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
    return Calibration("isotonic", beyond.temperature, beyond.shift, tuple(x for x, _ in kept), tuple(y for _, y in kept))


_FITS = {"temperature": temperature, "isotonic": isotonic}


def log_loss(log_odds: Scores, unsafe: Labels) -> float:
    """Mean negative log likelihood in nats."""
    return float(np.mean(np.logaddexp(0, log_odds) - unsafe * log_odds))


def expected_calibration_error(probabilities: Scores, unsafe: Labels, bins: int = 15) -> float:
    """Mean distance between predicted probability and share of unsafe examples, over bins of equally many examples.

    Source: Nixon et al., CVPR workshops 2019 (adaptive bins).
    """
    order = np.argsort(probabilities, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    gaps = [abs(float(probabilities[part].mean() - unsafe[part].mean())) * len(part) for part in parts]
    return float(sum(gaps) / len(order))


def _held_out_loss(scores: Scores, unsafe: Labels, kind: str, seed: int) -> float:
    """Log loss on folds that the calibration was not fit on; infinite where a fold would have one class only."""
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


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -values))
