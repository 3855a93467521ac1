"""Layers: where the neurons of a set lie, by layer, site, matrix and head, beside where a random set of its
size would lie.

Every place has the share of the set that is there, the share of its own population that was chosen,
parameters, and the number that a draw of the same size from everything that was searched would put there
(hypergeometric, with the range that holds 95 % of draws). Heads are held against a random spread within their
matrix, so that a busy layer does not make all its heads busy.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from safety_neurons.analysis.chance import Clumps, Counts, Expectation, Named, beside, clumped, mean_of_draw
from safety_neurons.arguments import well_typed
from safety_neurons.display import Displayed
from safety_neurons.neurons import ATTENTION_SITES, SITES, Scores, SiteInfo, SiteTable, parse_key
from safety_neurons.results.records import ChanceRecord, Recorded, called
from safety_neurons.strict_json import JsonObject

PARTS = ("self-attention", "feed-forward")
BLOCKS = 5
"""Consecutive blocks of ranks, each as large as the set, whose place is told."""
EMPTY = "the set is empty"


@dataclasses.dataclass(frozen=True)
class Place:
    """Some of the candidates, and how many of the set are among them."""

    name: str
    members: int
    candidates: int
    parameters: int
    """Weight and bias entries of the members."""
    n_of_set: int
    """Members of the whole set (of the matrix, for a head)."""
    n_parameters: int
    """All parameters of the model."""
    n_searched: int
    """All candidates (of the matrix, for a head)."""
    where: dict[str, Any]
    """`layer`, `site`, `head`, as far as they are fixed."""
    step: float = 1.0
    """How much more `members` varies than if neurons were drawn one by one: neurons of one unit that are
    chosen together count once.
    """

    @property
    def chance(self) -> Counts:
        """Distribution of `members` for a random draw."""
        if not (self.n_searched and self.n_of_set):
            return clumped(0.0, 0.0, 0.0)
        part, chosen = self.candidates / self.n_searched, self.n_of_set / self.n_searched
        return clumped(part * self.n_of_set, part, chosen, self.step)

    def record(self) -> JsonObject:
        """As JSON values."""
        expected = self.chance.expectation()
        return {
            "name": self.name,
            **self.where,
            "members": self.members,
            "candidates": self.candidates,
            "parameters": self.parameters,
            "share_of_parameters": _share(self.parameters, self.n_parameters),
            "share_of_set": _share(self.members, self.n_of_set),
            "share_of_population": _share(self.members, self.candidates),
            "expected": expected.expected,
            "low": expected.low,
            "high": expected.high,
            "enrichment": self.members / expected.expected if expected.expected else None,
            "verdict": expected.verdict(self.members),
        }


@dataclasses.dataclass(frozen=True)
class Layers(Recorded[JsonObject], Displayed):
    """Where one set lies."""

    verb = "analyze-layers"

    item: Named = dataclasses.field(metadata=called(None))
    by_layer: tuple[Place, ...]
    by_site: tuple[Place, ...]
    by_part: tuple[Place, ...]
    by_matrix: tuple[Place, ...]
    by_head: tuple[Place, ...]
    depth: ChanceRecord
    """Mean depth of the members, 0 for the first layer and 1 for the last, beside chance."""
    ranks: tuple[dict[str, Any], ...]
    """Place of consecutive blocks of ranks, where the scores are known."""
    skewness: float | None
    """Skewness of the scores: large where few neurons stand out."""
    claims: tuple[dict[str, Any], ...]

    def record(self) -> JsonObject:
        """As JSON values."""
        return {**self.item.record(), **super().record()}

    def _result(self) -> JsonObject:
        return {"sets": [self.record()]}


@well_typed
def layers(item: Named) -> Layers:
    """Where the neurons of a set lie, and what that says of the claims of both papers.

    Source: Zhao et al., ICLR 2025, abstract (less than 1 % of parameters, mostly self-attention, first
    layers); Chen et al., NeurIPS 2025 (mostly deep layers, drifting to the middle as ranks fall; skewness of
    change scores). Differs: every share stands beside what a random set of the same size gives, for a quota
    per matrix or a site with many neurons makes such shares by itself.
    """
    table, n_layers = item.searched, item.table.n_layers
    every, clumps = list(table.sites), Clumps(item.neurons, item.searched)
    places = {
        "by_layer": _places(item, clumps, every, lambda info: f"layer {parse_key(info.key).layer}", "layer"),
        "by_site": _places(
            item, clumps, sorted(every, key=lambda info: SITES.index(parse_key(info.key).site)), _site, "site"
        ),
        "by_part": _places(
            item, clumps, sorted(every, key=lambda info: PARTS.index(_part(info))), _part, "part"
        ),
        "by_matrix": _places(item, clumps, every, lambda info: info.key, "layer", "site"),
    }
    found = {name: tuple(part) for name, part in places.items()}
    depth = _depth(table, clumps, n_layers)
    ranks = tuple(_rank_blocks(item.scores, len(item.neurons), n_layers)) if item.scores is not None else ()
    values = (
        np.zeros(1) if item.scores is None else np.concatenate([values for _, values in item.scores.items()])
    )
    skewness = _skewness(values.astype(np.float64)) if np.ptp(values) else None
    claims = tuple(_claims(item, clumps, found["by_part"], found["by_layer"], depth, n_layers))
    return Layers(
        item,
        **found,
        by_head=tuple(_heads(item, clumps)),
        depth=depth,
        ranks=ranks,
        skewness=skewness,
        claims=claims,
    )


def _skewness(values: np.ndarray) -> float:
    from scipy.stats import skew  # It takes seconds to import.

    return float(skew(values))


def _site(info: SiteInfo) -> str:
    return parse_key(info.key).site


def _part(info: SiteInfo) -> str:
    return PARTS[0] if _site(info) in ATTENTION_SITES else PARTS[1]


def _places(
    item: Named, clumps: Clumps, sites: Iterable[SiteInfo], name_of: Callable[[SiteInfo], str], *fixed: str
) -> list[Place]:
    groups: dict[str, list[SiteInfo]] = {}
    for info in sites:
        groups.setdefault(name_of(info), []).append(info)
    n_searched, n_of_set = item.searched.n_neurons, len(item.neurons)
    places = []
    for name, infos in groups.items():
        counts = {info.key: len(item.neurons[info.key]) for info in infos}
        key = parse_key(infos[0].key)
        where = {"layer": key.layer, "site": key.site, "part": name}
        parameters = sum(counts[info.key] * info.parameters_per_neuron for info in infos)
        population = sum(info.size for info in infos)
        kept = {field: where[field] for field in fixed}
        numbers = (
            sum(counts.values()),
            population,
            parameters,
            n_of_set,
            item.table.n_parameters,
            n_searched,
        )
        places.append(Place(name, *numbers, kept, clumps.step(counts)))
    return places


def _heads(item: Named, clumps: Clumps) -> list[Place]:
    """Heads of the matrices that have members."""
    places = []
    for info in item.searched.sites:
        indices = item.neurons[info.key]
        if not info.n_heads or not len(indices) or info.n_heads * info.head_dim != info.size:
            continue
        members = np.bincount(indices // info.head_dim, minlength=info.n_heads)
        for head, number in enumerate(members.tolist()):
            where = {"layer": parse_key(info.key).layer, "site": _site(info), "head": head}
            parameters = number * info.parameters_per_neuron
            n_parameters = item.table.n_parameters
            numbers = (number, info.head_dim, parameters, len(indices), n_parameters, info.size)
            places.append(Place(f"{info.key} head {head}", *numbers, where, clumps.head_step(info)))
    return places


def _depth(table: SiteTable, clumps: Clumps, n_layers: int) -> ChanceRecord:
    counts = clumps.neurons.counts()
    sizes, members = np.zeros(n_layers), np.zeros(n_layers)
    for info in table.sites:
        layer = parse_key(info.key).layer
        sizes[layer] += info.size
        members[layer] += counts.get(info.key, 0)
    drawn = int(members.sum())
    if not drawn:
        return {"value": None, "why": "the set is empty"}
    depths = np.arange(n_layers) / max(1, n_layers - 1)
    step = clumps.step()
    return beside(float(depths @ members / drawn), mean_of_draw(depths, sizes / step, drawn / step))


def _rank_blocks(scores: Scores, size: int, n_layers: int) -> Iterable[dict[str, Any]]:
    """Mean depth and share of self-attention of the first `size` ranks, the next `size`, and so on."""
    keys = scores.keys()
    values = np.concatenate([scores[key] for key in keys]).astype(np.float64)
    layer = np.repeat([parse_key(key).layer for key in keys], [len(scores[key]) for key in keys])
    attention = np.repeat(
        [parse_key(key).site in ATTENTION_SITES for key in keys], [len(scores[key]) for key in keys]
    )
    order = np.argsort(-values, kind="stable")
    for block in range(BLOCKS):
        chosen = order[block * size : (block + 1) * size]
        if not len(chosen):
            return
        depth = float(layer[chosen].mean() / max(1, n_layers - 1))
        last = block * size + len(chosen)
        yield {
            "ranks": [block * size + 1, last],
            "mean_depth": depth,
            "share_of_self_attention": float(attention[chosen].mean()),
        }


def _claims(
    item: Named,
    clumps: Clumps,
    parts: Sequence[Place],
    by_layer: Sequence[Place],
    depth: ChanceRecord,
    n_layers: int,
) -> Iterable[dict[str, Any]]:
    """What the papers say of their sets, asked of this one.

    `holds` is None where the question cannot be answered.
    """
    n, rule = len(item.neurons), item.neurons.provenance.config.get("selection")
    share = item.neurons.share_of_parameters
    how = (
        f"the size follows from the selection {rule}"
        if rule
        else "the size follows from how the set was selected"
    )
    less = {
        "claim": "less than 1 % of all parameters",
        "paper": 1,
        "value": share,
        "chance": None,
        "holds": share < 0.01,
        "note": how,
    }
    yield less if n else _open("less than 1 % of all parameters", 1, EMPTY)
    attention = "mostly in self-attention"
    if not n or len(parts) < 2:
        yield _open(attention, 1, f"only {parts[0].name} was searched" if n else EMPTY)
    else:
        chance = parts[0].chance.expectation(lambda counts: counts / n)
        yield _claim(attention, 1, _share(parts[0].members, n), chance, _share(parts[0].members, n) > 0.5)
    for third, paper in (("first", 1), ("last", 2)):
        yield _in_third_claim(item, clumps, by_layer, n_layers, third, paper)
    nearer = "nearer to the first layer than a random set"
    if depth["value"] is None or len(by_layer) < 2:
        yield _open(nearer, 1, f"only {by_layer[0].name} was searched" if n else EMPTY)
    else:
        chance = Expectation(depth["expected"], depth["low"], depth["high"])
        yield _claim(nearer, 1, depth["value"], chance, depth["value"] < chance.low)


def _in_third_claim(
    item: Named, clumps: Clumps, by_layer: Sequence[Place], n_layers: int, third: str, paper: int
) -> dict[str, Any]:
    """Whether more of a set lies in the first (last) third than of random ones.

    Open where it could not have been otherwise.
    """
    claim, n, searched = f"in the {third} third of the layers", len(item.neurons), item.searched.n_neurons
    chosen = [
        place for place in by_layer if _in_third(int(place.where["layer"]), n_layers, last=third == "last")
    ]
    members, candidates = sum(place.members for place in chosen), sum(place.candidates for place in chosen)
    if not n or candidates in (0, searched):
        return _open(
            claim, paper, f"{'none of it' if not candidates else 'nothing else'} was searched" if n else EMPTY
        )
    step = clumps.step(
        info.key
        for info in item.searched.sites
        if _in_third(parse_key(info.key).layer, n_layers, last=third == "last")
    )
    chance = clumped(candidates / searched * n, candidates / searched, n / searched, step).expectation(
        lambda counts: counts / n
    )
    return _claim(claim, paper, _share(members, n), chance, _share(members, n) > chance.high)


def _open(claim: str, paper: int, why: str) -> dict[str, Any]:
    return {"claim": claim, "paper": paper, "value": None, "chance": None, "holds": None, "note": why}


def _claim(claim: str, paper: int, value: float, chance: Expectation, holds: bool) -> dict[str, Any]:
    found = {
        "claim": claim,
        "paper": paper,
        "value": value,
        "chance": {**chance.record(), "verdict": chance.verdict(value)},
    }
    return {**found, "holds": holds, "note": ""}


def _in_third(layer: int, n_layers: int, *, last: bool) -> bool:
    """Whether the middle of a layer lies in the first (last) third of the depth."""
    middle = (layer + 0.5) / n_layers
    return middle > 2 / 3 if last else middle < 1 / 3


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
