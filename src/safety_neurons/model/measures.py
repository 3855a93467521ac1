"""Small types that passes, completions and likelihoods share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

BatchSize = int | Literal["auto"]
"""Rows of a batch; `auto` for as many as a token budget allows."""
Progress = Callable[[int, int, int], None]
"""Called with what is done, what there is in all, and the tokens so far."""
Span = tuple[int, int]
"""Tokens of a sequence from the first number up to the second."""


@dataclass(frozen=True)
class Losses:
    """Negative log likelihoods of texts, in nats.

    Attributes:
        totals: Summed over the predicted tokens of each text.
        counts: Predicted tokens of each text; 0 for a text of one token, and for one on which the model gave NaN.
        failed: Texts on which it gave NaN, which are left out.
    """

    totals: tuple[float, ...]
    counts: tuple[int, ...]
    failed: int = 0

    @property
    def total(self) -> float:
        """Sum over all texts."""
        return float(np.sum(self.totals))

    @property
    def n_tokens(self) -> int:
        """Predicted tokens of all texts."""
        return sum(self.counts)
