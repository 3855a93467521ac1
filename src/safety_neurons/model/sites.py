"""Sites of a model: projections with adapters, fused layouts, routed experts, and the anatomy that holds
them.

A site is found in a `Projection` as some features of its output or input (`Index`), which is a `SitePlace`;
its weights are read with the share of active adapters in them. Experts kept as three-dimensional parameters
are reached through transformers' experts interface: every implementation of it that keeps the gate step apart
calls `experts._apply_gate(gate_up)`, with one row for each pair of a token and an expert chosen for it, and
feeds what it returns to the experts' down projections. So the argument holds the gate and up neurons of the
row's expert, and the value its down neurons. Which row is which pair follows from the routing that the
experts module is given.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model.fewer_bits import dequantised
from safety_neurons.neurons import MLP_SITES, SiteInfo, SiteTable

Index = slice | torch.Tensor | None
"""Features of a projection that are a site's neurons, in order: all (`None`), a run of them, or a vector of
positions.
"""


class Layout(StrEnum):
    """Order of the features inside a fused projection."""

    CONTIGUOUS = "contiguous"
    """All queries, then all keys, then all values; or all gates, then all ups."""
    GROUPED = "grouped"
    """Per key-value head: its queries, its key, its value.

    With one query head a group this is interleaving per head.
    """
    UP_FIRST = "up_first"
    """All ups, then all gates."""
    ALTERNATING = "alternating"
    """gate, up, gate, up …"""


QKV_LAYOUTS = (Layout.CONTIGUOUS, Layout.GROUPED)
GATE_UP_LAYOUTS = (Layout.CONTIGUOUS, Layout.UP_FIRST, Layout.ALTERNATING)


def split_qkv(layout: Layout, n_heads: int, n_kv_heads: int, head_dim: int) -> dict[str, Index]:
    """Positions of the `q`, `k` and `v` neurons in a fused projection of `(n_heads + 2·n_kv_heads)·head_dim`
    features.
    """
    if layout == Layout.CONTIGUOUS:
        queries, keys = n_heads * head_dim, n_kv_heads * head_dim
        return {
            "q": slice(0, queries),
            "k": slice(queries, queries + keys),
            "v": slice(queries + keys, queries + 2 * keys),
        }
    if layout == Layout.GROUPED and n_heads % n_kv_heads == 0:
        group = n_heads // n_kv_heads
        positions = torch.arange((n_heads + 2 * n_kv_heads) * head_dim).view(n_kv_heads, group + 2, head_dim)
        parts = {"q": positions[:, :group], "k": positions[:, group], "v": positions[:, group + 1]}
        return {site: simplified(part.reshape(-1)) for site, part in parts.items()}
    raise UnsupportedModelError(
        f"a fused query-key-value projection with layout {layout!r}, {n_heads} query heads and "
        f"{n_kv_heads} key heads cannot be split; pass layouts={{'qkv': one of {', '.join(QKV_LAYOUTS)}}}"
    )


def split_gated(n_heads: int, head_dim: int) -> tuple[Index, Index]:
    """Positions of the queries and of the output gate in a query projection that holds both, head by head."""
    positions = torch.arange(2 * n_heads * head_dim).view(n_heads, 2, head_dim)
    return simplified(positions[:, 0].reshape(-1)), simplified(positions[:, 1].reshape(-1))


def split_gate_up(layout: Layout, width: int) -> dict[str, Index]:
    """Positions of the `gate` and `up` neurons in a fused projection of `2·width` features."""
    first, second = slice(0, width), slice(width, 2 * width)
    if layout == Layout.CONTIGUOUS:
        return {"gate": first, "up": second}
    if layout == Layout.UP_FIRST:
        return {"gate": second, "up": first}
    if layout == Layout.ALTERNATING:
        return {"gate": slice(0, 2 * width, 2), "up": slice(1, 2 * width, 2)}
    raise UnsupportedModelError(
        f"a fused gate-up projection cannot have layout {layout!r}; pass layouts={{'gate_up': one of "
        f"{', '.join(GATE_UP_LAYOUTS)}}}"
    )


def simplified(positions: torch.Tensor) -> Index:
    """The same positions as a slice where they are evenly spaced, which costs a view instead of a copy."""
    if positions.numel() == 1:
        return slice(int(positions[0]), int(positions[0]) + 1)
    steps = positions[1:] - positions[:-1]
    step = int(steps[0])
    if step > 0 and bool((steps == step).all()):
        return slice(int(positions[0]), int(positions[-1]) + 1, step)
    return positions


def length(index: Index, features: int) -> int:
    """How many of `features` features an index takes."""
    if index is None:
        return features
    return len(range(*index.indices(features))) if isinstance(index, slice) else int(index.numel())


def covers(indices: Mapping[str, Index], features: int) -> bool:
    """Whether the sites of a fused projection take every feature exactly once."""
    everything = torch.arange(features)
    taken = torch.cat([take(everything, index) for index in indices.values()])
    return bool(torch.equal(taken.sort().values, everything))


def take(values: torch.Tensor, index: Index, axis: int = -1) -> torch.Tensor:
    """The features of one site, a view wherever the index is a slice."""
    if index is None:
        return values
    if isinstance(index, slice):
        if axis in (-1, values.ndim - 1):
            return values[..., index]
        return values[(slice(None),) * axis + (index,)]
    return values.index_select(axis, index if index.device == values.device else index.to(values.device))


_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def stored_weight(module: nn.Module, name: str, where: str) -> Tensor:
    """The tensor of a module that a change can be written into and that its identity stands for.

    Args:
        module: a module, or a container of parameters.
        name: of its tensor.
        where: what an error calls it.

    Raises:
        UnsupportedModelError: it is made anew on every access, so that what is written into it is lost.
    """
    held = isinstance(module, nn.ParameterDict)
    if not held and name not in module._parameters and name not in module._buffers:
        raise UnsupportedModelError(
            f"{where}: its {name} is computed from other tensors (a parametrisation, a weight norm, a "
            "pruning mask), a parameter was expected; take the parametrisation off first"
        )
    return module[name] if held else getattr(module, name)  # type: ignore[index]


@dataclass(frozen=True)
class Projection:
    """A linear map of the model, with whatever adapter is wrapped around it.

    `module` is what the model calls (a PEFT tuner layer where there is one), `base` the linear map inside.
    """

    module: nn.Module
    base: nn.Module
    in_features: int
    out_features: int
    transposed: bool

    @property
    def tuner(self) -> nn.Module:
        """The linear map with its adapters: `module`, or what is inside where trainable deltas (`added_to`)
        are around it.
        """
        return self.module.base_layer if hasattr(self.module, "added_to") else self.module  # type: ignore[return-value]

    @property
    def scales_input(self) -> bool:
        """Whether an (IA)³ adapter multiplies the input before the linear map sees it."""
        return hasattr(self.tuner, "ia3_l") and bool(getattr(self.tuner, "is_feedforward", False))

    @property
    def quantised(self) -> bool:
        """Whether the stored numbers are not the weights themselves."""
        weight = getattr(self.base, "weight", None)
        return (
            weight is None
            or weight.dtype not in _FLOATING
            or weight.ndim != 2
            or hasattr(weight, "quant_state")
        )

    @property
    def readable(self) -> bool:
        """Whether the weights can be read as they are (neither quantised nor off-loaded)."""
        return not self.quantised and not self.base.weight.is_meta

    @property
    def n_parameters(self) -> int:
        """Weights and bias entries of the linear map, adapters not counted."""
        return self.in_features * self.out_features + (
            self.out_features if getattr(self.base, "bias", None) is not None else 0
        )


def projection(module: nn.Module) -> Projection | None:
    """`module` as a linear map, or None if it is something else."""
    base = _base(module)
    weight = getattr(base, "weight", None)
    if isinstance(base, nn.Linear) or (
        hasattr(base, "in_features") and hasattr(base, "out_features") and not list(base.children())
    ):
        return Projection(module, base, int(base.in_features), int(base.out_features), False)
    if hasattr(base, "nf") and weight is not None and weight.ndim == 2 and weight.shape[1] == base.nf:
        return Projection(module, base, int(weight.shape[0]), int(base.nf), True)
    return None


def _base(module: nn.Module) -> Any:
    """The linear map under PEFT's wrappers."""
    current: Any = module
    while True:
        if hasattr(current, "modules_to_save") and hasattr(current, "original_module"):
            adapter = getattr(current, "active_adapter", None)
            name = adapter[0] if isinstance(adapter, list | tuple) and adapter else adapter
            saved = current.modules_to_save
            current = saved[name] if name in saved else current.original_module  # noqa: SIM401 (a ModuleDict has no get)
        elif hasattr(current, "base_layer"):
            current = current.base_layer
        else:
            return current


