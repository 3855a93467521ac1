"""Put deltas on a model and take them off again; everything else of the model is frozen meanwhile and never written to."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from safety_neurons.errors import NeuronError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.model.layouts import take
from safety_neurons.model.parts import Anatomy, LayerAnatomy
from safety_neurons.model.places import SitePlace
from safety_neurons.neurons import NeuronSet, parse_key
from safety_neurons.tuning.deltas import Beside, NeuronDelta, Part, full, total_norm
from safety_neurons.tuning.expert_deltas import CHILD, ExpertDeltas, ExpertPart, acting


def attach(model: LanguageModel, neurons: NeuronSet) -> "Deltas":
    """Puts a trainable delta beside every projection that has members of the set, and freezes all other parameters.

    The model computes what it did before until the deltas are changed. `model.model` can then be given to any training loop; its parameters
    that require gradients are the deltas. The adapters of this view of the model are active until `detach`.

    Args:
        model: plain, quantised or with adapters (the deltas are beside the adapted projection).
        neurons: what to train: rows of `q k v gate up`, columns of `o down`, without their bias entries.

    Returns:
        The deltas, which are also a context manager that detaches them at its end.

    Raises:
        NeuronError: the set is empty or out of range. ForeignModelError: it was found on another architecture.
        UsageError: the model has deltas already. UnsupportedModelError: a site that cannot be trained.

    Source: Zhao et al., ICLR 2025, section 3 (SN-Tune: only the safety neurons are trained).
    Differs: the published code keeps every weight trainable and zeroes gradients; here nothing else can move, whatever the optimizer does.
    """
    if not len(neurons):
        raise NeuronError("0 neurons arrived, at least one was expected: there is nothing to train; select more (--top, --agreement)")
    placed = neurons.on(model.table)
    if any(isinstance(module, Beside) for module in model.model.modules()):
        raise UsageError(f"{model.name} has deltas attached already; detach() them first")
    model.anatomy.check(placed.keys())
    return Deltas(model, placed)


class Deltas:
    """The deltas of one model while they are attached.

    Attributes:
        model: the model they are on.
        neurons: the set they belong to.
        modules: what stands beside the frozen weights, by path of the projection (or of a layer's experts).
    """

    def __init__(self, model: LanguageModel, neurons: NeuronSet) -> None:
        self.model, self.neurons = model, neurons
        self.modules: dict[str, Beside] = {}
        self._where: dict[str, tuple[str, str]] = {}
        self._experts: list[tuple[int, str]] = []
        self._hooks = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            stack.enter_context(model.active())
            stack.callback(_restore_flags, [(parameter, parameter.requires_grad) for parameter in model.model.parameters()])
            for parameter in model.model.parameters():
                parameter.requires_grad_(False)
            self._wrap_projections(stack)
            self._join_experts(stack)
            if getattr(model.inner, "is_quantized", False):
                stack.enter_context(_said_to_have_adapters(model.inner))
            wrappers = {name: module for name, module in self.modules.items() if isinstance(module, NeuronDelta)}
            stack.enter_context(_seen_through(model, wrappers))
            stack.callback(lambda: self._hooks.close())
            self._hook_experts()
            self._stack = stack.pop_all()

    def _wrap_projections(self, stack: contextlib.ExitStack) -> None:
        """A wrapper in the place of every projection with members."""
        by_module: dict[str, list[SitePlace]] = {}
        for key, _ in self.neurons.items():
            if parse_key(key).expert is None:
                place = self.model.anatomy.place(key)
                by_module.setdefault(place.module_name, []).append(place)
        for name, places in by_module.items():
            self.modules[name] = _wrapper(places, self.neurons)
            self._where.update({place.key: (name, parse_key(place.key).site) for place in places})
            parent, _, child = name.rpartition(".")
            owner = self.model.model.get_submodule(parent)
            stack.callback(setattr, owner, child, getattr(owner, child))
            setattr(owner, child, self.modules[name])

    def _join_experts(self, stack: contextlib.ExitStack) -> None:
        """A child of every experts module with members."""
        by_layer: dict[int, list[ExpertPart]] = {}
        for key, members in self.neurons.items():
            layer, expert, _, site = parse_key(key)
            if expert is not None:
                by_layer.setdefault(layer, []).append(ExpertPart(expert, site, torch.from_numpy(members.copy())))
        for layer, parts in by_layer.items():
            experts = self.model.anatomy.layers[layer].experts
            assert experts is not None
            kind, device = _type_and_device(experts.module)
            deltas = ExpertDeltas(experts.hidden, parts, kind, device)
            self.modules[f"{experts.module_name}.{CHILD}"] = deltas
            self._experts.append((layer, f"{experts.module_name}.{CHILD}"))
            for part in parts:
                self._where[experts.key(part.expert, part.site)] = (f"{experts.module_name}.{CHILD}", f"{part.expert}_{part.site}")
            experts.module.add_module(CHILD, deltas)
            stack.callback(delattr, experts.module, CHILD)

    def _hook_experts(self) -> None:
        for layer, name in self._experts:
            deltas = self.modules[name]
            assert isinstance(deltas, ExpertDeltas)
            self._hooks.enter_context(acting(self.model.anatomy, layer, deltas))

    # The parameters

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameter of every key: `[n, in]` for rows, `[out, n]` for columns, members in the set's order."""
        where = self._where
        return {key: self.modules[where[key][0]].deltas()[where[key][1]] for key, _ in self.neurons.items()}

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer is given."""
        return list(self.named_parameters().values())

    @property
    def n_parameters(self) -> int:
        """Trained entries."""
        return sum(parameter.numel() for parameter in self.parameters())

    def tensors(self) -> dict[str, Tensor]:
        """A copy of every delta by key, on the CPU, whole even where it is sharded."""
        return {key: full(parameter.detach()).to("cpu", copy=True).contiguous() for key, parameter in self.named_parameters().items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the deltas to given values.

        Raises:
            NeuronError: keys or shapes are not those of this set.
        """
        own = self.named_parameters()
        if own.keys() != tensors.keys():
            odd = sorted(own.keys() ^ tensors.keys())
            raise NeuronError(f"deltas for {len(tensors)} matrices arrived, {len(own)} of this set were expected (first odd one: {odd[0]})")
        for key, parameter in own.items():
            if parameter.shape != tensors[key].shape:
                raise NeuronError(f"{key}: a delta {list(tensors[key].shape)} arrived, {list(parameter.shape)} was expected for this set")
        with torch.no_grad():
            for key, parameter in own.items():
                _fill(parameter, tensors[key])

    def norm(self) -> float:
        """L2 norm of all deltas together."""
        return total_norm({key: parameter.detach() for key, parameter in self.named_parameters().items()})

    # Reference and end

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The untouched base for a block, bit for bit: reference log-probabilities, "before" of a study."""
        before = [(wrapper, wrapper.enabled) for wrapper in self.modules.values()]
        try:
            for wrapper, _ in before:
                wrapper.enabled = False
            yield
        finally:
            for wrapper, enabled in before:
                wrapper.enabled = enabled

    def reference(self) -> Any:
        """The untouched base as a model of its own, for losses that compare with it: `ref_model` of TRL's DPOTrainer.

        All parameters and buffers are the model's own, so it costs no memory for weights; the deltas are not in it.
        """
        model: Any = self.model.model
        own = {id(parameter) for parameter in self.parameters()}
        held = [*model.parameters(), *model.buffers()]
        self._hooks.close()
        try:
            twin = copy.deepcopy(model, {id(tensor): tensor for tensor in held if id(tensor) not in own})
        finally:
            self._hook_experts()
        for name, module in self.modules.items():
            parent, _, child = name.rpartition(".")
            owner = twin.get_submodule(parent)
            if isinstance(module, NeuronDelta):
                setattr(owner, child, getattr(owner, child).base_layer)
            else:
                delattr(owner, child)
        return twin.eval()

    def detach(self) -> None:
        """Takes the deltas off: the original modules are back, and which parameters require gradients is as it was."""
        self._stack.close()

    def __enter__(self) -> "Deltas":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def positions_of(place: SitePlace, neurons: NeuronSet) -> Int[Tensor, " neuron"]:
    """Which features of the projection are the members of the set at this place, in the set's order."""
    features = take(torch.arange(place.features), place.index)
    return features[torch.from_numpy(neurons[place.key].copy())]


def _wrapper(places: list[SitePlace], neurons: NeuronSet) -> NeuronDelta:
    part = places[0].projection
    kind, device = _type_and_device(part.base)
    parts = [Part(parse_key(place.key).site, place.side, positions_of(place, neurons)) for place in places]
    return NeuronDelta(part.module, part.in_features, part.out_features, parts, kind, device)


def _type_and_device(base: nn.Module) -> tuple[torch.dtype, torch.device]:
    weight: Any = getattr(base, "weight", None)
    if weight is None:
        weight = next(base.parameters(), next(base.buffers(), torch.zeros(0)))
    device = weight.device
    if weight.is_meta:
        device = torch.device(getattr(getattr(base, "_hf_hook", None), "execution_device", "cpu"))
    return torch.float64 if weight.dtype == torch.float64 else torch.float32, device


def _fill(parameter: nn.Parameter, values: Float[Tensor, "one other"]) -> None:
    if not hasattr(parameter, "full_tensor"):
        parameter.copy_(values)
        return
    from torch.distributed.tensor import distribute_tensor

    local: Any = parameter
    parameter.copy_(distribute_tensor(values.to(local.device, local.dtype), local.device_mesh, local.placements))


def _restore_flags(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, wanted in flags:
        if parameter.requires_grad != wanted:
            parameter.requires_grad_(wanted)


@contextlib.contextmanager
def _said_to_have_adapters(inner: Any) -> Iterator[None]:
    """The mark without which transformers' Trainer refuses to train anything beside quantised weights."""
    before = inner.__dict__.get("_hf_peft_config_loaded")
    inner._hf_peft_config_loaded = True
    try:
        yield
    finally:
        if before is None:
            del inner._hf_peft_config_loaded
        else:
            inner._hf_peft_config_loaded = before


@contextlib.contextmanager
def _seen_through(model: LanguageModel, modules: Mapping[str, NeuronDelta]) -> Iterator[None]:
    """The model's anatomy with the wrappers in place of the projections, so that readers and editors see what the deltas do."""
    before = model.anatomy
    model.__dict__["anatomy"] = _with_wrappers(before, modules)
    try:
        yield
    finally:
        model.__dict__["anatomy"] = before


def _with_wrappers(anatomy: Anatomy, modules: Mapping[str, NeuronDelta]) -> Anatomy:
    def changed(place: SitePlace) -> SitePlace:
        if place.module_name not in modules:
            return place
        return dataclasses.replace(place, projection=dataclasses.replace(place.projection, module=modules[place.module_name]))

    def part(old: Any) -> Any:
        return old and dataclasses.replace(old, places={site: changed(place) for site, place in old.places.items()})

    def whole(layer: LayerAnatomy) -> LayerAnatomy:
        return dataclasses.replace(layer, attention=part(layer.attention), mlp=part(layer.mlp), shared=part(layer.shared))

    return dataclasses.replace(anatomy, layers=tuple(whole(layer) for layer in anatomy.layers))
