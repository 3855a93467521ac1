"""The entries of a model's tensors that belong to a set of neurons: rows, columns, bias entries, and an adapter's share of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model import LanguageModel
from safety_neurons.model.experts import DOWN, FUSED, ExpertsAnatomy
from safety_neurons.model.layouts import take
from safety_neurons.model.places import Projection, SitePlace, projection
from safety_neurons.neurons import NeuronSet, parse_key

Where = tuple[Any, ...]
WEIGHT, LORA, SCALE = "weight", "lora", "scale"


@dataclass(frozen=True)
class Entries:
    """Some entries of one tensor.

    Attributes:
        key: the site they belong to.
        kind: `weight` (weights and bias entries of the model), `lora` (a factor whose zeros make the adapter's share zero) or `scale`
            (of (IA)³).
        holder: what the tensor is an attribute of; it is looked up at every use, because wrappers replace parameters.
        name: of the attribute.
        where: index of the entries.
        partner: of a LoRA factor the other one, which it is multiplied with.
    """

    key: str
    kind: str
    holder: Any
    name: str
    where: Where
    partner: Any = None

    @property
    def tensor(self) -> Tensor:
        """The whole tensor as it is now.

        Raises:
            UnsupportedModelError: it is shared out over processes, or not in memory.
        """
        value = self.holder[self.name] if isinstance(self.holder, nn.ParameterDict) else getattr(self.holder, self.name)
        if type(value).__name__ == "DTensor" or value.is_meta:
            raise UnsupportedModelError(
                f"{self.key}: its {self.kind} is {'off-loaded' if value.is_meta else 'shared out over processes'}, a tensor in memory was "
                "expected; protect on one device or with DDP, or repair() the saved model afterwards"
            )
        return value

    def read(self) -> Tensor:
        """A copy of the entries."""
        return self.tensor.detach()[self.where].clone()

    def write(self, values: Tensor) -> None:
        """Put values there, bit for bit."""
        with torch.no_grad():
            self.tensor.detach()[self.where] = values

    def clear_gradient(self) -> None:
        """Zero in the gradient, so that no optimizer state learns of it."""
        gradient = self.tensor.grad
        if gradient is not None and not gradient.is_sparse:
            gradient[self.where] = 0


def entries_of(model: LanguageModel, neurons: NeuronSet) -> Iterator[Entries]:
    """Every tensor entry that the neurons' parameters are made of, those of all adapters on the model included.

    Modules are looked up by name, so that adapters put on after the anatomy was made are seen.

    Raises:
        UnsupportedModelError: a site the model refuses, or an adapter whose share of a row or column cannot be told apart.
    """
    model.anatomy.check(neurons.keys())
    for key, members in neurons.items():
        index = torch.from_numpy(members.copy())
        site = parse_key(key)
        if site.expert is not None:
            experts = model.anatomy.layers[site.layer].experts
            assert experts is not None
            yield from _of_expert(key, experts, site.expert, site.site, index)
        else:
            place = model.anatomy.places[key]
            part = projection(_module(model, place)) or place.projection
            yield from _of_projection(key, place, part, take(torch.arange(place.features), place.index)[index])


def adapted(model: LanguageModel) -> tuple[int, ...]:
    """What says whether adapters were put on or taken off since: the identities of the modules at the sites."""
    return tuple(id(_module(model, place)) for place in model.anatomy.places.values())


def _module(model: LanguageModel, place: SitePlace) -> nn.Module:
    found: nn.Module = model.anatomy.model.get_submodule(place.module_name)
    return found


def _of_projection(key: str, place: SitePlace, part: Projection, features: Tensor) -> Iterator[Entries]:
    rows = place.side == "output"
    if not part.quantised:
        first = rows != part.transposed
        yield Entries(key, WEIGHT, part.base, "weight", _along(first, features))
    if rows and getattr(part.base, "bias", None) is not None:
        yield Entries(key, WEIGHT, part.base, "bias", (features,))
    current: Any = part.module
    while current is not part.base:
        if hasattr(current, "adapter_layer_names"):
            yield from _of_adapters(key, current, rows, features)
        current = current.base_layer if hasattr(current, "base_layer") else part.base


def _of_adapters(key: str, layer: Any, rows: bool, features: Tensor) -> Iterator[Entries]:
    lora, scales = getattr(layer, "lora_A", {}), getattr(layer, "ia3_l", {})
    for adapter in lora:
        if adapter in getattr(layer, "lora_variant", {}):
            raise UnsupportedModelError(
                f"{key}: adapter {adapter!r} is a LoRA variant (DoRA or the like) whose rows cannot be held apart, a plain LoRA was "
                "expected; train without the variant"
            )
        first, second = lora[adapter], layer.lora_B[adapter]
        factor, partner = (second, first) if rows else (first, second)
        yield Entries(key, LORA, factor, "weight", _along(rows, features), partner)
        if rows and factor.bias is not None:
            yield Entries(key, LORA, factor, "bias", (features,))
    for adapter in scales:
        if bool(layer.is_feedforward) == rows:
            raise UnsupportedModelError(
                f"{key}: the (IA)³ adapter {adapter!r} scales the other side of this projection, which changes every neuron of it; "
                "leave the projection out of the adapter's targets"
            )
        yield Entries(key, SCALE, scales, adapter, _along(rows, features))
    known = len(lora) + len(scales)
    if not known and any(len(getattr(layer, name, ())) for name in layer.adapter_layer_names):
        raise UnsupportedModelError(f"{key}: a {type(layer).__name__} adapter is on it; LoRA or (IA)³ was expected")


def _of_expert(key: str, experts: ExpertsAnatomy, expert: int, site: str, index: Tensor) -> Iterator[Entries]:
    if site == "down":
        yield Entries(key, WEIGHT, experts.module, DOWN, (expert, *_along(experts.transposed, index)))
        return
    features = take(torch.arange(2 * experts.width), experts.index[site])[index]
    yield Entries(key, WEIGHT, experts.module, FUSED, (expert, *_along(not experts.transposed, features)))
    if experts.has_bias:
        yield Entries(key, WEIGHT, experts.module, f"{FUSED}_bias", (expert, features))


def _along(first: bool, features: Tensor) -> Where:
    """An index of these features along the first axis, or along the second."""
    return (features,) if first else (slice(None), features)
