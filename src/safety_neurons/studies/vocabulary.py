"""Neuron cards: what a neuron writes into the vocabulary, where it is most active, and what it alone does to
the refusal's log-odds.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from safety_neurons.arguments import well_typed
from safety_neurons.declarations import Count, Positive
from safety_neurons.detectors.attribution import SCORED_TOKENS, ScoredRow, explained, tokens_behind
from safety_neurons.detectors.methods import ExplainedTexts
from safety_neurons.display import Displayed
from safety_neurons.errors import InputError, NeuronError, NumericalError, UnsupportedModelError
from safety_neurons.interventions import deactivated, patched
from safety_neurons.model import LanguageModel, run_batches, token_log_probabilities
from safety_neurons.model.batches import Batch, BatchSize
from safety_neurons.model.hooks import reading
from safety_neurons.model.likelihood import vocabulary_scores
from safety_neurons.model.passes import in_order
from safety_neurons.model.sites import AttentionAnatomy
from safety_neurons.neurons import NeuronSet, Scores, parse_key
from safety_neurons.prompt_lists import Prompts, as_prompts
from safety_neurons.prompt_lists.readers import Source
from safety_neurons.results import holm_in, paired_difference
from safety_neurons.strict_json import JsonObject
from safety_neurons.studies.bench import Progress, Treat, Treatment, said_of_seen
from safety_neurons.studies.lengths import too_long

Neuron = tuple[str, int]
BEFORE, AFTER = 8, 4
"""Tokens shown on either side of the one that is told."""
MOST, LEAST = "most_active", "least_active"
SIDES = (MOST, LEAST)
SUM_OF_HEADS = "the o columns its v row feeds, summed; each query head writes its own times its attention"
UNIT = "the unit's down column; the sign is that of the unit's activation"
NOTHING = "a q or k neuron writes nothing: it tells attention where to look"
ROUTED = "the output direction of a routed expert is not shown"
DENSE = "expected neurons of attention or of a dense feed-forward layer"


@dataclasses.dataclass
class Activity:
    """One neuron on a list of prompts.

    Attributes:
        means: by kind of prompts the mean over the prompts' tokens, one number a prompt.
        ends: by kind the largest and the smallest activation.
        top: the most and the least active places, each with another token or text before it.
    """

    means: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    ends: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    top: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)

    def record(self) -> JsonObject:
        """As JSON values."""
        summary = {
            kind: {
                "mean": float(values.mean()),
                "largest": self.ends[kind][0],
                "smallest": self.ends[kind][1],
            }
            for kind, values in self.means.items()
        }
        return {**summary, **self.top}


@dataclasses.dataclass(frozen=True)
class Peaks:
    """One prompt: per neuron its mean, and the values and positions of its largest and smallest
    activations.
    """

    means: np.ndarray
    values: dict[str, np.ndarray]
    positions: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Card:
    """One neuron.

    Attributes:
        key, index: which.
        score: by which it was chosen, where scores are known.
        writes: tokens of its output direction.
        active: where it is most and least active, and its mean on harmful and harmless prompts.
        effects: change of the refusal's log-odds by it alone, one entry per treatment.
    """

    key: str
    index: int
    score: float | None
    writes: Mapping[str, Any]
    active: Mapping[str, Any]
    effects: Mapping[str, Mapping[str, Any]]

    def record(self) -> JsonObject:
        """As JSON values."""
        place = parse_key(self.key)
        about: JsonObject = {
            "neuron": f"{self.key}:{self.index}",
            "key": self.key,
            "index": self.index,
            "layer": place.layer,
            "site": place.site,
        }
        return {
            **about,
            "score": self.score,
            "writes": dict(self.writes),
            "active": dict(self.active),
            "effects": dict(self.effects),
        }


@dataclasses.dataclass(frozen=True)
class Cards(Displayed):
    """Cards of a handful of neurons, and what the same numbers are for random ones."""

    verb = "analyze-vocabulary"

    cards: tuple[Card, ...]
    log_odds: Mapping[str, Any]
    """Mean log-odds of the refusal, untreated and with all the cards' neurons treated together, by
    treatment.
    """
    random: Mapping[str, Any]
    """By treatment the effects of random neurons of the same matrices."""
    texts: Mapping[str, Any]
    """What refusal and compliance are."""
    notes: tuple[str, ...] = ()

    def record(self) -> JsonObject:
        """As JSON values; of more than ten effects of single neurons the family-wise rate of what is clear is
        held (Holm).
        """
        cards = holm_in([card.record() for card in self.cards])
        return {
            "cards": cards,
            "log_odds": dict(self.log_odds),
            "random": dict(self.random),
            "texts": dict(self.texts),
        }


@dataclasses.dataclass(frozen=True)
class CardSettings(ExplainedTexts):
    """How cards are made: the texts that are explained without a base model, what each card holds, and how it
    is measured.
    """

    tokens: Positive = 10
    """Tokens shown at either end."""
    random: Count = 20
    """Random neurons of the same matrices."""
    places: Positive = 5
    """Prompts shown at either end of the activation."""
    seed: int = 0
    """Seed of the random neurons."""
    batch_size: BatchSize = "auto"
    """Prompts per pass."""


@well_typed
def vocabulary(
    model: LanguageModel,
    neurons: Sequence[Neuron],
    harmful: Source,
    harmless: Source | None = None,
    *,
    base: LanguageModel | None = None,
    scores: Scores | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Cards:
    """A card for each of a handful of neurons.

    Args:
        model: the (aligned) model: whose weights are read, whose activations are told, in which neurons are
            deactivated.
        neurons: which, as (key, index).
        harmful: requests on which activations and log-odds are taken.
        harmless: requests on which activations are told too.
        base: the less safe model; each neuron's activation is then also patched into it, and refusal and
            compliance are the two models' own greedy answers.
        scores: to tell each neuron's.
        progress: told every step.
        **options: the fields of `CardSettings`.

    Raises:
        NeuronError: no neuron, or one that the model does not have.
        UsageError: an option that is none.

    Source: Chen et al., NeurIPS 2025, section 5.3 (tokens of output directions); the effect of one neuron is
    measured, not estimated.
    """
    harmful = as_prompts(harmful)
    harmless = None if harmless is None else as_prompts(harmless)
    how = CardSettings.of(**options)
    how.check()
    chosen = _checked(model, neurons)
    tell = progress or (lambda _: None)
    tell("vocabulary")
    references = _references(model, chosen, how.random, how.seed)
    written = _written(model, [*chosen, *references], how.tokens)
    tell("activations")
    found = activity(model, chosen, harmful, harmless, places=how.places, batch_size=how.batch_size)
    odds = RefusalOdds.of(model, base, harmful, how, how.batch_size)
    treatments: dict[str, tuple[LanguageModel, Treat]] = {
        "deactivate": (model, lambda part: lambda: deactivated(model, part))
    }
    if base is not None:
        treatments["patch"] = (base, lambda part: lambda: patched(base, model, part))
    effects: dict[str, dict[Neuron, dict[str, Any]]] = {}
    log_odds: dict[str, Any] = {}
    reference: dict[str, Any] = {}
    for name, (subject, treat) in treatments.items():
        tell(f"log-odds, {name}")
        ruler = _Ruler(odds, subject, treat)
        reference[name] = ruler.random(references)
        effects[name] = {neuron: ruler.effect(neuron, reference[name]) for neuron in chosen}
        log_odds[name] = ruler.together(chosen)
    cards = tuple(_card(neuron, scores, written, found, effects, references) for neuron in chosen)
    asked = {"harmful": harmful, **({} if harmless is None else {"harmless": harmless})}
    seen = [] if scores is None else said_of_seen("harmful", harmful, scores)
    notes = (*too_long(model, asked, SCORED_TOKENS), *odds.notes, *seen)
    return Cards(cards, log_odds, reference, odds.texts, notes)


@well_typed
def strongest(neurons: NeuronSet, scores: Scores | None, count: int, seed: int = 0) -> list[Neuron]:
    """The members with the largest scores; without scores some of them at random."""
    members = list(neurons)
    if scores is not None:
        return sorted(
            members,
            key=lambda member: -float(scores[member[0]][member[1]]) if member[0] in scores else np.inf,
        )[:count]
    places = np.random.default_rng(seed).permutation(len(members))[:count]
    return [members[place] for place in sorted(places.tolist())]


@well_typed
def with_cards(model: LanguageModel, neurons: NeuronSet) -> tuple[NeuronSet, list[str]]:
    """The members that have an activation at every token, and a note on those of routed experts, which have
    not.

    Raises:
        UnsupportedModelError: there are none but those.
    """
    dense = NeuronSet(
        {key: indices for key, indices in neurons.items() if key in model.anatomy.places},
        model.table,
        neurons.provenance,
    )
    left = len(neurons) - len(dense)
    if left and not len(dense):
        raise UnsupportedModelError(
            f"all {left} neurons belong to routed experts, which have no activation at every token; {DENSE}"
        )
    return dense, [
        f"{left} of {len(neurons)} neurons belong to routed experts and have no card"
    ] if left else []


def _checked(model: LanguageModel, neurons: Sequence[Neuron]) -> list[Neuron]:
    if not neurons:
        raise NeuronError("no neuron was given; expected at least one for a card")
    NeuronSet({key: [index] for key, index in neurons}).check(model.table)
    for key, index in neurons:
        NeuronSet({key: [index]}, model.table)
        if key not in model.anatomy.places:
            raise UnsupportedModelError(
                f"{key} belongs to routed experts, which have no activation at every token; {DENSE}"
            )
    return list(dict.fromkeys((key, int(index)) for key, index in neurons))


def _references(model: LanguageModel, chosen: Sequence[Neuron], random: int, seed: int) -> list[Neuron]:
    """Random neurons of the same matrices, none of them chosen, spread over the matrices as the chosen ones
    are.
    """
    generator = np.random.default_rng([seed, 2])
    found: list[Neuron] = []
    keys = [chosen[number % len(chosen)][0] for number in range(random)]
    for key in keys:
        free = np.setdiff1d(
            np.arange(model.table[key].size), [index for name, index in (*chosen, *found) if name == key]
        )
        if len(free):
            found.append((key, int(generator.choice(free))))
    return found


def direction(model: LanguageModel, neuron: Neuron) -> tuple[Float[Tensor, " hidden"] | None, str]:
    """What a neuron adds to the residual stream per unit of its activation, and how that is defined.

    None where it is not.
    """
    key, index = neuron
    place = parse_key(key)
    places = model.anatomy.places
    if place.site in ("q", "k"):
        return None, NOTHING
    if place.site in ("down", "o"):
        return (places[key].weight()[:, index], "") if key in places else (None, ROUTED)
    if place.site in ("gate", "up"):
        down = f"{place.block}.down"
        return (places[down].weight()[:, index], UNIT) if down in places else (None, ROUTED)
    attention = model.anatomy.layers[place.layer].attention
    assert isinstance(attention, AttentionAnatomy)
    group, offset = divmod(index, attention.head_dim)
    heads = attention.n_heads // attention.n_kv_heads
    columns = [(group * heads + head) * attention.head_dim + offset for head in range(heads)]
    return places[f"{place.block}.o"].weight()[:, columns].sum(1), SUM_OF_HEADS


def _written(model: LanguageModel, neurons: Sequence[Neuron], tokens: int) -> dict[Neuron, dict[str, Any]]:
    """Top and bottom tokens of every neuron that writes, with the size of the largest score."""
    with model.running(), torch.no_grad():
        found = {neuron: direction(model, neuron) for neuron in neurons}
    writing = {neuron: vector for neuron, (vector, _) in found.items() if vector is not None}
    rows: dict[Neuron, dict[str, Any]] = {
        neuron: {"defined": vector is not None, "how": how, "top": [], "bottom": [], "largest": None}
        for neuron, (vector, how) in found.items()
    }
    if writing:
        scores = vocabulary_scores(model, torch.stack(list(writing.values())))
        for neuron, row in zip(writing, scores.cpu(), strict=True):
            most, least = row.topk(min(tokens, len(row))), (-row).topk(min(tokens, len(row)))
            rows[neuron]["top"] = _tokens(model, most.indices, most.values)
            rows[neuron]["bottom"] = _tokens(model, least.indices, -least.values)
            rows[neuron]["largest"] = float(row.abs().max())
    return rows


def _tokens(model: LanguageModel, ids: Tensor, values: Tensor) -> list[dict[str, Any]]:
    texts = [str(model.tokenizer.decode([number])) for number in ids.tolist()]
    return [
        {"token": text, "id": number, "score": value}
        for text, number, value in zip(texts, ids.tolist(), values.tolist(), strict=True)
    ]


# Where neurons are active: the tokens at which each is most and least active, and its mean over prompts


def activity(
    model: LanguageModel,
    neurons: Sequence[Neuron],
    harmful: Prompts,
    harmless: Prompts | None,
    *,
    places: int = 5,
    batch_size: BatchSize = "auto",
) -> dict[Neuron, Activity]:
    """Every neuron on the prompts as the model gets them, template included.

    Args:
        model: the model.
        neurons: which, as (key, index); sites that are active at every token.
        harmful: prompts.
        harmless: more prompts, told apart.
        places: how many are shown at either end.
        batch_size: prompts per pass.
    """
    found = {neuron: Activity() for neuron in neurons}
    shown: dict[Neuron, dict[str, list[dict[str, Any]]]] = {
        neuron: {name: [] for name in SIDES} for neuron in neurons
    }
    for kind, prompts in (("harmful", harmful), ("harmless", harmless)):
        if prompts is None or not len(prompts):
            continue
        encoded = model.encode(prompts)
        peaks = _peaks(model, neurons, [one.ids for one in encoded], places, batch_size)
        for column, neuron in enumerate(neurons):
            found[neuron].means[kind] = np.array([peak.means[column] for peak in peaks])
            largest, smallest = ([peak.values[name][0, column] for peak in peaks] for name in SIDES)
            found[neuron].ends[kind] = (float(max(largest)), float(min(smallest)))
            for one, peak in zip(encoded, peaks, strict=True):
                for name in SIDES:
                    for value, position in zip(
                        peak.values[name][:, column], peak.positions[name][:, column], strict=True
                    ):
                        place = {"prompts": kind, "prompt_id": one.prompt_id, "value": float(value)}
                        shown[neuron][name].append({**place, **_context(model, one.ids, int(position))})
    for neuron in neurons:
        for name in SIDES:
            ordered = sorted(
                shown[neuron][name], key=lambda place: float(place["value"]), reverse=name == MOST
            )
            found[neuron].top[name] = _different(ordered, places)
    return found


def _different(places: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The first places whose token and the text before it differ."""
    kept = {(place["before"], place["token"]): place for place in reversed(places)}
    return [place for place in places if kept[place["before"], place["token"]] is place][:count]


