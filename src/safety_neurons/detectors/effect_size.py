"""Effect size: Cohen's d of every neuron between harmful and harmless prompts, from sums of one pass."""

from collections.abc import Mapping
from functools import partial

import numpy as np
from jaxtyping import Float

from safety_neurons.detectors.activity import (
    Moments,
    folded_texts,
    said_of_signs,
    signed,
    statistics_of,
    text_of,
)
from safety_neurons.detectors.methods import EffectSize
from safety_neurons.detectors.runner import Run, Scored
from safety_neurons.errors import InputError
from safety_neurons.model.passes import Statistics

ROUNDING = 1e-5
"""Share of a neuron's root mean square below which its standard deviation is rounding."""


def score(method: EffectSize, run: Run) -> Scored:
    """Cohen's d, by its size or one of its signs."""
    assert run.harmless is not None
    lists = {"harmful": run.prompts, "harmless": run.harmless}
    read = {
        name: text_of(run, name, prompts, method.positions, method.max_new_tokens)
        for name, prompts in lists.items()
    }
    folded = folded_texts(run, read, dict.fromkeys(read, partial(Moments, by_prompt=True)))
    for name, n in folded.used.items():
        if n < 2:
            raise InputError(
                f"{n} {name} prompt can be used, which has no spread; expected at least two of each kind"
            )
    kinds = [statistics_of(run.sizes, folded.sums[name]) for name in lists]
    differences = cohens_d(*kinds)
    scores = signed(differences, method.sign)
    if method.sign == "both":
        said_of_signs(run, scores, differences)
    return Scored(scores, folded.counts)


def cohens_d(one: Statistics, other: Statistics) -> Mapping[str, Float[np.ndarray, " neuron"]]:
    """Difference of the means over the pooled standard deviation, `one` minus `other`; 0 where one of them,
    as an expert may, has no value, or both together have fewer than three.

    A standard deviation below `ROUNDING` of the root mean square counts as that, so that a constant neuron
    has 0 and not chance.
    """
    result = {}
    means = one.mean(), other.mean()
    for key, total in one.sums.items():
        n, m = one.counts[key], other.counts[key]
        if not n or not m or n + m < 3:
            result[key] = np.zeros(len(total))
            continue
        squares = one.sums_of_squares[key], other.sums_of_squares[key]
        within = [
            np.maximum(square - count * mean[key] ** 2, 0)
            for square, count, mean in zip(squares, (n, m), means, strict=True)
        ]
        size = np.sqrt((squares[0] + squares[1]) / (n + m))
        pooled = np.maximum(np.sqrt((within[0] + within[1]) / (n + m - 2)), ROUNDING * size)
        difference = means[0][key] - means[1][key]
        result[key] = np.divide(difference, pooled, out=np.zeros_like(difference), where=pooled > 0)
    return result
