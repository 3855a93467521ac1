"""Baselines: random neurons, and those that are large, or changed the most, by their weights or activations."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safety_neurons.detectors.methods import ActivationMagnitude, Ranked, WeightChange, WeightMagnitude
from safety_neurons.detectors.reading import chosen_rows, read, rows_at
from safety_neurons.detectors.runner import Found, PromptCounts, Run, Scored, chosen_from
from safety_neurons.detectors.streaming import BatchSums, to_numpy
from safety_neurons.detectors.sublayers import columns
from safety_neurons.errors import UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import Batch
from safety_neurons.neurons import SITES, NeuronSet, SiteTable, parse_key


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


def activations(_: ActivationMagnitude, run: Run) -> Scored:
    """Root mean square of every neuron's activation over the tokens of the prompts."""
    model = run.aligned
    encoded = model.encode(run.prompts)

    def reduce(batch: Batch) -> BatchSums:
        part = BatchSums()
        positions, _ = chosen_rows(batch, [0] * len(batch), batch.lengths)

        def reader(key: str) -> Any:
            def add(values: Any) -> None:
                rows = rows_at(values, positions).values.double()
                part.sums[f"square/{key}"] = to_numpy(rows.square().sum(0))
                part.sums[f"count/{key}"] = to_numpy(torch.tensor([float(len(rows))]))

            return add

        read(model, batch, {key: reader(key) for key in run.sizes})
        return part

    folded = run.fold([row.ids for row in encoded], reduce)
    sums = folded.sums
    values = {key: (sums[f"square/{key}"] / max(float(sums[f"count/{key}"][0]), 1.0)) ** 0.5 for key in run.sizes}
    counts = PromptCounts(len(run.prompts), 0, sum(row.truncated for row in encoded)).without(len(folded.failed))
    return Scored(values, counts)


def find_random(
    table: SiteTable,
    *,
    like: NeuronSet | None = None,
    seed: int = 0,
    sites: Sequence[str] = SITES,
    layers: range | str | None = None,
    **choice: Any,
) -> Found:
    """Random neurons, seeded: made of what a given set is made of (`NeuronSet.random_like`), or the largest of uniform scores.

    Args:
        table: of the model.
        like: the set to match; its own sites are then searched, and a selection is refused.
        seed: of the draw; the global random state is left as it was.
        sites: any of `q k v o gate up down`, where nothing is to be matched.
        layers: a range or "A:B"; None for all.
        **choice: `top`, `count`, `top_per_matrix` or `threshold`; the largest 5 % by default.

    Returns:
        Scores are uniform in [0, 1); with `like`, members lie above all others of their key.

    Raises:
        UsageError: both a set to match and a selection, or an agreement.

    Source: random controls as in Chen et al. (arXiv 2406.14144, section 4), counts matched per layer.
    Differs: matched per site and unit too, and disjoint from the set where it takes at most half (the public code draws from all).
    """
    if choice.get("agreement") is not None or (like is not None and any(value is not None for value in choice.values())):
        raise UsageError("a random set has no prompts to agree and is matched to the set given: leave the selection out, or the set")
    generator = np.random.default_rng(seed)
    values: dict[str, np.ndarray] = {}
    if like is None:
        sizes = table.select(sites=sites, layers=layers).sizes
        values = {key: generator.random(size, dtype=np.float32) for key, size in sizes.items()}
        selection = Ranked.of(**{name: value for name, value in choice.items() if name != "agreement"}).selection
        config = {"seed": seed, "sites": list(sites), "layers": list(layers) if isinstance(layers, range) else layers}
        return chosen_from(values, table, selection, {"method": "random", "config": config})
    drawn = like.random_like(seed, table)[0]
    for key in like.keys():  # noqa: SIM118 - a set of neurons is not a mapping
        values[key] = generator.random(table.sizes[key], dtype=np.float32) / 2
        values[key][drawn[key]] += 0.5
    searched = sorted({key.rsplit(".", 1)[1] for key in values}, key=SITES.index)
    made_of = {"seed": seed, "like": like.provenance.method if like.provenance else "", "disjoint": drawn.disjoint}
    config = made_of | {"sites": searched, "layers": None}
    made = chosen_from(values, table, Ranked(count=len(drawn)).selection, {"method": "random", "config": config})
    notes = () if drawn.disjoint else ("the set takes more than half of a layer, so the random one is not disjoint from it",)
    return Found(made.scores, drawn, made.prompts, notes)