def _peaks(
    model: LanguageModel,
    neurons: Sequence[Neuron],
    sequences: list[list[int]],
    places: int,
    batch_size: BatchSize,
) -> list[Peaks]:
    """The peaks of every prompt."""
    held: dict[str, Tensor] = {}
    columns: dict[str, list[int]] = {}
    for key, index in neurons:
        columns.setdefault(key, []).append(index)

    def reader(key: str) -> Callable[[Tensor], None]:
        def keep(activation: Tensor) -> None:
            held[key] = activation[..., columns[key]].double()

        return keep

    def per_batch(batch: Batch) -> dict[int, Peaks]:
        found = {}
        stacked = torch.stack([held[key][..., columns[key].index(index)] for key, index in neurons], -1)
        for row, (index, length) in enumerate(zip(batch.indices, batch.lengths, strict=True)):
            part = stacked[row, :length].cpu()
            ends = {name: part.topk(min(places, length), 0, largest=name == MOST) for name in SIDES}
            values = {name: end.values.numpy() for name, end in ends.items()}
            found[index] = Peaks(
                part.mean(0).numpy(), values, {name: end.indices.numpy() for name, end in ends.items()}
            )
        return found

    with reading(model.anatomy, {key: reader(key) for key in columns}):
        return in_order(run_batches(model, sequences, per_batch, batch_size))


