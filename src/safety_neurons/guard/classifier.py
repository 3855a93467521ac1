"""The linear classifier on features, as plain tensors: standardise, weigh, calibrate. What fits it is not needed to use it."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from safety_neurons.errors import InputError
from safety_neurons.guard.calibration import Calibration

LIMIT = 30.0
"""Log odds are cut off here, so that a probability is never exactly 0 or 1."""


@dataclass(frozen=True, eq=False)
class Classifier:
    """Logistic regression on standardised features, with calibration: p = σ(calibration(bias + Σ wᵢ (xᵢ − meanᵢ) / scaleᵢ)).

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
            raise InputError("a damaged classifier; expected finite means, scales above 0 and weights, one of each per neuron")

    @property
    def n_features(self) -> int:
        """Features it takes."""
        return len(self.weights)

    @cached_property
    def wide(self) -> tuple[Float64[np.ndarray, " neuron"], Float64[np.ndarray, " neuron"], Float64[np.ndarray, " neuron"]]:
        """Means, 1 / scale, and weights of the features before standardisation, in float64: for a few rows at a time."""
        mean, scale, weights = (vector.double().numpy() for vector in (self.mean, self.scale, self.weights))
        return mean, 1 / scale, weights / scale

    def scores(self, features: Float[Tensor, "prompt neuron"]) -> Float64[Tensor, " prompt"]:
        """Log odds before calibration, on the processor in float64, whatever the features are in."""
        if features.ndim != 2 or features.shape[1] != self.n_features:
            raise InputError(f"features of shape {tuple(features.shape)}; expected [prompt, {self.n_features}]: read them with this guard")
        mean, _, weights = map(torch.from_numpy, self.wide)
        return (features.to("cpu", torch.float64) - mean) @ weights + self.bias

    def log_odds(self, features: Float[Tensor, "prompt neuron"]) -> Float64[Tensor, " prompt"]:
        """Calibrated log odds of being unsafe, cut off at ±30."""
        return self.calibration(self.scores(features)).clamp(-LIMIT, LIMIT)

    def probabilities(self, features: Float[Tensor, "prompt neuron"]) -> Float64[Tensor, " prompt"]:
        """Calibrated probability of being unsafe; NaN where a feature is."""
        return self.log_odds(features).sigmoid()

    def chances(self, scores: Float64[Tensor, " prompt"]) -> Float64[Tensor, " prompt"]:
        """Calibrated probabilities of scores."""
        return self.calibration(scores).clamp(-LIMIT, LIMIT).sigmoid()

    def standardised(self, features: Float[Tensor, "prompt neuron"]) -> Float64[Tensor, "prompt neuron"]:
        """Distance of each feature from its mean, in standard deviations."""
        mean, inverse, _ = map(torch.from_numpy, self.wide)
        return (features.to("cpu", torch.float64) - mean) * inverse


def float_rows(features: Float[Tensor, "prompt neuron"]) -> np.ndarray:
    """Features as an array in the number type they are in, where numpy has it; what is computed with float64 vectors is float64."""
    if features.dtype is not torch.float32:
        features = features.double()
    return (features if features.device.type == "cpu" else features.cpu()).numpy()