@dataclass(frozen=True)
class SitePlace:
    """One site of one layer: a projection, the side on which its neurons are, and which features they are.

    Attributes:
        key: `layers.{i}.{site}` or `layers.{i}.shared_expert.{site}`.
        module_name: path of the projection in the model.
        projection: the linear map, adapters included.
        side: "output" (`q k v gate up`) or "input" (`o down`).
        index: the site's neurons among the features of that side, in order; None for all.
    """

    key: str
    module_name: str
    projection: Projection
    side: str
    index: Index = None

    @property
    def module(self) -> nn.Module:
        """What the model calls: the projection itself, or the tuner layer around it."""
        return self.projection.module

    @property
    def hooked(self) -> nn.Module:
        """The module at whose boundary the activation is: inside an (IA)³ layer for an input that it
        scales.
        """
        if self.side == "input" and self.projection.scales_input:
            return self.projection.tuner.base_layer  # type: ignore[return-value]
        return self.projection.module

    @property
    def transposed(self) -> bool:
        """Whether the stored weight is `[in, out]`."""
        return self.projection.transposed

    @property
    def features(self) -> int:
        """Features of the projection on this side, other sites' included."""
        return self.projection.out_features if self.side == "output" else self.projection.in_features

    @property
    def size(self) -> int:
        """Number of neurons."""
        return length(self.index, self.features)

    @property
    def has_bias(self) -> bool:
        """Whether each neuron has a bias entry of its own (never at an input)."""
        return self.side == "output" and getattr(self.projection.base, "bias", None) is not None

    @property
    def weights_per_neuron(self) -> int:
        """Weights in a neuron's row or column."""
        return self.projection.in_features if self.side == "output" else self.projection.out_features

    def at(self, index: Index) -> "SitePlace":
        """The same place with other features."""
        return replace(self, index=index)

    def weight(self) -> Float[Tensor, "out features"]:
        """Weights as `[n, in]` for an output site, `[out, n]` for an input site.

        An active adapter's share is included.

        The scale of an (IA)³ feed-forward adapter is on the activation (what the projection sees), so it is
        not in the weight.

        Raises:
            UnsupportedModelError: the weights are quantised in a way that cannot be read, off-loaded, or an
            adapter has no additive form.
        """
        return take(full_weight(self.projection, self.key), self.index, 0 if self.side == "output" else 1)

    def bias(self) -> Float[Tensor, " neuron"] | None:
        """The neurons' bias entries, an adapter's share included.

        None where there are none and at an input.
        """
        whole = full_bias(self.projection) if self.side == "output" else None
        return None if whole is None else take(whole, self.index)

    def output_bias(self) -> Float[Tensor, " out"] | None:
        """The bias of the whole projection, an adapter's share included."""
        return full_bias(self.projection)


