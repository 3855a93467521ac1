"""Where neurons are active: the tokens at which each is most and least active, and its mean over prompts."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safety_neurons.model import LanguageModel, run_batches
from safety_neurons.model.batches import Batch, BatchSize
from safety_neurons.model.hooks import reading
from safety_neurons.prompts import Prompts

BEFORE, AFTER = 8, 4
"""Tokens shown on either side of the one that is told."""
MOST, LEAST = "most_active", "least_active"
SIDES = (MOST, LEAST)


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

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        summary = {
            kind: {"mean": float(values.mean()), "largest": self.ends[kind][0], "smallest": self.ends[kind][1]}
            for kind, values in self.means.items()
        }
        return {**summary, **self.top}


@dataclasses.dataclass(frozen=True)
class Peaks:
    """One prompt: per neuron its mean, and the values and positions of its largest and smallest activations."""

    means: np.ndarray
    values: dict[str, np.ndarray]
    positions: dict[str, np.ndarray]


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
        places: how many are shown at either end.
        batch_size: prompts per pass.
    """
    found = {neuron: Activity() for neuron in neurons}
    shown: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = {neuron: {name: [] for name in SIDES} for neuron in neurons}
    for kind, prompts in (("harmful", harmful), ("harmless", harmless)):
        if prompts is None or not len(prompts):
            continue
        encoded = model.encode(prompts)
        peaks = _read(model, neurons, [one.ids for one in encoded], places, batch_size)
        for column, neuron in enumerate(neurons):
            found[neuron].means[kind] = np.array([peak.means[column] for peak in peaks])
            largest, smallest = ([peak.values[name][0, column] for peak in peaks] for name in SIDES)
            found[neuron].ends[kind] = (float(max(largest)), float(min(smallest)))
            for one, peak in zip(encoded, peaks, strict=True):
                for name in SIDES:
                    for value, position in zip(peak.values[name][:, column], peak.positions[name][:, column], strict=True):
                        place = {"prompts": kind, "prompt_id": one.prompt_id, "value": float(value)}
                        shown[neuron][name].append({**place, **_context(model, one.ids, int(position))})
    for neuron in neurons:
        for name in SIDES:
            ordered = sorted(shown[neuron][name], key=lambda place: float(place["value"]), reverse=name == MOST)
            found[neuron].top[name] = _different(ordered, places)
    return found


def _different(places: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The first places whose token and the text before it differ."""
    kept = {(place["before"], place["token"]): place for place in reversed(places)}
    return [place for place in places if kept[place["before"], place["token"]] is place][:count]


def _read(
    model: LanguageModel, neurons: Sequence[tuple[str, int]], sequences: list[list[int]], places: int, batch_size: BatchSize
) -> list[Peaks]:
    """The peaks of every prompt."""
    held: dict[str, Tensor] = {}
    columns: dict[str, list[int]] = {}
    for key, index in neurons:
        columns.setdefault(key, []).append(index)
    found: dict[int, Peaks] = {}

    def reader(key: str) -> Callable[[Tensor], None]:
        def keep(activation: Tensor) -> None:
            held[key] = activation[..., columns[key]].double()

        return keep

    def per_batch(batch: Batch) -> None:
        stacked = torch.stack([held[key][..., columns[key].index(index)] for key, index in neurons], -1)
        for row, (index, length) in enumerate(zip(batch.indices, batch.lengths, strict=True)):
            part = stacked[row, :length].cpu()
            ends = {name: part.topk(min(places, length), 0, largest=name == MOST) for name in SIDES}
            values = {name: end.values.numpy() for name, end in ends.items()}
            found[index] = Peaks(part.mean(0).numpy(), values, {name: end.indices.numpy() for name, end in ends.items()})

    with reading(model.anatomy, {key: reader(key) for key in columns}):
        run_batches(model, sequences, per_batch, batch_size)
    return [found[number] for number in range(len(sequences))]


def _context(model: LanguageModel, ids: Sequence[int], position: int) -> Mapping[str, Any]:
    def text(part: Sequence[int]) -> str:
        return str(model.tokenizer.decode(list(part)))

    around = {"before": text(ids[max(0, position - BEFORE) : position]), "after": text(ids[position + 1 : position + 1 + AFTER])}
    return {"position": position, "token": text([ids[position]]), **around}
