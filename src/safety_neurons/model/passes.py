"""Forward passes over many sequences: feeding them, and summing activations.

A reader of activations reduces what it gets while it is still in the cache, so that nothing but two numbers
per neuron outlives a hook. On a processor the rows of one sequence at a time are multiplied by ones (two
matrix-vector products), without a copy of the activations; elsewhere the whole batch is reduced by two
kernels. Padding is never read, so NaN in it harms nothing.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from safety_neurons.arguments import well_typed
from safety_neurons.errors import InputError, MismatchError, NumericalError
from safety_neurons.model import ranks
from safety_neurons.model.batches import (
    Batch,
    BatchSize,
    Halving,
    Progress,
    collate,
    forward,
    has_hooks,
    plan,
    said_of_failed,
    token_budget,
)
from safety_neurons.model.hooks import around, reading
from safety_neurons.model.language_model import LanguageModel, takes_padding
from safety_neurons.model.sites import ExpertRows
from safety_neurons.neurons.table import parse_key

T = TypeVar("T")


LOGIT_BYTES = 2**29
"""Bytes of logits that a batch which needs them may hold."""
LOGITS_AT_ONCE = 2**22
"""Logits whose probabilities are in memory at once."""


def logits_budget(lm: LanguageModel) -> int:
    """Padded tokens of a batch whose logits are kept for a moment: at most 512 MB of them."""
    return max(1, min(token_budget(lm.device), LOGIT_BYTES // (4 * lm.n_ids)))


@dataclass(frozen=True)
class PassOptions:
    """Which batches are done already, what is called around each, and where passes end.

    Attributes:
        start: Batches of the plan to skip because an earlier run finished them.
        finished: Called with the number of finished batches: where a partial state may be written.
        before: Called right before each forward pass (again for each half of a batch that did not fit).
        last_layer: Stop each pass after this layer; `batch.output` is None then.
        budget: Padded tokens of an `auto` batch, by default 2,048 on a CPU and 16,384 elsewhere, fewer for
            logits.
        failed: Gets index and reason of every sequence that is left out, as for `Halving`; None: the first
            ends the run.
        keep: Called with what `per_batch` returned, in the order of the plan; nothing is returned then. Where
            processes share, every one of them keeps all.
    """

    start: int = 0
    finished: Callable[[int], None] | None = None
    before: Callable[[Batch], None] | None = None
    last_layer: int | None = None
    budget: int | None = None
    failed: dict[int, str] | None = None
    keep: Callable[[Any], None] | None = None


def run_batches(
    lm: LanguageModel,
    sequences: Sequence[Sequence[int]],
    per_batch: Callable[[Batch], T],
    batch_size: BatchSize = "auto",
    with_logits: bool = False,
    progress: Progress | None = None,
    notes: list[str] | None = None,
    options: PassOptions = PassOptions(),
) -> list[T]:
    """Feeds every sequence once and calls `per_batch` after each forward pass.

    Several processes share the batches out: what is to stay of one is what `per_batch` returns, on the host.
    Hooks are the caller's. A batch that does not fit is fed again in halves: readers drop in `before` what
    `per_batch` did not take.

    Args:
        lm: The model; its adapters are made the active ones meanwhile.
        sequences: Token ids.
        per_batch: Gets the batch with its `output`, which is dropped afterwards.
        batch_size: Rows, or `auto` for a token budget.
        with_logits: `batch.output` holds logits rather than final hidden states.
        progress: Called as `progress(batches done, batches in all, tokens done)`.
        notes: Gets a line for every batch that was halved.
        options: What is done, seen and left out.

    Returns:
        What `per_batch` returned, in order (a halved batch gives several).

    Raises:
        ModelError: One sequence alone does not fit in memory. InputError: An empty sequence or a batch size
        below one.
    """
    budget = options.budget or (logits_budget(lm) if with_logits else token_budget(lm.device))
    groups = plan([len(sequence) for sequence in sequences], batch_size, budget, padded=takes_padding(lm))
    halving, results = Halving(options.failed), list[T]()
    tokens = sum(len(sequences[index]) for group in groups[: options.start] for index in group)

    def work(batch: Batch) -> T:
        if options.before is not None:
            options.before(batch)
        with stopping_after(lm, options.last_layer):
            batch.output = forward(lm.model, batch, with_logits=with_logits)
        try:
            return per_batch(batch)
        finally:
            batch.output = None

    def batch_of(number: int) -> Batch:
        return collate(sequences, groups[number], number=number, pad_id=lm.pad_id).to(lm.device)

    with lm.running(), torch.no_grad():
        left = range(options.start, len(groups))
        for number, parts in zip(left, halving.over(left, batch_of, work), strict=True):
            if options.keep is None:
                results += parts
            else:
                for part in parts:
                    options.keep(part)
            tokens += sum(len(sequences[index]) for index in groups[number])
            if options.finished is not None:
                options.finished(number + 1)
            if progress is not None:
                progress(number + 1, len(groups), tokens)
    if notes is not None:
        notes += halving.notes
    return results


def in_order(parts: Iterable[Mapping[int, T]]) -> list[T]:
    """What batches gave of every sequence, by its index, as one list in the order of the sequences."""
    whole = {index: value for part in parts for index, value in part.items()}
    return [whole[index] for index in sorted(whole)]


class _Stopped(Exception):
    """A pass went as far as it had to."""


@contextlib.contextmanager
def stopping_after(lm: LanguageModel, layer: int | None) -> Iterator[None]:
    """Ends forward passes behind a layer, for a block that holds exactly one pass; nothing to do for None.

    The pass runs to its end where something is hooked on the whole model, or weights are moved in and out by
    accelerate.
    """
    if (
        layer is None
        or any(has_hooks(module) for module in (lm.model, lm.inner))
        or hasattr(lm.inner, "hf_device_map")
    ):
        yield
        return
    layers = lm.anatomy.layers
    if not 0 <= layer < len(layers):
        raise InputError(f"layer {layer}: the model has layers 0 to {len(layers) - 1}")

    def stop(*_: Any) -> None:
        raise _Stopped

    with contextlib.suppress(_Stopped), around(after={layers[layer].module: stop}):
        yield


CACHED = 2**18
"""Numbers that are squared at a time on a processor: one megabyte of float32, half of a usual second-level
cache.
"""

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
        return {
            key: np.sqrt(values / max(self.counts[key], 1)) for key, values in self.sums_of_squares.items()
        }

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
            raise MismatchError(
                f"statistics of {len(others)} sites were added to those of {len(sizes)}: expected the "
                "same sites and sizes"
            )
        return Statistics(
            {key: count + other.counts[key] for key, count in self.counts.items()},
            {key: values + other.sums[key] for key, values in self.sums.items()},
            {key: values + other.sums_of_squares[key] for key, values in self.sums_of_squares.items()},
            self.failed + other.failed,
        )


@well_typed
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
        sites: any of `q k v o gate up down`; None for all. Activations are taken as `hooks.reading` hands
            them out.
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
    sharing = ranks.count() > 1
    options = PassOptions(
        before=sums.start,
        last_layer=max(parse_key(key).layer for key in sizes),
        failed=failed,
        keep=sums.add,
    )
    told: dict[str, Any] = {"progress": progress, "notes": notes, "options": options}
    with reading(lm.anatomy, {source: sums.reader(source) for source in sums.sources}):
        run_batches(lm, sequences, lambda _: sums.take(sharing), batch_size, **told)
    if len(failed) == len(sequences) > 0:
        raise NumericalError(
            f"none of {len(failed)} sequences gave finite numbers; the first: {next(iter(failed.values()))}"
        )
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
    """Sums of the batch in progress, which are dropped if it does not fit in memory, and of the batches
    before it.
    """

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
            part = (
                self._experts(values, self.sources[source])
                if isinstance(values, ExpertRows)
                else self._site(values)
            )
            if source in self.parts:  # experts may come by one after the other
                self.parts[source].add(part)
            else:
                self.parts[source] = part

        return read

    def take(self, sharing: bool) -> dict[str, _Sum]:
        """The batch's sums: on the device in float64, where it has float64 and they go to no other process.

        Raises:
            NumericalError: one is not finite.
        """
        whole = {source: part.sums.isfinite().all() for source, part in self.parts.items()}
        where = next((flag.device for flag in whole.values()), None)
        if whole and not bool(
            torch.stack([flag.to(where) for flag in whole.values()]).all()
        ):  # one question to the device
            source = next(source for source, flag in whole.items() if not flag)
            raise NumericalError(
                f"site {source} gave NaN or infinity: check the model's weights, or use --dtype float32"
            )
        taken = {}
        for source, part in self.parts.items():
            host = part.sums.device.type == "mps" or sharing
            taken[source] = _Sum(
                part.counts.cpu() if host else part.counts, (part.sums.cpu() if host else part.sums).double()
            )
        self.batch, self.parts = None, {}
        return taken

    def add(self, taken: Mapping[str, _Sum]) -> None:
        """Add the sums of a batch."""
        for source, part in taken.items():
            if source in self.totals:
                self.totals[source].add(part)
            else:
                self.totals[source] = part

    def finished(self) -> Statistics:
        host = {
            source: (total.counts.tolist(), total.sums.cpu().numpy()) for source, total in self.totals.items()
        }
        counts: dict[str, int] = {}
        sums: dict[str, np.ndarray] = {}
        squares: dict[str, np.ndarray] = {}
        for key, size in self.sizes.items():
            source, row = _source(key)
            tokens, values = host.get(source, ([0] * (row + 1), np.zeros((row + 1, 2, size))))
            counts[key], (sums[key], squares[key]) = tokens[row], values[row]
        return Statistics(counts, sums, squares)

    def _site(self, values: Float[Tensor, "batch token neuron"]) -> _Sum:
        assert self.batch is not None
        sums = reduced(self._pieces(values, self.batch), values.shape[2], self.dtype, self.scratch)
        return _Sum(torch.tensor([self.batch.n_tokens]), sums[None])

    def _pieces(self, values: Tensor, batch: Batch) -> list[Tensor]:
        """The rows of real tokens: views of single sequences, or one selection by index where there are many
        short ones.
        """
        if batch.n_tokens == len(batch) * batch.width:
            return [values.flatten(0, 1)]
        if values.device.type == "cpu" and batch.n_tokens * values.shape[2] >= FEW * len(batch):
            return [
                row.narrow(0, 0, length) for row, length in zip(values.unbind(0), batch.lengths, strict=True)
            ]
        if self.rows is None:
            self.rows = batch.rows
        return [values.flatten(0, 1).index_select(0, self.rows.to(values.device))]

    def _experts(self, rows: ExpertRows, n_experts: int) -> _Sum:
        """Routed rows whose token is not padding, sorted by expert."""
        assert self.batch is not None
        real = (
            self.batch.attention_mask.flatten()
            .to(rows.token_index.device)[rows.token_index]
            .nonzero()
            .squeeze(1)
        )
        expert, order = rows.expert_index[real].sort(stable=True)
        counts = torch.bincount(expert, minlength=n_experts)
        values = rows.values.index_select(0, real[order])
        if values.device.type in ("cpu", "mps"):
            pieces = values.split(counts.tolist())
            return _Sum(
                counts,
                torch.stack(
                    [reduced([piece], values.shape[1], self.dtype, self.scratch) for piece in pieces]
                ),
            )
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
    parts = [
        torch.segment_reduce(part, "sum", lengths=counts, axis=0, initial=0) for part in (wide, wide.square())
    ]
    return torch.stack(parts, dim=1)


def reduced(
    pieces: Sequence[Float[Tensor, "_ neuron"]],
    size: int,
    dtype: torch.dtype,
    scratch: "Scratch | None" = None,
) -> Float[Tensor, "2 neuron"]:
    """Σx and Σx² over the rows of all pieces.

    Args:
        pieces: activations; never written into.
        size: neurons.
        dtype: type of the sums.
        scratch: working memory, to be used again for the next call.
    """
    if pieces[0].device.type != "cpu":
        sums = [
            torch.stack(
                [piece.sum(0, dtype=dtype), torch.linalg.vector_norm(piece, dim=0, dtype=dtype).square()]
            )
            for piece in pieces
        ]
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


def read_residual(
    lm: LanguageModel, sequences: Sequence[Sequence[int]], batch_size: BatchSize = "auto"
) -> Float[np.ndarray, "case layer hidden"]:
    """The residual stream at the last token after every layer, in float32."""
    with residual_stream(lm, len(sequences)) as (found, rows):
        run_batches(lm, sequences, rows.take, batch_size, options=PassOptions(keep=rows.keep))
    return found


@dataclass(frozen=True)
class AlsoRead:
    """What is read of passes beside what they are made for.

    Attributes:
        take: Called behind the pass of a batch; what it returns is of that batch.
        keep: Called with that, in every one of several processes.
    """

    take: Callable[[Batch], Any]
    keep: Callable[[Any], None]


@contextlib.contextmanager
def residual_stream(
    lm: LanguageModel, count: int
) -> Iterator[tuple[Float[np.ndarray, "case layer hidden"], AlsoRead]]:
    """The residual stream at the last token after every layer, in float32, of sequences that are fed in the
    block, whatever else is read of the same passes.

    Gives an array with a row for each of `count` sequences, and what fills in the rows of a batch. The passes
    have to run to their end.
    """
    layers = lm.anatomy.layers
    seen: dict[int, torch.Tensor] = {}
    found = np.empty((count, len(layers), int(lm.config.hidden_size)), np.float32)

    def keep(number: int) -> Callable[[Any], None]:
        def after(output: Any) -> None:
            seen[number] = output[0] if isinstance(output, tuple) else output

        return after

    def take(batch: Batch) -> dict[int, Float[np.ndarray, "layer hidden"]]:
        last = torch.tensor(batch.lengths) - 1
        rows = [
            values[torch.arange(len(last)), last.to(values.device)].float().cpu().numpy()
            for _, values in sorted(seen.items())
        ]
        seen.clear()
        return dict(zip(batch.indices, np.stack(rows, 1), strict=True))

    def put(rows: Mapping[int, Float[np.ndarray, "layer hidden"]]) -> None:
        for index, row in rows.items():
            found[index] = row

    after = {layer.module: keep(number) for number, layer in enumerate(layers)}
    with around(after=after, each=True):
        yield found, AlsoRead(take, put)
