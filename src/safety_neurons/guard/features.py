"""Features of a request: the ways it is read, and the activations of a set of neurons pooled over each of
them while the model runs.
"""

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from safety_neurons.arguments import well_typed
from safety_neurons.errors import InputError, NeuronError, UsageError
from safety_neurons.guard.calibration import LATER
from safety_neurons.guard.verdict import ASKED, WHOLE
from safety_neurons.model import BatchSize, Encoded, LanguageModel, Progress
from safety_neurons.model.batches import Batch
from safety_neurons.model.hooks import Reading
from safety_neurons.model.language_model import Texts, said_of_reading
from safety_neurons.model.passes import AlsoRead, PassOptions, T, run_batches
from safety_neurons.model.sites import Anatomy, ExpertRows, Index
from safety_neurons.neurons import NeuronSet, parse_key
from safety_neurons.prompt_lists import Message, Prompt, as_prompts
from safety_neurons.prompt_lists.readers import Source

Request = Source
MOST_TURNS = 1024
"""Turns of a conversation that are read; each costs a reading."""


@dataclasses.dataclass(frozen=True)
class RequestReading:
    """One way to read a request.

    Attributes:
        name: `conversation`, `conversation without the last answer`, or `turn N`, counted from 1.
        prompt: what the model is fed.
    """

    name: str
    prompt: Prompt


def as_request_prompts(requests: Sequence[Request] | Source) -> list[Prompt]:
    """Prompts of whatever names some; plain texts and turns are numbered.

    Raises:
        InputError: an empty text, or turns that cannot be read.
    """
    asked = list(as_prompts(requests))
    empty = next(
        (prompt.id for prompt in asked if not any(turn.content.strip() for turn in prompt.turns)), None
    )
    if empty is not None:
        raise InputError(f"request {empty!r}: an empty text arrived; expected a request to score")
    return asked


def readings(prompt: Prompt) -> list[RequestReading]:
    """How a request is read: as a whole, without the answer it ends in, and every turn by itself, as if a
    user had asked that alone.

    An answer that is put into the model's mouth, or harmless turns behind a harmful one, can make the whole
    look safe; they cannot change what a turn says alone. What is the same for the model (one user turn, say)
    is read once; turns without text are not read alone.

    Raises:
        InputError: more turns than are read.

    Source: none of the papers, which judge single requests.
    """
    turns = tuple(prompt.messages) or (Message("user", prompt.text),)
    if len(turns) > MOST_TURNS:
        raise InputError(
            f"a conversation of {len(turns):,} turns; the guard reads at most {MOST_TURNS:,}: give it "
            "the last ones"
        )
    found, seen = [RequestReading(WHOLE, prompt)], {turns}
    end = next((number for number in range(len(turns), 0, -1) if turns[number - 1].role != "assistant"), 0)
    asked = end < len(turns) and any(turn.role == "user" for turn in turns[:end])
    parts: list[tuple[str, tuple[Message, ...]]] = [(ASKED, turns[:end])] if asked else []
    parts += [
        (f"turn {number}", (Message("user", turn.content),))
        for number, turn in enumerate(turns, 1)
        if turn.content.strip()
    ]
    for name, part in parts:
        if part not in seen:
            seen.add(part)
            text = next((turn.content for turn in reversed(part) if turn.role == "user"), part[-1].content)
            found.append(RequestReading(name, Prompt(prompt.id, text, part)))
    return found


def begun_answer(prompt: Prompt) -> bool:
    """Whether a conversation ends in an answer that was begun for the model, so that it is also read without
    it.
    """
    return any(way.name == ASKED for way in readings(prompt))


KINDS = ("last", "mean", "max", "agree")
WINDOW = 8


