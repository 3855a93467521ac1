"""Inference-time activation contrasting: which neurons fire differently in two models that read the same
text.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from safety_neurons.detectors.methods import Contrast
from safety_neurons.detectors.reading import PositionRows, chosen_rows, in_both, read, rows_at
from safety_neurons.detectors.runner import BatchSums, Folded, Run, Scored, Sums, to_numpy
from safety_neurons.detectors.text import Span, Texts, texts_of
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import Batch, token_budget

MEMORY_BUDGET = 2**30
"""Bytes of one model's activations that are kept while the other model reads the same batch."""


@dataclass(frozen=True)
class ContrastStatistics:
    """What is kept of two models that read the same text: one number per neuron each, whatever the number of
    tokens.

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
        return {
            key: np.sqrt(values / max(self.counts[key], 1)) for key, values in self.squared_difference.items()
        }

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
            counts,
            parts["difference"],
            (parts["base"], parts["base squared"]),
            (parts["aligned"], parts["aligned squared"]),
        )


def score(method: Contrast, run: Run) -> Scored:
    """The change score of every neuron of two models that read the same text."""
    text = texts_of(method, run)
    statistics, folded = contrast_statistics(run, text)
    tokens = text.n_tokens - sum(text.spans[index].n_tokens for index in folded.failed)
    return Scored(
        statistics.scores(), text.counts.without(len(folded.failed)), folded.votes, {"tokens": tokens}
    )


def contrast_statistics(run: Run, text: Texts) -> tuple[ContrastStatistics, Folded]:
    """Sums over the tokens that count, of two models that read the same text.

    With an agreement every prompt votes by its own.

    Sites are read in several passes where one sequence alone needs more than `MEMORY_BUDGET`.

    Args:
        run: the models, the searched sites and the resumable state.
        text: sequences and the positions that count.

    Returns:
        The statistics, and what became of the prompts (with their votes, where they vote).
    """
    base, aligned, budget = run.base, run.aligned, MEMORY_BUDGET
    kept = {key: size * base.anatomy.share_of_tokens(key) for key, size in run.sizes.items()}

    def reduce(batch: Batch) -> BatchSums:
        spans = [text.spans[index] for index in batch.indices]
        added = BatchSums(scores=[{} for _ in spans] if run.votes else [])
        for keys in _chunks(kept, run.sizes, sum(span.n_tokens for span in spans) * _row_bytes(base), budget):
            _compare(base, aligned, batch, spans, keys, added)
        return added

    room = int(budget // max(sum(kept.values()) * _row_bytes(base), 1))
    tokens = min(token_budget(base.device), max(room, 1))
    folded = run.fold([span.ids for span in text.spans], reduce, base, tokens)
    return ContrastStatistics.from_sums(folded.sums), folded


def _row_bytes(lm: LanguageModel) -> int:
    """Bytes of one kept activation (at least float32)."""
    return max(torch.finfo(lm.dtype).bits // 8, 4)


def _chunks(
    kept: Mapping[str, float], sizes: Mapping[str, int], bytes_per_neuron: int, memory_budget: int
) -> list[list[str]]:
    """Site keys in groups whose activations fit the budget; at least one key each.

    The experts of a site share the tokens in a way that only their sum is known of: they stay together where
    they fit, and are counted as if each got all tokens where they do not.

    Args:
        kept: neurons by key; of routed experts the share of the tokens that they get on average.
        sizes: neurons by key.
        bytes_per_neuron: over all tokens.
        memory_budget: bytes.
    """
    together: dict[str, list[str]] = {}
    for key in kept:
        together.setdefault(re.sub(r"\.experts\.\d+", ".experts", key), []).append(key)
    result: list[list[str]] = []
    used = 0.0
    for keys in together.values():
        whole = bytes_per_neuron * sum(kept[key] for key in keys)
        parts = [(keys, whole)]
        if whole > memory_budget:
            parts = [([key], float(bytes_per_neuron * sizes[key])) for key in keys]
        for part, need in parts:
            if not result or used + need > memory_budget:
                result.append([])
                used = 0
            result[-1] += part
            used += need
    return result


def _compare(
    base: LanguageModel,
    aligned: LanguageModel,
    batch: Batch,
    spans: Sequence[Span],
    keys: Sequence[str],
    part: BatchSums,
) -> None:
    """Both models read the batch; the second pass reduces against what the first one left."""
    positions, owner = chosen_rows(batch, [span.start for span in spans], [span.stop for span in spans])
    rows: dict[str, PositionRows] = {}

    def keep(key: str) -> Callable[[Any], None]:
        def reader(values: Any) -> None:
            rows[key] = rows_at(values, positions)

        return reader

    def subtract(key: str) -> Callable[[Any], None]:
        def reader(values: Any) -> None:
            _add(part, key, *in_both(rows.pop(key), rows_at(values, positions)), owner, len(spans))

        return reader

    read(base, batch, {key: keep(key) for key in keys})
    read(aligned, batch, {key: subtract(key) for key in keys})


def _add(
    part: BatchSums, key: str, first: PositionRows, second: PositionRows, owner: Tensor, n_prompts: int
) -> None:
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
    pooled = torch.zeros(n_prompts, squares.shape[1], dtype=torch.float64, device=squares.device).index_add_(
        0, mine, squares.double()
    )
    counts = torch.bincount(mine, minlength=n_prompts).clamp(min=1)
    for scores, values in zip(part.scores, to_numpy((pooled / counts[:, None]).sqrt()), strict=True):
        scores[key] = values
