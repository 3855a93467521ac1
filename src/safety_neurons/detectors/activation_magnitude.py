"""Activation magnitude: the neurons that are simply large, the control for methods that follow size."""

from collections.abc import Sequence
from typing import Any, Unpack

import torch

from safety_neurons.detectors.finishing import Choice, finish, searched
from safety_neurons.detectors.found import Found, PromptCounts
from safety_neurons.detectors.pairs import chosen_rows, comparing, read, rows_at
from safety_neurons.detectors.streaming import Part, Progress, Stream, fold, stream_key, to_numpy
from safety_neurons.model import LanguageModel, as_prompts
from safety_neurons.model.language_model import Texts as Asked
from safety_neurons.model.passes import Batch, BatchSize
from safety_neurons.neurons import SITES, NeuronSet, Selection
from safety_neurons.results import Checkpoint


def find_activation_magnitude(
    model: LanguageModel,
    prompts: Asked,
    *,
    sites: Sequence[str] = SITES,
    layers: range | str | None = None,
    batch_size: BatchSize = "auto",
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
    subtract: NeuronSet | None = None,
    **choice: Unpack[Choice],
) -> Found:
    """Root mean square of each neuron's activation over all tokens of the prompts; an expert's over the tokens routed to it.

    Args:
        model: usually the aligned model.
        prompts: usually harmful requests.
        sites: any of `q k v o gate up down`.
        layers: a range or "A:B"; None for all.
        batch_size: prompts a batch, or "auto".
        checkpoint: partial state; a killed run continues behind its last finished batch.
        progress: called with (batches done, in all, tokens).
        subtract: neurons taken away after selection.
        **choice: `top`, `count`, `top_per_matrix` or `threshold`; the largest 5 % by default.

    Raises:
        NumericalError: NaN or infinity; the message names the site.

    Source: activation size, the usual baseline of pruning.
    """
    asked = as_prompts(prompts)
    selection = Selection.of(**choice, default_top=0.05)
    sizes = model.table.select(sites=sites, layers=layers).sizes
    config = searched(sites, layers)
    stream = Stream(checkpoint, stream_key("activation-magnitude", [model], asked, config, selection, batch_size))
    encoded = model.encode(asked)

    def reduce(batch: Batch) -> Part:
        part = Part()
        positions, _ = chosen_rows(batch, [0] * len(batch), batch.lengths)

        def reader(key: str) -> Any:
            def add(values: Any) -> None:
                rows = rows_at(values, positions).values.double()
                part.sums[f"square/{key}"] = to_numpy(rows.square().sum(0))
                part.sums[f"count/{key}"] = to_numpy(torch.tensor([float(len(rows))]))

            return add

        read(model, batch, {key: reader(key) for key in sizes})
        return part

    notes: list[str] = []
    made: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "notes": notes}
    with comparing(model, model):
        folded = fold(model, stream, [row.ids for row in encoded], reduce, sizes=sizes, **made)
    sums = folded.sums
    values = {key: (sums[f"square/{key}"] / max(float(sums[f"count/{key}"][0]), 1.0)) ** 0.5 for key in sizes}
    counts = PromptCounts(len(asked), 0, sum(row.truncated for row in encoded)).without(len(folded.failed))
    told: dict[str, Any] = {"table": model.table, "models": (model.name,), "prompts": asked, "selection": selection}
    return finish("activation-magnitude", values, config=config, counts=counts, notes=notes, subtract=subtract, **told)