@dataclass(frozen=True, order=True)
class Pooling:
    """How the activations of a neuron at the tokens of a text become one number.

    Attributes:
        kind: `last`: at the last token. `mean`: over all tokens, special ones and those of the template
            included. `max`: the largest mean over `window` consecutive tokens; of a text that is shorter, the
            mean over all its tokens. `agree`: at the token of the last `window` that a classifier scores
            `agree`-th highest, so that its score reaches a threshold where at least so many of them do; of
            a text that is shorter, at its lowest where it has fewer tokens than have to agree.
        window: tokens of a window of `max` and `agree`; 0 for the others.
        agree: tokens that have to agree; 0 for the others.

    Source: `agree`: arXiv 2604.14865 (probes that several tokens have to agree with). Differs: any k of the
    last m tokens, as one calibrated score.
    """

    kind: str = "last"
    window: int = 0
    agree: int = dataclasses.field(default=0, metadata={LATER: True})

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"pooling {self.kind!r} is unknown; expected one of {', '.join(KINDS)}")
        if self.kind in ("max", "agree") and self.window < 1:
            raise UsageError(f"a window of {self.window} tokens; expected at least 1")
        if self.kind not in ("max", "agree") and self.window:
            raise UsageError(
                f"a window of {self.window} tokens with pooling {self.kind!r}; only max and "
                "agree have windows"
            )
        if self.kind == "agree" and not 1 <= self.agree <= self.window:
            raise UsageError(
                f"{self.agree} tokens that agree in a window of {self.window}; expected 1 to {self.window}"
            )
        if self.kind != "agree" and self.agree:
            raise UsageError(f"{self.agree} tokens that agree with pooling {self.kind!r}; expected agree")

    @classmethod
    def of(cls, pooling: "Pooling | str", window: int | None = None, agree: int | None = None) -> "Pooling":
        """The pooling that a word means, with a window where it has one (8 tokens where none is named) and
        half of it to agree where no number is named.
        """
        if isinstance(pooling, Pooling):
            return pooling
        width = (window or WINDOW) if pooling in ("max", "agree") else 0
        return cls(pooling, width, (agree or (width + 1) // 2) if pooling == "agree" else 0)

    def __str__(self) -> str:
        if self.kind == "agree":
            return f"{self.agree} of the last {self.window} agree"
        return f"max over windows of {self.window}" if self.kind == "max" else self.kind


class Pool:
    """Pools activations that arrive pass by pass: a whole prompt, its chunks, or one token after another.

    Args:
        pooling: how.
        direction: what orders tokens where several have to agree, one weight a neuron; without it such a
            pooling has tokens, and no result.
    """

    def __init__(self, pooling: Pooling, direction: Float[Tensor, " neuron"] | None = None) -> None:
        self.pooling, self.direction = pooling, direction
        self._last: Tensor | None = None
        self._sum: Tensor | None = None
        self._count: Tensor | None = None
        self._largest: Tensor | None = None
        self._tail: tuple[Tensor, Tensor] | None = None

    def add(
        self, values: Float[Tensor, "batch token neuron"], real: Bool[Tensor, "batch token"] | None
    ) -> None:
        """The activations of the tokens that came next.

        Args:
            values: padding may hold anything, NaN too.
            real: which tokens are no padding; None where all are.
        """
        if self.pooling.kind == "last":
            self._last = values[:, -1] if real is None else _last_real(values, real, self._last)
            return
        if self.pooling.kind == "agree":
            self._add_tokens(values, real)
            return
        if real is not None:
            values = torch.where(real[:, :, None], values, 0)
        count = (
            values.new_full((len(values),), values.shape[1]) if real is None else real.sum(1).to(values.dtype)
        )
        total = values.sum(1)
        self._sum = total if self._sum is None else self._sum + total
        self._count = count if self._count is None else self._count + count
        if self.pooling.kind == "max":
            self._add_windows(values, real)

    def _add_tokens(self, values: Tensor, real: Tensor | None) -> None:
        """Keep the last tokens of every row, the newest in the last column."""
        here = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device) if real is None else real
        if self._tail is not None:
            values, here = torch.cat([self._tail[0], values], 1), torch.cat([self._tail[1], here], 1)
        if real is None and self._tail is None:
            width = min(self.pooling.window, values.shape[1])
            self._tail = (values[:, -width:], here[:, -width:])
            return
        # A stable order of "real" moves every row's own tokens behind its padding, in their order.
        order = here.to(torch.uint8).argsort(dim=1, stable=True)[:, -self.pooling.window :]
        self._tail = (
            values.gather(1, order[:, :, None].expand(-1, -1, values.shape[2])),
            here.gather(1, order),
        )

    @property
    def tokens(self) -> tuple[Float[Tensor, "batch token neuron"], Bool[Tensor, "batch token"]]:
        """The last tokens of every row, the newest in the last column, and which columns a row has."""
        assert self._tail is not None
        return self._tail

    def _agreeing(self) -> Tensor:
        """The row of the token that is scored as high as so many tokens are, or higher; NaN where any is."""
        assert self.direction is not None, "pooling by agreement needs the direction of a classifier"
        values, here = self.tokens
        scores = (values * self.direction.to(values.device, values.dtype)).sum(-1)
        wrong = (scores.isnan() & here).any(1)
        # A token that a short row lacks is below all of its own, and never taken.
        order = torch.where(here, scores, -torch.inf).argsort(dim=1, descending=True, stable=True)
        place = (torch.minimum(here.sum(1), torch.tensor(self.pooling.agree, device=here.device)) - 1).clamp(
            min=0
        )
        rows = torch.arange(len(values), device=values.device)
        found = values[rows, order[rows, place]]
        return torch.where(wrong[:, None], torch.nan, found)

    def _add_windows(self, values: Tensor, real: Tensor | None) -> None:
        window = self.pooling.window
        here = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device) if real is None else real
        if self._tail is not None:
            values, here = torch.cat([self._tail[0], values], 1), torch.cat([self._tail[1], here], 1)
        if window > 1:
            self._tail = (values[:, 1 - window :], here[:, 1 - window :])
        if values.shape[1] < window:
            return
        means = values.unfold(1, window, 1).mean(-1)
        whole = here.unfold(1, window, 1).all(-1)
        largest = torch.where(whole[:, :, None], means, -torch.inf).amax(1)
        # A NaN inside a whole window has to come through: amax keeps it.
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows only."""
        for name in ("_last", "_sum", "_count", "_largest"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value[list(rows)])
        if self._tail is not None:
            self._tail = (self._tail[0][list(rows)], self._tail[1][list(rows)])

    def result(self) -> Float[Tensor, "batch neuron"]:
        """One number a row and neuron, over all tokens so far; more may be added afterwards."""
        if self.pooling.kind == "last":
            assert self._last is not None
            return self._last
        if self.pooling.kind == "agree":
            return self._agreeing()
        assert self._sum is not None
        assert self._count is not None
        mean = self._sum / self._count[:, None]
        if self._largest is None:
            return mean
        return torch.where((self._count >= self.pooling.window)[:, None], self._largest, mean)


def _last_real(values: Tensor, real: Tensor, before: Tensor | None) -> Tensor:
    """The values at each row's last real token; those of an earlier pass where this one holds none."""
    places = torch.arange(1, real.shape[1] + 1, device=real.device)
    last = (real * places).amax(1) - 1
    found = values[torch.arange(len(values), device=values.device), last.clamp(min=0)]
    return found if before is None else torch.where((last >= 0)[:, None], found, before)


