"""Effects: how much of the difference between two models a treatment restores, and whether one treatment beats another."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from safety_neurons.errors import InputError
from safety_neurons.results import notebook
from safety_neurons.results.rates import Outcomes, interval, resamples, scored

_RELATIVE_ZERO = 1e-9


@dataclass(frozen=True)
class Effect:
    """A causal effect; `value`, `low` and `high` are `None` where it is undefined, and `why` says why."""

    value: float | None
    low: float | None
    """Lower end of the 95 % interval."""
    high: float | None
    """Upper end of the 95 % interval."""
    measure: str
    """The score whose difference is explained, such as `refused`."""
    why: str | None = None
    """Why the effect is undefined."""
    n: int = 0
    """Prompts that all three arms scored."""
    unscored: int = 0
    """Prompts that at least one arm left unscored; left out of all three."""

    def __str__(self) -> str:
        if self.value is None or self.low is None or self.high is None:
            return f"undefined ({self.why})"
        return (
            f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] of the difference in {self.measure}, n {self.n}, unscored {self.unscored}"
        )

    def _repr_html_(self) -> str:
        shown = notebook.interval(self.value, self.low, self.high) + (f": {self.why}" if self.value is None else "")
        columns = ["share of the difference, 95 % interval", "n", "unscored"]
        return notebook.html_table(f"Causal effect on {self.measure}", columns, [[shown, self.n, self.unscored]])

    def to_json(self) -> dict[str, Any]:
        """`{value, low, high, measure, n, unscored}`, and `why` where the effect is undefined."""
        return {name: value for name, value in asdict(self).items() if name != "why" or value is not None}


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences with its 95 % interval."""

    value: float | None
    low: float | None
    """Lower end of the 95 % interval."""
    high: float | None
    """Upper end of the 95 % interval."""
    n: int
    """Pairs in which both sides are scored."""
    unscored: int = 0
    """Pairs left out."""

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0: what this project calls clearly better (or clearly worse, where the value is below 0)."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        if self.value is None or self.low is None or self.high is None:
            return f"undefined, n {self.n}, unscored {self.unscored}"
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}], n {self.n}, unscored {self.unscored}"

    def _repr_html_(self) -> str:
        shown = notebook.interval(self.value, self.low, self.high, signed=True)
        columns = ["difference, 95 % interval", "excludes 0", "pairs", "left out"]
        return notebook.html_table("Paired difference", columns, [[shown, "yes" if self.clear else "no", self.n, self.unscored]])

    def to_json(self) -> dict[str, Any]:
        """`{value, low, high, n, unscored, clear}`."""
        return {**asdict(self), "clear": self.clear}


def causal_effect(
    base: Outcomes,
    aligned: Outcomes,
    patched: Outcomes,
    measure: str = "refused",
    seed: int = 0,
) -> Effect:
    """(mean patched - mean base) / (mean aligned - mean base) over the prompts that all three arms scored.

    The interval is a paired percentile bootstrap: 2,000 resamples of prompts, the same resample in all three arms. The effect does
    not change when every score is replaced by a times the score plus b.

    It is undefined when the gap, mean aligned - mean base, is about 0: when the 95 % bootstrap interval of the gap includes 0, so
    that its sign is not known. (Resamples whose gap is 0 are left out of the interval of a defined effect; they are below 2.5 %.)

    Args:
        base: scores of the untreated base model, one per prompt; `None` means unscored.
        aligned: scores of the aligned model for the same prompts in the same order.
        patched: scores of the patched base model, likewise.
        measure: name of the score.
        seed: of the bootstrap.

    Raises:
        InputError: the three differ in length.
    """
    arms = _paired(base=base, aligned=aligned, patched=patched)
    unscored, arms = _complete(arms)
    n = arms.shape[1]
    if n == 0:
        return Effect(None, None, None, measure, f"no prompt is scored in all three arms ({unscored} unscored)", 0, unscored)
    gaps, gains = arms[1] - arms[0], arms[2] - arms[0]
    scale = float(np.abs(gaps).max()) * _RELATIVE_ZERO
    drawn = np.concatenate([np.stack([gaps[draw].mean(axis=1), gains[draw].mean(axis=1)]) for draw in resamples(n, seed)], axis=1)
    low, high = interval(drawn[0])
    if low <= scale and high >= -scale:
        why = f"base and aligned differ by {gaps.mean():.3g} in {measure}, 95 % interval {low:.3g} to {high:.3g}, which includes 0"
        return Effect(None, None, None, measure, why, n, unscored)
    usable = np.abs(drawn[0]) > scale
    low, high = interval(drawn[1, usable] / drawn[0, usable])
    return Effect(float(gains.mean() / gaps.mean()), low, high, measure, None, n, unscored)


def paired_difference(first: Outcomes, second: Outcomes, seed: int = 0) -> Difference:
    """The mean of first - second over the prompts both scored, with a paired percentile bootstrap of 2,000 resamples of prompts.

    Raises:
        InputError: the two differ in length.
    """
    unscored, arms = _complete(_paired(first=first, second=second))
    if arms.shape[1] == 0:
        return Difference(None, None, None, 0, unscored)
    differences = arms[0] - arms[1]
    low, high = interval(np.concatenate([differences[draw].mean(axis=1) for draw in resamples(len(differences), seed)]))
    return Difference(float(differences.mean()), low, high, len(differences), unscored)


def _paired(**arms: Outcomes) -> Float[np.ndarray, "arm prompt"]:
    lengths = {name: len(outcomes) for name, outcomes in arms.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"outcomes per arm are {lengths}; expected the same prompts in the same order in every arm")
    return np.stack([scored(outcomes) for outcomes in arms.values()])


def _complete(arms: Float[np.ndarray, "arm prompt"]) -> tuple[int, np.ndarray]:
    """How many prompts some arm left unscored, and the others."""
    usable = ~np.isnan(arms).any(axis=0)
    return int((~usable).sum()), arms[:, usable]
