"""Weights alone: how much each neuron's parameters differ between two models, or how large they are; the baselines without any text."""

from collections.abc import Callable, Sequence
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from safety_neurons.detectors.finishing import Choice, finish, searched
from safety_neurons.detectors.found import Found, PromptCounts
from safety_neurons.detectors.streaming import Progress, to_numpy
from safety_neurons.detectors.sublayers import columns
from safety_neurons.model import LanguageModel, check_pair
from safety_neurons.model.passes import BatchSize
from safety_neurons.neurons import SITES, NeuronSet, Selection, parse_key
from safety_neurons.prompts import Prompts


def find_weight_change(
    base: LanguageModel,
    aligned: LanguageModel,
    prompts: Prompts | None = None,
    *,
    sites: Sequence[str] = SITES,
    layers: range | str | None = None,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
    subtract: NeuronSet | None = None,
    **choice: Unpack[Choice],
) -> Found:
    """L2 norm of the change of each neuron's parameters between two models: its row and bias entry, or its column.

    Adapters count with what they do to the parameters: a LoRA with its product, an (IA)³ scale on what a projection reads as a scale of
    its columns.

    Args:
        base: the less safe model.
        aligned: the safer one.
        prompts: not looked at; here so that all detectors of a pair are called alike.
        sites: any of `q k v o gate up down`.
        layers: a range or "A:B"; None for all.
        batch_size: as for `prompts`.
        progress: called with (sites done, in all, 0).
        subtract: neurons taken away after selection.
        **choice: `top`, `count`, `top_per_matrix` or `threshold`; the largest 5 % by default.

    Raises:
        MismatchError: the models have other shapes.
        NumericalError: NaN or infinity; the message names the site.

    Source: the plain weight difference, the baseline that planted decoys are made to fool.
    Differs: the bias entry of a row belongs to its neuron.
    """
    del prompts, batch_size
    check_pair(base, aligned)

    def change(key: str) -> Tensor:
        mine, theirs = parameters_of(aligned, key), parameters_of(base, key)
        return torch.linalg.vector_norm(mine - theirs.to(mine), dim=1)

    return _by_weights(
        "weight-change", (base, aligned), change, sites, layers, progress, subtract, Selection.of(**choice, default_top=0.05)
    )


def find_weight_magnitude(
    model: LanguageModel,
    *,
    sites: Sequence[str] = SITES,
    layers: range | str | None = None,
    progress: Progress | None = None,
    subtract: NeuronSet | None = None,
    **choice: Unpack[Choice],
) -> Found:
    """L2 norm of each neuron's parameters in one model: its row and bias entry, or its column; arguments as for `find_weight_change`.

    Source: magnitude, the usual baseline of pruning.
    """
    return _by_weights(
        "weight-magnitude",
        (model,),
        lambda key: torch.linalg.vector_norm(parameters_of(model, key), dim=1),
        sites,
        layers,
        progress,
        subtract,
        Selection.of(**choice, default_top=0.05),
    )


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


def _by_weights(
    method: str,
    models: tuple[LanguageModel, ...],
    score: Callable[[str], Tensor],
    sites: Sequence[str],
    layers: range | str | None,
    progress: Progress | None,
    subtract: NeuronSet | None,
    selection: Selection,
) -> Found:
    table = models[0].table
    keys = table.select(sites=sites, layers=layers).keys
    values: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for number, key in enumerate(keys):
            values[key] = to_numpy(score(key))
            if progress is not None:
                progress(number + 1, len(keys), 0)
    return finish(
        method,
        values,
        table=table,
        models=tuple(model.name for model in models),
        selection=selection,
        config=searched(sites, layers),
        counts=PromptCounts(0),
        subtract=subtract,
    )