@dataclass(frozen=True)
class Features:
    """What was read of a list of prompts.

    Attributes:
        values: activation of each neuron, pooled over the prompt; NaN where the model gave NaN.
        truncated: prompts of which the middle was left out because they did not fit the context.
        lengths: tokens of each prompt as fed.
        neurons: the columns, in the order of `neurons.items()`: keys in order, indices ascending.
        pooling: how a prompt's tokens became one number.
        notes: warnings.
    """

    values: Float32[np.ndarray, "prompt neuron"]
    truncated: Bool[np.ndarray, " prompt"]
    lengths: Int[np.ndarray, " prompt"]
    neurons: NeuronSet
    pooling: Pooling
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    @property
    def finite(self) -> Bool[np.ndarray, " prompt"]:
        """Prompts without NaN and infinity."""
        return np.isfinite(self.values).all(axis=1)

    @property
    def usable(self) -> Bool[np.ndarray, " prompt"]:
        """Prompts that were read whole and gave numbers."""
        return self.finite & ~self.truncated


class Collector:
    """Gathers the activations of a set of neurons while a model runs, in float32 (float64 where the model
    is).

    The activation of an expert's neuron is 0 at tokens that are not routed to the expert.

    A context manager: it gathers at every forward pass inside it, and may be entered again and again.

    Args:
        anatomy: of the model that will run.
        neurons: which; columns are in the order of `neurons.items()`.
        poolings: how to pool, at least one.
        direction: of the classifier that tokens have to agree with, one weight a neuron.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        neurons: NeuronSet,
        poolings: Sequence[Pooling],
        direction: Float[Tensor, " neuron"] | None = None,
    ) -> None:
        self.neurons, self.poolings, self._direction = neurons, tuple(poolings), direction
        self._last_only = all(pooling.kind == "last" for pooling in self.poolings)
        self._columns = {key: torch.from_numpy(indices.copy()) for key, indices in neurons.items()}
        self._experts = [key for key in self._columns if parse_key(key).expert is not None]
        self._reading = Reading(anatomy, {key: self._reader(key, anatomy) for key in self._columns})
        self.firings = self._reading.firings
        self.start()

    def start(self, mask: Int[Tensor, "batch token"] | None = None, *, left: bool = False) -> None:
        """Forget what was gathered, and expect a new batch.

        Args:
            mask: 1 for tokens, 0 for padding, of all passes together; None where nothing is padding.
            left: whether padding is on the left, where the last token is the last column of every row.
        """
        real = None if mask is None or bool(mask.all()) else mask.bool()
        self._mask = real
        self._place = None if left or real is None else real.sum(1) - 1
        self._pools = (
            {} if self._last_only else {pooling: Pool(pooling, self._direction) for pooling in self.poolings}
        )
        self._last: Tensor | None = None
        self._parts: dict[str, Tensor] = {}
        self._shape = (0, 0)
        self._seen, self._offset = self.firings.passes, 0

    def __enter__(self) -> "Collector":
        self._reading.__enter__()
        self._seen = 0
        return self

    def __exit__(self, *error: Any) -> None:
        self._reading.__exit__(*error)

    def off(self) -> None:
        """Leave without looking whether every site came by: `result` fails where one did not."""
        self._reading.off()

    def result(self) -> dict[Pooling, Float[Tensor, "batch neuron"]]:
        """What was gathered since `start`, by pooling.

        Raises:
            NeuronError: nothing came by.
        """
        self._absorb()
        if not self._offset:
            raise NeuronError(
                "no activation of the guard's neurons came by; expected a forward pass of the model it "
                "was fit on"
            )
        if self._last is not None:
            return dict.fromkeys(self.poolings, self._last)
        return {pooling: pool.result() for pooling, pool in self._pools.items()}

    def tokens(
        self, pooling: Pooling
    ) -> tuple[Float[Tensor, "batch token neuron"], Bool[Tensor, "batch token"]]:
        """The last tokens that a pooling by agreement keeps, gathered since `start`; see `Pool.tokens`."""
        self._absorb()
        return self._pools[pooling].tokens

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows of the batch only."""
        self._absorb()
        for pool in self._pools.values():
            pool.keep(rows)

    def _reader(self, key: str, anatomy: Anatomy) -> Callable[[Tensor | ExpertRows], None]:
        if key in self._experts:
            return lambda rows: self._read_expert(key, rows)  # type: ignore[arg-type]
        wanted = positions(anatomy.place(key).index, self._columns[key])
        last_only, device = self._last_only, wanted.device

        def read(values: Tensor | ExpertRows) -> None:
            nonlocal wanted, device
            assert isinstance(values, Tensor)
            if self.firings.passes != self._seen:
                self._next()
            if device != values.device:
                wanted, device = wanted.to(values.device), values.device
            if last_only:
                values = values.select(1, -1) if self._place is None else self._at_last(values)
            self._parts[key] = values.index_select(-1, wanted)

        return read

    def _next(self) -> None:
        """Pool what an earlier pass gathered, once the next one begins."""
        self._absorb()
        self._shape = self.firings.shape

    def _read_expert(self, key: str, rows: ExpertRows) -> None:
        if self.firings.passes != self._seen:
            self._next()
        batch, width = self._shape
        if key not in self._parts:
            self._parts[key] = rows.values.new_zeros(batch * width, len(self._columns[key]))
        if len(rows):
            columns = self._columns[key].to(rows.values.device)
            self._parts[key].index_copy_(0, rows.token_index, rows.values.index_select(-1, columns))

    def _at_last(self, values: Float[Tensor, "batch token neuron"]) -> Float[Tensor, "batch neuron"]:
        if self._place is None:
            return values[:, -1]
        return values[torch.arange(len(values), device=values.device), self._place.to(values.device)]

    def _absorb(self) -> None:
        """Pool what the pass before gathered."""
        self._seen = self.firings.passes
        if not self._parts:
            return
        batch, width = self._shape
        for key in self._experts:
            whole = self._parts[key].view(batch, width, -1)
            self._parts[key] = self._at_last(whole) if self._last_only else whole
        parts = [self._parts[key] for key in self._columns]
        self._parts = {}
        self._offset += width
        device = parts[0].device
        wide = torch.cat([part if part.device == device else part.to(device) for part in parts], -1)
        wide = wide if wide.dtype in (torch.float32, torch.float64) else wide.float()
        if self._last_only:
            self._last = wide
            return
        real = None
        if self._mask is not None:
            start = self._offset - width
            real = self._mask[:, start : start + width].to(device)
            real = torch.nn.functional.pad(
                real, (0, width - real.shape[1]), value=True
            )  # behind the prompt nothing is padding
        for pool in self._pools.values():
            pool.add(wide, real)


