"""Where one site lives in a model: its projection, which features of it are the site's neurons, and their weights."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model.layouts import Index, length, take

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
        """The linear map with its adapters: `module`, or what is inside where trainable deltas (`added_to`) are around it."""
        return self.module.base_layer if hasattr(self.module, "added_to") else self.module  # type: ignore[return-value]

    @property
    def scales_input(self) -> bool:
        """Whether an (IA)³ adapter multiplies the input before the linear map sees it."""
        return hasattr(self.tuner, "ia3_l") and bool(getattr(self.tuner, "is_feedforward", False))

    @property
    def quantised(self) -> bool:
        """Whether the stored numbers are not the weights themselves."""
        weight = getattr(self.base, "weight", None)
        return weight is None or weight.dtype not in _FLOATING or weight.ndim != 2 or hasattr(weight, "quant_state")

    @property
    def readable(self) -> bool:
        """Whether the weights can be read as they are (neither quantised nor off-loaded)."""
        return not self.quantised and not self.base.weight.is_meta

    @property
    def n_parameters(self) -> int:
        """Weights and bias entries of the linear map, adapters not counted."""
        return self.in_features * self.out_features + (self.out_features if getattr(self.base, "bias", None) is not None else 0)


def projection(module: nn.Module) -> Projection | None:
    """`module` as a linear map, or None if it is something else."""
    base = _base(module)
    weight = getattr(base, "weight", None)
    if isinstance(base, nn.Linear) or (hasattr(base, "in_features") and hasattr(base, "out_features") and not _is_container(base)):
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


def _is_container(module: nn.Module) -> bool:
    return any(True for _ in module.children())


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
        """The module at whose boundary the activation is: inside an (IA)³ layer for an input that it scales."""
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
        """Weights as `[n, in]` for an output site, `[out, n]` for an input site; an active adapter's share is included.

        The scale of an (IA)³ feed-forward adapter is on the activation (what the projection sees), so it is not in the weight.

        Raises:
            UnsupportedModelError: the weights are quantised in a way that cannot be read, off-loaded, or an adapter has no additive form.
        """
        return take(full_weight(self.projection, self.key), self.index, 0 if self.side == "output" else 1)

    def bias(self) -> Float[Tensor, " neuron"] | None:
        """The neurons' bias entries, an adapter's share included; None where there are none and at an input."""
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
            f"{name}: trained deltas are beside an (IA)³ scale of its input, so the projection has no single weight; "
            "merge the adapter first (--merge-adapters)"
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
            if adapter in getattr(layer, "lora_B", {}) and getattr(layer.lora_B[adapter], "bias", None) is not None:
                extra = layer.lora_B[adapter].bias * layer.scaling[adapter]
                bias = extra if bias is None else bias + extra
    return bias


def _stored_weight(part: Projection, name: str) -> Tensor:
    weight: Any = _dequantised(part, name) if part.quantised else part.base.weight
    if weight.is_meta:
        raise UnsupportedModelError(
            f"{name}: its weights are off-loaded, a weight in memory was expected; load the model without disk or CPU off-loading"
        )
    return weight


def _dequantised(part: Projection, name: str) -> Tensor:
    weight = getattr(part.base, "weight", None)
    if weight is not None and type(weight).__name__ in ("Params4bit", "Int8Params"):
        from peft.utils.integrations import dequantize_module_weight

        return dequantize_module_weight(part.base)
    raise UnsupportedModelError(
        f"{name}: its weights are quantised ({type(part.base).__name__}) and cannot be read; methods that only read activations work, "
        "for this one load the model unquantised or in bitsandbytes 4 or 8 bits"
    )


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
                    f"{name}: adapter {adapter!r} is a LoRA variant (DoRA or the like) whose share of the weight is not a plain sum; "
                    "merge it into the model (--merge-adapters)"
                )
            delta = layer.get_delta_weight(adapter)
            weight = weight + (delta.T if transposed else delta)
        elif any(adapter in getattr(layer, names, {}) for names in getattr(layer, "adapter_layer_names", ())):
            raise UnsupportedModelError(
                f"{name}: adapter {adapter!r} is a {type(layer).__name__} layer, LoRA or (IA)³ was expected; "
                "merge it into the model (--merge-adapters)"
            )
    return weight
