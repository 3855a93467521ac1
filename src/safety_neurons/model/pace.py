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

MOST_BYTES, MOST_OPERATIONS, LEAST_SECONDS, MOST_TIMES = 2**30, 2e10, 0.2, 12
"""Of the weights of a layer, and of its pass that is timed; until so long has gone by, so often at most."""


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
        self.notes: tuple[str, ...] = ()
        self._pace: TimedLayers | None = None
        try:
            self._pace = TimedLayers(outline.anatomy, getattr(torch, outline.dtype), outline.device)
        except UnsupportedModelError as error:
            self._without(error)

    def __call__(self, rows: int, tokens: int, held: int = 0) -> float:
        """Of a batch of rows of so many tokens each, behind those that are held in the cache."""
        if self._pace is not None:
            layer = self._pace.timed
            token = 2.0 * self._outline.passed_in(layer)
            tokens = max(1, min(tokens, round(MOST_OPERATIONS / token)))
            rows = max(1, min(rows, round(MOST_OPERATIONS / token / tokens)))
            keys = attended_in(self._outline, layer, tokens + 2 * held)
            try:
                return rows * tokens * (token + keys) / self._pace.seconds(rows, tokens, held)
            except UnsupportedModelError as error:
                self._without(error)
        return self._of_products(min(512, max(1, rows * tokens)))

    def _without(self, error: UnsupportedModelError) -> None:
        self._pace = None
        self.notes = (f"the time is that of products of matrices alone, a lower bound: {error}",)

    def _of_products(self, rows: int) -> float:
        outline = self._outline
        inner = min(outline.hidden, 4096)
        outer = min(2**24 // inner, 4 * inner)
        kind = {"dtype": getattr(torch, outline.dtype), "device": outline.device}
        left, right = torch.rand(rows, inner, **kind), torch.rand(outer, inner, **kind)
        with torch.no_grad():
            took = min(_timed(lambda: nn.functional.linear(left, right), outline.device) for _ in range(4))
        return 2 * rows * inner * outer / max(took, 1e-9)


def _timed(action: Callable[[], Any], device: torch.device) -> float:
    """Seconds; on a processor its own time counts, whatever else runs on the machine."""
    clock, share = (
        (time.perf_counter, 1) if device.type == "cuda" else (time.process_time, torch.get_num_threads())
    )
    start = clock()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (clock() - start) / share


class TimedLayers:
    """Two layers of a model in memory, with random weights.

    Args:
        anatomy: of the model, on the meta device or in memory; it stays as it is.
        dtype: that it computes in.
        device: that it runs on.

    Raises:
        UnsupportedModelError: layers that are too large to be made up, or that do not run by themselves.
    """

    def __init__(self, anatomy: Anatomy, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._random = torch.Generator(device).manual_seed(0)
        layers = anatomy.layers[:2]
        self.timed = layers[-1]
        size = sum(one.numel() * dtype.itemsize for layer in layers for one in layer.module.parameters())
        if size > 2 * MOST_BYTES:
            raise UnsupportedModelError(
                f"layers of {size / 2e9:.1f} GB arrived, at most {MOST_BYTES / 1e9:.1f} GB were expected"
            )
        inner = unwrapped(anatomy.model)
        ends = [
            end for end in (inner.get_input_embeddings(), inner.get_output_embeddings()) if end is not None
        ]
        left_out: dict[int, Any] = {id(layer.module): nn.Identity() for layer in anatomy.layers[2:]}
        made = copy.deepcopy(anatomy.model, left_out | {id(end): end for end in ends})
        names = [layer.module_name.rpartition(".") for layer in layers]
        self._layers = made.get_submodule(names[0][0])
        for name in list(self._layers._modules):
            if name not in {last for _, _, last in names}:
                del self._layers._modules[name]
        self._decoder = decoder_of(made).eval()
        self._hidden = int(inner.config.get_text_config(decoder=True).hidden_size)
        for module in self._decoder.modules():
            if module not in ends:
                self._fill(module)

    def _fill(self, module: nn.Module) -> None:
        """Give a module of the meta device weights."""
        for held in tuple[dict[str, Any], ...]((module._parameters, module._buffers)):
            for name, value in held.items():
                if value is None:
                    continue
                kind = self.dtype if held is module._parameters and value.is_floating_point() else value.dtype
                new = torch.zeros(value.shape, dtype=kind, device=self.device)
                if kind.is_floating_point:
                    new.uniform_(-0.02, 0.02, generator=self._random)
                held[name] = nn.Parameter(new, requires_grad=False) if held is module._parameters else new

    @torch.no_grad()
    def seconds(self, rows: int, tokens: int, held: int = 0) -> float:
        """Seconds of one layer (of the processor, where it runs there): what two layers take beyond one.

        Args:
            rows: of the batch.
            tokens: that each row is fed.
            held: tokens that were read before and are in the cache.

        Raises:
            UnsupportedModelError: the layers do not run by themselves.
        """
        try:
            both = self._timed(rows, tokens, held)
            if len(self._layers._modules) == 1:
                return both
            last, layer = self._layers._modules.popitem()
            try:
                return max(both - self._timed(rows, tokens, held), both / 4)
            finally:
                self._layers._modules[last] = layer
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"layers alone do not run ({type(error).__name__}: {str(error).splitlines()[0][:80]})"
            ) from error

    def _timed(self, rows: int, tokens: int, held: int) -> float:
        given: dict[str, Any] = {"use_cache": held > 0}
        if held:  # and a token more each time: too few to matter
            output = self._decoder(inputs_embeds=self._states(rows, held), use_cache=True)
            given[cache_name(self._decoder)] = cache_in(output)
        states, took = self._states(rows, tokens), list[float]()
        while len(took) <= MOST_TIMES and sum(took[1:]) < LEAST_SECONDS:
            took.append(_timed(lambda: self._decoder(inputs_embeds=states, **given), self.device))
        return min(took[1:])

    def _states(self, rows: int, tokens: int) -> Tensor:
        states = torch.empty(rows, tokens, self._hidden, dtype=self.dtype, device=self.device)
        return states.normal_(generator=self._random)
