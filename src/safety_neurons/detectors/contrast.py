"""Inference-time activation contrasting: which neurons fire differently in two models that read the same text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from safety_neurons.detectors.finishing import Choice, finish, searched
from safety_neurons.detectors.found import Found
from safety_neurons.detectors.pairs import Rows, chosen_rows, comparing, in_both, read, rows_at, writer_of
from safety_neurons.detectors.streaming import Folded, Part, Progress, Stream, Sums, fold, stream_key, to_numpy
from safety_neurons.detectors.text import Span, Texts, text_config, texts
from safety_neurons.model import LanguageModel, as_prompts, check_pair
from safety_neurons.model.language_model import Texts as Asked
from safety_neurons.model.passes import Batch, BatchSize, token_budget
from safety_neurons.neurons import NeuronSet, Selection
from safety_neurons.results import Checkpoint, Completions

MEMORY_BUDGET = 2**30
"""Bytes of one model's activations that are kept while the other model reads the same batch."""


@dataclass(frozen=True)
class ContrastStatistics:
    """What is kept of two models that read the same text: one number per neuron each, whatever the number of tokens.

    Attributes:
        counts: tokens per site key (an expert counts the tokens that both models routed to it).
        squared_difference: Σ (base − aligned)² per neuron.
        base: (Σ a, Σ a²) per neuron of the base model.
        aligned: the same of the aligned model.
    """

    counts: Mapping[str, int]
    squared_difference: Mapping[str, np.ndarray]
    base: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]
    aligned: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]

    def scores(self) -> dict[str, Float[np.ndarray, " neuron"]]:
        """Root mean square over tokens of the difference; 0 for an expert that got no token."""
        return {key: np.sqrt(values / max(self.counts[key], 1)) for key, values in self.squared_difference.items()}

    def mean(self, model: str) -> dict[str, Float[np.ndarray, " neuron"]]:
        """Mean activation of `base` or `aligned`."""
        total = (self.base if model == "base" else self.aligned)[0]
        return {key: values / max(self.counts[key], 1) for key, values in total.items()}

    def standard_deviation(self, model: str) -> dict[str, Float[np.ndarray, " neuron"]]:
        """Standard deviation (n − 1) of the activation of `base` or `aligned`; NaN below two tokens."""
        total, squares = self.base if model == "base" else self.aligned
        result = {}
        for key, values in total.items():
            n = self.counts[key]
            centred = np.maximum(squares[key] - values**2 / max(n, 1), 0)
            result[key] = np.sqrt(centred / (n - 1)) if n > 1 else np.full(len(values), np.nan)
        return result

    @staticmethod
    def from_sums(sums: Sums) -> "ContrastStatistics":
        """The statistics in what `fold` returned."""
        parts: dict[str, dict[str, np.ndarray]] = {}
        for name, values in sums.items():
            kind, key = name.split("/", 1)
            parts.setdefault(kind, {})[key] = values
        counts = {key: int(values[0]) for key, values in parts["count"].items()}
        return ContrastStatistics(
            counts, parts["difference"], (parts["base"], parts["base squared"]), (parts["aligned"], parts["aligned squared"])
        )


def find_contrast(
    base: LanguageModel,
    aligned: LanguageModel,
    prompts: Asked,
    *,
    sites: Sequence[str] = ("down",),
    layers: range | str | None = None,
    positions: str = "completion",
    generate_with: str = "base",
    max_new_tokens: int = 128,
    completions: Completions | None = None,
    batch_size: BatchSize = "auto",
    memory_budget: int = MEMORY_BUDGET,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
    subtract: NeuronSet | None = None,
    **choice: Unpack[Choice],
) -> Found:
    """Change scores: root mean square over tokens of the activation difference between two models.

    One model writes greedy completions; then both read the same ids once, and per neuron Σd², Σa, Σa² and the token count are kept.

    Args:
        base: the less safe model.
        aligned: the safer one; two adapters on one base keep it in memory once.
        prompts: usually harmful requests.
        sites: any of `q k v o gate up down`.
        layers: a range or "A:B"; None for all. No layer is left out silently.
        positions: `completion`, `completion-predicting`, `prompt` or `prompt-last`.
        generate_with: `base` or `aligned`: which model writes.
        max_new_tokens: length limit of a completion.
        completions: used instead of generating.
        batch_size: sequences a batch, or "auto".
        memory_budget: bytes of activations kept of one model while the other reads.
        checkpoint: partial state; a killed run continues behind its last finished batch.
        progress: called with (done, in all, tokens).
        subtract: neurons taken away after selection.
        **choice: `top`, `count`, `top_per_matrix` or `threshold`, and `agreement`; the largest 5 % by default.

    Raises:
        MismatchError: the models have other shapes or tokenizers.
        NumericalError: NaN or infinity; the message names the site.
        UsageError: unknown site, positions or writer.

    Source: Chen et al. (arXiv 2406.14144), eq. 3 and section 3.1.
    Differs: completion tokens keep the ids that were generated (the public code re-tokenises decoded text); sums stream in O(neurons)
    memory; the layer range is explicit (the paper leaves the last layer out, the public code by a name filter that fits 32 layers only).
    """
    prompts = as_prompts(prompts)
    selection = Selection.of(**choice, default_top=0.05)
    writer = writer_of(base, aligned, generate_with)
    check_pair(base, aligned)
    sizes = base.table.select(sites=sites, layers=layers).sizes
    config = text_config(positions, generate_with, max_new_tokens, completions) | searched(sites, layers)
    stream = Stream(checkpoint, stream_key("contrast", (base, aligned), prompts, config, selection, batch_size))
    options: dict[str, Any] = {"stream": stream, "batch_size": batch_size, "progress": progress}
    with comparing(base, aligned):
        text = texts(writer, prompts, positions=positions, max_new_tokens=max_new_tokens, completions=completions, **options)
        notes = list(text.notes)
        statistics, folded = contrast_statistics(
            base, aligned, text, sizes, selection=selection, memory_budget=memory_budget, notes=notes, **options
        )
    made: dict[str, Any] = {
        "table": base.table,
        "models": (base.name, aligned.name),
        "prompts": prompts,
        "selection": selection,
        "votes": folded.votes,
    }
    config["tokens"] = text.n_tokens - sum(text.spans[index].n_tokens for index in folded.failed)
    counts = text.counts.without(len(folded.failed))
    return finish("contrast", statistics.scores(), config=config, counts=counts, notes=notes, subtract=subtract, **made)


