"""Learning rates: one for each site, from the size of its weights, and a schedule under which no step is zero.

Adam moves every entry by about the learning rate. Along the direction all entries agree on, a neuron's vector of `d` weights with root mean
square `s` then gains `rate × √d` where it has `s × √d / √d = s` of its own in a typical direction. With `rate = share × s / √d` one step
changes what a neuron computes by about that share of its size, whatever the model: 7e-5 on an 8 B model (s 0.015, d 4,096, share 0.3), 5e-3
on an organism (s 0.1, d 64), which is where people end up by hand on models of these sizes.
"""

import math
from collections.abc import Mapping

from torch import Tensor

from safety_neurons.errors import UnsupportedModelError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet, parse_key

SHARE = 0.3
"""Of a neuron's size that one step at the full rate changes."""
LAST = 0.1
"""Of the full rate that the last step has."""
LARGEST = 2e37
"""Adam's first step is ten times the rate, which no longer fits into float32 above 3e37: the optimizer itself fails there."""
_USUAL = 0.02
"""Root mean square of a weight where none can be read (quantised beyond reading, or off-loaded)."""


def learning_rates(model: LanguageModel, neurons: NeuronSet, learning_rate: float | str = "auto") -> dict[str, float]:
    """The learning rate of every site of the set, at the top of the schedule.

    Args:
        model: the model, before anything is attached to it.
        neurons: what is trained.
        learning_rate: one number for every site, or `auto` for `SHARE × rms(weights) / √(weights of a neuron)`.

    Raises:
        UsageError: not a number above zero, or one without measure; at zero nothing would be trained.

    Source: Zhao et al., ICLR 2025, train with one rate of 1e-6 (public code: 2e-6).
    Differs: relative to the weights' size by default. At 1e-6 in bfloat16 under one step in fifty changes a weight at all, and the
    public recipe's only step has a rate of zero.
    """
    if learning_rate != "auto":
        return dict.fromkeys(neurons.keys(), checked(learning_rate))
    rates = {}
    for key in neurons.keys():  # noqa: SIM118 - not a mapping
        rms, width = weight_scale(model, key)
        rates[key] = SHARE * rms / math.sqrt(width)
    return rates


def checked(learning_rate: float | str) -> float:
    """A learning rate as a number above zero.

    Raises:
        UsageError: it is none.
    """
    try:
        number = float(learning_rate)
    except (TypeError, ValueError):
        number = math.nan
    if not number > 0:
        raise UsageError(f"learning rate {learning_rate!r}: expected auto or a number above 0; at 0 no step would change anything")
    if not number < LARGEST:
        raise UsageError(f"learning rate {learning_rate!r}: expected auto or a number above 0, below {LARGEST:g}; weights would overflow")
    return number


def weight_scale(model: LanguageModel, key: str) -> tuple[float, int]:
    """Root mean square of a site's weights, and weights of one neuron."""
    width = model.table[key].weights_per_neuron
    try:
        weight = _weight(model, key)
        rms = float(weight.detach().float().square().mean().sqrt())
    except UnsupportedModelError:
        rms = _USUAL
    return (rms if math.isfinite(rms) and rms > 0 else _USUAL), width


def _weight(model: LanguageModel, key: str) -> Tensor:
    site = parse_key(key)
    if site.expert is None:
        return model.anatomy.place(key).weight()
    experts = model.anatomy.layers[site.layer].experts
    assert experts is not None
    return experts.weight(site.expert, site.site)


def factor(step: int, steps: int, warmup: float) -> float:
    """Share of the full rate at a step (counted from 0): a straight line up over the first ones, then down to a tenth; never zero."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 1 - (1 - LAST) * (step - rising + 1) / max(1, steps - rising)


def described(rates: Mapping[str, float]) -> str:
    """The rates in a few words."""
    low, high = min(rates.values()), max(rates.values())
    return f"{low:.1e}" if high <= 1.001 * low else f"{low:.1e} to {high:.1e}"
