"""Sets that are made of whole routed experts: which experts they are, and random other experts of the same
layers.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from safety_neurons.errors import NeuronError
from safety_neurons.neurons.sets import NeuronSet, extra_variance, written_extra
from safety_neurons.neurons.table import Provenance, SiteTable, parse_key


def whole_experts(neurons: NeuronSet, table: SiteTable) -> dict[int, list[int]]:
    """The experts that a set is made of, by layer.

    Raises:
        NeuronError: a neuron that is no routed expert's, or a part of an expert.
    """
    found: dict[int, set[int]] = {}
    for key, members in neurons.items():
        parsed = parse_key(key)
        if parsed.expert is None or len(members) != table.sizes[key]:
            raise NeuronError(
                f"{key}: {len(members)} of {table.sizes[key]} neurons arrived, expected all neurons of "
                "routed experts and no others; make the set by find routing --experts N"
            )
        found.setdefault(parsed.layer, set()).add(parsed.expert)
    return {layer: sorted(experts) for layer, experts in sorted(found.items())}


def experts_of(table: SiteTable) -> dict[int, list[int]]:
    """All routed experts, by layer."""
    found: dict[int, set[int]] = {}
    for key in table.keys:
        parsed = parse_key(key)
        if parsed.expert is not None:
            found.setdefault(parsed.layer, set()).add(parsed.expert)
    return {layer: sorted(experts) for layer, experts in found.items()}


def random_experts(neurons: NeuronSet, table: SiteTable, seed: int, n: int) -> list[NeuronSet]:
    """`n` sets of as many random experts of the same layers, at the same sites; the same seed gives the same.

    Experts are others than the set's as long as there are any; a random set that shares some says
    `disjoint == False`.
    """
    chosen, everything = whole_experts(neurons, table), experts_of(table)
    sites = sorted({parse_key(key).site for key, _ in neurons.items()})
    return [_one(neurons, table, (chosen, everything), sites, (seed, number)) for number in range(n)]


def _one(
    neurons: NeuronSet,
    table: SiteTable,
    experts: tuple[Mapping[int, Sequence[int]], Mapping[int, Sequence[int]]],
    sites: Sequence[str],
    draw: tuple[int, int],
) -> NeuronSet:
    generator, members, shared = np.random.default_rng(draw), {}, []
    for layer, mine in experts[0].items():
        others = [expert for expert in experts[1][layer] if expert not in mine]
        drawn = list(generator.permutation(others)[: len(mine)])
        drawn += list(generator.permutation(mine)[: len(mine) - len(drawn)])
        for expert in drawn:
            for site in sites:
                key = f"layers.{layer}.experts.{expert}.{site}"
                members[key] = np.arange(table.sizes[key])
                shared += [key] if expert in mine else []
    origin = neurons.provenance
    like = {"method": origin.method, "models": list(origin.models), "n_neurons": len(neurons)}
    config = {
        "seed": draw[0],
        "number": draw[1],
        "like": like,
        "disjoint": not shared,
        "not_disjoint": sorted(shared),
        **written_extra(
            extra_variance(
                ((len(mine), len(experts[1][layer])) for layer, mine in experts[0].items()), forced=True
            )
        ),
    }
    provenance = Provenance(
        "neurons", "random", origin.models, table.fingerprint, origin.prompts_sha256, config
    )
    return NeuronSet(members, table, provenance)