def contrast_statistics(
    base: LanguageModel,
    aligned: LanguageModel,
    text: Texts,
    sizes: Mapping[str, int],
    *,
    stream: Stream | None = None,
    selection: Selection | None = None,
    batch_size: BatchSize = "auto",
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
    notes: list[str] | None = None,
) -> tuple[ContrastStatistics, Folded]:
    """Sums over the tokens that count, of two models that read the same text.

    Args:
        base: first model.
        aligned: second model.
        text: sequences and the positions that count.
        sizes: neurons of every site key to read.
        stream: partial sums; None starts anew and keeps nothing on disk.
        selection: with an agreement, every prompt votes by its own root mean square.
        batch_size: sequences a batch, or "auto" (as many as keep the activations within `memory_budget`).
        memory_budget: bytes; sites are read in several passes where one sequence alone needs more.
        progress: called with (batches done, in all, tokens).
        notes: gets a line for every batch that was halved, and one for the prompts that were left out.

    Returns:
        The statistics, and what became of the prompts (with their votes, where they vote).
    """
    bytes_per_token = sum(sizes.values()) * _row_bytes(base)
    budget = min(token_budget(base.device), max(memory_budget // max(bytes_per_token, 1), 1))
    per_prompt = selection is not None and selection.agreement is not None

    def reduce(batch: Batch) -> Part:
        spans = [text.spans[index] for index in batch.indices]
        part = Part(scores=[{} for _ in spans] if per_prompt else [])
        for keys in _chunks(sizes, sum(span.n_tokens for span in spans) * _row_bytes(base), memory_budget):
            _compare(base, aligned, batch, spans, keys, part)
        return part

    folded = fold(
        base,
        stream if stream is not None else Stream(None, {}),
        [span.ids for span in text.spans],
        reduce,
        sizes=sizes,
        batch_size=batch_size,
        budget=budget,
        selection=selection,
        progress=progress,
        notes=notes,
    )
    return ContrastStatistics.from_sums(folded.sums), folded


def _row_bytes(lm: LanguageModel) -> int:
    """Bytes of one kept activation (at least float32)."""
    return max(torch.finfo(lm.dtype).bits // 8, 4)


def _chunks(sizes: Mapping[str, int], bytes_per_neuron: int, memory_budget: int) -> list[list[str]]:
    """Site keys in groups whose activations fit the budget; at least one key each."""
    result: list[list[str]] = []
    used = 0
    for key, size in sizes.items():
        need = size * bytes_per_neuron
        if not result or used + need > memory_budget:
            result.append([])
            used = 0
        result[-1].append(key)
        used += need
    return result


def _compare(base: LanguageModel, aligned: LanguageModel, batch: Batch, spans: Sequence[Span], keys: Sequence[str], part: Part) -> None:
    """Both models read the batch; the second pass reduces against what the first one left."""
    positions, owner = chosen_rows(batch, [span.start for span in spans], [span.stop for span in spans])
    kept: dict[str, Rows] = {}

    def keep(key: str) -> Callable[[Any], None]:
        def reader(values: Any) -> None:
            kept[key] = rows_at(values, positions)

        return reader

    def subtract(key: str) -> Callable[[Any], None]:
        def reader(values: Any) -> None:
            _add(part, key, *in_both(kept.pop(key), rows_at(values, positions)), owner, len(spans))

        return reader

    read(base, batch, {key: keep(key) for key in keys})
    read(aligned, batch, {key: subtract(key) for key in keys})


def _add(part: Part, key: str, first: Rows, second: Rows, owner: Tensor, n_prompts: int) -> None:
    """Sums of one site over one batch, and, where prompts vote, the root mean square of each prompt."""
    squares = (first.values - second.values).square()
    part.sums[f"count/{key}"] = np.array([float(len(squares))])
    part.sums[f"difference/{key}"] = to_numpy(squares.sum(0, dtype=torch.float64))
    for name, rows in (("base", first), ("aligned", second)):
        part.sums[f"{name}/{key}"] = to_numpy(rows.values.sum(0, dtype=torch.float64))
        part.sums[f"{name} squared/{key}"] = to_numpy(rows.values.square().sum(0, dtype=torch.float64))
    if not part.scores:
        return
    mine = owner.to(first.at.device)[first.at]
    pooled = torch.zeros(n_prompts, squares.shape[1], dtype=torch.float64, device=squares.device).index_add_(0, mine, squares.double())
    counts = torch.bincount(mine, minlength=n_prompts).clamp(min=1)
    for scores, values in zip(part.scores, to_numpy((pooled / counts[:, None]).sqrt()), strict=True):
        scores[key] = values