def full_weight(part: Projection, name: str = "a projection") -> Float[Tensor, "out in"]:
    """The weight of a projection as `[out, in]`, dequantised if need be, with the active adapters' share."""
    weight = _stored_weight(part, name)
    weight = weight.T if part.transposed else weight
    for layer in _active_layers(part):
        weight = _with_adapters(weight, layer, name, part.transposed)
    return _with_deltas(weight, part, name)


def _with_deltas(weight: Tensor, part: Projection, name: str) -> Tensor:
    if part.tuner is part.module:
        return weight
    if part.scales_input:
        raise UnsupportedModelError(
            f"{name}: trained deltas are beside an (IA)³ scale of its input, so the projection has no "
            "single weight; merge the adapter first (--merge-adapters)"
        )
    wrapper: Any = part.module
    added: Tensor = wrapper.added_to(weight)
    return added


def full_bias(part: Projection) -> Float[Tensor, " out"] | None:
    """The bias of a projection with the active adapters' share; None where there is none."""
    bias = getattr(part.base, "bias", None)
    for layer in _active_layers(part):
        for adapter in layer.active_adapters:
            if adapter in getattr(layer, "ia3_l", {}) and not layer.is_feedforward and bias is not None:
                bias = bias * layer.ia3_l[adapter].flatten()
            if (
                adapter in getattr(layer, "lora_B", {})
                and getattr(layer.lora_B[adapter], "bias", None) is not None
            ):
                extra = layer.lora_B[adapter].bias * layer.scaling[adapter]
                bias = extra if bias is None else bias + extra
    return bias


