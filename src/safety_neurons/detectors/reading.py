"""Read a running model: activations of sites at positions, inputs and outputs of sub-layers, two models on
one batch.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from safety_neurons.errors import UsageError
from safety_neurons.model import LanguageModel, hooks
from safety_neurons.model.attention import AttentionCapture
from safety_neurons.model.batches import Batch, forward
from safety_neurons.model.hooks import around, reading
from safety_neurons.model.sites import AttentionAnatomy, LayerAnatomy, MlpAnatomy, SitePlace, take


@dataclass(frozen=True)
class PositionRows:
    """A site's activations at the positions that count.

    Attributes:
        values: one row per position, in float32 or wider.
        at: number of the position each row is of, ascending (an expert has rows only for the tokens routed to
            it).
    """

    values: Float[Tensor, "row neuron"]
    at: Int[Tensor, " row"]


def rows_at(values: Any, positions: Int[Tensor, " position"]) -> PositionRows:
    """What a reader got, at flat positions (batch × token): selected by index, never multiplied by a mask."""
    if isinstance(values, Tensor):
        taken = values.flatten(0, 1)[positions.to(values.device)]
        return PositionRows(_widened(taken), torch.arange(len(positions), device=values.device))
    order = torch.searchsorted(positions.to(values.token_index.device), values.token_index).clamp(
        max=len(positions) - 1
    )
    counted = (positions.to(order.device)[order] == values.token_index).nonzero().squeeze(1)
    at, order_of_rows = order[counted].sort()
    return PositionRows(_widened(values.values[counted[order_of_rows]]), at)


def in_both(first: PositionRows, second: PositionRows) -> tuple[PositionRows, PositionRows]:
    """The rows of positions that both have, on the second's device (two models may route a token to different
    experts).
    """
    first = PositionRows(first.values.to(second.values.device), first.at.to(second.at.device))
    if torch.equal(first.at, second.at):
        return first, second
    left = torch.isin(first.at, second.at).nonzero().squeeze(1)
    right = torch.isin(second.at, first.at).nonzero().squeeze(1)
    return PositionRows(first.values[left], first.at[left]), PositionRows(
        second.values[right], second.at[right]
    )


def _widened(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values.clone()


def writer_of(base: LanguageModel, aligned: LanguageModel, generate_with: str) -> LanguageModel:
    """The model that writes the completions."""
    if generate_with not in ("base", "aligned"):
        raise UsageError(f"--generate-with {generate_with!r} is unknown; expected base or aligned")
    return base if generate_with == "base" else aligned


def read(lm: LanguageModel, batch: Batch, readers: Mapping[str, Callable[..., None]]) -> None:
    """One forward pass of one model over the batch, with its adapters active, its head left out and no
    gradients.
    """
    with lm.active(), hooks.reading(lm.anatomy, readers) as firings, torch.no_grad():
        forward(lm.model, batch.to(lm.device))
        firings.check(ran=True)


def donated(lm: LanguageModel, batch: Batch, keys: Iterable[str]) -> dict[str, Any]:
    """The activations of these sites in a model that reads the batch, as `hooks.reading` gives them, in
    memory of their own.
    """
    donors: dict[str, Any] = {}

    def keep(key: str) -> Callable[[Any], None]:
        def reader(values: Any) -> None:
            donors[key] = (
                values.detach().clone()
                if isinstance(values, Tensor)
                else replace(values, values=values.values.clone())
            )

        return reader

    read(lm, batch, {key: keep(key) for key in keys})
    return donors


def chosen_rows(batch: Batch, starts: Sequence[int], stops: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Flat indices (into batch × token) of the positions that count, sequence by sequence, and which row of
    the batch each is of.
    """
    device = batch.input_ids.device
    rows = [
        torch.arange(start, stop, device=device) + row * batch.width
        for row, (start, stop) in enumerate(zip(starts, stops, strict=True))
    ]
    lengths = torch.tensor([len(part) for part in rows], device=device)
    return torch.cat(rows), torch.repeat_interleave(torch.arange(len(rows), device=device), lengths)


Part = AttentionAnatomy | MlpAnatomy

OUTPUT_GATE = "output_gate"
"""Among the activations shown: what a query projection puts out beside the queries."""


@dataclass
class Shown:
    """What one sub-layer showed in one forward pass.

    Attributes:
        inputs: what each projection with output sites was given, by the id of the module.
        activations: of each site, `[batch, token, neuron]`; for `o` the projection's input, `down` is not
            kept; `output_gate` where a query projection puts out one.
        arguments: of the attention module, by name.
    """

    inputs: dict[int, Tensor] = field(default_factory=dict)
    activations: dict[str, Tensor] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def capture(self) -> AttentionCapture:
        """As the attention formula takes it."""
        seen = self.activations
        gate = seen.get(OUTPUT_GATE)
        return AttentionCapture(seen["q"], seen["k"], seen["v"], seen["o"], self.arguments, gate)

    def unscaled(self, part: AttentionAnatomy) -> AttentionCapture:
        """The same with the input of the o projection as it is before an (IA)³ scale, which then belongs to
        the columns.
        """
        scale, seen = input_scale(part.places["o"]), self.capture
        return seen if scale is None else replace(seen, o=seen.o / scale.to(seen.o))


