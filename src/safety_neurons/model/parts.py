"""The records of an anatomy: attention, feed-forward part and layer, the whole model, and how much of it is covered."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model.experts import ExpertsAnatomy
from safety_neurons.model.layouts import Layout
from safety_neurons.model.places import Projection, SitePlace, projection
from safety_neurons.neurons import MLP_SITES, SiteInfo, SiteTable


@dataclass(frozen=True)
class AttentionAnatomy:
    """The attention of one layer. Facts of its formula (rotary, norms, mask …) live in `safety_neurons.model.attention`."""

    module: nn.Module
    module_name: str
    n_heads: int
    n_kv_heads: int
    head_dim: int
    places: dict[str, SitePlace]
    layout: Layout | None = None
    """How q, k and v share one projection; None where each has its own."""


@dataclass(frozen=True)
class MlpAnatomy:
    """A dense feed-forward part: down(act(gate)·up), or down(act(up)) without a gate.

    `module` holds the projections (the layer itself in some families); `output_module` is the down projection with its adapters.
    """

    module: nn.Module
    module_name: str
    gated: bool
    places: dict[str, SitePlace]
    activation: Callable[[Tensor], Tensor]
    layout: Layout | None = None

    @property
    def output_module(self) -> nn.Module:
        """The module whose output is the sub-layer's, before any norm behind it."""
        return self.places["down"].module


@dataclass(frozen=True)
class LayerAnatomy:
    """One decoder layer."""

    index: int
    module_name: str
    module: nn.Module
    attention: AttentionAnatomy | None = None
    mlp: MlpAnatomy | None = None
    experts: ExpertsAnatomy | None = None
    shared: MlpAnatomy | None = None

    @property
    def parts(self) -> list[AttentionAnatomy | MlpAnatomy]:
        """The parts whose projections are linear maps of their own."""
        return [part for part in (self.attention, self.mlp, self.shared) if part is not None]


@dataclass(frozen=True)
class Coverage:
    """How much of the model's layers the anatomy knows."""

    found: int
    expected: int
    parameters: int
    all_parameters: int

    @property
    def share(self) -> float:
        """Share of the parameters of attention and feed-forward projections that belong to a site."""
        return self.parameters / self.all_parameters if self.all_parameters else 0.0

    @property
    def complete(self) -> bool:
        """Whether every expected site was found and every projection's parameters belong to one."""
        return self.found == self.expected and self.parameters == self.all_parameters and self.found > 0

    def __str__(self) -> str:
        percent = "100" if self.parameters == self.all_parameters else f"{min(100 * self.share, 99.9):.1f}"
        return f"sites {self.found}/{self.expected}, {percent} % of attention and MLP parameters"


@dataclass(frozen=True)
class Anatomy:
    """Every site of a model.

    Attributes:
        model: the model as it was given, wrappers included.
        layers: its decoder layers.
        refused: sites that exist but cannot be used, with the reason.
        all_parameters: parameters of attention and feed-forward projections and experts (routers, norms and adapters not counted).
        chosen: layouts that the caller fixed; the proof does not replace these.
    """

    model: nn.Module
    layers: tuple[LayerAnatomy, ...]
    refused: dict[str, str] = field(default_factory=dict)
    all_parameters: int = 0
    chosen: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def places(self) -> dict[str, SitePlace]:
        """Every site that is a linear map of its own, by key; experts are in `layers[i].experts`."""
        places = [place for layer in self.layers for part in layer.parts for place in part.places.values()]
        return {place.key: place for place in places if place.key not in self.refused}

    def place(self, key: str) -> SitePlace:
        """The place of a key.

        Raises:
            UnsupportedModelError: the site was refused, or the model has none of that name.
        """
        self.check([key])
        return self.places[key]

    def check(self, keys: Any) -> None:
        """Raise an error that names the first key which this model does not have or which was refused."""
        for key in keys:
            if key in self.refused:
                raise UnsupportedModelError(f"{key} is not supported on this {self.architecture}: {self.refused[key]}")
            if key not in self.table:
                raise UnsupportedModelError(
                    f"{key} was asked, this {self.architecture} has {len(self.table.keys)} sites in {len(self.layers)} layers; "
                    "check layer, expert and site"
                )

    @property
    def architecture(self) -> str:
        """Class of the model inside any adapter wrapper."""
        return type(unwrapped(self.model)).__name__

    @cached_property
    def table(self) -> SiteTable:
        """Sizes, heads and costs of all sites, experts included."""
        infos = [info for layer in self.layers for info in _infos(layer) if info.key not in self.refused]
        return SiteTable(self.architecture, count_parameters(self.model), tuple(infos))

    def coverage(self) -> Coverage:
        """Sites found of those expected, and the share of parameters they hold.

        Sites are counted per layer and part (the experts of a layer as gate, up and down), whatever the number of experts.
        """
        found = {re.sub(r"experts\.\d+", "experts", key) for key in self.table.keys}
        refused = {re.sub(r"experts\.\d+", "experts", key) for key in self.refused} - found
        counted = {id(place.projection.base): place.projection.n_parameters for place in self.places.values()}
        routed = sum(_expert_parameters(layer.experts) for layer in self.layers if layer.experts)
        return Coverage(len(found), len(found) + len(refused), sum(counted.values()) + routed, self.all_parameters)


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model, tied ones once, adapters and deltas not counted, quantised ones by the number of weights they stand for."""
    adapters = {
        id(parameter)
        for module in model.modules()
        for name in getattr(module, "adapter_layer_names", ())
        if isinstance(container := getattr(module, name, None), nn.Module)
        for parameter in container.parameters()
    }
    for module in model.modules():
        if hasattr(module, "trained_beside"):
            adapters |= {id(parameter) for parameter in module.parameters(recurse=False)}
    total = 0
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            state = getattr(parameter, "quant_state", None)
            total += state.shape.numel() if state is not None else parameter.numel()
    return total


def _expert_parameters(experts: ExpertsAnatomy) -> int:
    return sum(parameter.numel() for parameter in experts.module.parameters(recurse=False))


def _infos(layer: LayerAnatomy) -> list[SiteInfo]:
    infos = []
    for part in layer.parts:
        for site, place in part.places.items():
            heads, size = 0, 0
            if isinstance(part, AttentionAnatomy):
                heads, size = (part.n_heads if site in "qo" else part.n_kv_heads), part.head_dim
            infos.append(SiteInfo(place.key, place.size, place.weights_per_neuron, int(place.has_bias), heads, size))
    if (experts := layer.experts) is not None:
        infos += [
            SiteInfo(experts.key(expert, site), experts.width, experts.hidden, int(experts.has_bias and site != "down"))
            for expert in range(experts.n_experts)
            for site in MLP_SITES
        ]
    return infos


def projections_of(layer: nn.Module) -> dict[str, Projection]:
    """The linear maps of a layer by path, adapters and what lies inside a linear map left aside."""
    found: dict[str, Projection] = {}

    def walk(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            here = f"{path}.{name}" if path else name
            part = projection(child)
            if part is not None:
                found[here] = part
            else:
                walk(child, here)

    walk(layer, "")
    return found