def _stored_weight(part: Projection, name: str) -> Tensor:
    weight: Any = dequantised(part.base, name) if part.quantised else part.base.weight
    if weight.is_meta:
        raise UnsupportedModelError(
            f"{name}: its weights are off-loaded, a weight in memory was expected; load the model "
            "without disk or CPU off-loading"
        )
    return weight


def _active_layers(part: Projection) -> list[Any]:
    """Tuner layers around the projection whose adapters act, from the inside out."""
    layers: list[Any] = []
    current: Any = part.tuner
    while current is not part.base:
        if hasattr(current, "active_adapters") and hasattr(current, "base_layer"):
            if not current.disable_adapters and not current.merged:
                layers.insert(0, current)
            current = current.base_layer
        else:
            break
    return layers


def _with_adapters(weight: Tensor, layer: Any, name: str, transposed: bool) -> Tensor:
    for adapter in layer.active_adapters:
        if adapter in getattr(layer, "ia3_l", {}):
            weight = weight if layer.is_feedforward else weight * layer.ia3_l[adapter].reshape(-1, 1)
        elif adapter in getattr(layer, "lora_A", {}):
            if adapter in getattr(layer, "lora_variant", {}):
                raise UnsupportedModelError(
                    f"{name}: adapter {adapter!r} is a LoRA variant (DoRA or the like) whose share of the "
                    "weight is not a plain sum; merge it into the model (--merge-adapters)"
                )
            delta = layer.get_delta_weight(adapter)
            weight = weight + (delta.T if transposed else delta)
        elif any(adapter in getattr(layer, names, {}) for names in getattr(layer, "adapter_layer_names", ())):
            raise UnsupportedModelError(
                f"{name}: adapter {adapter!r} is a {type(layer).__name__} layer, LoRA or (IA)³ was expected; "
                "merge it into the model (--merge-adapters)"
            )
    return weight


FUSED, DOWN = "gate_up_proj", "down_proj"


@dataclass(frozen=True)
class ExpertRows:
    """Activations of one site of one expert (or of all experts of a layer) in one forward pass.

    Attributes:
        values: one row for each token routed to the expert. A view where possible; never write into it.
        token_index: the row's token, counted over the flattened batch (`row * tokens + position`).
        weight: the router weight with which the row's output is added to the token's stream.
        expert_index: the row's expert.
    """

    values: Float[Tensor, "row neuron"]
    token_index: Int[Tensor, " row"]
    weight: Float[Tensor, " row"]
    expert_index: Int[Tensor, " row"]

    def __len__(self) -> int:
        return self.values.shape[0]


@dataclass(frozen=True)
class Routing:
    """Which row of the gate step is which pair of token and expert, in one call of an experts module."""

    token_index: Int[Tensor, " row"]
    weight: Float[Tensor, " row"]
    expert_index: Int[Tensor, " row"]


