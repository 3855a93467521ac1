"""Weight change and weight magnitude: what can be known of neurons without running a model, the baselines of every other method."""

from collections.abc import Callable

import torch
from torch import Tensor

from safety_neurons.detectors.methods import WeightChange, WeightMagnitude
from safety_neurons.detectors.runner import PromptCounts, Run, Scored
from safety_neurons.detectors.streaming import to_numpy
from safety_neurons.detectors.sublayers import columns
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import parse_key


def change(_: WeightChange, run: Run) -> Scored:
    """L2 norm of the change of each neuron's parameters."""

    def changed(key: str) -> Tensor:
        mine, theirs = parameters_of(run.aligned, key), parameters_of(run.base, key)
        return torch.linalg.vector_norm(mine - theirs.to(mine), dim=1)

    return _by_weights(run, changed)


def magnitude(_: WeightMagnitude, run: Run) -> Scored:
    """L2 norm of each neuron's parameters."""
    return _by_weights(run, lambda key: torch.linalg.vector_norm(parameters_of(run.aligned, key), dim=1))


def _by_weights(run: Run, score: Callable[[str], Tensor]) -> Scored:
    values = {}
    with torch.no_grad():
        for number, key in enumerate(run.sizes):
            values[key] = to_numpy(score(key))
            if run.progress is not None:
                run.progress(number + 1, len(run.sizes), 0)
    return Scored(values, PromptCounts(0))


def parameters_of(lm: LanguageModel, key: str) -> Tensor:
    """A neuron's parameters in each row `[neuron, parameter]`, with adapters' shares, in float32 or wider."""
    parsed = parse_key(key)
    if parsed.expert is not None:
        experts = lm.anatomy.layers[parsed.layer].experts
        assert experts is not None
        weight, bias = experts.weight(parsed.expert, parsed.site).detach(), experts.bias(parsed.expert, parsed.site)
        weight = weight.T if parsed.site == "down" else weight
    elif parsed.site in ("o", "down"):
        weight, bias = columns(lm, key).T, None
    else:
        with lm.active():
            place = lm.anatomy.place(key)
            weight, bias = place.weight().detach(), place.bias()
    weight = weight if weight.dtype == torch.float64 else weight.float()
    return weight if bias is None else torch.cat([weight, bias.detach().to(weight)[:, None]], 1)
