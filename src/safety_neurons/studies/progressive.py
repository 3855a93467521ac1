"""Progressive deactivation: layer by layer and neuron by neuron, what is left of safety and of capability, and what random orders leave."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, Unpack

import numpy as np

from safety_neurons.errors import NeuronError
from safety_neurons.interventions import deactivated
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet, Scores, SiteTable, parse_key
from safety_neurons.prompt_lists.readers import Source
from safety_neurons.results import Difference, difference_over_seeds, holm, paired_difference
from safety_neurons.results.estimates import GroupLabels
from safety_neurons.studies.bench import UNTREATED, Arm, Bench, How, Outcome
from safety_neurons.studies.vocabulary import Neuron, strongest

FRONT, BACK, ALONE, SCORE = "front to back", "back to front", "one layer alone", "by score"
RANDOM_LAYERS, RANDOM_NEURONS = "random order of layers", "random neurons"
_STEPS = (1, 2, 5)


@dataclasses.dataclass(frozen=True)
class Step:
    """One point of a curve."""

    order: str
    step: str
    """What was switched off last: a layer, or the number of neurons."""
    layers: tuple[int, ...]
    """Layers with neurons that are off."""
    n_neurons: int
    arm: Outcome
    change: Difference
    """Refusals of harmful requests, off minus untreated, paired."""

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        about = {"order": self.order, "step": self.step, "layers": list(self.layers), "n_neurons": self.n_neurons}
        return {**about, **self.arm.record(), "change": self.change.to_json()}


@dataclasses.dataclass(frozen=True)
class Progressive:
    """Curves of safety and capability while more and more is off."""

    n_neurons: int
    untreated: Outcome
    steps: tuple[Step, ...]
    groups: GroupLabels
    """What the harmful requests share."""
    notes: tuple[str, ...]

    def curve(self, order: str) -> list[Step]:
        """The steps of one order, in order."""
        return [step for step in self.steps if step.order == order]

    @property
    def orders(self) -> list[str]:
        """Names of the curves."""
        return list(dict.fromkeys(step.order for step in self.steps))

    def record(self) -> dict[str, Any]:
        """As JSON values: the points of every curve, and the mean of each with the band of random ones."""
        named = [order for order in self.orders if not order.startswith((RANDOM_LAYERS, RANDOM_NEURONS))]
        kept = [
            {"order": order, "points": [step.record() for step in self.curve(order)], "neurons_for_half": self._half(order)}
            for order in named
        ]
        bands = {name: self._band(name) for name in (RANDOM_LAYERS, RANDOM_NEURONS) if any(order.startswith(name) for order in self.orders)}
        return {"n_neurons": self.n_neurons, "untreated": self.untreated.record(), "curves": kept, "random": bands}

    def _half(self, order: str) -> int | None:
        """Fewest neurons of the curve's points at which at most half of the refusals are left."""
        whole = self.untreated.harmful_refused.value
        if order == ALONE or not whole:
            return None
        found = [step.n_neurons for step in self.curve(order) if (step.arm.harmful_refused.value or 0.0) <= whole / 2]
        return min(found, default=None)

    def _band(self, kind: str) -> list[dict[str, Any]]:
        """Step by step the mean and the range over random orders."""
        curves = [self.curve(order) for order in self.orders if order.startswith(kind)]
        return [self._over(steps) for steps in zip(*curves, strict=True)]

    def _over(self, steps: Sequence[Step]) -> dict[str, Any]:
        found: dict[str, Any] = {"n_neurons": [step.n_neurons for step in steps], "layers": [list(step.layers) for step in steps]}
        for name in ("harmful_refused", "harmless_refused", "perplexity", "divergence"):
            values = [getattr(step.arm, name) for step in steps]
            numbers = [value if isinstance(value, float | None) else value.value for value in values]
            known = [number for number in numbers if number is not None]
            mean = sum(known) / len(known) if known else None
            found[name] = {"value": mean, "low": min(known, default=None), "high": max(known, default=None), "n": len(known)}
        arms = [step.arm.harmful for step in steps]
        found["change"] = difference_over_seeds(arms, [self.untreated.harmful] * len(arms), self.groups, "random order").to_json()
        return found