def _context(model: LanguageModel, ids: Sequence[int], position: int) -> Mapping[str, Any]:
    def text(part: Sequence[int]) -> str:
        return str(model.tokenizer.decode(list(part)))

    first, last = max(0, position - BEFORE), position + 1 + AFTER
    before, token, after = (
        text(part) for part in (ids[first:position], [ids[position]], ids[position + 1 : last])
    )
    # Some tokenizers put blanks between tokens that belong to none.
    if before and text(ids[first : position + 1]) == f"{before} {token}":
        before += " "
    if after and text(ids[position:last]) == f"{token} {after}":
        after = f" {after}"
    return {"position": position, "token": token, "before": before, "after": after}


# The refusal's log-odds of every prompt: mean log p(refusal) − mean log p(compliance), teacher-forced


@dataclasses.dataclass(frozen=True)
class RefusalOdds:
    """Texts to score, prompt by prompt.

    Attributes:
        rows: for every prompt its refusals and compliances behind it.
        texts: what they are, as JSON values.
        batch_size: rows per pass.
        notes: prompts that were left out.
        groups: what the prompts share.
    """

    rows: tuple[tuple[ScoredRow, ...], ...]
    texts: dict[str, Any]
    batch_size: BatchSize = "auto"
    notes: tuple[str, ...] = ()
    groups: tuple[str | None, ...] | None = None

    @staticmethod
    def of(
        model: LanguageModel,
        base: LanguageModel | None,
        prompts: Prompts,
        given: ExplainedTexts,
        batch_size: BatchSize = "auto",
    ) -> "RefusalOdds":
        """Of a pair both models' own greedy answers, of one model the given texts.

        16 tokens of each at most.

        Raises:
            InputError: no prompt on which the two models part.
        """
        encoded = model.encode(prompts, reserve=SCORED_TOKENS)
        if base is None:
            sides = list(given.texts.values())
            rows = [
                explained(
                    one.ids, *([tokens_behind(model, one.ids, text) for text in side] for side in sides)
                )
                for one in encoded
            ]
            texts: dict[str, Any] = {"refusal": sides[0], "compliance": sides[1]}
            return RefusalOdds(tuple(map(tuple, rows)), texts, batch_size, groups=tuple(prompts.groups))
        written = [
            [
                list(answer.token_ids)
                for answer in writer.complete(prompts, max_new_tokens=SCORED_TOKENS, batch_size=batch_size)
            ]
            for writer in (model, base)
        ]
        parted = [bool(mine and theirs and mine != theirs) for mine, theirs in zip(*written, strict=True)]
        pairs = zip(encoded, *written, parted, strict=True)
        rows = [explained(one.ids, [mine], [theirs]) for one, mine, theirs, apart in pairs if apart]
        if not rows:
            raise InputError(
                f"both models answer all {len(encoded)} prompts alike; expected prompts that only the "
                "aligned model refuses"
            )
        left = len(encoded) - len(rows)
        notes = (
            (
                (
                    f"{left} of {len(encoded)} prompts are answered alike by both models and say nothing of "
                    "log-odds"
                ),
            )
            if left
            else ()
        )
        texts = {"refusal": "the aligned model's", "compliance": "the base model's"}
        shared = tuple(group for group, apart in zip(prompts.groups, parted, strict=True) if apart)
        return RefusalOdds(tuple(map(tuple, rows)), texts, batch_size, notes, shared)

    def measure(
        self, model: LanguageModel, treatment: Treatment = contextlib.nullcontext
    ) -> Float64[np.ndarray, " prompt"]:
        """Log-odds of every prompt that counts, in nats per token.

        Raises:
            NumericalError: some are no numbers.
        """
        flat = [row for rows in self.rows for row in rows]
        spans = [(row.start, len(row.ids)) for row in flat]
        with treatment():
            found = token_log_probabilities(
                model, [list(row.ids) for row in flat], spans, batch_size=self.batch_size
            )
        values = [row.weight * float(part.mean()) for row, part in zip(flat, found, strict=True)]
        ends = np.cumsum([len(rows) for rows in self.rows])[:-1]
        odds = np.array([part.sum() for part in np.split(np.array(values), ends)])
        if lost := int((~np.isfinite(odds)).sum()):
            raise NumericalError(
                f"{lost} of {len(odds)} prompts gave NaN or infinity where log-odds were measured; expected "
                "numbers: leave these prompts out, check the model's weights, or use --dtype float32"
            )
        return odds


