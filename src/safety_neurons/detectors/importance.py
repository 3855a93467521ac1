"""Importance: how much a sub-layer's output changes when one neuron's parameters are zero, exactly, for every neuron at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch

from safety_neurons.detectors.finishing import Choice, finish, searched
from safety_neurons.detectors.found import Found, PromptCounts
from safety_neurons.detectors.importance_published import PUBLISHED_SITES
from safety_neurons.detectors.importance_readers import ImportanceReaders, Options
from safety_neurons.detectors.streaming import Part, Progress, Stream, fold, stream_key
from safety_neurons.errors import InputError, UnsupportedModelError, UsageError
from safety_neurons.model import LanguageModel, as_prompts
from safety_neurons.model.language_model import Texts
from safety_neurons.model.passes import Batch, BatchSize, forward
from safety_neurons.neurons import SITES, NeuronSet, Selection
from safety_neurons.prompts import Prompts
from safety_neurons.results import Checkpoint

MEMORY_BUDGET = 2**28
"""Bytes that the changed attention of a chunk of neurons may take."""
SPACES = ("output", "probability")


def find_importance(
    model: LanguageModel,
    prompts: Texts,
    *,
    sites: Sequence[str] = SITES,
    layers: range | str | None = None,
    space: str = "output",
    as_published: bool = False,
    batch_size: BatchSize = "auto",
    memory_budget: int = MEMORY_BUDGET,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
    subtract: NeuronSet | None = None,
    **choice: Unpack[Choice],
) -> Found:
    """Importance of every neuron: L2 norm of the change of its sub-layer's output when its parameters are zero, mean over prompts.

    One forward pass without the output head; scores are computed inside it in closed form, for every prompt with its exact length.
    Memory does not grow with the number of prompts.

    Args:
        model: the model.
        prompts: usually harmful requests, or a general corpus for foundation neurons.
        sites: any of `q k v o gate up down`.
        layers: a range or "A:B"; None for all.
        space: `output`: change of what o or down puts out, comparable across sites; `probability`: for q and k the change of the
            attention probabilities, as the paper writes it.
        as_published: what the public code computes instead (it has no score for gate).
        batch_size: prompts a batch, or "auto".
        memory_budget: bytes that a chunk of neurons may take.
        checkpoint: a killed run continues behind its last finished batch.
        progress: called with (batches done, batches in all, tokens done).
        subtract: neurons taken away after selection.
        **choice: `top`, `count`, `top_per_matrix` or `threshold`, and `agreement`; the largest 1 % by default.

    Raises:
        NumericalError: no prompt gave finite scores.
        UnsupportedModelError: a site that this model does not have, or an attention formula that cannot be proved.
        UsageError: unknown site or space.

    Source: Zhao et al. (ICLR 2025), eq. 1-9 and 11-14.
    Differs: norms are of the sub-layer's output for all sites (the paper leaves q and k in probability space, one threshold for all);
    heads, rotary embedding, mask, biases, norms and soft-caps are exact; o and gate are scored; the score of a prompt sums over all tokens
    fed, special ones included; a set is chosen from the mean over prompts unless an agreement asks for the paper's intersection.
    """
    selection = Selection.of(**choice, default_top=0.01)
    asked = as_prompts(prompts)
    keys, sizes, notes = _wanted(model, sites, layers, space, as_published)
    fed, counts = _encoded(model, asked, notes)
    scored = [site for site in sites if site in PUBLISHED_SITES] if as_published else sites
    config = {"space": space, "as_published": as_published} | searched(scored, layers)
    stream = Stream(checkpoint, stream_key("importance", [model], asked, config, selection, batch_size))
    readers = ImportanceReaders(model, keys, Options(space, as_published, memory_budget))
    reduce = _Reduce(model, readers, selection.agreement is not None)
    options: dict[str, Any] = {"batch_size": batch_size, "selection": selection, "progress": progress, "notes": notes}
    with torch.no_grad(), model.running(), readers.on():
        folded = fold(model, stream, fed, reduce, sizes=sizes, **options)
    counts = counts.without(len(folded.failed))
    return finish(
        "importance",
        {key: folded.sums[key] / counts.used for key in keys},
        table=model.table,
        models=(model.name,),
        selection=selection,
        votes=folded.votes,
        prompts=asked,
        config=config,
        counts=counts,
        notes=notes,
        subtract=subtract,
    )


@dataclass
class _Reduce:
    """One batch to sums over its prompts; leaves nothing behind when it raises."""

    model: LanguageModel
    readers: ImportanceReaders
    per_prompt: bool

    def __call__(self, batch: Batch) -> Part:
        self.readers.start(batch)
        forward(self.model.model, batch)
        rows = self.readers.take()
        sums = {key: np.sum(np.stack([scores[key] for scores in rows]), axis=0) for key in self.readers.keys}
        return Part(sums, rows if self.per_prompt else [])


def _wanted(
    model: LanguageModel, sites: Sequence[str], layers: range | str | None, space: str, as_published: bool
) -> tuple[tuple[str, ...], dict[str, int], list[str]]:
    """Keys to score with their sizes, and what has to be said about them."""
    if space not in SPACES:
        raise UsageError(f"space {space!r} is unknown: use one of {', '.join(SPACES)}")
    notes: list[str] = []
    if as_published:
        sites = [site for site in sites if site in PUBLISHED_SITES]
        notes.append("the public code has no score for gate; gate is left out")
    sizes = model.table.select(sites=sites, layers=layers).sizes
    if as_published and any(".experts." in key for key in sizes):
        raise UnsupportedModelError(
            "experts have no published score: leave as_published out, or score q, k, v and o only (--sites q,k,v,o)"
        )
    refused = [key for key in model.anatomy.refused if key.rsplit(".", 1)[-1] in sites]
    if refused:
        notes.append(
            f"{len(refused)} sites of this model are refused and not scored, first {refused[0]}: {model.anatomy.refused[refused[0]]}"
        )
    return tuple(sizes), dict(sizes), notes


def _encoded(model: LanguageModel, prompts: Prompts, notes: list[str]) -> tuple[list[list[int]], PromptCounts]:
    """Token ids of every prompt that has some."""
    fed: list[list[int]] = []
    failed = truncated = 0
    why: Any = None
    for number in range(len(prompts)):
        try:
            encoded = model.encode(prompts[number : number + 1])[0]
        except InputError as error:
            failed, why = failed + 1, why or error
            continue
        fed.append(encoded.ids)
        truncated += encoded.truncated
    if failed:
        notes.append(f"{failed} of {len(prompts)} prompts could not be read and are not in the scores; the first: {why}")
    if truncated:
        notes.append(f"{truncated} of {len(prompts)} prompts were longer than the context: middle left out")
    return fed, PromptCounts(len(fed), failed, truncated)