def positions(index: Index, columns: Int[Tensor, " neuron"]) -> Int[Tensor, " neuron"]:
    """Where neurons of a site are among all features of its projection's side."""
    if index is None:
        return columns
    return (
        columns * (index.step or 1) + (index.start or 0)
        if isinstance(index, slice)
        else index.to(columns.device)[columns]
    )


@well_typed
def read_features(
    model: LanguageModel,
    prompts: Texts,
    neurons: NeuronSet,
    *,
    pooling: Pooling | str = "last",
    window: int | None = None,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
) -> Features:
    """The activations of a set of neurons on prompts, one row a prompt: what a guard looks at.

    The model reads each prompt once, template and generation prompt included, without its head and only up to
    the last layer that has a neuron of the set. The last token is the last one of the prompt, whatever the
    padding.

    Args:
        model: its adapters are the active ones meanwhile.
        prompts: Prompts, or plain texts.
        neurons: found on this architecture; experts' neurons too. An expert's neuron is 0 at tokens that are
            not routed to its expert.
        pooling: `last`, `mean` or `max` (the largest mean over a window of consecutive tokens), or a
            `Pooling`.
        window: tokens of a window of `max`, 8 where none is named.
        batch_size: prompts a batch, or `auto` for a token budget.
        progress: called with (batches done, in all, tokens).

    Raises:
        NeuronError: an empty set, or one of another architecture.
        InputError: no prompts, or one without tokens.

    Source: Chen et al., arXiv 2406.14144, section 6 (activations of the top neurons at the last prompt
    token). Differs: also q k v o gate up neurons and experts, and the mean and the windowed maximum over the
    prompt.
    """
    chosen = Pooling.of(pooling, window)
    return read_poolings(
        model, model.encode(prompts), neurons, [chosen], batch_size=batch_size, progress=progress
    )[chosen]