@dataclasses.dataclass
class _Ruler:
    """Measures the refusal's log-odds under one treatment of single neurons."""

    odds: RefusalOdds
    subject: LanguageModel
    treat: Treat
    untreated: np.ndarray = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.untreated = self.odds.measure(self.subject)

    def under(self, neurons: Sequence[Neuron]) -> np.ndarray:
        """Log-odds of every prompt while these neurons are treated."""
        members: dict[str, list[int]] = {}
        for key, index in neurons:
            members.setdefault(key, []).append(index)
        return self.odds.measure(self.subject, self.treat(NeuronSet(members, self.subject.table)))

    def random(self, references: Sequence[Neuron]) -> dict[str, Any]:
        """Effects of random neurons one by one: mean, range of 95 %, all of them."""
        values = [float((self.under([neuron]) - self.untreated).mean()) for neuron in references]
        if not values:
            return {"value": None, "low": None, "high": None, "n": 0, "values": []}
        low, high = np.quantile(values, (0.025, 0.975), method="inverted_cdf")
        return {
            "value": float(np.mean(values)),
            "low": float(low),
            "high": float(high),
            "n": len(values),
            "values": values,
        }

    def effect(self, neuron: Neuron, reference: Mapping[str, Any]) -> dict[str, Any]:
        """What the neuron alone changes, beside the random ones."""
        change = paired_difference(self.under([neuron]), self.untreated, self.odds.groups)
        values = reference["values"]
        larger = sum(abs(value) >= abs(change.value or 0.0) for value in values)
        p = (1 + larger) / (1 + len(values)) if values else None
        return {
            **change.to_json(),
            "as_large_among_random": larger,
            "n_random": len(values),
            "p_among_random": p,
        }

    def together(self, neurons: Sequence[Neuron]) -> dict[str, Any]:
        """The untreated log-odds, and the change by all the neurons at once."""
        change = paired_difference(self.under(neurons), self.untreated, self.odds.groups)
        return {"untreated": float(self.untreated.mean()), "change_together": change.to_json()}


def _card(
    neuron: Neuron,
    scores: Scores | None,
    written: Mapping[Neuron, dict[str, Any]],
    found: Mapping[Neuron, Activity],
    effects: Mapping[str, Mapping[Neuron, dict[str, Any]]],
    references: Sequence[Neuron],
) -> Card:
    writes = dict(written[neuron])
    others = [
        written[other]["largest"]
        for other in references
        if other[0] == neuron[0] and written[other]["largest"] is not None
    ]
    writes["random_largest"] = (
        {"value": float(np.mean(others)), "low": min(others), "high": max(others)} if others else None
    )
    score = float(scores[neuron[0]][neuron[1]]) if scores is not None and neuron[0] in scores else None
    return Card(
        *neuron, score, writes, found[neuron].record(), {name: part[neuron] for name, part in effects.items()}
    )
