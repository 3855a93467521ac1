"""Activation magnitude: the neurons that are simply large, the control for methods that follow size."""

from typing import Any

import torch

from safety_neurons.detectors.methods import ActivationMagnitude
from safety_neurons.detectors.pairs import chosen_rows, read, rows_at
from safety_neurons.detectors.runner import PromptCounts, Run, Scored
from safety_neurons.detectors.streaming import Part, to_numpy
from safety_neurons.model.passes import Batch


def score(_: ActivationMagnitude, run: Run) -> Scored:
    """Root mean square of every neuron's activation over the tokens of the prompts."""
    model = run.aligned
    encoded = model.encode(run.prompts)

    def reduce(batch: Batch) -> Part:
        part = Part()
        positions, _ = chosen_rows(batch, [0] * len(batch), batch.lengths)

        def reader(key: str) -> Any:
            def add(values: Any) -> None:
                rows = rows_at(values, positions).values.double()
                part.sums[f"square/{key}"] = to_numpy(rows.square().sum(0))
                part.sums[f"count/{key}"] = to_numpy(torch.tensor([float(len(rows))]))

            return add

        read(model, batch, {key: reader(key) for key in run.sizes})
        return part

    folded = run.fold([row.ids for row in encoded], reduce)
    sums = folded.sums
    values = {key: (sums[f"square/{key}"] / max(float(sums[f"count/{key}"][0]), 1.0)) ** 0.5 for key in run.sizes}
    counts = PromptCounts(len(run.prompts), 0, sum(row.truncated for row in encoded)).without(len(folded.failed))
    return Scored(values, counts)