def progressive(
    model: LanguageModel,
    neurons: NeuronSet,
    harmful: Source,
    harmless: Source,
    *,
    scores: Scores | None = None,
    text: Source | None = None,
    points: int = 8,
    **how: Unpack[How],
) -> Progressive:
    """Switches a set off bit by bit: layers front to back, back to front and each alone; neurons by score.

    Beside the layers: as many random orders of them (the band says how much an order matters), and beside the set random sets with as
    many neurons in every matrix, taken front to back. Beside the order by score, of the set's members alone: at every point random sets
    that are made of what the members switched off so far are made of.

    Args:
        model: the model that refuses.
        neurons: the set.
        harmful: requests the model should refuse.
        harmless: requests it should answer.
        scores: those the set was taken from, or any others; neuron by neuron goes down the ranks its members have there, those
            that have none last.
        text: general text for perplexity.
        points: most steps of a curve; more layers than that are taken in groups of neighbours.
        **how: `random` orders and sets (3 by default), the `seed` of both, and the rest of `How`.

    Raises:
        NeuronError: an empty set.

    Source: Zhao et al., ICLR 2025, section 2.3 (progressively deactivating layers and neurons).
    Differs: both directions and each layer alone; bands of random orders and random neurons; harmless requests, perplexity and
    divergence at every point.
    """
    neurons.check(model.table, [model.name])
    if not len(neurons):
        raise NeuronError("an empty set was given, expected at least one neuron")
    neurons = neurons.on(model.table)
    facts = {"model": model, "neurons": neurons, "scores": scores}
    bench = Bench.of(facts, harmful, harmless, text, **{"random": 3, **how})
    random, seed = bench.random, bench.seed
    walker = _Walker(bench, model, bench.measure(Arm(UNTREATED, model)))
    blocks = layer_blocks(neurons, points)
    steps = [*walker.cumulative(FRONT, neurons, blocks), *walker.cumulative(BACK, neurons, blocks[::-1])]
    steps += [walker.step(ALONE, _named(block), neurons.only(layers=block)) for block in blocks]
    generator = np.random.default_rng(seed)
    for number in range(random if len(blocks) > 2 else 0):
        shuffled = [blocks[place] for place in generator.permutation(len(blocks))]
        steps += walker.cumulative(f"{RANDOM_LAYERS} {number}", neurons, shuffled)
    if scores is not None:
        sizes = ladder(len(neurons), points)
        ranked = strongest(neurons, scores, len(neurons))
        steps += [walker.step(SCORE, str(size), _together(ranked[:size], model.table)) for size in sizes]
        drawn = [_together(ranked[:size], model.table).random_like(seed, n=random) for size in sizes]
        for number in range(random):
            steps += [walker.step(f"{RANDOM_NEURONS} {number}", str(size), sets[number]) for size, sets in zip(sizes, drawn, strict=True)]
    else:
        for number, control in enumerate(neurons.random_like(seed, table=model.table, n=random)):
            steps += walker.cumulative(f"{RANDOM_NEURONS} {number}", control, blocks)
    bench.finish()
    return Progressive(len(neurons), walker.untreated, tuple(_held_together(steps)), bench.harmful.groups, tuple(bench.notes))


def _held_together(steps: Sequence[Step]) -> list[Step]:
    """Of more than ten points the family-wise rate of what is clear is held, random orders apart."""
    named = [step for step in steps if not step.order.startswith((RANDOM_LAYERS, RANDOM_NEURONS))]
    held = dict(zip(map(id, named), holm([step.change for step in named]), strict=True))
    return [dataclasses.replace(step, change=held.get(id(step), step.change)) for step in steps]


@dataclasses.dataclass
class _Walker:
    """Measures sets that are off, each once however often it comes by."""

    bench: Bench
    model: LanguageModel
    untreated: Outcome
    known: dict[NeuronSet, Outcome] = dataclasses.field(default_factory=dict)

    def cumulative(self, order: str, neurons: NeuronSet, blocks: Sequence[Sequence[int]]) -> Iterable[Step]:
        """The steps of switching blocks of layers off one after another."""
        off: list[int] = []
        found = []
        for block in blocks:
            off += block
            found.append(self.step(order, _named(block), neurons.only(layers=sorted(off))))
        return found

    def step(self, order: str, name: str, neurons: NeuronSet) -> Step:
        """One point of a curve."""
        arm = self.known.get(neurons)
        if arm is None:
            arm = self.known[neurons] = self._measured(f"{order}, {name}", neurons)
        change = paired_difference(arm.harmful, self.untreated.harmful, self.bench.harmful.groups)
        layers = tuple(sorted({parse_key(key).layer for key in neurons.keys()}))  # noqa: SIM118 - not a mapping
        return Step(order, name, layers, len(neurons), arm, change)

    def _measured(self, name: str, neurons: NeuronSet) -> Outcome:
        if not len(neurons):
            return dataclasses.replace(self.untreated, divergence=0.0)
        return self.bench.measure(Arm(name, self.model, functools.partial(deactivated, self.model, neurons)))


def layer_blocks(neurons: NeuronSet, points: int) -> list[list[int]]:
    """The layers that hold members, front to back, in at most `points` groups of neighbours."""
    layers = sorted({parse_key(key).layer for key in neurons.keys()})  # noqa: SIM118 - not a mapping
    return [part.tolist() for part in np.array_split(np.array(layers), min(points, len(layers)))]


def ladder(largest: int, points: int) -> list[int]:
    """Whole numbers 1, 2, 5, 10, … below the largest, the last `points` of them with the largest itself."""
    sizes = [step * 10**power for power in range(12) for step in _STEPS if step * 10**power < largest]
    return [*sizes, largest][-points:]


def _together(neurons: Sequence[Neuron], table: SiteTable) -> NeuronSet:
    members: dict[str, list[int]] = {}
    for key, index in neurons:
        members.setdefault(key, []).append(index)
    return NeuronSet(members, table)


def _named(block: Sequence[int]) -> str:
    return f"layer {block[0]}" if len(block) == 1 else f"layers {block[0]} to {block[-1]}"
