"""Importance: how much a sub-layer's output changes when one neuron's parameters are zero, exactly, for every neuron at once."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from safety_neurons.detectors.importance_published import PUBLISHED_SITES
from safety_neurons.detectors.importance_readers import ImportanceReaders, Options
from safety_neurons.detectors.methods import Importance
from safety_neurons.detectors.runner import PromptCounts, Run, Scored
from safety_neurons.detectors.streaming import Part
from safety_neurons.errors import InputError, UnsupportedModelError
from safety_neurons.model import LanguageModel
from safety_neurons.model.passes import Batch, forward


def score(method: Importance, run: Run) -> Scored:
    """The importance of every neuron, inside one forward pass a batch."""
    keys = _keys(method, run)
    fed, counts = _encoded(run)
    readers = ImportanceReaders(run.aligned, keys, Options(method.space, method.as_published, method.memory_budget * 2**20))
    with torch.no_grad(), run.aligned.running(), readers.on():
        folded = run.fold(fed, _Reduce(run.aligned, readers, run.votes))
    counts = counts.without(len(folded.failed))
    return Scored({key: folded.sums[key] / counts.used for key in keys}, counts, folded.votes)


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


def _keys(method: Importance, run: Run) -> tuple[str, ...]:
    """Site keys to score; what has to be said about them is noted."""
    model, sites = run.aligned, method.searched
    keys = tuple(run.sizes)
    if method.as_published:
        run.notes.append("the public code has no score for gate; gate is left out")
        keys = tuple(key for key in keys if key.rsplit(".", 1)[-1] in PUBLISHED_SITES)
        if any(".experts." in key for key in keys):
            raise UnsupportedModelError(
                "experts have no published score: leave as_published out, or score q, k, v and o only (--sites q,k,v,o)"
            )
    refused = [key for key in model.anatomy.refused if key.rsplit(".", 1)[-1] in sites]
    if refused:
        why = model.anatomy.refused[refused[0]]
        run.notes.append(f"{len(refused)} sites of this model are refused and not scored, first {refused[0]}: {why}")
    return keys


def _encoded(run: Run) -> tuple[list[list[int]], PromptCounts]:
    """Token ids of every prompt that has some."""
    fed: list[list[int]] = []
    failed = truncated = 0
    why: Any = None
    for number in range(len(run.prompts)):
        try:
            encoded = run.aligned.encode(run.prompts[number : number + 1])[0]
        except InputError as error:
            failed, why = failed + 1, why or error
            continue
        fed.append(encoded.ids)
        truncated += encoded.truncated
    if failed:
        run.notes.append(f"{failed} of {len(run.prompts)} prompts could not be read and are not in the scores; the first: {why}")
    if truncated:
        run.notes.append(f"{truncated} of {len(run.prompts)} prompts were longer than the context: middle left out")
    return fed, PromptCounts(len(fed), failed, truncated)
