"""How fast this machine runs a model of which only the shape is known: one of its layers, with made-up
weights, reads a batch, takes a decoding step, or goes through what a method does with a batch.

A product of matrices alone says too little: attention, norms and the calls themselves take as long again in
small models, a decoding step of few rows is bound by reading weights, and a method's own arithmetic may be of
small matrices and exponentials.
"""

import copy
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model.anatomy import resolve
from safety_neurons.model.batches import Batch, collate, decoder_of
from safety_neurons.model.decoding import cache_in, cache_name
from safety_neurons.model.language_model import LanguageModel
from safety_neurons.model.outline import Outline
from safety_neurons.model.proof import Probe, settle_attention
from safety_neurons.model.sites import Anatomy, LayerAnatomy, unwrapped

MOST_BYTES = 2**31
"""Of the weights that are made up."""
MOST_OPERATIONS = {"cpu": 2e10}
"""Of a pass that is timed, and of what is read before a decoding step; elsewhere a hundred times as many."""
LEAST_SECONDS, MOST_TIMES = 0.2, 12
"""A pass is timed until so long has gone by, so often at most."""
READING_SHARE = 0.2
"""Of these operations, what a method is timed on: it takes longer to one, and more passes."""
VOCABULARY = 64
"""Tokens that made-up layers know."""
HASHED_BYTES = 2**24
"""Of made-up weights, read and hashed."""

Operations = Callable[[LayerAnatomy, int], float]
"""Of one layer for a prompt of so many tokens."""
Reading = Callable[[LanguageModel], AbstractContextManager[Callable[[Batch], object]]]
"""What a run does with every batch of prompts; entering it does what the run does once."""


class ReadingPace(NamedTuple):
    """How long a method takes, beside what it was timed on."""

    once: float
    """Seconds for each layer, whatever is read."""
    rate: float
    """Operations a second."""


def attended_in(outline: Outline, layer: LayerAnatomy, length: float | int) -> float:
    """Operations a token of scores and mixtures of one layer, half of the keys being hidden on average."""
    if (part := layer.attention) is None:
        return 0.0
    window = outline.windows[layer.index]
    return 2.0 * part.n_heads * part.head_dim * min(length, 2 * (window or length))


