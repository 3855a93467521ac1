"""Weights that matter on one text and not on another, as Wei et al. isolate safety: the part that SNIP and Wanda share.

Both give every weight an importance on two texts: the model's own answers to harmful requests (safety) and to harmless ones (utility).
The weights among the largest on the first and not among the largest on the second are kept; a neuron's score is the share of its
weights that were kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from safety_neurons.detectors.attribution import SCORED_TOKENS, ScoredRow, frozen, score_rows
from safety_neurons.detectors.methods import SetDifference
from safety_neurons.detectors.runner import PromptCounts, Run, Scored
from safety_neurons.detectors.streaming import BatchSums, Folded
from safety_neurons.detectors.text import generate
from safety_neurons.errors import InputError, NumericalError, UnsupportedModelError
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import Batch, forward
from safety_neurons.model.hooks import around, refuse_compiled, skipped
from safety_neurons.model.sites import SitePlace, take
from safety_neurons.neurons.scores import kept_share
from safety_neurons.prompt_lists import Prompts

SAFETY, UTILITY = "safety", "utility"
Importances = Callable[[LanguageModel, "Capture", Batch, Sequence[ScoredRow]], list[dict[str, Tensor]]]
"""What one batch gives: for each of its rows, by site key, one number per weight `[neuron, weight]`."""


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
        capture, part = Capture(places, differentiate), BatchSums()
        found = importances(model, capture, batch, [everything[index] for index in batch.indices])
        for index, of_row in zip(batch.indices, found, strict=True):
            name = SAFETY if index < counts[SAFETY] else UTILITY
            for key, values in of_row.items():
                each = values.double().cpu().numpy().ravel()
                part.sums[f"{name}/{key}"] = part.sums.get(f"{name}/{key}", 0.0) + each
        return part

    means = _means(run.fold([row.ids for row in everything], reduce), counts)
    shares = method.safety, method.utility
    values = {key: kept_share(means[f"{SAFETY}/{key}"], means[f"{UTILITY}/{key}"], run.sizes[key], *shares) for key in places}
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
            raise NumericalError(f"no answer to the {name} prompts gave finite numbers; the first: {next(iter(folded.failed.values()))}")
    return {name: values / counts[name.split("/", 1)[0]] for name, values in folded.sums.items()}


def _places(model: LanguageModel, keys: Sequence[str]) -> dict[str, SitePlace]:
    routed = [key for key in keys if ".experts." in key]
    if routed:
        raise UnsupportedModelError(f"{routed[0]} is an expert's: weights of routed experts are not scored; use --sites q,k,v,o")
    return {key: model.anatomy.place(key) for key in keys}


def _answers(run: Run, prompts: Prompts, name: str) -> list[ScoredRow]:
    """The model's own greedy answers, their first tokens scored."""
    model = run.aligned
    written = generate(model, prompts, name, SCORED_TOKENS, run.stream, batch_size=run.batch_size)
    encoded = model.encode(prompts, reserve=SCORED_TOKENS)
    rows = [ScoredRow((*row.ids, *answer), len(row.ids), 1.0) for row, answer in zip(encoded, written, strict=True) if answer]
    broken = sum(answer is None for answer in written)
    if broken == len(prompts):
        raise NumericalError(f"all {broken} {name} prompts gave NaN or infinity: check the model's weights, or use --dtype float32")
    if not rows:
        raise InputError(f"all {len(prompts)} {name} prompts got an empty answer: there is nothing to weigh; use other prompts")
    empty = len(prompts) - len(rows) - broken
    run.notes += [f"{empty} {name} prompts have an empty answer and were left out"] if empty else []
    run.notes += [f"{broken} {name} prompts gave NaN or infinity and were left out"] if broken else []
    return rows


def _by_gradient(model: LanguageModel, capture: Capture, batch: Batch, rows: Sequence[ScoredRow]) -> list[dict[str, Tensor]]:
    with frozen(model.model), model.running(), torch.enable_grad(), capture.on():
        logits = forward(model.model, batch, with_logits=True)
        assert logits is not None
        capture.check()
        modules = list(capture.zeros)
        slopes = dict(zip(modules, torch.autograd.grad(score_rows(logits, batch, rows).sum(), list(capture.zeros.values())), strict=True))
    found: list[dict[str, Tensor]] = []
    for row in range(len(rows)):
        each = {}
        with model.active(), torch.no_grad():
            for key, place in capture.places.items():
                slope, fed, weight = slopes[place.hooked][row].float(), capture.fed(place, row), place.weight().float()
                gradient = slope.T @ fed if place.side == "input" else take(slope, place.index).T @ fed
                product = (weight * gradient).abs()
                each[key] = product.T if place.side == "input" else product
        found.append(each)
    return found


def _by_input(model: LanguageModel, capture: Capture, batch: Batch, rows: Sequence[ScoredRow]) -> list[dict[str, Tensor]]:
    """(weight × norm)²: its mean over answers ranks weights as |weight| × norm over all answers' tokens does."""
    with model.running(), torch.no_grad(), capture.on():
        forward(model.model, batch)
        capture.check()
    found: list[dict[str, Tensor]] = []
    with model.active(), torch.no_grad():
        weights = {key: place.weight().float() ** 2 for key, place in capture.places.items()}
        for number, row in enumerate(rows):
            each = {}
            for key, place in capture.places.items():
                squares = (capture.fed(place, number)[row.start : len(row.ids)] ** 2).sum(0)
                each[key] = (weights[key] * squares).T if place.side == "input" else weights[key] * squares
            found.append(each)
    return found
