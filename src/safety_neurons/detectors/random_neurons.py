"""Random neurons: the control for every other method."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from safety_neurons.detectors.methods import Ranked
from safety_neurons.detectors.runner import Found, chosen_from
from safety_neurons.errors import UsageError
from safety_neurons.neurons import SITES, NeuronSet, SiteTable


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
    if like is None:
        sizes = table.select(sites=sites, layers=layers).sizes
        values = {key: generator.random(size, dtype=np.float32) for key, size in sizes.items()}
        selection = Ranked.of(**{name: value for name, value in choice.items() if name != "agreement"}).selection
        config = {"seed": seed, "sites": list(sites), "layers": list(layers) if isinstance(layers, range) else layers}
        return chosen_from(values, table, selection, {"method": "random", "config": config})
    drawn = like.random_like(seed, table)[0]
    values = {}
    for key in like.keys():  # noqa: SIM118 - a set of neurons is not a mapping
        values[key] = generator.random(table.sizes[key], dtype=np.float32) / 2
        values[key][drawn[key]] += 0.5
    searched = sorted({key.rsplit(".", 1)[1] for key in values}, key=SITES.index)
    made_of = {"seed": seed, "like": like.provenance.method if like.provenance else "", "disjoint": drawn.disjoint}
    config = made_of | {"sites": searched, "layers": None}
    made = chosen_from(values, table, Ranked(count=len(drawn)).selection, {"method": "random", "config": config})
    notes = () if drawn.disjoint else ("the set takes more than half of a layer, so the random one is not disjoint from it",)
    return Found(made.scores, drawn, made.prompts, notes)
