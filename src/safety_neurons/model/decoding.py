"""Decode with transformers' `generate`: what is asked, answers, settings of one's own alone, and batches that
rows leave when their answers end.
"""

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safety_neurons.arguments import well_typed
from safety_neurons.errors import UsageError
from safety_neurons.model.batches import hooked_by_others
from safety_neurons.model.sites import unwrapped

_CACHES = ("past_key_values", "cache")
"""What a model's memory of earlier tokens is called: until transformers 5.23, and since."""


def cache_name(model: Any) -> str:
    """The argument by which a model takes its memory of earlier tokens."""
    accepted = inspect.signature(type(unwrapped(model)).forward).parameters
    return next((name for name in reversed(_CACHES) if name in accepted), _CACHES[0])


def cache_in(given: Any) -> Any:
    """The memory of earlier tokens among arguments by name, or in a model's output; None without one."""
    read = given.get if isinstance(given, Mapping) else lambda name: getattr(given, name, None)
    return next((cache for name in _CACHES if (cache := read(name)) is not None), None)


def without_cache(given: Mapping[str, Any]) -> dict[str, Any]:
    """The other arguments."""
    return {name: value for name, value in given.items() if name not in _CACHES}


_INSTEAD = {
    "do_sample": "sample=True, whose draws come from `seed`",
    "generation_config": "its fields as arguments",
    "input_ids": "prompts",
    "inputs_embeds": "prompts",
    "attention_mask": "prompts",
    "max_length": "max_new_tokens",
}
"""Arguments of `generate` that would undo what a completion promises, and what to give in their place."""

Watched = Callable[[list[int], Tensor], contextlib.AbstractContextManager[Mapping[str, Any]]]
"""Watches the batches of `generate`: gets the indices of the rows and the mask `[batch, token]`, gives
further arguments of the model's
`generate` (`logits_processor` and `stopping_criteria` as lists, `streamer`)."""


@dataclass(frozen=True)
class TreatedRows:
    """Sequences that are treated each in one of several ways.

    Attributes:
        which: For every sequence the number of its treatment.
        begin: Opened around every batch, and again around each half of one that did not fit, with the
            treatments of its rows, which are in ascending order.
    """

    which: Sequence[int]
    begin: Callable[[Sequence[int]], contextlib.AbstractContextManager[Any]]


@well_typed
@dataclass(frozen=True)
class Decoding:
    """How answers are decoded.

    Attributes:
        max_new_tokens: Longest answer.
        sample: Draw tokens rather than take the likeliest.
        temperature: Of sampling.
        top_p: Of sampling.
        seed: Of sampling; every batch of the plan draws from its own stream, so a continued run draws the
            same.
        others: Further arguments of `generate`, passed on as they are.
        watched: Opened around every batch, and again around each half of one that did not fit, with the
            indices of its rows and its mask; gives arguments for that batch.
        read: Makes something of index and answer, in the one of several processes that wrote it.
        treated: Treatments of one's own for the sequences; None where all have the same, or none.
    """

    max_new_tokens: int = 128
    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    others: Mapping[str, Any] | None = None
    watched: Watched | None = None
    read: "Callable[[int, Answer], Any] | None" = None
    treated: TreatedRows | None = None

    @property
    def plain(self) -> bool:
        """Whether every row is decoded greedily for itself alone, whatever other rows its batch has."""
        return not (self.sample or self.others or self.watched)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Decoding":
        """Keyword arguments of `complete`: what is no field of this class is an argument of `generate`."""
        own = {
            name: options[name]
            for name in ("max_new_tokens", "sample", "temperature", "top_p", "seed", "treated")
            if name in options
        }
        return cls(**own, others={name: value for name, value in options.items() if name not in own})

    def __post_init__(self) -> None:
        wrong = next((name for name in _INSTEAD if name in (self.others or {})), None)
        if wrong is not None:
            raise UsageError(f"argument {wrong!r} of generate() arrived: give {_INSTEAD[wrong]} instead")
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens {self.max_new_tokens}: expected at least 1")
        if self.sample and self.temperature <= 0:
            raise UsageError(
                f"--temperature {self.temperature}: expected more than 0; leave sampling out for greedy "
                "decoding"
            )
        if self.sample and not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p}: expected more than 0 and at most 1")
        # transformers takes no whole number as a temperature.
        object.__setattr__(self, "temperature", float(self.temperature))
        if int((self.others or {}).get("num_return_sequences", 1)) != 1:
            raise UsageError(
                "num_return_sequences: expected one answer a prompt; give the prompt several times, or "
                "call again with another seed"
            )


