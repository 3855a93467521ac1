"""Weights that matter on one text and not on another, as Wei et al. isolate safety: the part that SNIP and Wanda share.

Both give every weight an importance on two texts: the model's own answers to harmful requests (safety) and to harmless ones (utility).
The weights among the largest on the first and not among the largest on the second are kept; a neuron's score is the share of its
weights that were kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from safety_neurons.detectors.finishing import Choice, finish, searched
from safety_neurons.detectors.found import Found, PromptCounts
from safety_neurons.detectors.gradients import SCORED_TOKENS, Scored
from safety_neurons.detectors.streaming import Folded, Part, Progress, Stream, fold, stream_key
from safety_neurons.detectors.text import generate
from safety_neurons.errors import InputError, NumericalError, UnsupportedModelError, UsageError
from safety_neurons.model import LanguageModel, as_prompts
from safety_neurons.model.hooks import around, refuse_compiled, skipped
from safety_neurons.model.language_model import Texts as Asked
from safety_neurons.model.layouts import take
from safety_neurons.model.passes import Batch, BatchSize, evaluating
from safety_neurons.model.places import SitePlace
from safety_neurons.neurons import SITES, NeuronSet, Selection
from safety_neurons.neurons.weights import kept_share
from safety_neurons.results import Checkpoint

SAFETY, UTILITY = "safety", "utility"
Importances = Callable[[LanguageModel, "Capture", Batch, Sequence[Scored]], list[dict[str, Tensor]]]
"""What one batch gives: for each of its rows, by site key, one number per weight `[neuron, weight]`."""


class Options(TypedDict, total=False):
    """What both methods take."""

    safety: float
    utility: float
    sites: Sequence[str]
    layers: range | str | None
    batch_size: BatchSize
    checkpoint: Checkpoint | None
    progress: Progress | None
    subtract: NeuronSet | None


@dataclass
class Capture:
    """Inputs of the projections in one pass, and zeros added to their outputs, by whose gradient the weights' is had.

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
        """What a site's weights multiply in one row of the batch, `[token, feature]`: all inputs, or the site's own."""
        values = self.inputs[place.hooked][row].float()
        return take(values, place.index) if place.side == "input" else values


def find_set_difference(
    method: str,
    model: LanguageModel,
    prompts: Asked,
    harmless: Asked,
    importances: Importances,
    differentiate: bool,
    choice: Choice,
    **options: Unpack[Options],
) -> Found:
    """Scores by one importance of weights; arguments as the two methods explain them."""
    asked, other = as_prompts(prompts), as_prompts(harmless)
    shares = {SAFETY: options.get("safety", 0.05), UTILITY: options.get("utility", 0.05)}
    if not all(0 < share < 1 for share in shares.values()):
        raise UsageError(f"shares {shares} of the weights: expected numbers above 0 and below 1 (0.05 for five per cent)")
    sites, layers = options.get("sites", SITES), options.get("layers")
    batch_size, selection = options.get("batch_size", "auto"), Selection.of(**choice, default_top=0.05)
    if selection.agreement is not None:
        raise UsageError(f"{method} ranks weights by means over prompts: no prompt can vote; leave the agreement out")
    refuse_compiled(model.model)
    places = _places(model, model.table.select(sites=sites, layers=layers).keys)
    config = {**shares, "harmless_sha256": other.sha256} | searched(sites, layers)
    stream = Stream(options.get("checkpoint"), stream_key(method, [model], asked, config, selection, batch_size))
    notes: list[str] = []
    with evaluating(model.model):
        rows = [_answers(model, text, name, stream, batch_size, notes) for name, text in ((SAFETY, asked), (UTILITY, other))]
        counts = {SAFETY: len(rows[0]), UTILITY: len(rows[1])}
        everything = [*rows[0], *rows[1]]

        def reduce(batch: Batch) -> Part:
            capture, part = Capture(places, differentiate), Part()
            found = importances(model, capture, batch, [everything[index] for index in batch.indices])
            for index, of_row in zip(batch.indices, found, strict=True):
                name = SAFETY if index < counts[SAFETY] else UTILITY
                for key, values in of_row.items():
                    each = values.double().cpu().numpy().ravel()
                    part.sums[f"{name}/{key}"] = part.sums.get(f"{name}/{key}", 0.0) + each
            return part

        sizes = {key: model.table.sizes[key] for key in places}
        made: dict[str, Any] = {"batch_size": batch_size, "progress": options.get("progress"), "notes": notes}
        folded = fold(model, stream, [row.ids for row in everything], reduce, sizes=sizes, **made)
    means = _means(folded, counts)
    values = {
        key: kept_share(means[f"{SAFETY}/{key}"], means[f"{UTILITY}/{key}"], sizes[key], shares[SAFETY], shares[UTILITY]) for key in places
    }
    told: dict[str, Any] = {"table": model.table, "models": (model.name,), "prompts": asked, "selection": selection, "config": config}
    found = PromptCounts(
        counts[SAFETY], len(asked) - counts[SAFETY], sum(row.truncated for row in model.encode(asked, reserve=SCORED_TOKENS))
    )
    return finish(method, values, counts=found, notes=notes, subtract=options.get("subtract"), **told)


def _means(folded: Folded, counts: dict[str, int]) -> dict[str, np.ndarray]:
    """Mean importances by text and site; `counts` loses the answers that were left out.

    Raises:
        NumericalError: no answer of a text is left.
    """
    lost = sum(index < counts[SAFETY] for index in folded.failed)
    counts[SAFETY], counts[UTILITY] = counts[SAFETY] - lost, counts[UTILITY] - (len(folded.failed) - lost)
    for name, left in counts.items():
        if not left:
            raise NumericalError(f"no answer to the {name} prompts gave finite numbers; the first: {next(iter(folded.failed.values()))}")
    return {name: values / counts[name.split("/", 1)[0]] for name, values in folded.sums.items()}


def _places(model: LanguageModel, keys: Sequence[str]) -> dict[str, SitePlace]:
    routed = [key for key in keys if ".experts." in key]
    if routed:
        raise UnsupportedModelError(f"{routed[0]} is an expert's: weights of routed experts are not scored; use --sites q,k,v,o")
    return {key: model.anatomy.place(key) for key in keys}


def _answers(model: LanguageModel, prompts: Any, name: str, stream: Stream, batch_size: BatchSize, notes: list[str]) -> list[Scored]:
    """The model's own greedy answers, their first tokens scored."""
    written = generate(model, prompts, name, SCORED_TOKENS, stream, batch_size=batch_size)
    encoded = model.encode(prompts, reserve=SCORED_TOKENS)
    rows = [Scored((*row.ids, *answer), len(row.ids), 1.0) for row, answer in zip(encoded, written, strict=True) if answer]
    broken = sum(answer is None for answer in written)
    if broken == len(prompts):
        raise NumericalError(f"all {broken} {name} prompts gave NaN or infinity: check the model's weights, or use --dtype float32")
    if not rows:
        raise InputError(f"all {len(prompts)} {name} prompts got an empty answer: there is nothing to weigh; use other prompts")
    empty = len(prompts) - len(rows) - broken
    notes += [f"{empty} {name} prompts have an empty answer and were left out"] if empty else []
    notes += [f"{broken} {name} prompts gave NaN or infinity and were left out"] if broken else []
    return rows
