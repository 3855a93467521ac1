"""Wanda set difference: large weights on features that are large while refusing and not while answering harmless prompts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from safety_neurons.detectors.found import Found
from safety_neurons.detectors.gradients import Scored
from safety_neurons.detectors.set_difference import Capture, find_set_difference
from safety_neurons.detectors.snip import split
from safety_neurons.model import LanguageModel
from safety_neurons.model.language_model import Texts as Asked
from safety_neurons.model.passes import Batch, forward


def find_wanda(model: LanguageModel, prompts: Asked, *, harmless: Asked, **options: Any) -> Found:
    """|weight| × root mean square over answers of the norm of its input feature; then the set difference of `find_set_difference`.

    Arguments, errors and defaults as for `find_snip`; the norm is over the tokens of an answer.

    Source: Wei et al. (ICML 2024, arXiv 2402.05162), sections 3.1 and 3.3; Wanda: Sun et al. (ICLR 2024).
    Differs: a neuron's score is the share of its weights in the set difference; as in Wei et al. the largest weights are taken of the
    whole matrix (Wanda itself compares within one output).
    """
    choice, rest = split(options)
    return find_set_difference("wanda", model, prompts, harmless, _importances, False, choice, **rest)


def _importances(model: LanguageModel, capture: Capture, batch: Batch, rows: Sequence[Scored]) -> list[dict[str, Tensor]]:
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
