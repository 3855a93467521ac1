"""Sums over batches that survive a kill: what was summed, how many batches are in it, and who voted.

A detector hands `fold` a function from a batch to sums; `fold` adds them in float64, writes them to the checkpoint after every batch,
and starts behind the last written batch when it is called again. A batch that does not fit in memory is halved.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from safety_neurons.errors import NumericalError, RunError
from safety_neurons.model import LanguageModel
from safety_neurons.model.passes import Batch, BatchSize, Halving, collate, plan, takes_padding, token_budget
from safety_neurons.neurons import Selection, Votes
from safety_neurons.prompts import Prompts
from safety_neurons.results import Checkpoint

Sums = dict[str, np.ndarray]
Progress = Callable[[int, int, int], None]


@dataclass
class Part:
    """What one batch adds.

    Attributes:
        sums: one array per name, added up over batches.
        scores: one entry per prompt of the batch (site key to score of each neuron); only wanted where prompts vote.
    """

    sums: Sums = field(default_factory=dict)
    scores: list[dict[str, np.ndarray]] = field(default_factory=list)


class Stream:
    """Arrays and plain values of one running `find`, kept in a checkpoint when there is one.

    Args:
        checkpoint: where to keep them; None keeps them in memory only.
        key: identifies the configuration; a checkpoint of another one is refused.

    Raises:
        RunError: the checkpoint belongs to another configuration.
    """

    def __init__(self, checkpoint: Checkpoint | None, key: Mapping[str, Any]) -> None:
        self._checkpoint = checkpoint
        self._key = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        self.arrays: Sums = {}
        self.state: dict[str, Any] = {}
        stored = checkpoint.load() if checkpoint is not None else None
        if stored is not None:
            arrays, state = stored
            if state.get("key") != self._key:
                raise RunError(
                    "the stored partial result belongs to another configuration: use another output folder, or overwrite this one"
                )
            self.arrays, self.state = dict(arrays), dict(state)

    def save(self) -> None:
        """Write everything at once; a kill in the middle leaves the previous state."""
        if self._checkpoint is not None:
            self._checkpoint.save(self.arrays, {**self.state, "key": self._key})

    def named(self, prefix: str) -> Sums:
        """Arrays whose name starts with `prefix/`, without the prefix."""
        return {name[len(prefix) + 1 :]: values for name, values in self.arrays.items() if name.startswith(f"{prefix}/")}

    def put(self, prefix: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Set arrays under `prefix/`."""
        self.arrays.update({f"{prefix}/{name}": values for name, values in arrays.items()})


def stream_key(
    method: str,
    models: Sequence[LanguageModel],
    prompts: Prompts,
    config: Mapping[str, Any],
    selection: Selection,
    batch_size: BatchSize,
) -> dict[str, Any]:
    """What a partial state must have been made with to be continued (a selection without agreement acts only at the end)."""
    return {
        **config,
        "method": method,
        "models": [model.name for model in models],
        "templates": [repr(model.template) for model in models],
        "types": [str(model.dtype) for model in models],
        "fingerprint": models[0].fingerprint,
        "prompts": prompts.sha256,
        "selection": selection.config() if selection.agreement is not None else None,
        "batch_size": batch_size,
    }


def fold(
    lm: LanguageModel,
    stream: Stream,
    sequences: Sequence[Sequence[int]],
    reduce: Callable[[Batch], Part],
    *,
    sizes: Mapping[str, int],
    batch_size: BatchSize = "auto",
    budget: int | None = None,
    selection: Selection | None = None,
    progress: Progress | None = None,
    notes: list[str] | None = None,
) -> tuple[Sums, Votes | None]:
    """Sum what `reduce` returns over all batches of `sequences`.

    Args:
        lm: model whose device and padding the batches are made for.
        stream: holds the sums; a resumed one skips the batches that are in them.
        sequences: token ids.
        reduce: batch to part; must leave nothing behind when it raises, for it is called again on the halves of a batch that did not fit.
        sizes: neurons of each site key, for the votes.
        batch_size: rows of a batch, or "auto" for a token budget.
        budget: padded tokens of an "auto" batch.
        selection: with an agreement, every prompt votes for the neurons that it chooses.
        progress: called with (batches done, batches in all, tokens done).
        notes: gets a line for every batch that was halved.

    Returns:
        The sums by name, and the votes (None without agreement).

    Raises:
        NumericalError: a sum is not finite; the message names the site.
    """
    votes = Votes(dict(sizes)) if selection is not None and selection.agreement is not None else None
    if votes is not None and stream.named("votes"):
        votes.restore(stream.named("votes"))
    lengths = [len(sequence) for sequence in sequences]
    groups = plan(lengths, batch_size, token_budget(lm.device, budget), padded=takes_padding(lm))
    halving, tokens = Halving(), 0
    for number, group in enumerate(groups):
        tokens += sum(len(sequences[index]) for index in group)
        if number < int(stream.state.get("batches", 0)):
            continue
        for part in halving.run(collate(sequences, group, number=number, pad_id=lm.pad_id).to(lm.device), reduce):
            _merge(stream, part)
            if votes is not None and selection is not None:
                for scores in part.scores:
                    votes.add(selection.choose(scores))
        if votes is not None:
            stream.put("votes", votes.state())
        stream.state["batches"] = number + 1
        stream.save()
        if progress is not None:
            progress(number + 1, len(groups), tokens)
    if notes is not None:
        notes += halving.notes
    return stream.named("sum"), votes


def _merge(stream: Stream, part: Part) -> None:
    for name, values in part.sums.items():
        if not np.isfinite(values).all():
            raise NumericalError(f"site {name.rsplit('/', 1)[-1]} gave NaN or infinity: check the model's weights, or use --dtype float32")
    for name, values in part.sums.items():
        stored = stream.arrays.get(f"sum/{name}")
        stream.arrays[f"sum/{name}"] = np.asarray(values, dtype=np.float64) + (0.0 if stored is None else stored)


def to_numpy(values: torch.Tensor) -> np.ndarray:
    """A float64 array on the host."""
    return values.detach().to("cpu", torch.float64).numpy()
