"""One row of activations per prompt: at its last token, or the largest over its tokens."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model import LanguageModel, hooks
from safety_neurons.model.passes import Batch, BatchSize, run_batches
from safety_neurons.prompts import Prompts

Pool = Callable[[Tensor, Batch], Tensor]


def pooled_activations(
    model: LanguageModel, prompts: Prompts, keys: Iterable[str], pool: Pool, *, batch_size: BatchSize = "auto"
) -> dict[str, Float[Tensor, "prompt neuron"]]:
    """Every site's activations, one row a prompt (`at_last` or `largest`), in float32 or wider, on the host.

    Raises:
        UnsupportedModelError: a key of a routed expert.
    """
    names = list(keys)
    routed = [key for key in names if ".experts." in key]
    if routed:
        raise UnsupportedModelError(f"{routed[0]} is an expert's, which does not see every token; use --sites q,k,v,o")
    seen: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    encoded = [row.ids for row in model.encode(prompts)]

    def keep(key: str) -> Callable[[Any], None]:
        def reader(values: Tensor) -> None:
            seen[key] = values

        return reader

    def take(batch: Batch) -> None:
        for key in names:
            values = pool(seen.pop(key), batch)
            if key not in found:
                found[key] = torch.zeros(len(encoded), values.shape[1], dtype=values.dtype)
            found[key][batch.indices] = values

    with hooks.reading(model.anatomy, {key: keep(key) for key in names}):
        run_batches(model, encoded, take, batch_size)
    return found


def largest(values: Float[Tensor, "batch token feature"], batch: Batch) -> Float[Tensor, "batch feature"]:
    """The largest over the real tokens of every row, in float32 or wider, on the host."""
    taken = torch.stack([row[:length].amax(0) for row, length in zip(values, batch.lengths, strict=True)]).cpu()
    return taken if taken.dtype == torch.float64 else taken.float()


def at_last(values: Float[Tensor, "batch token feature"], batch: Batch) -> Float[Tensor, "batch feature"]:
    """The last real token of every row, in float32 or wider, on the host."""
    last = batch.row_lengths.to(values.device) - 1
    taken = values[torch.arange(len(last), device=values.device), last].cpu()
    return taken if taken.dtype == torch.float64 else taken.float()
