"""SNIP set difference: weights whose change would alter the loss of refusals and not that of harmless answers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from safety_neurons.detectors.finishing import Choice
from safety_neurons.detectors.found import Found
from safety_neurons.detectors.gradients import Scored, frozen, score_rows
from safety_neurons.detectors.set_difference import Capture, Options, find_set_difference
from safety_neurons.model import LanguageModel
from safety_neurons.model.language_model import Texts as Asked
from safety_neurons.model.layouts import take
from safety_neurons.model.passes import Batch, forward


def find_snip(model: LanguageModel, prompts: Asked, *, harmless: Asked, **options: Any) -> Found:
    """|weight × gradient of the loss of the model's own answer|, mean over prompts; then the set difference of `find_set_difference`.

    Args:
        model: usually the aligned model.
        prompts: usually harmful requests; the model's answers to them are what safety is read from.
        harmless: prompts whose answers utility is read from.
        **options: `safety` and `utility` (share of each matrix's weights that counts as important, 0.05 each), `sites`, `layers`,
            `batch_size`, `checkpoint`, `progress`, `subtract`, and `top`, `count`, `top_per_matrix` or `threshold` (the largest 5 %).

    Raises:
        InputError: every answer is empty.
        UnsupportedModelError: routed experts at the searched sites.
        UsageError: a share that is none, or an agreement.

    Source: Wei et al. (ICML 2024, arXiv 2402.05162), sections 3.1 and 3.3; SNIP: Lee et al. (ICLR 2019).
    Differs: they take single weights away; here a neuron's score is the share of its weights in the set difference. The text is the
    model's own answers, the first 16 tokens of each. Importances of both texts (two numbers per weight) are held in memory.
    """
    choice, rest = split(options)
    return find_set_difference("snip", model, prompts, harmless, _importances, True, choice, **rest)


def split(options: dict[str, Any]) -> tuple[Choice, Options]:
    """The selection's part of some options, and the others."""
    unknown = options.keys() - Choice.__annotations__.keys() - Options.__annotations__.keys()
    if unknown:
        raise TypeError(f"unexpected arguments {', '.join(sorted(unknown))}")
    chosen: Any = {name: value for name, value in options.items() if name in Choice.__annotations__}
    rest: Any = {name: value for name, value in options.items() if name not in Choice.__annotations__}
    return chosen, rest


def _importances(model: LanguageModel, capture: Capture, batch: Batch, rows: Sequence[Scored]) -> list[dict[str, Tensor]]:
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