class Throughput:
    """Floating-point operations a second of a model on this machine.

    Args:
        outline: The model.

    Attributes:
        notes: Why it is the rate of plain products of matrices, where it is.
    """

    def __init__(self, outline: Outline) -> None:
        self._outline = outline
        self._most = MOST_OPERATIONS.get(outline.device.type, 2e12)
        self._known: dict[tuple[int, int, int], float] = {}
        self._readings: dict[tuple[Reading, tuple[int, ...]], ReadingPace | None] = {}
        self._layers: TimedLayers | None = None
        self.notes: tuple[str, ...] = ()
        dtype = getattr(torch, outline.dtype)
        self._layers = self._by_itself(lambda: TimedLayers(outline.anatomy, dtype, outline.device))
        sizes = {outline.passed_in(layer) for layer in outline.anatomy.layers}
        if self._layers is not None and len(sizes) > 1:
            self.notes = ("the time is told from the first two layers; others are of another size",)

    def __call__(self, rows: int, tokens: int, held: int = 0) -> float:
        """Of a batch of rows of so many tokens each, behind those that are held in the cache."""
        asked = (rows, tokens, held)
        if asked not in self._known:
            found = None if self._layers is None else self._by_itself(lambda: self._of_layers(*asked))
            self._known[asked] = found or self._of_products(min(512, max(1, rows * tokens)))
        return self._known[asked]

    def of_reading(
        self, reading: Reading, lengths: Sequence[int], operations: Operations
    ) -> ReadingPace | None:
        """Of what a method does with a batch of prompts of these lengths, timed once for all such batches.

        None, and a note, where made-up layers cannot go through it.
        """
        if (layers := self._layers) is None:
            return None
        layer = layers.timed
        sample = sampled(lengths, lambda length: operations(layer, length), READING_SHARE * self._most)
        if (asked := (reading, tuple(sample))) in self._readings:
            return self._readings[asked]
        try:
            once, seconds = layers.reading(reading, sample)
        except Exception as error:
            self.notes += (f"what is done with a prompt is timed as if it were a plain pass ({_why(error)})",)
            found = None
        else:
            done = sum(operations(layer, length) for length in sample)
            found = ReadingPace(once, done / max(seconds, 1e-9))
        self._readings[asked] = found
        return found

    def hashed(self) -> float:
        """Bytes of weights a second that are taken into memory and hashed."""
        content = torch.ones(HASHED_BYTES // 4)

        def read() -> None:
            hashlib.sha256(memoryview(content.clone().numpy())).digest()  # type: ignore[arg-type]

        return HASHED_BYTES / max(min(_took(read, torch.device("cpu")) for _ in range(3)), 1e-9)

    def _by_itself(self, action: Callable[[], Any]) -> Any:
        """What comes of it, or None and a note: whatever keeps layers from running, the plan goes on."""
        try:
            return action()
        except Exception as error:
            self._layers = None
            self.notes = (f"the time is that of products of matrices alone, a lower bound ({_why(error)})",)
            return None

    def _of_layers(self, rows: int, tokens: int, held: int) -> float:
        assert self._layers is not None
        layer = self._layers.timed
        token = 2.0 * self._outline.passed_in(layer)
        while tokens > 1 and tokens * (token + attended_in(self._outline, layer, tokens)) > self._most:
            tokens //= 2  # of narrow layers attention is the most of it, and grows by the square
        of_row = tokens * (token + attended_in(self._outline, layer, tokens))
        rows = max(1, min(rows, round(self._most / of_row)))
        held = min(held, max(1, round(self._most / token / rows)))
        keys = attended_in(self._outline, layer, tokens + 2 * held)
        return rows * tokens * (token + keys) / self._layers.seconds(rows, tokens, held)

    def _of_products(self, rows: int) -> float:
        outline = self._outline
        inner = min(outline.hidden, 4096)
        outer = min(2**24 // inner, 4 * inner)
        kind = {"dtype": getattr(torch, outline.dtype), "device": outline.device}
        left, right = torch.rand(rows, inner, **kind), torch.rand(outer, inner, **kind)
        with torch.no_grad():
            took = min(_took(lambda: nn.functional.linear(left, right), outline.device) for _ in range(4))
        return 2 * rows * inner * outer / max(took, 1e-9)


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _took(action: Callable[[], Any], device: torch.device) -> float:
    """Seconds. On a processor the least of wall and processor time: one counts what else runs on the machine,
    the other all threads.
    """
    wall, processor = time.perf_counter(), time.process_time()
    action()
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
        return time.perf_counter() - wall
    return min(time.perf_counter() - wall, time.process_time() - processor)


def sampled(lengths: Sequence[int], operations: Callable[[int], float], most: float) -> list[int]:
    """Some of these lengths, all of a length together as they are read, of so many operations at most: every
    second, every third … length, then fewer of it, and at last a shorter one.
    """
    groups = [list(same) for _, same in groupby(sorted(lengths))]
    for step in range(1, len(groups) + 1):
        taken = [length for group in groups[step // 2 :: step] for length in group]
        if sum(map(operations, taken)) <= most:
            return taken
    while len(taken) > 1 and sum(map(operations, taken)) > most:
        taken = taken[: len(taken) // 2]
    while taken[0] > 1 and operations(taken[0]) > most:
        taken = [taken[0] // 2]
    return taken


class TimedLayers:
    """Two layers of a model in memory, with random weights.

    Args:
        anatomy: of the model, on the meta device or in memory; it stays as it is.
        dtype: that it computes in.
        device: that it runs on.

    Raises:
        UnsupportedModelError: layers that are too large to be made up, or do not follow each other.
    """

    def __init__(self, anatomy: Anatomy, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._random = torch.Generator(device).manual_seed(0)
        layers = anatomy.layers[:2]
        self.timed = layers[-1]
        inner = unwrapped(anatomy.model)
        ends = [
            end for end in (inner.get_input_embeddings(), inner.get_output_embeddings()) if end is not None
        ]
        of_ends = {id(one): one for end in ends for one in end.parameters()}
        kept = {id(one) for each in anatomy.layers[2:] for one in each.module.parameters()} | of_ends.keys()
        size = sum(one.numel() * dtype.itemsize for one in inner.parameters() if id(one) not in kept)
        names = [layer.module_name.rpartition(".") for layer in layers]
        lists = {parent for parent, _, _ in names}
        if size > MOST_BYTES or len(lists) > 1:
            raise UnsupportedModelError(
                f"layers of {size / 1e9:.1f} GB in {len(lists)} lists arrived, at most "
                f"{MOST_BYTES / 1e9:.1f} GB in one were expected"
            )
        left_out: dict[int, Any] = {id(layer.module): nn.Identity() for layer in anatomy.layers[2:]}
        few = {
            key: nn.Parameter(self._made(one[:VOCABULARY], dtype), requires_grad=False)
            for key, one in of_ends.items()
        }
        made = self._model = copy.deepcopy(anatomy.model, left_out | few)
        self._list = made.get_submodule(names[0][0])
        for name in list(self._list._modules):
            if name not in {last for _, _, last in names}:
                del self._list._modules[name]
        self._decoder = decoder_of(made)
        self._hidden = int(inner.config.get_text_config(decoder=True).hidden_size)
        inner = unwrapped(made)
        inner.config.get_text_config(decoder=True).vocab_size = VOCABULARY
        inner.get_input_embeddings().padding_idx = None
        own = set(few.values())
        for module in made.modules():
            module.training = False
            self._fill(module, own)

    def _fill(self, module: nn.Module, own: set[nn.Parameter]) -> None:
        """Give a module of the meta device weights, but for its own."""
        for name, weight in module._parameters.items():
            if weight is not None and weight not in own:
                made = self._made(weight, self.dtype if weight.is_floating_point() else weight.dtype)
                module._parameters[name] = nn.Parameter(made, requires_grad=False)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = self._made(value, value.dtype)

    def _made(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        new = torch.zeros(like.shape, dtype=dtype, device=self.device)
        return new.uniform_(-0.02, 0.02, generator=self._random) if dtype.is_floating_point else new

    @torch.no_grad()
    def seconds(self, rows: int, tokens: int, held: int = 0) -> float:
        """Seconds of one layer: what two layers take beyond one.

        Args:
            rows: of the batch.
            tokens: that each row is fed.
            held: tokens that were read before and are in the cache.
        """
        both = self._timed(rows, tokens, held)
        if len(self._list._modules) == 1:
            return both
        with self._one():
            return max(both - self._timed(rows, tokens, held), both / 4)

    @torch.no_grad()
    def reading(self, reading: Reading, lengths: Sequence[int]) -> tuple[float, float]:
        """Seconds of one layer, as `seconds`: of what is done once, and of a batch.

        Args:
            reading: what is done.
            lengths: tokens of every row of the batch.
        """
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
        batch = collate(rows, range(len(rows))).to(self.device)
        if len(self._list._modules) == 1:
            self._timed_reading(reading, batch)
            return self._timed_reading(reading, batch)
        with self._one():
            self._timed_reading(reading, batch)  # what the first call of any function takes is of no layer
            first, one = self._timed_reading(reading, batch)
        once, both = self._timed_reading(reading, batch)
        return max(once - first, 0.0), max(both - one, both / 4)

    @contextmanager
    def _one(self) -> Iterator[None]:
        """Without the second layer."""
        last, layer = self._list._modules.popitem()
        try:
            yield
        finally:
            self._list._modules[last] = layer

    def _timed_reading(self, reading: Reading, batch: Batch) -> tuple[float, float]:
        lm = LanguageModel(self._model)
        config, there = lm.config, lm.config.num_hidden_layers
        config.num_hidden_layers = len(self._list._modules)
        try:
            # Of the proof, which the plan counts, only where a fused projection keeps its queries.
            lm.anatomy = settle_attention(resolve(self._model), Probe(self._model))
        finally:
            config.num_hidden_layers = there
        with ExitStack() as stack:
            read: Any = None

            def begin() -> None:
                nonlocal read
                read = stack.enter_context(reading(lm))
                read(batch)

            first = _took(begin, self.device)
            again = min(_took(lambda: read(batch), self.device) for _ in range(2))
        return max(first - again, 0.0), again

    def _timed(self, rows: int, tokens: int, held: int) -> float:
        given: dict[str, Any] = {"use_cache": held > 0}
        if held:  # and a token more each time: too few to matter
            from safety_neurons.model.room import with_room  # imports transformers

            output = self._decoder(inputs_embeds=self._states(rows, held), use_cache=True)
            given[cache_name(self._decoder)] = with_room(cache_in(output))
        states, took = self._states(rows, tokens), list[float]()
        while len(took) < 2 or (len(took) <= MOST_TIMES and sum(took[1:]) < LEAST_SECONDS):
            took.append(_took(lambda: self._decoder(inputs_embeds=states, **given), self.device))
        return min(took[1:])

    def _states(self, rows: int, tokens: int) -> Tensor:
        states = torch.empty(rows, tokens, self._hidden, dtype=self.dtype, device=self.device)
        return states.normal_(generator=self._random)