@dataclass(frozen=True)
class ExpertsAnatomy:
    """The routed experts of one layer.

    Attributes:
        layer: number of the layer.
        module_name: path of the experts module in the model.
        module: the module whose `_apply_gate` separates the projections; it is called with (hidden, chosen
            experts, router weights).
        block: the mixture-of-experts block around it, whose output the importance of an expert neuron is
            measured on.
        n_experts: experts of the layer.
        width: neurons of each site of one expert.
        hidden: size of the residual stream.
        transposed: whether the parameters are `[expert, in, out]`.
        layout: how gate and up share one projection.
    """

    layer: int
    module_name: str
    module: nn.Module
    block: nn.Module
    n_experts: int
    width: int
    hidden: int
    transposed: bool
    layout: Layout

    @property
    def index(self) -> dict[str, Index]:
        """Columns of the gate step's argument that are the gate and the up neurons."""
        return split_gate_up(self.layout, self.width)

    @property
    def has_bias(self) -> bool:
        """Whether the projections have bias entries."""
        return getattr(self.module, f"{FUSED}_bias", None) is not None

    @property
    def implementation(self) -> str:
        """Name of the implementation of the experts interface in force ("eager" for the model's own loop)."""
        config = getattr(self.module, "config", None)
        return str(getattr(config, "_experts_implementation", None) or "eager")

    def key(self, expert: int, site: str) -> str:
        """Key of one site of one expert."""
        return f"layers.{self.layer}.experts.{expert}.{site}"

    def weight(self, expert: int, site: str) -> Float[Tensor, "out features"]:
        """Weights of one expert's site: `[n, hidden]` for gate and up, `[hidden, n]` for down (a view of the
        model's parameter).
        """
        whole = _parameter(self, DOWN if site == "down" else FUSED)[expert]
        whole = whole.T if self.transposed else whole
        return whole if site == "down" else take(whole, self.index[site], 0)

    def bias(self, expert: int, site: str) -> Float[Tensor, " neuron"] | None:
        """Bias entries of the neurons of one expert's site; None where there are none, and for down."""
        if site == "down" or not self.has_bias:
            return None
        return take(getattr(self.module, f"{FUSED}_bias")[expert], self.index[site])

    def output_bias(self, expert: int) -> Float[Tensor, " hidden"] | None:
        """Bias of one expert's down projection, None where there is none."""
        return getattr(self.module, f"{DOWN}_bias")[expert] if self.has_bias else None

    def apply_gate(self, gate_up: Float[Tensor, "row fused"]) -> Float[Tensor, "row neuron"]:
        """The gate step itself: what the model makes of gate and up values, clamps and offsets included."""
        kind: Any = type(self.module)
        return kind._apply_gate(self.module, gate_up)

    def fuse(
        self, gate: Float[Tensor, "row neuron"], up: Float[Tensor, "row neuron"]
    ) -> Float[Tensor, "row fused"]:
        """Gate and up values in the order in which the gate step takes them."""
        fused = gate.new_empty((*gate.shape[:-1], 2 * self.width))
        for site, values in (("gate", gate), ("up", up)):
            fused[..., self.index[site]] = values
        return fused

    def routing(self, chosen: Int[Tensor, "token choice"], weights: Float[Tensor, "token choice"]) -> Routing:
        """The pair that each row of the gate step is, as the implementation in force orders them.

        Raises:
            UnsupportedModelError: the implementation does not hold the gate step apart.
        """
        choices = chosen.shape[-1]
        experts, shares = chosen.reshape(-1), weights.reshape(-1)
        if self.implementation == "batched_mm":
            order = torch.arange(experts.numel(), device=experts.device)
        elif self.implementation == "grouped_mm":
            experts, order = torch.sort(experts)
            shares = shares[order]
        elif self.implementation == "eager":
            # The loop takes experts in turn and the rows of one expert by choice, then by token.
            by_choice = chosen.T.reshape(-1)
            experts, order = torch.sort(by_choice, stable=True)
            tokens = order % chosen.shape[0]
            return Routing(tokens, weights.T.reshape(-1)[order], experts)
        else:
            raise self.unsupported(f"experts implementation {self.implementation!r} hides the gate step")
        return Routing(order // choices, shares, experts)

    def unsupported(self, why: str) -> UnsupportedModelError:
        """The error that says which layer, why, and what to do."""
        return UnsupportedModelError(
            f"layers.{self.layer}.experts: {why}; expected 'grouped_mm' or 'batched_mm': "
            "call model.set_experts_implementation('grouped_mm')"
        )


def _parameter(experts: ExpertsAnatomy, name: str) -> Tensor:
    value = getattr(experts.module, name)
    if (
        not isinstance(value, Tensor)
        or not value.is_floating_point()
        or value.ndim != 3
        or value.element_size() < 2
    ):
        raise UnsupportedModelError(
            f"layers.{experts.layer}.experts: {name} is quantised ({type(value).__name__}), three axes of "
            "floating numbers were expected; load the model dequantised"
        )
    return value


def is_experts(module: nn.Module) -> bool:
    """Whether a module keeps its experts as three-dimensional parameters behind the experts interface."""
    return getattr(getattr(module, DOWN, None), "ndim", 0) == 3 and callable(
        getattr(module, "_apply_gate", None)
    )


def describe_experts(
    layer: int, name: str, module: nn.Module, block: nn.Module, layout: Layout | None = None
) -> ExpertsAnatomy:
    """The anatomy of an experts module, from the shapes of its parameters and the facts the interface states.

    Raises:
        UnsupportedModelError: experts without a gate, or shared out over several devices.
    """
    facts: Any = module
    if not getattr(facts, "has_gate", True) or not hasattr(facts, FUSED):
        raise UnsupportedModelError(
            f"layers.{layer}.experts: experts without a gate ({type(module).__name__}) were found, a "
            f"{FUSED} parameter was expected; use a model whose experts have one"
        )
    if getattr(facts, "has_post_expert_norm", False) or getattr(facts, "_is_expert_parallel", False):
        raise UnsupportedModelError(
            f"layers.{layer}.experts: {type(module).__name__} has a norm after each expert or is shared "
            "out over devices; plain experts on one device were expected"
        )
    transposed = bool(getattr(facts, "is_transposed", False))
    n_experts, *sizes = getattr(facts, DOWN).shape
    width, hidden = sizes if transposed else sizes[::-1]
    if layout is None:
        layout = Layout.CONTIGUOUS if getattr(facts, "is_concatenated", True) else Layout.ALTERNATING
    return ExpertsAnatomy(
        layer, name, module, block, int(n_experts), int(width), int(hidden), transposed, layout
    )


@dataclass(frozen=True)
class AttentionAnatomy:
    """The attention of one layer.

    Facts of its formula (rotary, norms, mask …) live in `safety_neurons.model.attention`.
    """

    module: nn.Module
    module_name: str
    n_heads: int
    n_kv_heads: int
    head_dim: int
    places: dict[str, SitePlace]
    layout: Layout | None = None
    """How q, k and v share one projection; None where each has its own."""
    gate: Index = None
    """Features of the query projection that are no queries but the output gate: its sigmoid scales what goes
    into o, entry by entry.

    They are neurons of no site. None where there is no gate.
    """

    def gate_values(self, queries: Float[Tensor, "... feature"]) -> Float[Tensor, "... mixed"]:
        """The gate, before its sigmoid, from the whole output of the query projection."""
        return take(queries, self.gate)


@dataclass(frozen=True)
class MlpAnatomy:
    """A dense feed-forward part: down(act(gate)·up), or down(act(up)) without a gate.

    `module` holds the projections (the layer itself in some families); `output_module` is the down projection
    with its adapters.
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
    left_out: str = ""
    """What belongs to no site, by layers; empty where nothing is left out."""

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
        all_parameters: parameters of attention and feed-forward projections and experts (routers, norms and
            adapters not counted).
        chosen: layouts that the caller fixed; the proof does not replace these.
        unknown: by layer the linear maps that are no attention and no feed-forward part (recurrent and
            convolutional mixers), as paths inside the layer.
    """

    model: nn.Module
    layers: tuple[LayerAnatomy, ...]
    refused: dict[str, str] = field(default_factory=dict)
    all_parameters: int = 0
    chosen: Mapping[str, str] = field(default_factory=dict)
    unknown: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def places(self) -> dict[str, SitePlace]:
        """Every site that is a linear map of its own, by key; experts are in `layers[i].experts`."""
        places = [place for layer in self.layers for part in layer.parts for place in part.places.values()]
        return {place.key: place for place in places if place.key not in self.refused}

    def experts_per_token(self, layer: int) -> int:
        """Routed experts that a token passes in a mixture's layer; 0 where no configuration tells."""
        config = unwrapped(self.model).config.get_text_config(decoder=True)
        names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
        told = next((value for name in names if (value := getattr(config, name, None))), 0)
        return int(told[layer] if isinstance(told, Sequence) else told)

    def share_of_tokens(self, key: str) -> float:
        """Of all tokens, those that pass a site: all, but for routed experts, whose rows in a layer are the
        tokens times the experts each is sent to, whichever these are.
        """
        part = self.layers[int(key.split(".")[1])].experts if ".experts." in key else None
        return min(1.0, (part and self.experts_per_token(part.layer) / part.n_experts) or 1.0)

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
                raise UnsupportedModelError(
                    f"{key} is not supported on this {self.architecture}: {self.refused[key]}"
                )
            if key not in self.table:
                raise UnsupportedModelError(
                    f"{key} was asked, this {self.architecture} has {len(self.table.keys)} sites in "
                    f"{len(self.layers)} layers; check layer, expert and site"
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

        Sites are counted per layer and part (the experts of a layer as gate, up and down), whatever the
        number of experts.
        """
        present = {re.sub(r"experts\.\d+", "experts", key) for key in self.table.keys}
        refused = {re.sub(r"experts\.\d+", "experts", key) for key in self.refused} - present
        counted = {id(place.projection.base): place.projection.n_parameters for place in self.places.values()}
        modules = [layer.experts.module for layer in self.layers if layer.experts]
        routed = sum(
            parameter.numel() for module in modules for parameter in module.parameters(recurse=False)
        )
        gates = sum(
            length(part.gate, 0) * (place.weights_per_neuron + place.has_bias)
            for layer in self.layers
            if (part := layer.attention) is not None and part.gate is not None
            if (place := part.places["q"]).key in self.places
        )
        return Coverage(
            len(present),
            len(present) + len(refused),
            sum(counted.values()) + routed - gates,
            self.all_parameters,
            self._left_out(refused),
        )

    def _left_out(self, refused: set[str]) -> str:
        """What the sites do not cover: maps of unknown role, sites refused for another reason, output
        gates.
        """
        layers: dict[str, list[int]] = {}
        for number, paths in self.unknown.items():
            layers.setdefault(", ".join(paths), []).append(number)
        for number, layer in enumerate(self.layers):
            prefix = f"layers.{number}."
            if number not in self.unknown and (
                sites := sorted(key.removeprefix(prefix) for key in refused if key.startswith(prefix))
            ):
                layers.setdefault(f"the sites {' '.join(sites)}", []).append(number)
            if layer.attention is not None and layer.attention.gate is not None:
                layers.setdefault("the output gate beside q", []).append(number)
        return "; ".join(
            f"{what} of {len(numbers)} layer{'s' * (len(numbers) > 1)} ({runs(numbers)})"
            for what, numbers in layers.items()
        )


def runs(numbers: Sequence[int]) -> str:
    """Ascending numbers with neighbours joined: `0–2, 4`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in spans)


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model, tied ones once, adapters and deltas not counted, quantised ones by the number of
    weights they stand for.
    """
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


def _infos(layer: LayerAnatomy) -> list[SiteInfo]:
    infos = []
    for part in layer.parts:
        for site, place in part.places.items():
            heads, size = 0, 0
            if isinstance(part, AttentionAnatomy):
                heads, size = (part.n_heads if site in "qo" else part.n_kv_heads), part.head_dim
            infos.append(
                SiteInfo(place.key, place.size, place.weights_per_neuron, int(place.has_bias), heads, size)
            )
    if (experts := layer.experts) is not None:
        infos += [
            SiteInfo(
                experts.key(expert, site),
                experts.width,
                experts.hidden,
                int(experts.has_bias and site != "down"),
            )
            for expert in range(experts.n_experts)
            for site in MLP_SITES
        ]
    return infos


def projections_of(layer: nn.Module) -> dict[str, Projection]:
    """The linear maps of a layer by path, adapters and what lies inside a linear map left aside."""
    found: dict[str, Projection] = {}
    for name, child in layer.named_children():
        part = projection(child)
        inside = {"": part} if part is not None else projections_of(child)
        found |= {f"{name}.{path}".rstrip("."): one for path, one in inside.items()}
    return found
