"""Rates: a mean with its 95 % interval, and how many outcomes it rests on."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from safety_neurons.errors import InputError
from safety_neurons.results import notebook

RESAMPLES = 2000
Outcomes = Sequence[bool | int | float | np.generic | None] | np.ndarray
"""One outcome per prompt; `None` or NaN means unscored."""
_Z = 1.959963984540054  # 97.5 % point of the normal distribution


@dataclass(frozen=True)
class Rate:
    """A mean over scored outcomes. `value`, `low` and `high` are `None` where nothing was scored."""

    value: float | None
    low: float | None
    """Lower end of the 95 % interval."""
    high: float | None
    """Upper end of the 95 % interval."""
    n: int
    """Scored outcomes."""
    unscored: int = 0
    """Outcomes that could not be scored; never counted as 0."""

    def __str__(self) -> str:
        if self.value is None or self.low is None or self.high is None:
            return f"undefined, n {self.n}, unscored {self.unscored}"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}], n {self.n}, unscored {self.unscored}"

    def _repr_html_(self) -> str:
        shown = notebook.interval(self.value, self.low, self.high)
        return notebook.html_table("Rate", ["value, 95 % interval", "n", "unscored"], [[shown, self.n, self.unscored]])

    def to_json(self) -> dict[str, float | int | None]:
        """`{value, low, high, n, unscored}`."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Rate":
        """The rate that `to_json` wrote; other keys are left alone.

        Raises:
            KeyError, TypeError: one of the five is missing, or this is no object.
        """
        return cls(**{field.name: found[field.name] for field in fields(cls)})


def rate(outcomes: Outcomes, seed: int = 0) -> Rate:
    """The mean of the scored outcomes.

    The interval is Wilson's where every outcome is 0 or 1, otherwise a percentile bootstrap of 2,000 resamples.

    Args:
        outcomes: one per prompt; `None` or NaN means unscored.
        seed: of the bootstrap.

    Raises:
        InputError: an outcome is infinite.
    """
    values = scored(outcomes)
    kept = values[~np.isnan(values)]
    unscored = len(values) - len(kept)
    if len(kept) == 0:
        return Rate(None, None, None, 0, unscored)
    mean = float(kept.mean())
    if np.isin(kept, (0.0, 1.0)).all():
        low, high = wilson(mean, len(kept))
    else:
        low, high = interval(np.concatenate([kept[draw].mean(axis=1) for draw in resamples(len(kept), seed)]))
    return Rate(mean, low, high, len(kept), unscored)


def per_token(totals: Outcomes, token_counts: Sequence[int] | np.ndarray, seed: int = 0) -> Rate:
    """Sum of the totals ÷ sum of the token counts; the interval resamples texts.

    Args:
        totals: a sum over the tokens of each text; `None` or NaN means unscored.
        token_counts: tokens of each text; a text without any is unscored.
        seed: of the bootstrap.

    Raises:
        InputError: the two differ in length.
    """
    losses, counts = scored(totals), np.asarray(token_counts, np.float64)
    if losses.shape != counts.shape:
        raise InputError(f"{len(losses)} losses and {len(counts)} token counts; expected one of each per text")
    usable = ~np.isnan(losses) & (counts > 0)
    losses, counts = losses[usable], counts[usable]
    if not len(losses):
        return Rate(None, None, None, 0, int((~usable).sum()))
    draws = np.concatenate([losses[draw].sum(axis=1) / counts[draw].sum(axis=1) for draw in resamples(len(losses), seed)])
    low, high = interval(draws)
    return Rate(float(losses.sum() / counts.sum()), low, high, len(losses), int((~usable).sum()))


def perplexity(log_likelihood_losses: Outcomes, token_counts: Sequence[int] | np.ndarray, seed: int = 0) -> Rate:
    """exp(mean negative log-likelihood per token) over texts; the interval resamples texts.

    Args:
        log_likelihood_losses: summed negative log-likelihood of each text, in nats; `None` or NaN means unscored.
        token_counts: predicted tokens of each text; a text without any is unscored.
        seed: of the bootstrap.
    """
    mean = per_token(log_likelihood_losses, token_counts, seed)
    if mean.value is None or mean.low is None or mean.high is None:
        return mean
    with np.errstate(over="ignore"):
        value, low, high = (float(np.exp(number)) for number in (mean.value, mean.low, mean.high))
    return Rate(value, low, high, mean.n, mean.unscored)


def scored(outcomes: Outcomes) -> Float[np.ndarray, " prompt"]:
    """The outcomes as float64, unscored ones as NaN.

    Raises:
        InputError: an outcome is infinite.
    """
    values = np.array([math.nan if outcome is None else float(outcome) for outcome in outcomes], np.float64)
    if np.isinf(values).any():
        raise InputError(f"{int(np.isinf(values).sum())} of {len(values)} outcomes are infinite; expected numbers, or None for unscored")
    return values


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `n` outcomes."""
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def resamples(n: int, seed: int) -> Iterator[Int[np.ndarray, "resample prompt"]]:
    """Indices of `RESAMPLES` bootstrap resamples of `n` items, in blocks of bounded memory; equal seeds give equal indices."""
    generator = np.random.default_rng(seed)
    block = max(1, min(RESAMPLES, 1_000_000 // max(n, 1)))
    for first in range(0, RESAMPLES, block):
        yield generator.integers(0, n, size=(min(block, RESAMPLES - first), n))


def interval(draws: Float[np.ndarray, " resample"]) -> tuple[float, float]:
    """The 2.5 % and 97.5 % points of the resampled values."""
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)
