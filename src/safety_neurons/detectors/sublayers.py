"""Sub-layers of a running model: what goes into their projections and what comes out, handed on layer by layer."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from safety_neurons.model import LanguageModel
from safety_neurons.model.attention import AttentionCapture
from safety_neurons.model.hooks import around, reading
from safety_neurons.model.sites import AttentionAnatomy, LayerAnatomy, MlpAnatomy, SitePlace, take

Part = AttentionAnatomy | MlpAnatomy


@dataclass
class Shown:
    """What one sub-layer showed in one forward pass.

    Attributes:
        inputs: what each projection with output sites was given, by the id of the module.
        activations: of each site, `[batch, token, neuron]`; for `o` the projection's input, `down` is not kept.
        arguments: of the attention module, by name.
    """

    inputs: dict[int, Tensor] = field(default_factory=dict)
    activations: dict[str, Tensor] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def capture(self) -> AttentionCapture:
        """As the attention formula takes it."""
        seen = self.activations
        return AttentionCapture(seen["q"], seen["k"], seen["v"], seen["o"], self.arguments)


Handler = Callable[[LayerAnatomy, Shown], None]


@contextmanager
def watching(lm: LanguageModel, layers: Iterable[LayerAnatomy], attention: Handler | None, mlp: Handler | None) -> Iterator[None]:
    """Calls a function for each sub-layer, inside the pass, when its `o` or `down` projection is reached.

    Args:
        lm: the model.
        layers: which layers.
        attention: gets the layer and what its attention showed; None where attention is not wanted.
        mlp: the same for the dense feed-forward part.
    """
    readers: dict[str, Callable[[Any], None]] = {}
    with ExitStack() as stack:
        for layer in layers:
            if attention is not None and layer.attention is not None:
                watch = _Watch(layer, layer.attention, "o", attention)
                stack.enter_context(watch.on({layer.attention.module: watch.keep_arguments}))
                readers.update(watch.readers())
            if mlp is not None and layer.mlp is not None:
                watch = _Watch(layer, layer.mlp, "down", mlp)
                stack.enter_context(watch.on({}))
                readers.update(watch.readers())
        stack.enter_context(reading(lm.anatomy, readers))
        yield


class _Watch:
    """Collects what one sub-layer shows."""

    def __init__(self, layer: LayerAnatomy, part: Part, last: str, then: Handler) -> None:
        self.layer, self.part, self.last, self.then = layer, part, last, then
        self.seen = Shown()

    @contextmanager
    def on(self, before: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
        """Hooks before the module and before the projections of its output sites."""
        hooks = dict(before)
        for place in self.part.places.values():
            if place.side == "output":
                hooks[place.module] = partial(self._keep_input, place.module)
        with around(before=hooks):
            yield

    def readers(self) -> dict[str, Callable[[Any], None]]:
        """One reader a site."""
        named = {place.key: partial(self._keep, site) for site, place in self.part.places.items() if site != self.last}
        return {**named, self.part.places[self.last].key: self._finish}

    def keep_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Arguments of the attention module by name."""
        code = getattr(self.part.module.forward, "__code__", None)
        names = code.co_varnames[1:] if code is not None else ()
        self.seen.arguments = {**dict(zip(names, args, strict=False)), **kwargs}

    def _keep_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen.inputs[id(module)] = args[0] if args else next(iter(kwargs.values()))

    def _keep(self, site: str, values: Tensor) -> None:
        self.seen.activations[site] = values

    def _finish(self, values: Tensor) -> None:
        seen, self.seen = self.seen, Shown()
        if self.last == "o":
            seen.activations["o"] = values
        self.then(self.layer, seen)
        self.seen = Shown()


def under(other: LanguageModel, part: Part, shown: Shown) -> dict[str, Tensor]:
    """Activations that the other model's projections give on the inputs shown, `[batch, token, neuron]` by output site.

    The other model may be the same modules under other adapters.
    """
    like = next(iter(shown.activations.values()))
    given: dict[int, Tensor] = {}
    found: dict[str, Tensor] = {}
    with other.active():
        for site, place in part.places.items():
            if place.side == "output":
                theirs = other.anatomy.place(place.key)
                if id(theirs.module) not in given:
                    given[id(theirs.module)] = projected(theirs, shown.inputs[id(place.module)]).to(like.device)
                output = given[id(theirs.module)]
                found[site] = take(output.reshape(*like.shape[:2], output.shape[-1]), theirs.index)
    return found


def projected(place: SitePlace, fed: Tensor) -> Tensor:
    """What a projection makes of an input that may lie on another device."""
    weight = getattr(place.projection.base, "weight", fed)
    return place.module(fed.to(weight.device))


def input_scale(place: SitePlace) -> Tensor | None:
    """Scale that active (IA)³ adapters put on what a projection reads; None where there is none."""
    scale: Tensor | None = None
    layer: Any = place.module
    while place.projection.scales_input and hasattr(layer, "base_layer"):
        if not layer.disable_adapters and not layer.merged:
            for adapter in layer.active_adapters:
                if adapter in getattr(layer, "ia3_l", {}):
                    factor = layer.ia3_l[adapter].detach().flatten()
                    scale = factor if scale is None else scale * factor
        layer = layer.base_layer
    return scale


def columns(lm: LanguageModel, key: str) -> Tensor:
    """Columns `[out, neuron]` of an `o` or `down` projection, with adapters' shares: LoRA added, an (IA)³ input scale multiplied in."""
    with lm.active():
        place = lm.anatomy.place(key)
        weight, scale = place.weight().detach(), input_scale(place)
        weight = weight if weight.dtype == torch.float64 else weight.float()
        return weight if scale is None else weight * scale.to(weight)
