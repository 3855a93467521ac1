"""How fast this machine runs a model of which only the shape is known: one of its layers, with made-up
weights, reads a batch or takes a decoding step.

A product of matrices alone says too little: attention, norms and the calls themselves take as long again in
small models, and a decoding step of few rows is bound by reading weights.
"""

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model.batches import decoder_of
from safety_neurons.model.decoding import cache_in, cache_name
from safety_neurons.model.outline import Outline
from safety_neurons.model.sites import Anatomy, LayerAnatomy, unwrapped

MOST_BYTES = 2**31
"""Of the weights that are made up."""
MOST_OPERATIONS = {"cpu": 2e10}
"""Of a pass that is timed, and of what is read before a decoding step; elsewhere a hundred times as many."""
LEAST_SECONDS, MOST_TIMES = 0.2, 12
"""A pass is timed until so long has gone by, so often at most."""


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

    def _by_itself(self, action: Callable[[], Any]) -> Any:
        """What comes of it, or None and a note: whatever keeps layers from running, the plan goes on."""
        try:
            return action()
        except Exception as error:
            self._layers = None
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            self.notes = (f"the time is that of products of matrices alone, a lower bound ({why})",)
            return None

    def _of_layers(self, rows: int, tokens: int, held: int) -> float:
        assert self._layers is not None
        layer = self._layers.timed
        token = 2.0 * self._outline.passed_in(layer)
        tokens = max(1, min(tokens, round(self._most / token)))
        rows = max(1, min(rows, round(self._most / token / tokens)))
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
        kept = {
            id(one)
            for end in (*ends, *(each.module for each in anatomy.layers[2:]))
            for one in end.parameters()
        }
        size = sum(one.numel() * dtype.itemsize for one in inner.parameters() if id(one) not in kept)
        names = [layer.module_name.rpartition(".") for layer in layers]
        lists = {parent for parent, _, _ in names}
        if size > MOST_BYTES or len(lists) > 1:
            raise UnsupportedModelError(
                f"layers of {size / 1e9:.1f} GB in {len(lists)} lists arrived, at most "
                f"{MOST_BYTES / 1e9:.1f} GB in one were expected"
            )
        left_out: dict[int, Any] = {id(layer.module): nn.Identity() for layer in anatomy.layers[2:]}
        made = copy.deepcopy(anatomy.model, left_out | {id(end): end for end in ends})
        self._list = made.get_submodule(names[0][0])
        for name in list(self._list._modules):
            if name not in {last for _, _, last in names}:
                del self._list._modules[name]
        self._decoder = decoder_of(made)
        self._hidden = int(inner.config.get_text_config(decoder=True).hidden_size)
        for module in self._decoder.modules():
            if module not in ends:
                module.training = False
                self._fill(module)

    def _fill(self, module: nn.Module) -> None:
        """Give a module of the meta device weights."""
        for name, weight in module._parameters.items():
            if weight is not None:
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
        last, layer = self._list._modules.popitem()
        try:
            return max(both - self._timed(rows, tokens, held), both / 4)
        finally:
            self._list._modules[last] = layer

    def _timed(self, rows: int, tokens: int, held: int) -> float:
        given: dict[str, Any] = {"use_cache": held > 0}
        if held:  # and a token more each time: too few to matter
            output = self._decoder(inputs_embeds=self._states(rows, held), use_cache=True)
            given[cache_name(self._decoder)] = cache_in(output)
        states, took = self._states(rows, tokens), list[float]()
        while len(took) < 2 or (len(took) <= MOST_TIMES and sum(took[1:]) < LEAST_SECONDS):
            took.append(_took(lambda: self._decoder(inputs_embeds=states, **given), self.device))
        return min(took[1:])

    def _states(self, rows: int, tokens: int) -> Tensor:
        states = torch.empty(rows, tokens, self._hidden, dtype=self.dtype, device=self.device)
        return states.normal_(generator=self._random)
