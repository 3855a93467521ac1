"""One row of activations per prompt: at its last token, or the largest over its tokens."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safety_neurons.detectors.runner import PromptCounts, Run
from safety_neurons.errors import NumericalError, UnsupportedModelError
from safety_neurons.model import Encoded, hooks
from safety_neurons.model.passes import Batch, run_batches, said_of_failed

Pool = Callable[[Tensor, Batch], Tensor]


def pooled_activations(
    run: Run, prompts: Sequence[Encoded], keys: Iterable[str], pool: Pool, name: str, *, residual: bool = False
) -> dict[str, Float[Tensor, "prompt neuron"]]:
    """Every site's activations, one row a prompt (`at_last` or `largest`), in float32 or wider, on the host; NaN where the model gives NaN.

    Args:
        run: whose aligned model's activations, and the state in which the rows of finished batches are kept.
        prompts: encoded.
        keys: of sites.
        pool: makes one row of a prompt's tokens.
        name: of these rows in the state.
        residual: also what every layer puts out, under `residual.{layer}`.

    Raises:
        UnsupportedModelError: a key of a routed expert.
    """
    model, stream = run.aligned, run.stream
    names = list(keys)
    routed = [key for key in names if ".experts." in key]
    if routed:
        raise UnsupportedModelError(f"{routed[0]} is an expert's, which does not see every token; use --sites q,k,v,o")
    seen: dict[str, Tensor] = {}
    found = {key: torch.from_numpy(values.copy()) for key, values in stream.named(name).items()}
    encoded = [row.ids for row in prompts]
    done = f"{name}/batches"

    def keep(key: str) -> Callable[[Any], None]:
        def reader(values: Any) -> None:
            seen[key] = values if isinstance(values, Tensor) else values[0]

        return reader

    def take(batch: Batch) -> None:
        for key in list(seen):
            values = pool(seen.pop(key), batch)
            if key not in found:
                found[key] = torch.zeros(len(encoded), values.shape[1], dtype=values.dtype)
            found[key][batch.indices] = values

    def prepare() -> None:
        stream.put(name, {key: values.numpy() for key, values in found.items()})

    def finished(count: int) -> None:
        stream.state[done] = count
        stream.went_on(prepare)

    layers = {layer.module: keep(f"residual.{layer.index}") for layer in model.anatomy.layers} if residual else {}
    with hooks.reading(model.anatomy, {key: keep(key) for key in names}), hooks.around(after=layers), stream.kept(prepare):
        run_batches(model, encoded, take, run.batch_size, start=int(stream.state.get(done, 0)), finished=finished)
        prepare()
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


def whole_rows(parts: Iterable[Float[Tensor, "prompt _"]]) -> Bool[Tensor, " prompt"]:
    """Which prompts have finite numbers in all of these.

    Raises:
        NumericalError: none has.
    """
    whole = torch.stack([values.isfinite().all(1) for values in parts]).all(0)
    if not bool(whole.any()):
        raise NumericalError(f"none of {len(whole)} prompts gave finite numbers: check the model's weights, or use --dtype float32")
    return whole


def sorted_out(
    encoded: Sequence[Sequence[Encoded]], whole: Sequence[Bool[Tensor, " _"]]
) -> tuple[Sequence[Bool[Tensor, " _"]], PromptCounts, list[str]]:
    """Which prompts of two texts are used, what became of those of the first, and what has to be said.

    Args:
        encoded: the prompts of both texts.
        whole: which of them gave finite numbers.
    """
    notes: list[str] = []
    for name, kept in zip(("prompts", "harmless prompts"), whole, strict=True):
        notes += said_of_failed({int(index): "NaN or infinity" for index in (~kept).nonzero().flatten()}, len(kept), name)
    counts = PromptCounts(len(encoded[0]), 0, sum(row.truncated for row in encoded[0])).without(int((~whole[0]).sum()))
    return whole, counts, notes