Handler = Callable[[LayerAnatomy, Shown], None]


@contextmanager
def watching(
    lm: LanguageModel,
    layers: Iterable[LayerAnatomy],
    attention: Handler | None,
    mlp: Handler | None = None,
    *,
    inputs: bool = True,
) -> Iterator[None]:
    """Calls a function for each sub-layer, inside the pass, when its `o` or `down` projection is reached.

    Args:
        lm: the model.
        layers: which layers.
        attention: gets the layer and what its attention showed; None where attention is not wanted.
        mlp: the same for the dense feed-forward part.
        inputs: whether what the projections are given is shown too.
    """
    readers: dict[str, Callable[[Any], None]] = {}
    with ExitStack() as stack:
        for layer in layers:
            if attention is not None and layer.attention is not None:
                watch = _Watch(layer, layer.attention, "o", attention)
                stack.enter_context(watch.on({layer.attention.module: watch.keep_arguments}, inputs))
                readers.update(watch.readers())
            if mlp is not None and layer.mlp is not None:
                watch = _Watch(layer, layer.mlp, "down", mlp)
                stack.enter_context(watch.on({}, inputs))
                readers.update(watch.readers())
        stack.enter_context(reading(lm.anatomy, readers))
        yield


class _Watch:
    """Collects what one sub-layer shows."""

    def __init__(self, layer: LayerAnatomy, part: Part, last: str, then: Handler) -> None:
        self.layer, self.part, self.last, self.then = layer, part, last, then
        self.seen = Shown()

    @contextmanager
    def on(self, before: dict[nn.Module, Callable[..., Any]], inputs: bool) -> Iterator[None]:
        """Hooks before the module and, where inputs are shown, before the projections of its output sites."""
        hooks = dict(before)
        for place in self.part.places.values():
            if inputs and place.side == "output":
                hooks[place.module] = partial(self._keep_input, place.module)
        gates: dict[nn.Module, Callable[..., Any]] = {}
        if isinstance(self.part, AttentionAnatomy) and self.part.gate is not None:
            gates[self.part.places["q"].module] = self._keep_gate
        with around(before=hooks, after=gates):
            yield

    def _keep_gate(self, queries: Tensor) -> None:
        assert isinstance(self.part, AttentionAnatomy)
        self.seen.activations[OUTPUT_GATE] = self.part.gate_values(queries)

    def readers(self) -> dict[str, Callable[[Any], None]]:
        """One reader a site."""
        named = {
            place.key: partial(self._keep, site)
            for site, place in self.part.places.items()
            if site != self.last
        }
        return {**named, self.part.places[self.last].key: self._finish}

    def keep_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Arguments of the attention module by name."""
        names = list(inspect.signature(type(self.part.module).forward).parameters)[
            1:
        ]  # The class's: an instance's may be wrapped.
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
    """Activations that the other model's projections give on the inputs shown, `[batch, token, neuron]` by
    output site.

    The other model may be the same modules under other adapters.
    """
    like = next(iter(shown.activations.values()))
    given: dict[int, Tensor] = {}
    activations: dict[str, Tensor] = {}
    with other.active():
        for site, place in part.places.items():
            if place.side == "output":
                theirs = other.anatomy.place(place.key)
                if id(theirs.module) not in given:
                    given[id(theirs.module)] = projected(theirs, shown.inputs[id(place.module)]).to(
                        like.device
                    )
                output = given[id(theirs.module)]
                whole = output.reshape(*like.shape[:2], output.shape[-1])
                activations[site] = take(whole, theirs.index)
                if site == "q" and isinstance(part, AttentionAnatomy) and part.gate is not None:
                    activations[OUTPUT_GATE] = part.gate_values(whole)
    return activations


def projected(place: SitePlace, fed: Tensor) -> Tensor:
    """What a projection makes of an input that may lie on another device."""
    weight = getattr(place.projection.base, "weight", fed)
    # Past its hooks: the other model may be these very modules, whose pass is under way and counted.
    output: Tensor = place.module.forward(fed.to(weight.device))
    return output


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
    """Columns `[out, neuron]` of an `o` or `down` projection, with adapters' shares: LoRA added, an (IA)³
    input scale multiplied in.
    """
    with lm.active():
        place = lm.anatomy.place(key)
        weight, scale = place.weight().detach(), input_scale(place)
        weight = weight if weight.dtype == torch.float64 else weight.float()
        return weight if scale is None else weight * scale.to(weight)
