"""Teacher-forced likelihoods, one batch's logits at a time: losses of texts, log probabilities of tokens and
of given answers, divergences.

And what a direction of the residual stream says to the vocabulary, through the model's final norm and output
embedding.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from safety_neurons.errors import InputError, MismatchError, UnsupportedModelError
from safety_neurons.model.batches import (
    Batch,
    BatchSize,
    Progress,
    decoder_of,
    forward,
    next_token_rows,
    said_of_failed,
)
from safety_neurons.model.hooks import After, Before, around
from safety_neurons.model.language_model import LanguageModel
from safety_neurons.model.passes import (
    LOGITS_AT_ONCE,
    PassOptions,
    in_order,
    logits_budget,
    run_batches,
)

Span = tuple[int, int]
"""Tokens of a sequence from the first number up to the second."""


@dataclass(frozen=True)
class Losses:
    """Negative log likelihoods of texts, in nats.

    Attributes:
        totals: Summed over the predicted tokens of each text.
        counts: Predicted tokens of each text; 0 for a text of one token, and for one on which the model gave
            NaN.
        failed: Texts on which it gave NaN, which are left out.
    """

    totals: tuple[float, ...]
    counts: tuple[int, ...]
    failed: int = 0

    @property
    def total(self) -> float:
        """Sum over all texts."""
        return float(np.sum(self.totals))

    @property
    def n_tokens(self) -> int:
        """Predicted tokens of all texts."""
        return sum(self.counts)


Treatment = Callable[[], AbstractContextManager[Any]]


_NOT_A_NUMBER = "NaN or infinity in the logits"


def log_probabilities_of_next(
    logits: Float[Tensor, "batch token vocab"], batch: Batch
) -> tuple[Float[Tensor, " row"], Int[Tensor, " row"]]:
    """Log probability of every token but the first of each sequence, differentiable.

    Args:
        logits: Of the batch.
        batch: Where they come from.

    Returns:
        Log probabilities in nats (float32, or float64 where the logits are), sequence by sequence, and the
        flat `batch × token` index of the position that predicts each.
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
        spans: For each sequence the tokens wanted, as `(start, stop)` with `start ≥ 1`; all but the first
            where None.
        batch_size: Rows, or `auto`.
        progress: Called as `progress(batches done, batches in all, tokens done)`.
        notes: Gets a line for every batch that was halved.

    Returns:
        One vector a sequence, in nats; NaN where the model gives NaN. A sequence of one token gives an empty
        one.

    Raises:
        InputError: A span outside its sequence, or an empty sequence.
    """
    wanted = [(1, len(sequence)) for sequence in sequences] if spans is None else list(spans)
    if len(wanted) != len(sequences):
        raise InputError(f"{len(wanted)} spans for {len(sequences)} sequences: expected one each")
    for number, ((start, stop), sequence) in enumerate(zip(wanted, sequences, strict=True)):
        if not 1 <= start <= max(stop, 1) <= len(sequence):
            raise InputError(
                f"span {start}:{stop} of sequence {number} with {len(sequence)} tokens: expected 1 ≤ "
                "start ≤ stop ≤ length"
            )

    def per_batch(batch: Batch) -> dict[int, Float64[np.ndarray, " token"]]:
        assert batch.output is not None
        values, _ = log_probabilities_of_next(batch.output, batch)
        rows = values.double().cpu().split([length - 1 for length in batch.lengths])
        return {
            index: row[wanted[index][0] - 1 : wanted[index][1] - 1].numpy()
            for index, row in zip(batch.indices, rows, strict=True)
        }

    return in_order(run_batches(lm, sequences, per_batch, batch_size, True, progress, notes))


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
    sequences = (
        lm.encode_texts(words, notes=notes) if words else [[int(token) for token in ids] for ids in texts]
    )
    usable = [number for number, ids in enumerate(sequences) if len(ids) > 1]
    values = token_log_probabilities(
        lm, [sequences[number] for number in usable], batch_size=batch_size, progress=progress, notes=notes
    )
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
        treated: Another model with the same vocabulary, or what makes the context in which `lm` is treated,
            such as `lambda: deactivated(lm, neurons)`; it is entered once for each batch.
        batch_size: Rows, or `auto`.
        progress: Called as `progress(batches done, batches in all, tokens done)`.
        notes: Gets a line for every batch that was halved, and one for sequences that were left out.

    Returns:
        One vector a sequence, in nats, one entry a token; an empty one where either model gives NaN.
    """

    def per_batch(batch: Batch) -> dict[int, Float64[np.ndarray, " token"]]:
        assert batch.output is not None
        untreated = batch.output
        other = _treated_logits(lm, batch, treated)
        rows = batch.rows
        parts = [
            _divergence(untreated.flatten(0, 1)[places], other.flatten(0, 1)[places.to(other.device)])
            for places, _ in _chunks(rows, rows, untreated.shape[-1])
        ]
        values = zip(batch.indices, torch.cat(parts).double().cpu().split(batch.lengths), strict=True)
        return {index: row[: 0 if row.isnan().any() else None].numpy() for index, row in values}

    half = PassOptions(budget=logits_budget(lm) // 2 or 1)  # the logits of both models are there at once
    rows = in_order(run_batches(lm, sequences, per_batch, batch_size, True, progress, notes, half))
    if notes is not None:
        failed = {index: _NOT_A_NUMBER for index, row in enumerate(rows) if not len(row)}
        notes += said_of_failed(failed, len(sequences), "sequences")
    return rows


def kl_divergence(
    lm: LanguageModel,
    sequences: Sequence[Sequence[int]],
    treated: Treatment | LanguageModel,
    *,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
    notes: list[str] | None = None,
) -> float | None:
    """Mean of `token_divergences` over all tokens; None where there is none."""
    rows = token_divergences(lm, sequences, treated, batch_size=batch_size, progress=progress, notes=notes)
    return float(np.concatenate(rows).mean()) if any(map(len, rows)) else None


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


def _divergence(
    untreated: Float[Tensor, "row vocab"], treated: Float[Tensor, "row vocab"]
) -> Float[Tensor, " row"]:
    first = widened(untreated).log_softmax(1)
    second = widened(treated).to(first.device).log_softmax(1)
    return (first.exp() * (first - second)).sum(1)


def _chunks(
    rows: Int[Tensor, " row"], targets: Int[Tensor, " row"], width: int
) -> list[tuple[Tensor, Tensor]]:
    size = max(1, LOGITS_AT_ONCE // max(1, width))
    return list(zip(rows.split(size), targets.split(size), strict=True)) if len(rows) else []


Ids = Sequence[int]


@dataclass(frozen=True)
class Choice:
    """How likely each of the given answers is.

    Attributes:
        probabilities: One per answer, summing to 1: at every token where answers part, the model's
            probabilities of the tokens that go on.
        mass: Probability that the model goes on with one of the answers at all, where they first part. Near 0
            the model is not answering the question. Both are NaN where the model gives NaN.
    """

    probabilities: Float64[np.ndarray, " answer"]
    mass: float


def answer_probabilities(
    lm: LanguageModel,
    prompts: Sequence[Ids],
    answers: Sequence[Sequence[Ids]],
    *,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
    notes: list[str] | None = None,
) -> list[Choice]:
    """How likely a model finds each of the given answers to each prompt.

    Answers are a tree of tokens; the model is read where the tree branches, several places in one row where
    they lie behind one another, so that answers that part at one place cost one row a prompt. An answer that
    another one begins with is taken to end there (EOS).

    Args:
        lm: The model.
        prompts: Token ids, template included.
        answers: For each prompt the token ids of its possible answers, at least two different ones.
        batch_size: Rows, or `auto`.
        progress: Called as `progress(batches done, batches in all, tokens done)`.
        notes: Gets a line for every batch that was halved.

    Raises:
        InputError: Not one list of answers per prompt, fewer than two answers, or equal ones.
        MismatchError: An answer ends where another goes on, and the model has no EOS.
    """
    if len(prompts) != len(answers):
        raise InputError(f"{len(answers)} lists of answers for {len(prompts)} prompts: expected one each")
    trees = [_Tree(group, lm.eos_ids) for group in answers]
    rows: list[list[int]] = []
    reads: list[list[tuple[int, tuple[int, ...]]]] = []
    for number, (prompt, tree) in enumerate(zip(prompts, trees, strict=True)):
        for longest, read in tree.rows():
            rows.append([*prompt, *longest])
            reads.append([(number, node) for node in read])
    starts = [len(prompt) for prompt in prompts]

    def per_batch(batch: Batch) -> list[tuple[int, tuple[int, ...], Float64[np.ndarray, " token"]]]:
        assert batch.output is not None
        found = []
        for row, index in enumerate(batch.indices):
            for number, node in reads[index]:
                logits = widened(batch.output[row, starts[number] + len(node) - 1])
                ids = torch.tensor(trees[number].children[node], device=logits.device)
                shares = (logits[ids] - logits.logsumexp(0)).double().exp().cpu().numpy()
                found.append((number, node, shares))
        return found

    for part in run_batches(lm, rows, per_batch, batch_size, True, progress, notes):
        for number, node, shares in part:
            trees[number].read[node] = shares
    return [tree.choice() for tree in trees]


class _Tree:
    """The tokens of several answers, as a tree: for every beginning that several answers share, the tokens
    that go on.
    """

    def __init__(self, answers: Sequence[Ids], eos_ids: Sequence[int]) -> None:
        ended = [tuple(answer) for answer in answers]
        if len(ended) < 2 or len(set(ended)) < len(ended):
            raise InputError(
                f"{len(ended)} answers, {len(set(ended))} of them different: expected at least two "
                "different ones"
            )
        for place, answer in enumerate(ended):
            if any(other != answer and other[: len(answer)] == answer for other in ended):
                if not eos_ids:
                    raise MismatchError(
                        "one answer begins another, and the model has no end token to tell them apart"
                    )
                ended[place] = (*answer, eos_ids[0])
        self.answers = ended
        following: dict[tuple[int, ...], set[int]] = {}
        for answer in ended:
            for place, token in enumerate(answer):
                following.setdefault(answer[:place], set()).add(token)
        self.children = {node: sorted(tokens) for node, tokens in following.items() if len(tokens) > 1}
        self.read: dict[tuple[int, ...], Float64[np.ndarray, " token"]] = {}

    def rows(self) -> list[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
        """The rows to feed behind the prompt, each with the nodes that are read in it."""
        paths: list[tuple[tuple[int, ...], list[tuple[int, ...]]]] = []
        for node in sorted(self.children, key=len, reverse=True):
            home = next((read for longest, read in paths if longest[: len(node)] == node), None)
            if home is None:
                paths.append((node, [node]))
            else:
                home.append(node)
        return paths

    def choice(self) -> Choice:
        """The probabilities, once every node was read."""
        if any(np.isnan(shares).any() for shares in self.read.values()):
            return Choice(np.full(len(self.answers), np.nan), float("nan"))
        values = np.ones(len(self.answers))
        for place, answer in enumerate(self.answers):
            for length in range(len(answer)):
                node = answer[:length]
                if node in self.children:
                    shares = self.read[node]
                    total = shares.sum()
                    values[place] *= (
                        shares[self.children[node].index(answer[length])] / total
                        if total > 0
                        else 1 / len(shares)
                    )
        return Choice(values / values.sum(), float(self.read[min(self.children, key=len)].sum()))


def final_norm(lm: LanguageModel) -> nn.Module | None:
    """The module between the last layer and the output embedding; None where there is none.

    It is found by what it does, not by its name: in one pass its input is the last layer's output, and its
    output is what the decoder gives.

    Raises:
        UnsupportedModelError: something else stands between the two.
    """
    decoder = decoder_of(lm.model)
    last = lm.anatomy.layers[-1].module
    layers = {id(module) for layer in lm.anatomy.layers for module in layer.module.modules()}
    candidates = [
        module for module in decoder.modules() if id(module) not in layers and not list(module.children())
    ]
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    entered: dict[nn.Module, Tensor] = {}
    streams: list[Tensor] = []

    def enter(module: nn.Module) -> Before:
        def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = next(iter([*args, *kwargs.values()]), None)
            if isinstance(given, Tensor):
                entered[module] = given

        return note

    def leave(module: nn.Module) -> After:
        def note(output: Any) -> None:
            if module in entered and isinstance(output, Tensor):
                seen[module] = (entered[module], output)

        return note

    before = {module: enter(module) for module in candidates}
    after: dict[nn.Module, After] = {module: leave(module) for module in candidates}
    after[last] = lambda output: streams.append(output[0] if isinstance(output, tuple) else output)
    with lm.running(), torch.no_grad(), around(before=before, after=after):
        ids = torch.arange(2, device=lm.device)[None] % lm.n_ids
        given = decoder(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, return_dict=True
        ).last_hidden_state
    if torch.equal(given, streams[-1]):
        return None
    for module, (fed, output) in seen.items():
        if fed.shape == given.shape and torch.equal(fed, streams[-1]) and torch.equal(output, given):
            return module
    raise UnsupportedModelError(
        f"between the last layer of this {type(lm.inner).__name__} and its output embedding stands more "
        "than one norm; expected a final norm alone: directions cannot be read through it"
    )


def vocabulary_scores(
    lm: LanguageModel, directions: Float[Tensor, "direction hidden"]
) -> Float[Tensor, "direction vocab"]:
    """Logits of each direction behind the final norm, less what no direction at all gives and less their mean
    over the vocabulary.

    The first is what biases of the norm and of the embedding say by themselves, the second is what no
    probability feels. The norm brings every direction to one size: scores rank the tokens of a direction, and
    do not say which of two directions is the larger.

    Args:
        lm: the model.
        directions: in the residual stream, such as columns of `down`.

    Returns:
        float32; positive where the token becomes likelier as the direction is added; of the opposite
        direction, the opposite.

    Source: Chen et al., NeurIPS 2025, section 5.3 (unembedding of the final norm of a neuron's output
    direction). Differs: biases and the mean over the vocabulary are taken out; a cap on logits is left out,
    which keeps their order.
    """
    norm = final_norm(lm)
    head = lm.inner.get_output_embeddings()
    with lm.running(), torch.no_grad():
        hidden = directions.to(lm.device, lm.dtype)
        hidden = torch.cat([hidden, torch.zeros_like(hidden[:1])])
        logits = head(hidden if norm is None else norm(hidden)).float()
    added = logits[:-1] - logits[-1]
    return added - added.mean(-1, keepdim=True)