@dataclass(frozen=True)
class Answer:
    """Token ids generated for one sequence, EOS excluded, why they end, and what `Decoding.read` makes of it.

    `stop` or `length`; `failed` where the model gave NaN or infinity at any step, and then there are none.
    """

    token_ids: list[int]
    finish_reason: Literal["stop", "length", "failed"]
    read: Any = None


class Finite:
    """A logits processor that ends the sequences whose logits are not numbers, which `generate` would go on
    from with token 0.
    """

    def __init__(self, end: int) -> None:
        self._end = end
        self._failed: Tensor | None = None

    def __call__(
        self, _: Int[Tensor, "row token"], scores: Float[Tensor, "row vocab"]
    ) -> Float[Tensor, "row vocab"]:
        """The scores, those of a failed row with the end token alone."""
        bad = ~scores.amax(
            -1
        ).isfinite()  # the largest is NaN where any is; −∞ may be a token that is forbidden
        self._failed = bad if self._failed is None or len(self._failed) != len(bad) else self._failed | bad
        ending = torch.full_like(scores[0], -torch.inf)
        ending[self._end] = 0
        return torch.where(bad[:, None], ending, scores)

    def failed(self, rows: int) -> list[bool]:
        """Which of the batch's rows failed; beams of a row count together."""
        return [False] * rows if self._failed is None else self._failed.view(rows, -1).any(1).tolist()


