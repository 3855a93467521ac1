"""Teacher-forced likelihoods: losses of texts, log probabilities of given tokens, divergences; logits of one batch at a time."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from safety_neurons.errors import InputError
from safety_neurons.model.language_model import LanguageModel
from safety_neurons.model.measures import BatchSize, Losses, Progress, Span
from safety_neurons.model.passes import Batch, forward, next_token_rows, run_batches, said_of_failed, token_budget

Treatment = Callable[[], AbstractContextManager[Any]]
LOGIT_BYTES = 2**29
_CHUNK = 2**22
_NOT_A_NUMBER = "NaN or infinity in the logits"


def log_probabilities_of_next(
    logits: Float[Tensor, "batch token vocab"], batch: Batch
) -> tuple[Float[Tensor, " row"], Int[Tensor, " row"]]:
    """Log probability of every token but the first of each sequence, differentiable.

    Args:
        logits: Of the batch.
        batch: Where they come from.

    Returns:
        Log probabilities in nats (float32, or float64 where the logits are), sequence by sequence, and the flat `batch × token` index of
        the position that predicts each.
    """
    rows, targets = next_token_rows(batch)
    flat = logits.flatten(0, 1)
    parts = []
    for places, ids in _chunks(rows, targets, flat.shape[-1]):
        scores = widened(flat[places])
        parts.append(scores.gather(1, ids[:, None]).squeeze(1) - scores.logsumexp(1))
    return torch.cat(parts) if parts else widened(flat[:0, 0]), rows


def token_log_probabilities(
    lm: LanguageModel,
    sequences: Sequence[Sequence[int]],
    spans: Sequence[Span] | None = None,
    *,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
    notes: list[str] | None = None,
) -> list[Float64[np.ndarray, " token"]]:
    """Log probability of given tokens, each under the tokens before it.

    Args:
        lm: The model.
        sequences: Token ids, context included.
        spans: For each sequence the tokens wanted, as `(start, stop)` with `start ≥ 1`; all but the first where None.
        batch_size: Rows, or `auto`.
        progress: Called as `progress(batches done, batches in all, tokens done)`.
        notes: Gets a line for every batch that was halved.

    Returns:
        One vector a sequence, in nats; NaN where the model gives NaN. A sequence of one token gives an empty one.

    Raises:
        InputError: A span outside its sequence, or an empty sequence.
    """
    wanted = [(1, len(sequence)) for sequence in sequences] if spans is None else list(spans)
    if len(wanted) != len(sequences):
        raise InputError(f"{len(wanted)} spans for {len(sequences)} sequences: expected one each")
    for number, ((start, stop), sequence) in enumerate(zip(wanted, sequences, strict=True)):
        if not 1 <= start <= max(stop, 1) <= len(sequence):
            raise InputError(f"span {start}:{stop} of sequence {number} with {len(sequence)} tokens: expected 1 ≤ start ≤ stop ≤ length")
    found: dict[int, Float64[np.ndarray, " token"]] = {}

    def per_batch(batch: Batch) -> None:
        assert batch.output is not None
        values, _ = log_probabilities_of_next(batch.output, batch)
        for index, row in zip(batch.indices, values.double().cpu().split([length - 1 for length in batch.lengths]), strict=True):
            start, stop = wanted[index]
            found[index] = row[start - 1 : stop - 1].numpy()

    run_batches(lm, sequences, per_batch, batch_size, True, progress, budget=logits_budget(lm), notes=notes)
    return [found[index] for index in range(len(sequences))]


def token_losses(
    lm: LanguageModel,
    texts: Sequence[str] | Sequence[Sequence[int]],
    *,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
    notes: list[str] | None = None,
) -> Losses:
    """Negative log likelihood of running text, each text as it stands; perplexity is exp(total / n_tokens).

    A text on which the model gives NaN is left out and counted.

    Args:
        lm: The model.
        texts: Texts (fed without a template, cut at the context's length), or token ids.
        batch_size: Rows, or `auto`.
        progress: Called as `progress(batches done, batches in all, tokens done)`.
        notes: Gets a line for what had to be said.
    """
    words = [text for text in texts if isinstance(text, str)]
    sequences = lm.encode_texts(words) if words else [[int(token) for token in ids] for ids in texts]
    usable = [number for number, ids in enumerate(sequences) if len(ids) > 1]
    values = token_log_probabilities(lm, [sequences[number] for number in usable], batch_size=batch_size, progress=progress, notes=notes)
    totals, counts = [0.0] * len(sequences), [0] * len(sequences)
    failed: dict[int, str] = {}
    for number, row in zip(usable, values, strict=True):
        if np.isnan(row).any():
            failed[number] = _NOT_A_NUMBER
        else:
            totals[number], counts[number] = -float(row.sum()), len(row)
    if notes is not None:
        notes += said_of_failed(failed, len(sequences), "texts")
    return Losses(tuple(totals), tuple(counts), len(failed))


def token_divergences(
    lm: LanguageModel,
    sequences: Sequence[Sequence[int]],
    treated: Treatment | LanguageModel,
    *,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
    notes: list[str] | None = None,
) -> list[Float64[np.ndarray, " token"]]:
    """KL(untreated ‖ treated) of the next-token distribution at every position.

    Args:
        lm: The untreated model.
        sequences: Token ids.
        treated: Another model with the same vocabulary, or what makes the context in which `lm` is treated, such as
            `lambda: deactivated(lm, neurons)`; it is entered once for each batch.
        batch_size: Rows, or `auto`.
        progress: Called as `progress(batches done, batches in all, tokens done)`.
        notes: Gets a line for every batch that was halved, and one for sequences that were left out.

    Returns:
        One vector a sequence, in nats, one entry a token; an empty one where either model gives NaN.
    """
    found: dict[int, Float64[np.ndarray, " token"]] = {}
    failed: dict[int, str] = {}

    def per_batch(batch: Batch) -> None:
        assert batch.output is not None
        untreated = batch.output
        other = _treated_logits(lm, batch, treated)
        rows = batch.rows
        parts = [
            _divergence(untreated.flatten(0, 1)[places], other.flatten(0, 1)[places.to(other.device)])
            for places, _ in _chunks(rows, rows, untreated.shape[-1])
        ]
        for index, row in zip(batch.indices, torch.cat(parts).double().cpu().split(batch.lengths), strict=True):
            if bool(row.isnan().any()):
                failed[index] = _NOT_A_NUMBER
            found[index] = row[: 0 if index in failed else None].numpy()

    run_batches(lm, sequences, per_batch, batch_size, True, progress, budget=logits_budget(lm) // 2 or 1, notes=notes)
    if notes is not None:
        notes += said_of_failed(failed, len(sequences), "sequences")
    return [found[index] for index in range(len(sequences))]


def kl_divergence(
    lm: LanguageModel,
    sequences: Sequence[Sequence[int]],
    treated: Treatment | LanguageModel,
    *,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
) -> float | None:
    """Mean of `token_divergences` over all tokens; None where there is none."""
    rows = token_divergences(lm, sequences, treated, batch_size=batch_size, progress=progress)
    return float(np.concatenate(rows).mean()) if any(map(len, rows)) else None


def logits_budget(lm: LanguageModel) -> int:
    """Padded tokens of a batch whose logits are kept for a moment: at most 512 MB of them."""
    return max(1, min(token_budget(lm.device), LOGIT_BYTES // (4 * lm.n_ids)))


def widened(values: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """In float32, or in float64 where the values are."""
    return values if values.dtype == torch.float64 else values.float()


def _treated_logits(lm: LanguageModel, batch: Batch, treated: Treatment | LanguageModel) -> Tensor:
    if isinstance(treated, LanguageModel):
        with treated.running():
            logits = forward(treated.model, batch.to(treated.device), with_logits=True)
    else:
        with treated():
            logits = forward(lm.model, batch, with_logits=True)
    assert logits is not None
    return logits


def _divergence(untreated: Float[Tensor, "row vocab"], treated: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
    first = widened(untreated).log_softmax(1)
    second = widened(treated).to(first.device).log_softmax(1)
    return (first.exp() * (first - second)).sum(1)


def _chunks(rows: Int[Tensor, " row"], targets: Int[Tensor, " row"], width: int) -> list[tuple[Tensor, Tensor]]:
    size = max(1, _CHUNK // max(1, width))
    return list(zip(rows.split(size), targets.split(size), strict=True)) if len(rows) else []