@well_typed
def read_poolings(
    model: LanguageModel,
    encoded: Sequence[Encoded],
    neurons: NeuronSet,
    poolings: Sequence[Pooling],
    *,
    direction: Float[Tensor, " neuron"] | None = None,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
    also: AlsoRead | None = None,
) -> dict[Pooling, Features]:
    """`read_features` of encoded prompts for several poolings, in one pass over the prompts.

    `direction`: of the classifier that tokens have to agree with (`Classifier.direction`). `also`: called
    behind the pass of every batch, which then runs through all layers.

    Source: as `read_features`.
    """
    if not len(neurons):
        raise NeuronError("the neuron set is empty; expected at least one neuron to read")
    if not encoded:
        raise InputError("no prompts; expected at least one to read features of")
    placed, collector, notes = (
        neurons.on(model.table, [model.name]),
        Collector(model.anatomy, neurons, poolings, direction),
        list[str](),
    )
    found = {pooling: np.empty((len(encoded), len(neurons)), np.float32) for pooling in poolings}

    def take(batch: Batch) -> tuple[list[int], dict[Pooling, np.ndarray], Any]:
        values = {key: rows.to("cpu", torch.float32).numpy() for key, rows in collector.result().items()}
        return batch.indices, values, None if also is None else also.take(batch)

    told: dict[str, Any] = {"progress": progress, "notes": notes, "every_layer": also is not None}
    for indices, parts, beside in collect(model, encoded, collector, take, batch_size, **told):
        for pooling, values in parts.items():
            found[pooling][indices] = values
        if also is not None:
            also.keep(beside)
    truncated = np.array([item.truncated for item in encoded])
    lengths = np.array([len(item.ids) for item in encoded])
    notes += said_of_reading(encoded)
    return {
        pooling: Features(values, truncated, lengths, placed, pooling, (*placed.notes, *notes))
        for pooling, values in found.items()
    }