def joined(given: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` with those of a watch, whose processors and criteria come behind the
    caller's.
    """
    from transformers import LogitsProcessorList, StoppingCriteriaList

    lists = {"logits_processor": LogitsProcessorList, "stopping_criteria": StoppingCriteriaList}
    joined = {
        name: lists[name]([*(given.get(name) or ()), *value]) if name in lists else value
        for name, value in more.items()
    }
    return {**given, **joined}


def cut(tokens: list[int], ends: Collection[int], pad_id: int, limit: int) -> Answer:
    """What was generated up to the first end of sequence.

    Args:
        tokens: Generated ids of one row.
        ends: Ids that end an answer.
        pad_id: What follows an answer that ended before others of its batch.
        limit: Longest answer where something else than an end token may stop one, 0 where nothing else can.
    """
    for place, token in enumerate(tokens):
        if token in ends:
            return Answer(tokens[:place], "stop")
    length = len(tokens)
    while limit and length and tokens[length - 1] == pad_id:
        length -= 1
    return Answer(tokens[:length], "stop" if length < limit else "length")


@contextlib.contextmanager
def neutral_defaults(model: Any) -> Iterator[None]:
    """A model without generation defaults of its own for a block, so that only what is asked for counts.

    transformers fills whatever a call leaves open from the checkpoint's `generation_config` (temperature,
    repetition penalty, …). PEFT replaces two attributes while it generates; they are put back as well.
    """
    from transformers import GenerationConfig

    inner = unwrapped(model)
    holders = [
        holder
        for holder in {id(inner): inner, id(model): model}.values()
        if "generation_config" in vars(holder)
    ]
    before = [(holder, holder.generation_config) for holder in holders]
    tuner = model.base_model if hasattr(model, "peft_config") else None
    prepared = vars(tuner).get("prepare_inputs_for_generation") if tuner is not None else None
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig()
        yield
    finally:
        for holder, settings in before:
            holder.generation_config = settings
        if tuner is not None:
            vars(tuner).pop("prepare_inputs_for_generation", None)
            if prepared is not None:
                tuner.prepare_inputs_for_generation = prepared


@contextlib.contextmanager
def seeded(device: torch.device, seed: int, number: int) -> Iterator[None]:
    """Random numbers of one's own for a block; the global generators are afterwards where they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((seed * 1_000_003 + number) % 2**63)
        yield


FEWEST = 8
"""Rows of a batch from which on those that have ended leave it: a step of fewer costs nearly as much."""
LEAVING = 3
"""Rows leave when one in so many has ended: to go on costs a call and a copy of the others' cache."""
_ROW_LAYERS = frozenset({"DynamicLayer", "DynamicSlidingWindowLayer"})
"""Layers of a cache that hold keys and values by row, and nothing else."""


_PLACES = "rope_deltas"
"""Where models of images and text keep, by row, how far positions are from the places of tokens."""


def rows_can_leave(model: Any) -> bool:
    """Whether the model's cache holds every row by itself, and nothing else does, so that rows can be taken
    out of a batch.
    """
    if any(_PLACES in vars(module) for module in unwrapped(model).modules()):
        return False
    plain = getattr(unwrapped(model), "_supports_default_dynamic_cache", None)
    if not callable(plain) or not plain():
        return False
    return all(type(layer).__name__ in _ROW_LAYERS for layer in getattr(_empty(model), "layers", ()))


def _empty(model: Any) -> Any:
    """The dynamic cache that `generate` would make for the model."""
    from transformers import DynamicCache

    return DynamicCache(config=unwrapped(model).config.get_text_config(decoder=True))


def roomy_cache(model: Any, new: int) -> dict[str, Any]:
    """A cache in which a step copies nothing, as an argument of `generate`, of a model whose rows can
    leave.

    Args:
        model: with `generate`.
        new: tokens that it may write.
    """
    from safety_neurons.model.room import with_room  # imports transformers

    return {cache_name(model): with_room(_empty(model), new)}


@runtime_checkable
class Following(Protocol):
    """What treats rows of a batch each in a way of its own, and has to know which they are."""

    def alike(self) -> Int[Tensor, " row"] | None:
        """For every row a number that rows have in common which are treated alike; None where that hangs on
        what is read.
        """

    def keep(self, cache: Any, rows: Int[Tensor, " row"]) -> None:
        """Goes on with these rows of those that there were, in a cache."""


class Whole:
    """Has every row read from its first token on, and needs nothing else: what is drawn for it, say."""

    def alike(self) -> None:
        """Every row is one of its own."""

    def keep(self, cache: Any, rows: Int[Tensor, " row"]) -> None:
        """Nothing to go on with."""


_FOLLOWED_BY: list[Following] = []


@contextlib.contextmanager
def following(told: Following) -> Iterator[None]:
    """Tells, inside a block, of every batch that rows leave, before those that are left go on."""
    _FOLLOWED_BY.append(told)
    try:
        yield
    finally:
        _FOLLOWED_BY.remove(told)


def _keep(cache: Any, rows: Int[Tensor, " row"]) -> None:
    """Goes on with some rows of a cache."""
    cache.batch_select_indices(rows)  # on the processor, since layers, and a donor, may be on other devices
    _tell(cache, rows)


def _tell(cache: Any, rows: Int[Tensor, " row"]) -> None:
    for told in _FOLLOWED_BY:
        told.keep(cache, rows)


SHARED = 8
"""Tokens from which on it pays to read what all prompts of a batch begin with in a pass of its own."""


def common_start(ids: Int[Tensor, "row token"], mask: Int[Tensor, "row token"]) -> int:
    """How many tokens all rows begin with, the last of the shortest row not counted.

    Args:
        ids: padded on the left.
        mask: 0 where there is padding.
    """
    lengths = mask.sum(1)
    places = ids.shape[1] - lengths[:, None] + torch.arange(int(lengths.min()) - 1, device=ids.device)
    begins = ids.gather(1, places)
    return int((begins == begins[:1]).all(0).cumprod(0).sum())


def _begun(model: Any, ids: Int[Tensor, "row token"], mask: Int[Tensor, "row token"], cache: Any) -> Any:
    """The empty cache, with the first columns of the batch in it where all its rows begin alike, as with a
    chat template: what they share is read in one row for each treatment, and laid to where a row begins.

    So every column holds what a pass of the whole batch would put there. Prompts stay whole where treatments
    hang on what is read, where positions are turned by the longest row, and where hooks of others act, which
    may look for the last token of a request.
    """
    windows = [layer.sliding_window - 1 for layer in cache.layers if getattr(layer, "sliding_window", None)]
    shared = min([common_start(ids, mask), *windows])
    if shared < SHARED or _turned_by_length(model) or hooked_by_others(model):
        return cache
    treatments = [torch.zeros(len(ids), dtype=torch.long), *(told.alike() for told in _FOLLOWED_BY)]
    if any(one is None for one in treatments):
        return cache
    _, like = torch.stack(treatments, 1).unique(dim=0, return_inverse=True)  # type: ignore[arg-type]
    ones = torch.tensor([like.tolist().index(number) for number in range(int(like.max()) + 1)])
    if 2 * len(ones) > len(ids):
        return cache
    first = ids[:1, ids.shape[1] - int(mask[0].sum()) :][:, :shared].expand(len(ones), -1)
    accepted = inspect.signature(unwrapped(model).forward).parameters
    fewer = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    given = {"attention_mask": torch.ones_like(first), cache_name(model): cache, "use_cache": True}
    _tell(cache, ones)
    model(input_ids=first, **given, **fewer)
    _keep(cache, like)
    padding = ids.shape[1] - mask.sum(1)
    places = (torch.arange(shared, device=ids.device) - padding[:, None]).clamp(min=0)
    for held in (cache, getattr(cache, "twin", None)):  # A patch's donor may keep a cache of its own.
        for layer in getattr(held, "layers", ()):
            layer.keys, layer.values = _laid(layer.keys, places), _laid(layer.values, places)
    return cache


def _turned_by_length(model: Any) -> bool:
    """Whether how far a pass reads decides by how much its rotary embedding turns every token."""
    kinds = (str(getattr(module, "rope_type", "")) for module in unwrapped(model).modules())
    return any("dynamic" in kind or "longrope" in kind for kind in kinds)


def _laid(
    states: Float[Tensor, "held head token feature"], places: Int[Tensor, "row token"]
) -> Float[Tensor, "held head token feature"]:
    """Every row's states at other places; the cache may hold the rows twice, for a patch and its donor."""
    at = places.to(states.device).repeat(len(states) // len(places), 1)
    return states.gather(2, at[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


class _Thinned:
    """A stopping criterion that interrupts a batch when a share of its rows has ended."""

    def __init__(self, ends: Collection[int], rows: int) -> None:
        self._ends, self._rows = sorted(ends), rows
        self._ended: Tensor | None = None

    def __call__(self, ids: Int[Tensor, "row token"], *_: Any, **__: Any) -> Tensor:
        ended = torch.isin(ids[:, -1], torch.tensor(self._ends, device=ids.device))
        self._ended = ended if self._ended is None else self._ended | ended
        thin = self._rows >= FEWEST and LEAVING * int(self._ended.sum()) >= self._rows
        return torch.full_like(ended, thin)


def decoded(
    model: Any,
    ids: Int[Tensor, "row token"],
    mask: Int[Tensor, "row token"],
    settings: Any,
    ends: Collection[int],
    pad_id: int,
) -> tuple[list[list[int]], list[bool]]:
    """New tokens of every row up to its end token, that one included, and whether the row's logits failed.

    Greedy. Rows that have ended leave the batch with their part of the cache, which costs nothing of the
    others: one long answer does not keep the whole batch at work. The cache has room, so that a step copies
    none of it; what all prompts begin with is read once.

    Args:
        model: with `generate`, in evaluation mode; its cache holds rows by themselves (`rows_can_leave`).
        ids: prompts, padded on the left.
        mask: 0 where there is padding.
        settings: a generation configuration, for as many tokens as there may be.
        ends: ids that end an answer.
        pad_id: what fills rows that ended before others of their batch.
    """
    from safety_neurons.model.room import with_room  # imports transformers

    written: list[list[int]] = [[] for _ in ids]
    failed = [False] * len(ids)
    rows, left = list(range(len(ids))), int(settings.max_new_tokens)
    passed = {name: _begun(model, ids, mask, cache) for name, cache in roomy_cache(model, left).items()}
    settings.return_dict_in_generate = True
    while True:
        width, finite = ids.shape[1], Finite(min(ends, default=pad_id))
        settings.max_new_tokens = left
        watching = {"logits_processor": [finite], "stopping_criteria": [_Thinned(ends, len(rows))]}
        output = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=settings, **joined(passed, watching)
        )
        new = output.sequences[:, width:].tolist()
        going = []
        for number, (row, lost) in enumerate(zip(rows, finite.failed(len(rows)), strict=True)):
            end = next((place + 1 for place, token in enumerate(new[number]) if token in ends), None)
            written[row] += new[number][:end]
            failed[row] = lost
            if end is None and not lost:
                going.append(number)
        left -= len(new[0])
        if not left or not going:
            return written, failed
        kept = torch.tensor(going)
        cache = cache_in(output)
        _keep(cache, kept)
        ids = output.sequences[kept]
        mask = torch.cat([mask, torch.ones_like(output.sequences[:, width:])], 1)[kept]
        rows, passed = [rows[number] for number in going], {cache_name(model): with_room(cache, left)}
