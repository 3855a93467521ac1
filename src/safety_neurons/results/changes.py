"""Changes: what several trainings did to the activations of one model, as sums over the tokens of the same text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class Changes:
    """Sums over tokens, one row for each group of prompts, so that groups can be drawn anew for an interval.

    Attributes:
        squares: for each training the sum of the squared change of activation, trained minus before.
        between: for each pair of trainings the sum of the squared difference between the two trained models.
        tokens: tokens of each group of prompts.
        layers: layer of every neuron.
        activation: root mean square activation of every neuron before the trainings.
    """

    squares: Mapping[str, Float[np.ndarray, "group neuron"]]
    between: Mapping[tuple[str, str], Float[np.ndarray, "group neuron"]]
    tokens: Float[np.ndarray, " group"]
    layers: Int[np.ndarray, " neuron"]
    activation: Float[np.ndarray, " neuron"]

    def scores(self, name: str, groups: Any = slice(None)) -> Float[np.ndarray, " neuron"]:
        """Change scores of a training on some groups of prompts, which may repeat: root mean square over their tokens."""
        return np.sqrt(self.squares[name][groups].sum(0) / max(self.tokens[groups].sum(), 1))
