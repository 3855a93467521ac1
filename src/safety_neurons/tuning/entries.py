"""The entries of a model's tensors that belong to a set of neurons: rows, columns, bias entries, and an adapter's share of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model import LanguageModel
from safety_neurons.model.sites import DOWN, FUSED, ExpertsAnatomy, Projection, SitePlace, projection, take
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
        transposed: whether a weight is stored as `[in, out]`; what is read and written then is, too.
    """

    key: str
    kind: str
    holder: Any
    name: str
    where: Where
    partner: Any = None
    transposed: bool = False

    @property
    def tensor(self) -> Tensor:
        """The whole tensor as it is now.

        Raises:
            UnsupportedModelError: it is shared out over processes, or not in memory.
        """
        held = isinstance(self.holder, nn.ParameterDict)
        value = self.holder[self.name] if held else getattr(self.holder, self.name)
        if not held and self.name not in self.holder._parameters:
            raise UnsupportedModelError(
                f"{self.key}: its {self.name} is computed from other tensors (a parametrisation, a weight norm, a pruning mask), "
                "a parameter was expected; take the parametrisation off first"
            )
        if type(value).__name__ == "DTensor" or value.is_meta:
            raise UnsupportedModelError(
                f"{self.key}: its {self.kind} is {'off-loaded' if value.is_meta else 'shared out over processes'}, a tensor in memory was "
                "expected; load the model without off-loading, on one device or with DDP, or repair() it once saved"
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
            _experts_module(model, key)
            yield from _of_expert(key, experts, site.expert, site.site, index)
        else:
            place = model.anatomy.places[key]
            part = current_projection(model, key)
            yield from _of_projection(key, place, part, take(torch.arange(place.features), place.index)[index])


def weights_of(model: LanguageModel, neurons: NeuronSet) -> Iterator[Entries]:
    """The neurons' rows and columns in the model's own weights, bias entries and whatever is around a projection aside.

    Sites of quantised projections, which no plain tensor holds, are left out.

    Raises:
        UnsupportedModelError: a site the model refuses.
    """
    model.anatomy.check(neurons.keys())
    for key, members in neurons.items():
        index = torch.from_numpy(members.copy())
        site = parse_key(key)
        if site.expert is not None:
            experts = model.anatomy.layers[site.layer].experts
            assert experts is not None
            yield next(_of_expert(key, experts, site.expert, site.site, index))
        else:
            place = model.anatomy.places[key]
            features = take(torch.arange(place.features), place.index)[index]
            yield from _of_weight(key, place.side == "output", place.projection, features)


def adapted(model: LanguageModel, neurons: NeuronSet) -> tuple[int, ...]:
    """What says whether adapters were put on or taken off since: the identities of the modules at the set's sites, adapters included."""
    found: list[int] = []
    for key in neurons.keys():  # noqa: SIM118 - not a mapping
        module: Any = _experts_module(model, key) if key not in model.anatomy.places else _module(model, model.anatomy.places[key])
        while module is not None:
            found += [id(module), *(id(parameter) for name, parameter in module.named_parameters() if "base_layer" not in name)]
            module = getattr(module, "base_layer", None)
    return tuple(found)


def current_projection(model: LanguageModel, key: str) -> Projection:
    """The projection of a dense site as it is now, with whatever was wrapped around it since the anatomy was made.

    Raises:
        UnsupportedModelError: another module stands there.
    """
    place = model.anatomy.places[key]
    found = projection(_module(model, place))
    if found is None or (found.in_features, found.out_features) != (place.projection.in_features, place.projection.out_features):
        raise UnsupportedModelError(
            f"{key}: another module stands at {place.module_name!r} now, the projection was expected; load the model anew"
        )
    return found


def _module(model: LanguageModel, place: SitePlace) -> nn.Module:
    return _live(model, place.key, place.module_name)


def _live(model: LanguageModel, key: str, name: str) -> nn.Module:
    """The module of this name that the model runs: a copy of a whole sub-layer (`modules_to_save`) stands in for what it was made of.

    Raises:
        UnsupportedModelError: layers were put in or taken out, so that the name means another module.
    """
    here: Any = model.anatomy.model
    if _n_layers(model) != len(model.anatomy.layers):
        raise UnsupportedModelError(
            f"{key}: the model has {_n_layers(model)} layers now and had {len(model.anatomy.layers)} (layer replication?); "
            "load the model anew, then protect it"
        )
    for part in name.split("."):
        here = _saved(here)
        here = getattr(here, part)
    found: nn.Module = here
    return found


def _saved(module: Any) -> Any:
    """The copy that is trained in a module's place, where PEFT keeps one."""
    if not (hasattr(module, "modules_to_save") and hasattr(module, "original_module")):
        return module
    names = [name for name in getattr(module, "active_adapters", None) or [] if name in module.modules_to_save]
    return module.modules_to_save[names[0]] if names else module.original_module


def _n_layers(model: LanguageModel) -> int:
    path = model.anatomy.layers[0].module_name.rsplit(".", 1)[0]
    here: Any = model.anatomy.model
    for part in path.split("."):
        here = getattr(_saved(here), part)
    return len(_saved(here))


def _experts_module(model: LanguageModel, key: str) -> nn.Module:
    """The module that holds the experts' parameters.

    Raises:
        UnsupportedModelError: something is wrapped around it (a LoRA through `target_parameters`, a saved copy) whose share of an
            expert's row or column cannot be told apart.
    """
    experts = model.anatomy.layers[parse_key(key).layer].experts
    assert experts is not None
    found = _live(model, key, experts.module_name)
    above = [experts.module_name.rsplit(".", cut)[0] for cut in range(experts.module_name.count(".") + 1)]
    around = [part for part in map(model.anatomy.model.get_submodule, above) if hasattr(part, "adapter_layer_names")]
    if found is not experts.module or around:
        raise UnsupportedModelError(
            f"{key}: a {type(around[0] if around else found).__name__} is around the experts (target_parameters, "
            "modules_to_save), the model's own parameters were expected; leave the experts out of the adapter's targets, or merge the "
            "adapter and repair() afterwards"
        )
    return found


def _of_projection(key: str, place: SitePlace, part: Projection, features: Tensor) -> Iterator[Entries]:
    rows = place.side == "output"
    yield from _of_weight(key, rows, part, features)
    if rows and getattr(part.base, "bias", None) is not None:
        yield Entries(key, WEIGHT, part.base, "bias", (features,))
    current: Any = part.module
    while current is not part.base:
        if _saved(current) is not current:
            current = _saved(current)
            continue
        if hasattr(current, "adapter_layer_names"):
            yield from _of_adapters(key, current, rows, features)
        elif hasattr(current, "base_layer"):
            raise UnsupportedModelError(
                f"{key}: a {type(current).__name__} is around its projection, whose share of a neuron cannot be told apart; "
                "an adapter of PEFT or the projection alone was expected"
            )
        current = current.base_layer if hasattr(current, "base_layer") else part.base


def _of_weight(key: str, rows: bool, part: Projection, features: Tensor) -> Iterator[Entries]:
    if not part.quantised:
        yield Entries(key, WEIGHT, part.base, "weight", _along(rows != part.transposed, features), transposed=part.transposed)


def _of_adapters(key: str, layer: Any, rows: bool, features: Tensor) -> Iterator[Entries]:
    lora, scales = getattr(layer, "lora_A", {}), getattr(layer, "ia3_l", {})
    if any(not isinstance(part, nn.Linear) for adapter in lora for part in (lora[adapter], layer.lora_B[adapter])):
        raise UnsupportedModelError(f"{key}: a {type(layer).__name__} adapter is on it; a plain LoRA or (IA)³ was expected")
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
    own = (*(part for adapter in lora for part in (*lora[adapter].parameters(), *layer.lora_B[adapter].parameters())), *scales.values())
    known = {id(parameter) for parameter in own} | {id(parameter) for parameter in layer.base_layer.parameters()}
    unknown = [name for name, parameter in layer.named_parameters() if id(parameter) not in known]
    if unknown:
        raise UnsupportedModelError(f"{key}: a {type(layer).__name__} adapter is on it (with {unknown[0]}); LoRA or (IA)³ was expected")


def _of_expert(key: str, experts: ExpertsAnatomy, expert: int, site: str, index: Tensor) -> Iterator[Entries]:
    if site == "down":
        yield Entries(key, WEIGHT, experts.module, DOWN, (expert, *_along(experts.transposed, index)), transposed=experts.transposed)
        return
    features = take(torch.arange(2 * experts.width), experts.index[site])[index]
    where = (expert, *_along(not experts.transposed, features))
    yield Entries(key, WEIGHT, experts.module, FUSED, where, transposed=experts.transposed)
    if experts.has_bias:
        yield Entries(key, WEIGHT, experts.module, f"{FUSED}_bias", (expert, features))


def _along(first: bool, features: Tensor) -> Where:
    """An index of these features along the first axis, or along the second."""
    return (features,) if first else (slice(None), features)
