"""Where neurons are active: the tokens at which each is most and least active, and its mean over prompts."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safety_neurons.model import LanguageModel, run_batches
from safety_neurons.model.hooks import reading
from safety_neurons.model.measures import BatchSize
from safety_neurons.model.passes import Batch
from safety_neurons.prompts import Prompts

BEFORE, AFTER = 8, 4
"""Tokens shown on either side of the one that is told."""


@dataclasses.dataclass
class Activity:
    """One neuron on a list of prompts.

    Attributes:
        means: by kind of prompts the mean over the prompts' tokens, one number a prompt.
        ends: by kind, for every prompt the largest and the smallest activation with their positions.
        top: the most and the least active places, each in another prompt.
    """

    means: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    ends: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    top: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        summary = {}
        for kind, values in self.means.items():
            largest, smallest = self.ends[kind][:, 0].max(), self.ends[kind][:, 2].min()
            summary[kind] = {"mean": float(values.mean()), "largest": float(largest), "smallest": float(smallest)}
        return {**summary, **self.top}


def activity(
    model: LanguageModel,
    neurons: Sequence[tuple[str, int]],
    harmful: Prompts,
    harmless: Prompts | None,
    *,
    places: int = 5,
    batch_size: BatchSize = "auto",
) -> dict[tuple[str, int], Activity]:
    """Every neuron on the prompts as the model gets them, template included.

    Args:
        model: the model.
        neurons: which, as (key, index); sites that are active at every token.
        harmful: prompts.
        harmless: more prompts, told apart.
        places: how many prompts are shown at either end.
        batch_size: prompts per pass.
    """
    found = {neuron: Activity() for neuron in neurons}
    shown: list[tuple[float, float, tuple[str, int], dict[str, Any]]] = []
    for kind, prompts in (("harmful", harmful), ("harmless", harmless)):
        if prompts is None or not len(prompts):
            continue
        encoded = model.encode(prompts)
        values = _read(model, neurons, [one.ids for one in encoded], batch_size)
        for column, neuron in enumerate(neurons):
            found[neuron].means[kind] = values[:, column, 4]
            found[neuron].ends[kind] = values[:, column, :4]
            for number, one in enumerate(encoded):
                for side in (0, 2):
                    value, position = float(values[number, column, side]), int(values[number, column, side + 1])
                    place = {"prompts": kind, "prompt_id": one.prompt_id, "value": value, **_context(model, one.ids, position)}
                    shown.append((float(side), value, neuron, place))
    for neuron in neurons:
        mine = [(side, value, place) for side, value, owner, place in shown if owner == neuron]
        found[neuron].top["most_active"] = [
            place for _, _, place in sorted((one for one in mine if one[0] == 0), key=lambda one: -one[1])[:places]
        ]
        found[neuron].top["least_active"] = [
            place for _, _, place in sorted((one for one in mine if one[0] == 2), key=lambda one: one[1])[:places]
        ]
    return found


def _read(model: LanguageModel, neurons: Sequence[tuple[str, int]], sequences: list[list[int]], batch_size: BatchSize) -> np.ndarray:
    """[prompt, neuron, (largest, its position, smallest, its position, mean)]."""
    held: dict[str, Tensor] = {}
    columns: dict[str, list[int]] = {}
    for key, index in neurons:
        columns.setdefault(key, []).append(index)
    values = np.zeros((len(sequences), len(neurons), 5))

    def reader(key: str) -> Callable[[Tensor], None]:
        def keep(activation: Tensor) -> None:
            held[key] = activation[..., columns[key]].double()

        return keep

    def per_batch(batch: Batch) -> None:
        stacked = torch.stack([held[key][..., columns[key].index(index)] for key, index in neurons], -1)
        for row, (index, length) in enumerate(zip(batch.indices, batch.lengths, strict=True)):
            part = stacked[row, :length]
            most, least = part.max(0), part.min(0)
            parts = (most.values, most.indices.double(), least.values, least.indices.double(), part.mean(0))
            values[index] = torch.stack(parts, -1).cpu().numpy()

    with reading(model.anatomy, {key: reader(key) for key in columns}):
        run_batches(model, sequences, per_batch, batch_size)
    return values


def _context(model: LanguageModel, ids: Sequence[int], position: int) -> Mapping[str, Any]:
    def text(part: Sequence[int]) -> str:
        return str(model.tokenizer.decode(list(part)))

    around = {"before": text(ids[max(0, position - BEFORE) : position]), "after": text(ids[position + 1 : position + 1 + AFTER])}
    return {"position": position, "token": text([ids[position]]), **around}
