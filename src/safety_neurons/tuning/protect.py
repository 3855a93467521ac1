"""Entries of a model's tensors that belong to a set of neurons: kept while someone else's loop trains the
model, and put back after it.

Full fine-tuning: the set's rows, columns and bias entries get no gradient and are written back after every
optimizer step, through torch's hooks on optimizers (this is the only file that registers them). Weight decay,
momentum, a resumed optimizer state or a fused optimizer change nothing about that: what they moved is moved
back before the next forward pass.

LoRA: an adapter adds B·A to a weight. Its row i is zero while row i of B is, its column j while column j of A
is, whatever the other factor holds; so those rows and columns are held at zero. The share is then exactly
zero, before and after merging.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from safety_neurons.arguments import well_typed
from safety_neurons.errors import MismatchError, NeuronError, UnsupportedModelError
from safety_neurons.model import LanguageModel
from safety_neurons.model.sites import (
    DOWN,
    FUSED,
    ExpertsAnatomy,
    Projection,
    SitePlace,
    projection,
    stored_weight,
    take,
)
from safety_neurons.neurons import NeuronSet, parse_key

Where = tuple[Any, ...]
WEIGHT, LORA, SCALE = "weight", "lora", "scale"


@dataclass(frozen=True)
class Entries:
    """Some entries of one tensor.

    Attributes:
        key: the site they belong to.
        kind: `weight` (weights and bias entries of the model), `lora` (a factor whose zeros make the
            adapter's share zero) or `scale` (of (IA)³).
        holder: what the tensor is an attribute of; it is looked up at every use, because wrappers replace
            parameters.
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
    def stored(self) -> Tensor:
        """The holder's tensor, wherever its entries lie.

        Raises:
            UnsupportedModelError: it is computed from other tensors.
        """
        return stored_weight(self.holder, self.name, self.key)

    @property
    def tensor(self) -> Tensor:
        """The whole tensor as it is now.

        Raises:
            UnsupportedModelError: it is computed, shared out over processes, or not in memory.
        """
        value = self.stored
        if type(value).__name__ == "DTensor" or value.is_meta:
            raise UnsupportedModelError(
                f"{self.key}: its {self.kind} is "
                f"{'off-loaded' if value.is_meta else 'shared out over processes'}, a tensor in memory was "
                "expected; load the model without off-loading, on one device or with DDP, or repair() it "
                "once saved"
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
    """Every tensor entry that the neurons' parameters are made of, those of all adapters on the model
    included.

    Modules are looked up by name, so that adapters put on after the anatomy was made are seen.

    Raises:
        UnsupportedModelError: a site the model refuses, or an adapter whose share of a row or column cannot
        be told apart.
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
            yield from _of_projection(
                key, place, part, take(torch.arange(place.features), place.index)[index]
            )


def weights_of(model: LanguageModel, neurons: NeuronSet) -> Iterator[Entries]:
    """The neurons' rows and columns in the model's own weights, bias entries and whatever is around a
    projection aside.

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
    """What says whether adapters were put on or taken off since: the identities of the modules at the set's
    sites, adapters included.
    """
    identities: list[int] = []
    for key in neurons.keys():  # noqa: SIM118 - not a mapping
        module: Any = (
            _experts_module(model, key)
            if key not in model.anatomy.places
            else _module(model, model.anatomy.places[key])
        )
        while module is not None:
            identities += [
                id(module),
                *(id(parameter) for name, parameter in module.named_parameters() if "base_layer" not in name),
            ]
            module = getattr(module, "base_layer", None)
    return tuple(identities)


def current_projection(model: LanguageModel, key: str) -> Projection:
    """The projection of a dense site as it is now, with whatever was wrapped around it since the anatomy was
    made.

    Raises:
        UnsupportedModelError: another module stands there.
    """
    place = model.anatomy.places[key]
    current = projection(_module(model, place))
    if current is None or (current.in_features, current.out_features) != (
        place.projection.in_features,
        place.projection.out_features,
    ):
        raise UnsupportedModelError(
            f"{key}: another module stands at {place.module_name!r} now, the projection was expected; "
            "load the model anew"
        )
    return current


def _module(model: LanguageModel, place: SitePlace) -> nn.Module:
    return _live(model, place.key, place.module_name)


def _live(model: LanguageModel, key: str, name: str) -> nn.Module:
    """The module of this name that the model runs: a copy of a whole sub-layer (`modules_to_save`) stands in
    for what it was made of.

    Raises:
        UnsupportedModelError: layers were put in or taken out, so that the name means another module.
    """
    here: Any = model.anatomy.model
    if _n_layers(model) != len(model.anatomy.layers):
        raise UnsupportedModelError(
            f"{key}: the model has {_n_layers(model)} layers now and had {len(model.anatomy.layers)} "
            "(layer replication?); load the model anew, then protect it"
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
    names = [
        name for name in getattr(module, "active_adapters", None) or [] if name in module.modules_to_save
    ]
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
        UnsupportedModelError: something is wrapped around it (a LoRA through `target_parameters`, a saved
            copy) whose share of an expert's row or column cannot be told apart.
    """
    experts = model.anatomy.layers[parse_key(key).layer].experts
    assert experts is not None
    live = _live(model, key, experts.module_name)
    above = [experts.module_name.rsplit(".", cut)[0] for cut in range(experts.module_name.count(".") + 1)]
    around = [
        part for part in map(model.anatomy.model.get_submodule, above) if hasattr(part, "adapter_layer_names")
    ]
    if live is not experts.module or around:
        raise UnsupportedModelError(
            f"{key}: a {type(around[0] if around else live).__name__} is around the experts "
            "(target_parameters, modules_to_save), the model's own parameters were expected; leave the "
            "experts out of the adapter's targets, or merge the adapter and repair() afterwards"
        )
    return live


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
                f"{key}: a {type(current).__name__} is around its projection, whose share of a neuron "
                "cannot be told apart; an adapter of PEFT or the projection alone was expected"
            )
        current = current.base_layer if hasattr(current, "base_layer") else part.base


def _of_weight(key: str, rows: bool, part: Projection, features: Tensor) -> Iterator[Entries]:
    if not part.quantised:
        yield Entries(
            key,
            WEIGHT,
            part.base,
            "weight",
            _along(rows != part.transposed, features),
            transposed=part.transposed,
        )


def _of_adapters(key: str, layer: Any, rows: bool, features: Tensor) -> Iterator[Entries]:
    lora, scales = getattr(layer, "lora_A", {}), getattr(layer, "ia3_l", {})
    if any(
        not isinstance(part, nn.Linear) for adapter in lora for part in (lora[adapter], layer.lora_B[adapter])
    ):
        raise UnsupportedModelError(
            f"{key}: a {type(layer).__name__} adapter is on it; a plain LoRA or (IA)³ was expected"
        )
    for adapter in lora:
        if adapter in getattr(layer, "lora_variant", {}):
            raise UnsupportedModelError(
                f"{key}: adapter {adapter!r} is a LoRA variant (DoRA or the like) whose rows cannot be "
                "held apart, a plain LoRA was expected; train without the variant"
            )
        first, second = lora[adapter], layer.lora_B[adapter]
        factor, partner = (second, first) if rows else (first, second)
        yield Entries(key, LORA, factor, "weight", _along(rows, features), partner)
        if rows and factor.bias is not None:
            yield Entries(key, LORA, factor, "bias", (features,))
    for adapter in scales:
        if bool(layer.is_feedforward) == rows:
            raise UnsupportedModelError(
                f"{key}: the (IA)³ adapter {adapter!r} scales the other side of this projection, which "
                "changes every neuron of it; leave the projection out of the adapter's targets"
            )
        yield Entries(key, SCALE, scales, adapter, _along(rows, features))
    own = (
        *(
            part
            for adapter in lora
            for part in (*lora[adapter].parameters(), *layer.lora_B[adapter].parameters())
        ),
        *scales.values(),
    )
    known = {id(parameter) for parameter in own} | {
        id(parameter) for parameter in layer.base_layer.parameters()
    }
    unknown = [name for name, parameter in layer.named_parameters() if id(parameter) not in known]
    if unknown:
        raise UnsupportedModelError(
            f"{key}: a {type(layer).__name__} adapter is on it (with {unknown[0]}); LoRA or (IA)³ was "
            "expected"
        )


def _of_expert(key: str, experts: ExpertsAnatomy, expert: int, site: str, index: Tensor) -> Iterator[Entries]:
    if site == "down":
        yield Entries(
            key,
            WEIGHT,
            experts.module,
            DOWN,
            (expert, *_along(experts.transposed, index)),
            transposed=experts.transposed,
        )
        return
    features = take(torch.arange(2 * experts.width), experts.index[site])[index]
    where = (expert, *_along(not experts.transposed, features))
    yield Entries(key, WEIGHT, experts.module, FUSED, where, transposed=experts.transposed)
    if experts.has_bias:
        yield Entries(key, WEIGHT, experts.module, f"{FUSED}_bias", (expert, features))


def _along(first: bool, features: Tensor) -> Where:
    """An index of these features along the first axis, or along the second."""
    return (features,) if first else (slice(None), features)


@dataclass
class Protection:
    """What is being kept, and what was seen of the training.

    Attributes:
        neurons: the set.
        steps: optimizer steps seen so far.
        moved_outside: entries that had changed without an optimizer step that could be seen, and were put
            back at the end.
    """

    model: LanguageModel
    neurons: NeuronSet
    steps: int = 0
    moved_outside: int = 0
    _kept: dict[tuple[str, str, int], tuple[Entries, Tensor]] = field(default_factory=dict, repr=False)
    _adapted: tuple[int, ...] = field(default=(), repr=False)
    _effective: dict[tuple[str, str], Tensor] = field(default_factory=dict, repr=False)

    def start(self) -> None:
        """Remember every entry as it is; hold the set's share of an adapter, which must be zero, at zero."""
        self._adapted = adapted(self.model, self.neurons)
        for entries in entries_of(self.model, self.neurons):
            place = (entries.key, entries.name, id(entries.holder))
            if place in self._kept:
                continue
            values = entries.read()
            if entries.kind == LORA:
                _check_idle(entries, values)
                values = torch.zeros_like(values)
                entries.write(values)
            self._kept[place] = (entries, values)
        self._effective = self._effective or effective(self.model, self.neurons)

    def changed(self) -> int:
        """How many entries of the set differ now from what they are kept at.

        Both are looked at: the tensors that are held, bit for bit, and what the model computes with,
        adapters, copies and whatever else is around a projection by now counted in. The larger number is
        told.
        """
        held = sum(
            int((_bits(entries.read()) != _bits(values)).sum()) for entries, values in self._kept.values()
        )
        return max(held, self._changed_in_effect())

    def _changed_in_effect(self) -> int:
        now = effective(self.model, self.neurons)
        return sum(
            int((now[place] != values.to(now[place].device)).sum())
            for place, values in self._effective.items()
        )

    def before_step(self, *_: Any) -> None:
        """Keep the gradient of the set out of the optimizer; see adapters that were put on meanwhile."""
        if adapted(self.model, self.neurons) != self._adapted:
            self.start()
        for entries, _values in self._kept.values():
            entries.clear_gradient()

    def after_step(self, *_: Any) -> None:
        """Put the set back."""
        self.steps += 1
        self.restore()

    def restore(self) -> None:
        """Write every entry back."""
        for entries, values in self._kept.values():
            entries.write(values.to(entries.tensor.device))


@well_typed
@contextlib.contextmanager
def protected(model: LanguageModel, neurons: NeuronSet) -> Iterator[Protection]:
    """Train everything but these neurons: inside the context the set stays bit-for-bit as it is, whatever
    loop trains the model.

    Works with every optimizer that derives from `torch.optim.Optimizer`, thus with plain loops, Hugging
    Face's Trainer, TRL and accelerate (gradient accumulation, clipping, mixed precision and DDP included),
    for full fine-tuning and for LoRA and (IA)³ adapters, put on before or inside the context. Bias entries of
    the neurons are protected too. The norm that gradients are clipped at still counts the set's own gradient,
    as the loop computes it before the optimizer is reached.

    Args:
        model: the model that is trained; its wrappers (DDP, a PEFT model around it) may be made inside the
            context.
        neurons: what stays.

    Yields:
        The protection: how many steps it saw, and `changed()`.

    Raises:
        NeuronError: an empty set, or one of another model.
        MismatchError: a LoRA adapter that has already changed the neurons; `repair` it first.
            At the end: entries of the set that differ and could not be put back.
        UnsupportedModelError: parameters shared out over processes (FSDP, ZeRO-3), weights computed from
            other tensors (parametrisations), or an adapter whose share of a neuron cannot be told apart
            (DoRA, LoRA on the parameters of experts).

    Source: the aim of RSN-Tune (Zhao et al., ICLR 2025): safety that outlives downstream fine-tuning.
    Differs: held by construction, where RSN-Tune chooses neurons that the task is unlikely to move.
    """
    _check(model, neurons)
    protection = Protection(model, neurons)
    with contextlib.ExitStack() as stack:
        protection.start()
        stack.callback(register_optimizer_step_pre_hook(protection.before_step).remove)
        stack.callback(register_optimizer_step_post_hook(protection.after_step).remove)
        stack.callback(
            protection.restore
        )  # also where training fails between an optimizer's step and what follows it
        yield protection
        if adapted(model, neurons) != protection._adapted:
            protection.start()
        protection.moved_outside = protection.changed()
        protection.restore()
        left = protection.changed()
        if left:
            raise MismatchError(
                f"{left} entries of the set differ from what they were and cannot be put back: something "
                "that is not held reaches them; train without what was added to the model, or "
                "repair(model, reference, neurons)"
            )


@dataclass(frozen=True)
class Repair:
    """What was put back.

    Attributes:
        n_neurons: neurons of the set.
        n_entries: weights and bias entries they are made of.
        changed: entries that differed from the reference.
        adapter_changed: entries of adapters that were cleared.
        rounded: entries whose reference does not fit the model's type exactly.
    """

    n_neurons: int
    n_entries: int
    changed: int
    adapter_changed: int
    rounded: int


@well_typed
def repair(model: LanguageModel, reference: LanguageModel, neurons: NeuronSet) -> Repair:
    """Put the set's rows, columns and bias entries back to what they are in the reference, in the model in
    memory.

    A LoRA adapter on the model loses its share of the set, so that adapter and base together are the
    reference there; the reference's own adapters are counted in. Everything outside the set stays as it is.

    Args:
        model: what was fine-tuned; it is changed.
        reference: a model of the same architecture that still has the neurons as they should be.
        neurons: what is put back.

    Raises:
        NeuronError: an empty set, or one of another model.
        MismatchError: two architectures, or two views of one base in memory whose rows would have to differ.
        UnsupportedModelError: quantised weights, or an adapter that cannot be told apart.

    Source: the aim of RSN-Tune (Zhao et al., ICLR 2025).
    Differs: after the fine-tune instead of before it.
    """
    _check(model, neurons)
    if reference.fingerprint != model.fingerprint:
        raise MismatchError(
            f"{model.name} and the reference {reference.name} are of different architectures; expected "
            "the model before its fine-tuning"
        )
    with reference.active():
        wanted = effective(reference, neurons)
        for key, scale in _input_scales(reference, neurons).items():
            wanted[key, "weight"] = wanted[key, "weight"] * scale
    mine = list(entries_of(model, neurons))
    weights = [entries for entries in mine if entries.kind == WEIGHT]
    if {entries.key for entries in weights if entries.name != "bias"} != set(neurons.keys()):
        raise MismatchError(
            f"{model.name} is quantised and its rows cannot be written; repair the unquantised model, "
            "then quantise it"
        )
    changed = rounded = total = 0
    shared = _bases(reference, neurons)
    for entries in weights:
        target, now = (
            wanted[entries.key, "bias" if entries.name.endswith("bias") else "weight"],
            entries.read(),
        )
        target = target.T if entries.transposed else target
        values = target.to(now.dtype).to(now.device)
        total += values.numel()
        differs = int((_bits(now) != _bits(values)).sum())
        changed += differs
        rounded += int((values.to(target.dtype).cpu() != target.cpu()).sum())
        if differs and entries.holder in shared:
            raise MismatchError(
                f"{entries.key}: model and reference share one base in memory; load the reference by itself"
            )
        if differs:
            entries.write(values)
    return Repair(
        len(neurons),
        total,
        changed,
        sum(_cleared(entries) for entries in mine if entries.kind != WEIGHT),
        rounded,
    )


def effective(model: LanguageModel, neurons: NeuronSet) -> dict[tuple[str, str], Tensor]:
    """What the model computes with at the neurons, active adapters counted in: rows or columns, and bias
    entries, by key.

    Weights that can be neither read nor trained (quantised ones of other packages) are left out.
    """
    parameters: dict[tuple[str, str], Tensor] = {}
    with torch.no_grad():
        for key, indices in neurons.items():
            members = torch.from_numpy(indices.copy())
            site = parse_key(key)
            if site.expert is not None:
                experts = model.anatomy.layers[site.layer].experts
                assert experts is not None
                whole, bias = experts.weight(site.expert, site.site), experts.bias(site.expert, site.site)
                rows = site.site != "down"
            else:
                part = current_projection(model, key)
                place = dataclasses.replace(model.anatomy.places[key], projection=part)
                rows = place.side == "output"
                if part.quantised and not hasattr(part.base.weight, "quant_state"):
                    continue
                whole, bias = place.weight(), place.bias()
            parameters[key, "weight"] = (whole[members] if rows else whole[:, members]).clone()
            if bias is not None:
                parameters[key, "bias"] = bias[members].clone()
    return parameters


def _input_scales(model: LanguageModel, neurons: NeuronSet) -> dict[str, Tensor]:
    """By key what (IA)³ multiplies the inputs of the set's columns with.

    It is on the activation, so that no weight has it; a model whose own scales are cleared needs it there.
    """
    found: dict[str, Tensor] = {}
    for key, indices in neurons.items():
        if parse_key(key).expert is not None:
            continue
        part = current_projection(model, key)
        tuner: Any = part.tuner
        if not part.scales_input or tuner.disable_adapters:
            continue
        for adapter in tuner.active_adapters:
            if adapter in tuner.ia3_l and adapter not in tuner.merged_adapters:
                scale = tuner.ia3_l[adapter].detach().flatten()[indices.tolist()]
                found[key] = found[key] * scale if key in found else scale
    return found


def _bases(reference: LanguageModel, neurons: NeuronSet) -> set[Any]:
    return {entries.holder for entries in entries_of(reference, neurons) if entries.kind == WEIGHT}


def _cleared(entries: Entries) -> int:
    """Zero an adapter's factor (one in a scale); how many entries that changed."""
    values = entries.read()
    idle = torch.zeros_like(values) if entries.kind == LORA else torch.ones_like(values)
    differs = int((values != idle).sum())
    if differs:
        entries.write(idle)
    return differs


def _check(model: LanguageModel, neurons: NeuronSet) -> None:
    if not len(neurons):
        raise NeuronError(
            "an empty set was given, expected at least one neuron; find with a larger --top or a smaller "
            "--agreement"
        )
    neurons.check(model.table, [model.name])


def _check_idle(entries: Entries, values: Tensor) -> None:
    """A LoRA factor that already acts on the set cannot be held at zero without changing what the model
    does.
    """
    partner = getattr(entries.partner, "weight", None)
    if bool((values != 0).any()) and (partner is None or bool((partner != 0).any())):
        raise MismatchError(
            f"{entries.key}: a LoRA adapter has already changed neurons of the set; repair(model, "
            "reference, neurons) first, then train on"
        )


def _bits(values: Tensor) -> Tensor:
    """The values as integers, so that -0 differs from 0 and a NaN equals itself."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.contiguous().view(kinds[values.element_size()])
