"""Score neurons by what detectors are held against: sizes, chance, set differences of weights, probes, the
refusal direction.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from safety_neurons.arguments import well_typed
from safety_neurons.counting import numbered
from safety_neurons.detectors.activity import (
    Moments,
    at_last,
    folded_texts,
    pooled_activations,
    sorted_out,
    statistics_of,
    whole_rows,
)
from safety_neurons.detectors.attribution import SCORED_TOKENS, ScoredRow, score_rows
from safety_neurons.detectors.methods import (
    ActivationMagnitude,
    Ranked,
    RefusalDirection,
    SetDifference,
    WeightChange,
    WeightMagnitude,
)
from safety_neurons.detectors.reading import columns
from safety_neurons.detectors.runner import (
    BatchSums,
    Folded,
    Found,
    PromptCounts,
    Run,
    Scored,
    chosen_from,
    to_numpy,
)
from safety_neurons.detectors.text import generate, texts
from safety_neurons.errors import InputError, NumericalError, UnsupportedModelError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import Batch, forward, frozen
from safety_neurons.model.hooks import around, refuse_compiled, skipped
from safety_neurons.model.language_model import said_of_reading
from safety_neurons.model.sites import AttentionAnatomy, SitePlace, take
from safety_neurons.neurons import MLP_SITES, SITES, NeuronSet, SiteTable, parse_key
from safety_neurons.neurons.scores import kept_share
from safety_neurons.prompt_lists import Prompts


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
        weight, bias = (
            experts.weight(parsed.expert, parsed.site).detach(),
            experts.bias(parsed.expert, parsed.site),
        )
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
    read = texts(run.aligned, run.prompts, positions="prompt", max_new_tokens=0, **run.told())
    run.notes += read.notes
    folded = folded_texts(run, {"prompts": read}, {"prompts": Moments})
    return Scored(statistics_of(run.sizes, folded.sums["prompts"]).root_mean_square(), folded.counts)


@well_typed
def find_random(
    table: SiteTable,
    *,
    like: NeuronSet | None = None,
    seed: int = 0,
    sites: Sequence[str] = SITES,
    layers: range | str | None = None,
    **choice: Any,
) -> Found:
    """Random neurons, seeded: made of what a given set is made of (`NeuronSet.random_like`), or the largest
    of uniform scores.

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
    Differs: matched per site and unit too, and disjoint from the set where it takes at most half (the public
    code draws from all).
    """
    if choice.get("agreement") is not None or (
        like is not None and any(value is not None for value in choice.values())
    ):
        raise UsageError(
            "a random set has no prompts to agree and is matched to the set given: leave the selection "
            "out, or the set"
        )
    generator = np.random.default_rng(seed)
    values: dict[str, np.ndarray] = {}
    if like is None:
        sizes = table.select(sites=sites, layers=layers).sizes
        values = {key: generator.random(size, dtype=np.float32) for key, size in sizes.items()}
        selection = Ranked.of(
            **{name: value for name, value in choice.items() if name != "agreement"}
        ).selection
        config = {
            "seed": seed,
            "sites": list(sites),
            "layers": list(layers) if isinstance(layers, range) else layers,
        }
        return chosen_from(values, table, selection, {"method": "random", "config": config})
    drawn = like.random_like(seed, table)[0]
    for key in like.keys():  # noqa: SIM118 - a set of neurons is not a mapping
        values[key] = generator.random(table.sizes[key], dtype=np.float32) / 2
        values[key][drawn[key]] += 0.5
    searched = sorted({key.rsplit(".", 1)[1] for key in values}, key=SITES.index)
    made_of = {
        "seed": seed,
        "like": like.provenance.method if like.provenance else "",
        "disjoint": drawn.disjoint,
    }
    config = made_of | {"sites": searched, "layers": None}
    drawn_scores = chosen_from(
        values, table, Ranked(count=len(drawn)).selection, {"method": "random", "config": config}
    )
    notes = (
        ()
        if drawn.disjoint
        else ("the set takes more than half of a layer, so the random one is not disjoint from it",)
    )
    return Found(drawn_scores.scores, drawn, drawn_scores.prompts, notes)


SAFETY, UTILITY = "safety", "utility"
Importances = Callable[[LanguageModel, "Capture", Batch, Sequence[ScoredRow]], list[dict[str, Tensor]]]
"""What one batch gives: for each of its rows, by site key, one number per weight `[neuron, weight]`."""


@dataclass
class Capture:
    """Inputs of the projections in one pass, and zeros added to their outputs, by whose gradient the weights'
    is had.

    Attributes:
        places: the searched sites.
        differentiate: whether zeros are added.
    """

    places: Mapping[str, SitePlace]
    differentiate: bool
    inputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    zeros: dict[nn.Module, Tensor] = field(default_factory=dict)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Hooks at every searched projection for a block."""
        modules = {place.hooked: place for place in self.places.values()}
        with around(
            before={module: self._keeper(module) for module in modules},
            after={module: self._adder(module) for module in modules} if self.differentiate else None,
        ):
            yield

    def check(self) -> None:
        """Raise an error where a projection was not called in the pass (a replaced forward or kernel)."""
        silent = [key for key, place in self.places.items() if place.hooked not in self.inputs]
        if silent:
            raise skipped(silent, "in the pass")

    def _keeper(self, module: nn.Module) -> Callable[..., None]:
        def keep(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.inputs[module] = (args[0] if args else next(iter(kwargs.values()))).detach()

        return keep

    def _adder(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        def add(output: Tensor) -> Tensor:
            self.zeros[module] = torch.zeros_like(output, requires_grad=True)
            return output + self.zeros[module]

        return add

    def fed(self, place: SitePlace, row: int) -> Tensor:
        """What a site's weights multiply in one row of the batch, `[token, feature]`: all inputs, or the
        site's own.
        """
        values = self.inputs[place.hooked][row].float()
        return take(values, place.index) if place.side == "input" else values


def snip(method: SetDifference, run: Run) -> Scored:
    """The set difference by |weight × gradient of the loss of the model's own answer|."""
    return _difference(method, run, _by_gradient, differentiate=True)


def wanda(method: SetDifference, run: Run) -> Scored:
    """The set difference by |weight| × norm of the input feature."""
    return _difference(method, run, _by_input, differentiate=False)


def _difference(method: SetDifference, run: Run, importances: Importances, *, differentiate: bool) -> Scored:
    """Share of each neuron's weights that are important on one text and not on the other."""
    model = run.aligned
    refuse_compiled(model.model)
    places = _places(model, list(run.sizes))
    assert run.harmless is not None
    rows = [_answers(run, text, name) for name, text in ((SAFETY, run.prompts), (UTILITY, run.harmless))]
    counts = {SAFETY: len(rows[0]), UTILITY: len(rows[1])}
    everything = [*rows[0], *rows[1]]

    def reduce(batch: Batch) -> BatchSums:
        capture, added = Capture(places, differentiate), BatchSums()
        of_rows = importances(model, capture, batch, [everything[index] for index in batch.indices])
        for index, of_row in zip(batch.indices, of_rows, strict=True):
            name = SAFETY if index < counts[SAFETY] else UTILITY
            for key, values in of_row.items():
                each = values.double().cpu().numpy().ravel()
                added.sums[f"{name}/{key}"] = added.sums.get(f"{name}/{key}", 0.0) + each
        return added

    means = _means(run.fold([row.ids for row in everything], reduce), counts)
    shares = method.safety, method.utility
    values = {
        key: kept_share(means[f"{SAFETY}/{key}"], means[f"{UTILITY}/{key}"], run.sizes[key], *shares)
        for key in places
    }
    truncated = sum(row.truncated for row in model.encode(run.prompts, reserve=SCORED_TOKENS))
    return Scored(values, PromptCounts(counts[SAFETY], len(run.prompts) - counts[SAFETY], truncated))


def _means(folded: Folded, counts: dict[str, int]) -> dict[str, np.ndarray]:
    """Mean importances by text and site; `counts` loses the answers that were left out.

    Raises:
        NumericalError: no answer of a text is left.
    """
    lost = sum(index < counts[SAFETY] for index in folded.failed)
    counts[SAFETY], counts[UTILITY] = counts[SAFETY] - lost, counts[UTILITY] - (len(folded.failed) - lost)
    for name, left in counts.items():
        if not left:
            raise NumericalError(
                f"no answer to the {name} prompts gave finite numbers; the first: "
                f"{next(iter(folded.failed.values()))}"
            )
    return {name: values / counts[name.split("/", 1)[0]] for name, values in folded.sums.items()}


def _places(model: LanguageModel, keys: Sequence[str]) -> dict[str, SitePlace]:
    routed = [key for key in keys if ".experts." in key]
    if routed:
        raise UnsupportedModelError(
            f"{routed[0]} is an expert's: weights of routed experts are not scored; use --sites q,k,v,o"
        )
    return {key: model.anatomy.place(key) for key in keys}


def _answers(run: Run, prompts: Prompts, name: str) -> list[ScoredRow]:
    """The model's own greedy answers, their first tokens scored."""
    model = run.aligned
    written = generate(model, prompts, name, SCORED_TOKENS, run.stream, batch_size=run.batch_size)
    encoded = model.encode(prompts, reserve=SCORED_TOKENS)
    run.notes += said_of_reading(encoded, name)
    rows = [
        ScoredRow((*row.ids, *answer), len(row.ids), 1.0)
        for row, answer in zip(encoded, written, strict=True)
        if answer
    ]
    broken = sum(answer is None for answer in written)
    if broken == len(prompts):
        raise NumericalError(
            f"all {broken} {name} prompts gave NaN or infinity: check the model's weights, or use "
            "--dtype float32"
        )
    if not rows:
        raise InputError(
            f"all {len(prompts)} {name} prompts got an empty answer: there is nothing to weigh; use "
            "other prompts"
        )
    empty = len(prompts) - len(rows) - broken
    run.notes += (
        [f"{numbered(empty, f'{name} prompt has', f'{name} prompts have')} an empty answer: left out"]
        if empty
        else []
    )
    run.notes += [f"{numbered(broken, f'{name} prompt')} gave NaN or infinity: left out"] if broken else []
    return rows


def _by_gradient(
    model: LanguageModel, capture: Capture, batch: Batch, rows: Sequence[ScoredRow]
) -> list[dict[str, Tensor]]:
    with frozen(model.model), model.running(), torch.enable_grad(), capture.on():
        logits = forward(model.model, batch, with_logits=True)
        assert logits is not None
        capture.check()
        modules = list(capture.zeros)
        slopes = dict(
            zip(
                modules,
                torch.autograd.grad(score_rows(logits, batch, rows).sum(), list(capture.zeros.values())),
                strict=True,
            )
        )
    of_rows: list[dict[str, Tensor]] = []
    for row in range(len(rows)):
        each = {}
        with model.active(), torch.no_grad():
            for key, place in capture.places.items():
                slope, fed, weight = (
                    slopes[place.hooked][row].float(),
                    capture.fed(place, row),
                    place.weight().float(),
                )
                gradient = slope.T @ fed if place.side == "input" else take(slope, place.index).T @ fed
                product = (weight * gradient).abs()
                each[key] = product.T if place.side == "input" else product
        of_rows.append(each)
    return of_rows


def _by_input(
    model: LanguageModel, capture: Capture, batch: Batch, rows: Sequence[ScoredRow]
) -> list[dict[str, Tensor]]:
    """(weight × norm)²: its mean over answers ranks weights as |weight| × norm over all answers' tokens
    does.
    """
    with model.running(), torch.no_grad(), capture.on():
        forward(model.model, batch)
        capture.check()
    of_rows: list[dict[str, Tensor]] = []
    with model.active(), torch.no_grad():
        weights = {key: place.weight().float() ** 2 for key, place in capture.places.items()}
        for number, row in enumerate(rows):
            each = {}
            for key, place in capture.places.items():
                squares = (capture.fed(place, number)[row.start : len(row.ids)] ** 2).sum(0)
                each[key] = (weights[key] * squares).T if place.side == "input" else weights[key] * squares
            of_rows.append(each)
    return of_rows


SEARCHED_LAYERS = 0.8
"""Share of the layers, from the first, among which the direction is taken where no layer is named."""


def score_direction(method: RefusalDirection, run: Run) -> Scored:
    """What every searched neuron writes along the difference of the two kinds of prompts."""
    model, layer = run.aligned, method.layer
    assert run.harmless is not None
    n_layers = len(model.anatomy.layers)
    if layer is not None and not 0 <= layer < n_layers:
        raise UsageError(f"--layer {layer}: expected 0 to {n_layers - 1}")
    writers = list(dict.fromkeys(_writer(key) for key in run.sizes if _writer(key)))
    with torch.no_grad():
        encoded = [model.encode(text) for text in (run.prompts, run.harmless)]
        names = ("harmful", "harmless")
        seen = [
            pooled_activations(run, text, writers, at_last, name, residual=True)
            for name, text in zip(names, encoded, strict=True)
        ]
        whole, counts, notes = sorted_out(encoded, [whole_rows(part.values()) for part in seen])
        run.notes += notes
        seen = [
            {key: values[used] for key, values in part.items()}
            for part, used in zip(seen, whole, strict=True)
        ]
        streams = [[part[f"residual.{number}"] for number in range(n_layers)] for part in seen]
        chosen = (
            layer
            if layer is not None
            else _most_apart(streams[0], streams[1], max(1, int(SEARCHED_LAYERS * n_layers)))
        )
        direction = streams[0][chosen].mean(0) - streams[1][chosen].mean(0)
        direction = direction / direction.norm().clamp(min=1e-30)
        written: dict[str, Tensor] = {}
        for number, key in enumerate(writers):
            with model.active():
                along = direction @ model.anatomy.place(key).weight().detach().cpu().to(direction)
            written[key] = (seen[0][key].mean(0) - seen[1][key].mean(0)).to(along) * along
            if run.progress is not None:
                run.progress(number + 1, len(writers), 0)
    return Scored(
        {key: _of_site(model, key, written).double().numpy() for key in run.sizes},
        counts,
        config={"layer": chosen},
    )


def _most_apart(harmful: Sequence[Tensor], harmless: Sequence[Tensor], n_layers: int) -> int:
    apart = []
    for one, other in zip(harmful[:n_layers], harmless[:n_layers], strict=True):
        direction = one.mean(0) - other.mean(0)
        ours, theirs = one @ direction, other @ direction
        pooled = ((ours.var(correction=0) + theirs.var(correction=0)) / 2).sqrt().clamp(min=1e-30)
        apart.append(float((ours.mean() - theirs.mean()) / pooled))
    return max(range(len(apart)), key=apart.__getitem__)


def _writer(key: str) -> str:
    """The site that writes what a neuron of this site does to the residual stream; empty for `q` and `k`."""
    layer, site = key.rsplit(".", 1)
    if site in ("q", "k"):
        return ""
    return f"{layer}.down" if site in MLP_SITES else f"{layer}.o"


def _of_site(model: LanguageModel, key: str, written: Mapping[str, Tensor]) -> Tensor:
    parsed, writer = parse_key(key), _writer(key)
    if not writer:
        return torch.zeros(model.table.sizes[key])
    if parsed.site != "v":
        return written[writer]
    attention = model.anatomy.layers[parsed.layer].attention
    assert isinstance(attention, AttentionAnatomy)
    return (
        written[writer]
        .unflatten(0, (attention.n_kv_heads, -1, model.table[key].size // attention.n_kv_heads))
        .sum(1)
        .flatten()
    )
