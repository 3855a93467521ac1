"""What one model's activations are on the prompts of one text or of several: sums over all of them in one
pass, whatever their number, and one row a prompt.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safety_neurons.counting import numbered
from safety_neurons.detectors.reading import PositionRows, chosen_rows, rows_at
from safety_neurons.detectors.reading import read as feed
from safety_neurons.detectors.runner import BatchSums, PromptCounts, Run, Sums, to_numpy
from safety_neurons.detectors.text import Texts, texts
from safety_neurons.errors import NumericalError, UnsupportedModelError
from safety_neurons.model import Encoded, hooks
from safety_neurons.model.batches import Batch, said_of_failed
from safety_neurons.model.language_model import said_of_reading
from safety_neurons.model.passes import PassOptions, Statistics, run_batches
from safety_neurons.prompt_lists import Prompts


class Reducer(Protocol):
    """Sums over the rows of one text in one batch; a new one is made for every batch."""

    def take(self, key: str, values: Float[Tensor, "row neuron"], owner: Int[Tensor, " row"]) -> None:
        """Rows of a site, in float32 or wider, and of which prompt of the batch each is."""

    def sums(self) -> Sums:
        """What this batch adds, by any name that ends in `/` and the site key; NaN where a row was."""


class Moments:
    """Count, Σx and Σx² of every neuron; x is an activation, or a prompt's mean over its positions.

    Args:
        by_prompt: whether x is a prompt's mean.
    """

    def __init__(self, by_prompt: bool = False) -> None:
        self.by_prompt, self._sums = by_prompt, Sums()

    def take(self, key: str, values: Float[Tensor, "row neuron"], owner: Int[Tensor, " row"]) -> None:
        """Add the rows of a site."""
        wide = values.to("cpu" if values.device.type == "mps" else values.device).double()
        if self.by_prompt:
            owner = owner.to(wide.device)
            counts = torch.bincount(owner)
            totals = wide.new_zeros(len(counts), wide.shape[1]).index_add_(0, owner, wide)
            wide = totals[counts > 0] / counts[counts > 0, None]
        self._sums[f"count/{key}"] = np.array([float(len(wide))])
        self._sums[f"sum/{key}"] = to_numpy(wide.sum(0))
        self._sums[f"square/{key}"] = to_numpy(wide.square().sum(0))

    def sums(self) -> Sums:
        """What this batch adds."""
        return self._sums


def statistics_of(sizes: Mapping[str, int], sums: Sums) -> Statistics:
    """What `Moments` added up; an expert that got no token counts none."""
    nothing = {key: np.zeros(size) for key, size in sizes.items()}
    return Statistics(
        {key: round(float(sums.get(f"count/{key}", np.zeros(1))[0])) for key in sizes},
        {key: sums.get(f"sum/{key}", nothing[key]) for key in sizes},
        {key: sums.get(f"square/{key}", nothing[key]) for key in sizes},
    )


@dataclass(frozen=True)
class FoldedTexts:
    """What a pass over several texts gave.

    Attributes:
        sums: by text, then as its reducer names them.
        used: prompts of every text that are in its sums.
        counts: what became of the prompts of the first text.
    """

    sums: Mapping[str, Sums]
    used: Mapping[str, int]
    counts: PromptCounts


def text_of(run: Run, name: str, prompts: Prompts, positions: str, max_new_tokens: int = 0) -> Texts:
    """What the model reads of a list of prompts: they themselves, or its own greedy answers behind them.

    Args:
        run: whose aligned model reads and writes; what has to be said of the prompts is noted.
        name: of the list, under which answers are kept.
        prompts: the list.
        positions: one of `text.POSITIONS`.
        max_new_tokens: length of an answer.
    """
    read = texts(
        run.aligned,
        prompts,
        positions=positions,
        max_new_tokens=max_new_tokens,
        name=name,
        **run.told(),
    )
    run.notes += [f"{name}: {note}" for note in read.notes]
    return read


def folded_texts(
    run: Run, read: Mapping[str, Texts], reducers: Mapping[str, Callable[[], Reducer]]
) -> FoldedTexts:
    """One pass over all texts, their prompts mixed in batches, in the run's resumable state.

    Args:
        run: whose aligned model's activations at the searched sites.
        read: sequences and positions that count, by the name of the text.
        reducers: of every text.

    Raises:
        NumericalError: no prompt of a text gives finite numbers.
    """
    spans = [span for text in read.values() for span in text.spans]
    text_of_span = [name for name, text in read.items() for _ in text.spans]

    def reduce(batch: Batch) -> BatchSums:
        here = [spans[index] for index in batch.indices]
        names = [text_of_span[index] for index in batch.indices]
        positions, owner = chosen_rows(batch, [span.start for span in here], [span.stop for span in here])
        at_work = {name: reducers[name]() for name in dict.fromkeys(names)}
        rows_of = {name: torch.tensor([name == other for other in names]) for name in at_work}

        def reader(key: str) -> Callable[[Any], None]:
            def reduce_rows(values: Any) -> None:
                rows: PositionRows = rows_at(values, positions)
                mine = owner.to(rows.at.device)[rows.at]
                for name, reducer in at_work.items():
                    taken = rows_of[name].to(mine.device)[mine]
                    whole = len(at_work) == 1
                    reducer.take(key, rows.values if whole else rows.values[taken], mine[taken])

            return reduce_rows

        feed(run.aligned, batch, {key: reader(key) for key in run.sizes})
        return BatchSums(
            {
                f"{name}/{what}": values
                for name, reducer in at_work.items()
                for what, values in reducer.sums().items()
            }
        )

    folded = run.fold([span.ids for span in spans], reduce)
    used = dict.fromkeys(read, 0)
    for index, name in enumerate(text_of_span):
        used[name] += index not in folded.failed
    for name, n in used.items():
        if not n:
            raise NumericalError(
                f"none of the {len(read[name].spans)} {name} prompts gave finite numbers; the first: "
                f"{next(iter(folded.failed.values()))}"
            )
    sums = {
        name: {
            what.removeprefix(f"{name}/"): values
            for what, values in folded.sums.items()
            if what.startswith(f"{name}/")
        }
        for name in read
    }
    first, text = next(iter(read.items()))
    return FoldedTexts(sums, used, text.counts.without(len(text.spans) - used[first]))


Pool = Callable[[Tensor, Batch], Tensor]


def pooled_activations(
    run: Run,
    prompts: Sequence[Encoded],
    keys: Iterable[str],
    pool: Pool,
    name: str,
    *,
    residual: bool = False,
) -> dict[str, Float[Tensor, "prompt neuron"]]:
    """Every site's activations, one row a prompt (`at_last` or `largest`), in float32 or wider, on the host.

    NaN where the model gives NaN.

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
        raise UnsupportedModelError(
            f"{routed[0]} is an expert's, which does not see every token; use --sites q,k,v,o"
        )
    seen: dict[str, Tensor] = {}
    pooled = {key: torch.from_numpy(values.copy()) for key, values in stream.named(name).items()}
    encoded = [row.ids for row in prompts]
    done = f"{name}/batches"

    def keep(key: str) -> Callable[[Any], None]:
        def reader(values: Any) -> None:
            seen[key] = values if isinstance(values, Tensor) else values[0]

        return reader

    def take(batch: Batch) -> tuple[list[int], dict[str, Tensor]]:
        return batch.indices, {key: pool(seen.pop(key), batch) for key in list(seen)}

    def put(part: tuple[list[int], dict[str, Tensor]]) -> None:
        indices, rows = part
        for key, values in rows.items():
            if key not in pooled:
                pooled[key] = torch.zeros(len(encoded), values.shape[1], dtype=values.dtype)
            pooled[key][indices] = values

    def prepare() -> None:
        stream.put(name, {key: values.numpy() for key, values in pooled.items()})

    def finished(count: int) -> None:
        stream.state[done] = count
        stream.went_on(prepare)

    layers = (
        {layer.module: keep(f"residual.{layer.index}") for layer in model.anatomy.layers} if residual else {}
    )
    with (
        hooks.reading(model.anatomy, {key: keep(key) for key in names}),
        hooks.around(after=layers, each=True),
        stream.kept(prepare),
    ):
        run_batches(
            model,
            encoded,
            take,
            run.batch_size,
            options=PassOptions(int(stream.state.get(done, 0)), finished, keep=put),
        )
        prepare()
    return pooled


