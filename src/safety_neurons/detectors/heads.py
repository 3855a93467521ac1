"""Safety heads: how far the next token's distribution moves when one attention head is taken away.

A head is taken away at the input of the output projection, where nothing but this head is in its columns:
keys and values that it shares with other heads of its group stay. What comes before the head's layer is
computed once.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safety_neurons.detectors.methods import SafetyHeads
from safety_neurons.detectors.parts import ScoredPart, scored
from safety_neurons.detectors.runner import BatchSums, PromptCounts, Run, Scored, to_numpy
from safety_neurons.model import LanguageModel, hooks
from safety_neurons.model.batches import Batch, forward
from safety_neurons.model.language_model import said_of_reading
from safety_neurons.neurons import parse_key


def score(method: SafetyHeads, run: Run) -> Scored:
    """Mean divergence over prompts of every head, as the score of its neurons."""
    model = run.aligned
    encoded = model.encode(run.prompts)
    run.notes += said_of_reading(encoded)
    keys = [key for key in run.sizes if parse_key(key).site == "o"]

    def reduce(batch: Batch) -> BatchSums:
        return BatchSums(
            {
                f"divergence/{key}": to_numpy(moved.sum(1))
                for key, moved in divergences(model, batch, keys).items()
            }
        )

    folded = run.fold([row.ids for row in encoded], reduce)
    used = len(encoded) - len(folded.failed)
    parts = []
    for key in keys:
        size = model.table[key].head_dim
        for head, value in enumerate(folded.sums[f"divergence/{key}"] / used):
            neurons = {key: range(head * size, (head + 1) * size)}
            parts.append(ScoredPart(parse_key(key).layer, head, float(value), neurons))
    counts = PromptCounts(len(encoded), 0, sum(row.truncated for row in encoded)).without(len(folded.failed))
    return scored(method, run, parts, counts)


def divergences(lm: LanguageModel, batch: Batch, keys: list[str]) -> dict[str, Float[Tensor, "head batch"]]:
    """KL(as it is ‖ without the head) of the token after every prompt, for every head of these `o` sites."""
    outputs: dict[int, Any] = {}
    layers = {layer.index: layer.module for layer in lm.anatomy.layers}
    kept = {module: partial(outputs.__setitem__, number) for number, module in layers.items()}
    with hooks.around(after=kept, each=True):
        whole = next_token(lm, batch)
    result = {}
    for key in keys:
        info, layer = lm.table[key], parse_key(key).layer
        before = {layers[number]: _given(outputs[number]) for number in layers if number < layer}
        rows = []
        for head in range(info.n_heads):
            editor = partial(_without, head * info.head_dim, (head + 1) * info.head_dim)
            with hooks.with_forwards(before), hooks.editing(lm.anatomy, {key: editor}):
                rows.append(divergence(whole, next_token(lm, batch)))
        result[key] = torch.stack(rows)
    return result


def _given(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: output


def _without(start: int, stop: int, values: Float[Tensor, "batch token mixed"]) -> Tensor:
    values = values.clone()
    values[..., start:stop] = 0
    return values


def next_token(lm: LanguageModel, batch: Batch) -> Float[Tensor, "batch vocab"]:
    """Log-probabilities of the token after every row, in float64 where the device has it."""
    last = batch.row_lengths - 1

    def at_last(values: Tensor) -> Tensor:
        here = last.to(values.device)
        return values[torch.arange(len(here), device=values.device), here][:, None]

    def cut(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (at_last(args[0]), *args[1:]), kwargs

    head: nn.Module | None = lm.inner.get_output_embeddings()
    before: Mapping[nn.Module, hooks.Before] = {} if head is None else {head: cut}
    with lm.running(), torch.no_grad(), hooks.around(before=before):
        logits = forward(lm.model, batch, with_logits=True)
    assert logits is not None
    logits = logits if head is not None else at_last(logits)
    wide = logits[:, 0].float() if logits.device.type == "mps" else logits[:, 0].double()
    return wide.log_softmax(-1)


def divergence(
    one: Float[Tensor, "batch vocab"], other: Float[Tensor, "batch vocab"]
) -> Float[Tensor, " batch"]:
    """KL(one ‖ other) of each row of log-probabilities."""
    chances = one.exp()
    # A token that has no chance adds nothing, NaN stays NaN.
    return torch.where(chances == 0, torch.zeros_like(one), chances * (one - other)).sum(-1)