def read_tokens(
    model: LanguageModel,
    encoded: Sequence[Encoded],
    neurons: NeuronSet,
    window: int,
    keep: Callable[[int, Float32[np.ndarray, "token neuron"]], None],
    *,
    batch_size: BatchSize = "auto",
    progress: Progress | None = None,
) -> None:
    """Activations of a set of neurons at the last tokens of encoded prompts, each prompt read once.

    Args:
        model: its adapters are the active ones meanwhile.
        encoded: the prompts.
        neurons: found on this architecture.
        window: tokens that are kept of each, from its end.
        keep: called with the number of every prompt and its activations, the newest token last.
        batch_size: prompts a batch, or `auto`.
        progress: called with (batches done, in all, tokens).
    """
    pooling = Pooling("agree", window, 1)
    collector = Collector(model.anatomy, neurons.on(model.table, [model.name]), [pooling])

    def take(batch: Batch) -> dict[int, Float[np.ndarray, "token neuron"]]:
        values, here = collector.tokens(pooling)
        rows = zip(batch.indices, values.to("cpu", torch.float32), here.cpu(), strict=True)
        return {int(index): row[own].numpy() for index, row, own in rows}

    def each(part: dict[int, Float[np.ndarray, "token neuron"]]) -> None:
        for index, row in part.items():
            keep(index, row)

    collect(model, encoded, collector, take, batch_size, keep=each, progress=progress)


def collect(
    model: LanguageModel,
    encoded: Sequence[Encoded],
    collector: Collector,
    take: Callable[[Batch], T],
    batch_size: BatchSize = "auto",
    *,
    keep: Callable[[T], None] | None = None,
    every_layer: bool = False,
    **watching: Any,
) -> list[T]:
    """Run prompts through a model up to the last layer that is read, or through every layer; `take` is called
    behind every batch.

    What it returned is given to `keep`, or returned. `watching`: see `run_batches`.
    """
    options = PassOptions(
        keep=keep,
        before=lambda batch: collector.start(batch.attention_mask),
        last_layer=None if every_layer else last_layer(collector.neurons),
    )
    with model_lock(model), collector:
        ids = [item.ids for item in encoded]
        return run_batches(model, ids, take, batch_size, options=options, **watching)


def last_layer(neurons: NeuronSet) -> int:
    """The last layer that has a neuron of the set."""
    return max(parse_key(key).layer for key in neurons.keys())  # noqa: SIM118 - not a mapping


_LOCKS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def model_lock(model: LanguageModel) -> contextlib.AbstractContextManager[Any]:
    """The lock of a model in memory, held while a guard reads it: a pass of another thread would be read as
    this one's.
    """
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model.inner, threading.RLock())