def largest(values: Float[Tensor, "batch token feature"], batch: Batch) -> Float[Tensor, "batch feature"]:
    """The largest over the real tokens of every row, in float32 or wider, on the host."""
    taken = torch.stack(
        [row[:length].amax(0) for row, length in zip(values, batch.lengths, strict=True)]
    ).cpu()
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
        raise NumericalError(
            f"none of {len(whole)} prompts gave finite numbers: check the model's weights, or use "
            "--dtype float32"
        )
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
    for part, name in zip(encoded, ("", "harmless"), strict=True):
        notes += said_of_reading(part, name)
    for name, used in zip(("prompts", "harmless prompts"), whole, strict=True):
        notes += said_of_failed(
            {int(index): "NaN or infinity" for index in (~used).nonzero().flatten()}, len(used), name
        )
    counts = PromptCounts(len(encoded[0]), 0, sum(row.truncated for row in encoded[0])).without(
        int((~whole[0]).sum())
    )
    return whole, counts, notes


def mean(values: Float[Tensor, "batch token feature"], batch: Batch) -> Float[Tensor, "batch feature"]:
    """The mean over the real tokens of every row, in float32 or wider, on the host."""
    wide = values if values.dtype == torch.float64 else values.float()
    return torch.stack([row[:length].mean(0) for row, length in zip(wide, batch.lengths, strict=True)]).cpu()


def signed(values: Mapping[str, np.ndarray], sign: str) -> dict[str, np.ndarray]:
    """Scores of differences, harmful minus harmless: their size, or what is of one sign, the others 0."""
    sides: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "both": np.abs,
        "harmful": lambda one: np.maximum(one, 0.0),
        "harmless": lambda one: np.maximum(-one, 0.0),
    }
    return {key: sides[sign](one) for key, one in values.items()}


def said_of_signs(run: Run, scores: Mapping[str, np.ndarray], differences: Mapping[str, np.ndarray]) -> None:
    """Note how many of the neurons that will be chosen by these scores are larger on harmful prompts."""
    chosen = run.selection.choose(scores)
    signs = [np.sign(differences[key][mask]) for key, mask in chosen.items()]
    more, less = (sum(int((one == sign).sum()) for one in signs) for sign in (1, -1))
    run.notes.append(
        f"of {numbered(sum(map(len, signs)), 'chosen neuron')} larger on harmful prompts: {more:,}, on "
        f"harmless ones: {less:,}"
    )
