"""Count, sum and sum of squares of every neuron over a corpus, in one forward pass and memory that does not grow with it.

A reader reduces what it gets while it is still in the cache, so that nothing but two numbers per neuron outlives a hook. On a processor
the rows of one sequence at a time are multiplied by ones (two matrix-vector products), without a copy of the activations; elsewhere the
whole batch is reduced by two kernels. Padding is never read, so NaN in it harms nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from safety_neurons.errors import MismatchError, NumericalError
from safety_neurons.model.experts import ExpertRows
from safety_neurons.model.hooks import reading
from safety_neurons.model.language_model import LanguageModel
from safety_neurons.model.measures import BatchSize, Progress
from safety_neurons.model.passes import Batch, run_batches, said_of_failed
from safety_neurons.neurons.table import parse_key

CACHED = 2**18
"""Numbers that are squared at a time on a processor: one megabyte of float32, half of a usual second-level cache."""
FEW = 2**15
"""Below so many numbers a sequence, calls cost more than the copy that joins the sequences of a batch."""
VIEWS = 512
"""Shapes of working memory that are remembered."""


@dataclass(frozen=True)
class Statistics:
    """What is kept of the activations of every site: two numbers per neuron, whatever the number of tokens.

    Attributes:
        counts: tokens by site key (an expert counts the tokens routed to it).
        sums: Σx of every neuron, by site key.
        sums_of_squares: Σx² of every neuron.
        failed: sequences that are not in them, because they gave NaN or infinity or did not fit in memory.
    """

    counts: Mapping[str, int]
    sums: Mapping[str, Float[np.ndarray, " neuron"]]
    sums_of_squares: Mapping[str, Float[np.ndarray, " neuron"]]
    failed: int = 0

    def mean(self) -> dict[str, Float[np.ndarray, " neuron"]]:
        """Mean activation; 0 for an expert that got no token."""
        return {key: values / max(self.counts[key], 1) for key, values in self.sums.items()}

    def root_mean_square(self) -> dict[str, Float[np.ndarray, " neuron"]]:
        """Root of the mean squared activation; 0 for an expert that got no token."""
        return {key: np.sqrt(values / max(self.counts[key], 1)) for key, values in self.sums_of_squares.items()}

    def standard_deviation(self) -> dict[str, Float[np.ndarray, " neuron"]]:
        """Standard deviation (n − 1); NaN below two tokens."""
        result = {}
        for key, values in self.sums.items():
            n = self.counts[key]
            centred = np.maximum(self.sums_of_squares[key] - values**2 / max(n, 1), 0)
            result[key] = np.sqrt(centred / (n - 1)) if n > 1 else np.full(len(values), np.nan)
        return result

    def __add__(self, other: "Statistics") -> "Statistics":
        """The statistics of both corpora together.

        Raises:
            MismatchError: They are of other sites.
        """
        sizes, others = ({key: len(values) for key, values in one.sums.items()} for one in (self, other))
        if sizes != others:
            raise MismatchError(f"statistics of {len(others)} sites were added to those of {len(sizes)}: expected the same sites and sizes")
        return Statistics(
            {key: count + other.counts[key] for key, count in self.counts.items()},
            {key: values + other.sums[key] for key, values in self.sums.items()},
            {key: values + other.sums_of_squares[key] for key, values in self.sums_of_squares.items()},
            self.failed + other.failed,
        )


def activation_statistics(
    lm: LanguageModel,
    sequences: Sequence[Sequence[int]],
    *,
    sites: Sequence[str] | None = None,
    layers: range | str | None = None,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
    notes: list[str] | None = None,
) -> Statistics:
    """Count, Σx and Σx² of every neuron over all tokens of a corpus, special tokens included.

    Sums of one batch are in float32 (in float64 where the model is), sums over batches in float64.

    Args:
        lm: the model; its adapters are made the active ones meanwhile.
        sequences: token ids, each sequence fed once.
        sites: any of `q k v o gate up down`; None for all. Activations are taken as `hooks.reading` hands them out.
        layers: a range or "A:B"; None for all. The pass stops behind the last one.
        batch_size: sequences a batch, or "auto" for a token budget.
        progress: called with (batches done, in all, tokens).
        notes: gets a line for every batch that was halved, and one for the sequences that were left out.

    Raises:
        NumericalError: no sequence gives finite numbers; the message names the first one's site.
        UsageError: an unknown site, or layers outside the model.
    """
    sizes = lm.table.select(sites, layers).sizes
    sums = _Sums(sizes, torch.float64 if lm.dtype == torch.float64 else torch.float32)
    failed: dict[int, str] = {}
    with reading(lm.anatomy, {source: sums.reader(source) for source in sums.sources}):
        run_batches(
            lm,
            sequences,
            lambda _: sums.take(),
            batch_size,
            progress=progress,
            before=sums.start,
            last_layer=max(parse_key(key).layer for key in sizes),
            notes=notes,
            failed=failed,
        )
    if len(failed) == len(sequences) > 0:
        raise NumericalError(f"none of {len(failed)} sequences gave finite numbers; the first: {next(iter(failed.values()))}")
    if notes is not None:
        notes += said_of_failed(failed, len(sequences), "sequences")
    return replace(sums.finished(), failed=len(failed))


def _source(key: str) -> tuple[str, int]:
    """The key that a site is read by, and its row there: the experts of a layer are read together."""
    parsed = parse_key(key)
    if parsed.expert is None:
        return key, 0
    return f"layers.{parsed.layer}.experts.*.{parsed.site}", parsed.expert


@dataclass
class _Sum:
    """Sums of one source: of one site, or of one site of all experts of a layer."""

    counts: Int[Tensor, " expert"]
    sums: Float[Tensor, "expert 2 neuron"]

    def add(self, other: "_Sum") -> None:
        self.counts += other.counts
        self.sums += other.sums


class _Sums:
    """Sums of the batch in progress, which are dropped if it does not fit in memory, and of the batches before it."""

    def __init__(self, sizes: Mapping[str, int], dtype: torch.dtype) -> None:
        self.sizes, self.dtype, self.scratch = sizes, dtype, Scratch(dtype)
        self.sources: dict[str, int] = {}
        for key in sizes:
            source, row = _source(key)
            self.sources[source] = max(self.sources.get(source, 0), row + 1)
        self.totals: dict[str, _Sum] = {}
        self.batch: Batch | None = None
        self.rows: Tensor | None = None
        self.parts: dict[str, _Sum] = {}

    def start(self, batch: Batch) -> None:
        self.batch, self.rows, self.parts = batch, None, {}

    def reader(self, source: str) -> Callable[[Tensor | ExpertRows], None]:
        def read(values: Tensor | ExpertRows) -> None:
            part = self._experts(values, self.sources[source]) if isinstance(values, ExpertRows) else self._site(values)
            if source in self.parts:  # experts may come by one after the other
                self.parts[source].add(part)
            else:
                self.parts[source] = part

        return read

    def take(self) -> None:
        """Add the batch's sums: on the device in float64, where it has float64.

        Raises:
            NumericalError: one is not finite; nothing is added.
        """
        whole = {source: part.sums.isfinite().all() for source, part in self.parts.items()}
        where = next((flag.device for flag in whole.values()), None)
        if whole and not bool(torch.stack([flag.to(where) for flag in whole.values()]).all()):  # one question to the device
            source = next(source for source, flag in whole.items() if not flag)
            raise NumericalError(f"site {source} gave NaN or infinity: check the model's weights, or use --dtype float32")
        for source, part in self.parts.items():
            host = part.sums.device.type == "mps"
            wide = _Sum(part.counts.cpu() if host else part.counts, (part.sums.cpu() if host else part.sums).double())
            if source in self.totals:
                self.totals[source].add(wide)
            else:
                self.totals[source] = wide
        self.batch, self.parts = None, {}

    def finished(self) -> Statistics:
        host = {source: (total.counts.tolist(), total.sums.cpu().numpy()) for source, total in self.totals.items()}
        counts: dict[str, int] = {}
        sums: dict[str, np.ndarray] = {}
        squares: dict[str, np.ndarray] = {}
        for key, size in self.sizes.items():
            source, row = _source(key)
            found, values = host.get(source, ([0] * (row + 1), np.zeros((row + 1, 2, size))))
            counts[key], (sums[key], squares[key]) = found[row], values[row]
        return Statistics(counts, sums, squares)

    def _site(self, values: Float[Tensor, "batch token neuron"]) -> _Sum:
        assert self.batch is not None
        sums = reduced(self._pieces(values, self.batch), values.shape[2], self.dtype, self.scratch)
        return _Sum(torch.tensor([self.batch.n_tokens]), sums[None])

    def _pieces(self, values: Tensor, batch: Batch) -> list[Tensor]:
        """The rows of real tokens: views of single sequences, or one selection by index where there are many short ones."""
        if batch.n_tokens == len(batch) * batch.width:
            return [values.flatten(0, 1)]
        if values.device.type == "cpu" and batch.n_tokens * values.shape[2] >= FEW * len(batch):
            return [row.narrow(0, 0, length) for row, length in zip(values.unbind(0), batch.lengths, strict=True)]
        if self.rows is None:
            self.rows = batch.rows
        return [values.flatten(0, 1).index_select(0, self.rows.to(values.device))]

    def _experts(self, rows: ExpertRows, n_experts: int) -> _Sum:
        """Routed rows whose token is not padding, sorted by expert."""
        assert self.batch is not None
        real = self.batch.attention_mask.flatten().to(rows.token_index.device)[rows.token_index].nonzero().squeeze(1)
        expert, order = rows.expert_index[real].sort(stable=True)
        counts = torch.bincount(expert, minlength=n_experts)
        values = rows.values.index_select(0, real[order])
        if values.device.type in ("cpu", "mps"):
            pieces = values.split(counts.tolist())
            return _Sum(counts, torch.stack([reduced([piece], values.shape[1], self.dtype, self.scratch) for piece in pieces]))
        return _Sum(counts, reduced_by_group(values, counts, self.dtype))


def reduced_by_group(
    values: Float[Tensor, "row neuron"], counts: Int[Tensor, " group"], dtype: torch.dtype
) -> Float[Tensor, "group 2 neuron"]:
    """Σx and Σx² of every group of consecutive rows, in two kernels whatever the number of groups.

    Args:
        values: rows in the order of their groups.
        counts: rows of each group.
        dtype: type of the sums.
    """
    wide = values.to(dtype)
    parts = [torch.segment_reduce(part, "sum", lengths=counts, axis=0, initial=0) for part in (wide, wide.square())]
    return torch.stack(parts, dim=1)


def reduced(
    pieces: Sequence[Float[Tensor, "_ neuron"]], size: int, dtype: torch.dtype, scratch: "Scratch | None" = None
) -> Float[Tensor, "2 neuron"]:
    """Σx and Σx² over the rows of all pieces.

    Args:
        pieces: activations; never written into.
        size: neurons.
        dtype: type of the sums.
        scratch: working memory, to be used again for the next call.
    """
    if pieces[0].device.type != "cpu":
        sums = [torch.stack([piece.sum(0, dtype=dtype), torch.linalg.vector_norm(piece, dim=0, dtype=dtype).square()]) for piece in pieces]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)
    scratch = scratch or Scratch(dtype)
    result = torch.zeros(2, size, dtype=dtype)
    total, squares = result.unbind(0)
    limit = max(1, CACHED // max(size, 1))
    for piece in pieces:
        for rows in piece.split(limit) if len(piece) > limit else (piece,):
            columns = rows.to(dtype).t()
            ones, product = scratch(len(rows), size)
            total.addmv_(columns, ones)
            squares.addmv_(torch.mul(columns, columns, out=product), ones)
    return result


class Scratch:
    """Ones to sum with and memory for squares, made once and handed out in the shape that is asked for."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._ones = torch.ones(0, dtype=dtype)
        self._memory = torch.empty(0, dtype=dtype)
        self._views: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, rows: int, size: int) -> tuple[Float[Tensor, " row"], Float[Tensor, "neuron row"]]:
        """Ones, and memory for the squares of transposed rows."""
        if (rows, size) not in self._views:
            if rows > len(self._ones):
                self._ones = self._ones.new_ones(rows)
            if rows * size > len(self._memory) or len(self._views) >= VIEWS:
                self._memory = self._memory.new_empty(max(rows * size, len(self._memory)))
                self._views.clear()
            self._views[rows, size] = (self._ones[:rows], self._memory[: rows * size].view(rows, size).t())
        return self._views[rows, size]
