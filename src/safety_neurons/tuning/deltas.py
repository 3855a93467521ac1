"""Trainable rows and columns beside frozen projections: the only thing that tuning trains.

A delta is a small dense parameter per site: `[n, in]` for the selected rows of `q k v gate up`, `[out, n]`
for the selected columns of `o down`. The projection itself is called as it is (fused, transposed, quantised,
adapted) and never needs a weight gradient; bias entries stay frozen.

| what | in which type |
|---|---|
| the parameter, its gradient, its optimizer state | float32 (float64 on a float64 model) |
| its product with the input, the gradients of both | float32 (float64), autocast or not |
| the sum with the projection's output | float32 (float64), then one rounding to the type of that output |

So under bfloat16 an update of 1e-6 is kept in the parameter, however small it is beside the weight; the
forward pass shows of it what one rounding of the sum leaves.

Routed experts are slices of three-dimensional parameters, which stay as they are: rows of gate and up act
between the projection and the gate step, columns of down on what the experts put out, both through the model
floor's readers and editors. So every implementation of the experts interface that keeps the gate step apart
trains them.
"""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from safety_neurons.arguments import well_typed
from safety_neurons.errors import NeuronError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.model.hooks import around, editing, reading
from safety_neurons.model.sites import Anatomy, ExpertRows, LayerAnatomy, SitePlace, take
from safety_neurons.neurons import NeuronSet, parse_key


class TrainedSite(NamedTuple):
    """One site of a projection: which of its features are trained."""

    site: str
    side: str
    """`output` for rows, `input` for columns."""
    positions: Int[Tensor, " neuron"]
    """Features of the projection on that side, in the order of the set's members."""


class DeltaModule(nn.Module):
    """Trainable deltas beside frozen weights.

    Attributes:
        enabled: whether they act; off, what is beside them computes what it did before, bit for bit.
        trained_beside: says to the anatomy that parameters held here belong to no site.
    """

    trained_beside = True

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True

    def deltas(self) -> dict[str, nn.Parameter]:
        """The parameters by the name of their part."""
        raise AssertionError("every kind of deltas has its own")


class NeuronDelta(DeltaModule):
    """A projection with trainable deltas beside it; `base_layer` is the projection, untouched.

    Args:
        base_layer: what the model called before: a linear map, with its adapters or quantisation.
        in_features: of the linear map.
        out_features: of the linear map.
        parts: its sites that have members; one projection may hold several (`q k v`, `gate up`).
        dtype: of the parameters.
        device: of the parameters.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        in_features: int,
        out_features: int,
        parts: Sequence[TrainedSite],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = in_features, out_features
        self.sites = {part.site: part.side for part in parts}
        for part in parts:
            n = len(part.positions)
            shape = (n, in_features) if part.side == "output" else (out_features, n)
            self.register_parameter(
                f"delta_{part.site}", nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
            )
            self.register_buffer(f"at_{part.site}", part.positions.to(device), persistent=False)
        self.train(base_layer.training)

    @property
    def weight(self) -> Any:
        """The projection's own weight, as models that look at it expect."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The projection's own bias."""
        return self.base_layer.bias

    def deltas(self) -> dict[str, nn.Parameter]:
        """The parameters by site."""
        return {site: self.delta(site) for site in self.sites}

    def delta(self, site: str) -> nn.Parameter:
        """The parameter of a site: `[n, in]` for rows, `[out, n]` for columns."""
        return self.get_parameter(f"delta_{site}")

    def positions(self, site: str) -> Int[Tensor, " neuron"]:
        """Features of the projection that a site's delta belongs to."""
        return self.get_buffer(f"at_{site}")

    def forward(self, x: Float[Tensor, "*rows in"], *args: Any, **kwargs: Any) -> Float[Tensor, "*rows out"]:
        """The projection's output with the deltas' share."""
        y = self.base_layer(x, *args, **kwargs)
        if not self.enabled:
            return y
        for site, side in self.sites.items():
            delta, positions = self.delta(site), self.positions(site)
            given = x if x.device == delta.device else x.to(delta.device)
            function = _AddRows if side == "output" else _AddColumns
            y = function.apply(given, y, delta, positions)
        return y

    def added_to(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """A weight `[out, in]` with the deltas added, as a new tensor.

        The weight itself while the deltas are off.
        """
        if not self.enabled:
            return weight
        for site, side in self.sites.items():
            weight = add_at(weight, self.delta(site), self.positions(site), side)
        return weight

    def extra_repr(self) -> str:
        """Sites and members."""
        return ", ".join(f"{site}: {len(self.positions(site))}" for site in self.sites)


def add_at(
    weight: Float[Tensor, "out in"], delta: Tensor, positions: Int[Tensor, " neuron"], side: str
) -> Float[Tensor, "out in"]:
    """A weight with a delta added to its rows (`output`) or columns (`input`): summed in the wider type,
    rounded once to the weight's.
    """
    axis = 0 if side == "output" else 1
    positions = positions.to(weight.device)
    return weight.index_copy(axis, positions, summed(weight.index_select(axis, positions), delta))


def summed(
    weights: Float[Tensor, "one other"], delta: Float[Tensor, "one other"], dtype: torch.dtype | None = None
) -> Tensor:
    """Weights plus their change, in the wider of both types, rounded once to a type (that of the weights by
    default).
    """
    wide = torch.promote_types(weights.dtype, delta.dtype)
    return (weights.to(wide) + delta.to(weights.device, wide)).to(dtype or weights.dtype)


def product(x: Float[Tensor, "row in"], delta: Float[Tensor, "out in"]) -> Float[Tensor, "row out"]:
    """`x @ delta.T` in the type of the delta or float32, whichever is wider, autocast or not."""
    result: Tensor = _Product.apply(x, delta)
    return result


class _Product(torch.autograd.Function):
    """Keeps `x` for the gradient in its own type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor) -> Tensor:
        ctx.save_for_backward(x, delta)
        with _full_precision(x):
            return x.to(_wide(delta)) @ delta.to(_wide(delta)).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, delta = ctx.saved_tensors
        wide = _wide(delta)
        with _full_precision(x):
            for_x = (grad @ delta.to(wide)).to(x.dtype) if ctx.needs_input_grad[0] else None
            for_delta = (grad.T @ x.to(wide)).to(delta.dtype) if ctx.needs_input_grad[1] else None
        return for_x, for_delta


def _wide(delta: Tensor) -> torch.dtype:
    return torch.float64 if delta.dtype == torch.float64 else torch.float32


@contextlib.contextmanager
def _full_precision(values: Tensor) -> Iterator[None]:
    with torch.autocast(values.device.type, enabled=False):
        yield


class _AddRows(torch.autograd.Function):
    """`y` with `x @ delta.T` added to the features at `positions`.

    Of the activations, only `x` is kept, in its own type.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, delta: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(x, delta, positions)
        with _full_precision(x):
            wide = _wide(delta)
            added = (x.to(wide) @ delta.to(wide).T).to(y.device)
            at = positions.to(y.device)
            if y.dtype == wide:
                return y.index_add(-1, at, added)
            return y.index_copy(-1, at, (y.index_select(-1, at).to(wide) + added).to(y.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, delta, positions = ctx.saved_tensors
        needs_x, needs_y, needs_delta, _ = ctx.needs_input_grad
        with _full_precision(x):
            wide = _wide(delta)
            rows = grad.index_select(-1, positions.to(grad.device)).to(delta.device, wide)
            for_x = (rows @ delta.to(wide)).to(x.dtype) if needs_x else None
            for_delta = (flat(rows).T @ flat(x).to(wide)).to(delta.dtype) if needs_delta else None
        return for_x, grad if needs_y else None, for_delta, None


class _AddColumns(torch.autograd.Function):
    """`y` with `x[..., positions] @ delta.T` added.

    Of the activations, only those features of `x` are kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, delta: Tensor, positions: Tensor) -> Tensor:
        chosen = x.index_select(-1, positions)
        ctx.save_for_backward(chosen, delta, positions)
        ctx.width, ctx.type = x.shape[-1], x.dtype
        with _full_precision(x):
            wide = _wide(delta)
            if y.dtype == wide and y.device == chosen.device:
                added = y.clone(
                    memory_format=torch.contiguous_format
                )  # never a view: models may add to what they get in place
                added.view(-1, y.shape[-1]).addmm_(flat(chosen).to(wide), delta.to(wide).T)
                return added
            return (y + (chosen.to(wide) @ delta.to(wide).T).to(y.device)).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        chosen, delta, positions = ctx.saved_tensors
        needs_x, needs_y, needs_delta, _ = ctx.needs_input_grad
        with _full_precision(chosen):
            wide = _wide(delta)
            outputs = grad.to(delta.device, wide)
            for_x = None
            if needs_x:
                for_x = grad.new_zeros((*grad.shape[:-1], ctx.width), dtype=ctx.type, device=chosen.device)
                for_x.index_copy_(-1, positions, (outputs @ delta.to(wide)).to(ctx.type))
            for_delta = (flat(outputs).T @ flat(chosen).to(wide)).to(delta.dtype) if needs_delta else None
        return for_x, grad if needs_y else None, for_delta, None


def flat(values: Float[Tensor, "*rows features"]) -> Float[Tensor, "row features"]:
    """All leading axes as one."""
    return values.reshape(-1, values.shape[-1])


def full(tensor: Tensor) -> Tensor:
    """A tensor that is sharded over processes as one whole tensor; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def total_norm(tensors: Sequence[Tensor]) -> float:
    """L2 norm over all entries, summed in float64."""
    return float(torch.stack([full(tensor.detach()).double().norm().cpu() for tensor in tensors]).norm())


CHILD = "neuron_deltas"
"""Name of the deltas among the children of an experts module."""


class ExpertPart(NamedTuple):
    """One site of one expert: which of its neurons are trained."""

    expert: int
    site: str
    neurons: Int[Tensor, " neuron"]


class ExpertDeltas(DeltaModule):
    """The deltas of one layer's experts: `[n, hidden]` for gate and up, `[hidden, n]` for down.

    Args:
        hidden: size of the stream.
        parts: sites of experts that have members.
        dtype: of the parameters.
        device: of the parameters.
    """

    def __init__(
        self, hidden: int, parts: Sequence[ExpertPart], dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.parts = {f"{part.expert}_{part.site}": part.site for part in parts}
        for name, part in zip(self.parts, parts, strict=True):
            n = len(part.neurons)
            shape = (hidden, n) if part.site == "down" else (n, hidden)
            self.register_parameter(
                f"delta_{name}", nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
            )
            self.register_buffer(f"at_{name}", part.neurons.to(device), persistent=False)

    def deltas(self) -> dict[str, nn.Parameter]:
        """The parameters by `expert_site`."""
        return {name: self.get_parameter(f"delta_{name}") for name in self.parts}

    def of(self, site: str) -> list[tuple[int, nn.Parameter, Tensor]]:
        """Expert, parameter and neurons of every part of a site."""
        names = [name for name, own in self.parts.items() if own == site]
        return [
            (int(name.split("_")[0]), self.get_parameter(f"delta_{name}"), self.get_buffer(f"at_{name}"))
            for name in names
        ]


@contextlib.contextmanager
def acting(anatomy: Anatomy, layer: int, deltas: ExpertDeltas) -> Iterator[None]:
    """The deltas at work in a layer's experts, for as long as the context lasts."""
    experts = anatomy.layers[layer].experts
    assert experts is not None
    call = _Call(deltas)
    key = f"layers.{layer}.experts.*."
    with contextlib.ExitStack() as stack:
        stack.enter_context(around(experts.module, before=call.begin, after=call.end))
        editors = {
            key + site: functools.partial(call.edit, site) for site in ("gate", "up") if deltas.of(site)
        }
        if editors:
            stack.enter_context(editing(anatomy, editors))
        if deltas.of("down"):
            stack.enter_context(reading(anatomy, {f"{key}down": call.read}))
        yield


class _Call:
    """One call of an experts module: its input, and what is to be added to its output."""

    def __init__(self, deltas: ExpertDeltas) -> None:
        self.deltas = deltas
        self.hidden: Tensor | None = None
        self.added: list[tuple[Tensor, Tensor]] = []

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the stream that the experts are fed."""
        self.hidden = args[0] if args else next(iter(kwargs.values()))
        self.added = []

    def edit(self, site: str, rows: ExpertRows) -> Float[Tensor, "row neuron"]:
        """Gate or up values with the trained rows' share."""
        values, hidden = rows.values, self.hidden
        if not self.deltas.enabled:
            return values
        assert hidden is not None
        stream = hidden.reshape(-1, hidden.shape[-1])
        for expert, delta, neurons in self.deltas.of(site):
            where = (rows.expert_index == expert).nonzero().flatten()
            added = product(stream.index_select(0, rows.token_index[where]), delta)
            old = values.index_select(0, where).index_select(1, neurons)
            values = values.index_put(
                (where[:, None], neurons[None]), (old.to(added.dtype) + added).to(values.dtype)
            )
        return values

    def read(self, rows: ExpertRows) -> None:
        """The trained columns' share of what the experts put out."""
        if not self.deltas.enabled:
            return
        for expert, delta, neurons in self.deltas.of("down"):
            where = (rows.expert_index == expert).nonzero().flatten()
            share = product(rows.values.index_select(0, where).index_select(1, neurons), delta)
            self.added.append((rows.token_index[where], share * rows.weight[where].to(share.dtype)[:, None]))

    def end(self, output: Tensor) -> Tensor:
        """The experts' output with those shares."""
        self.hidden = None
        if not self.added:
            return output
        flat = output.reshape(-1, output.shape[-1])
        total = flat.to(self.added[0][1].dtype)
        for tokens, share in self.added:
            total = total.index_add(0, tokens, share)
        self.added = []
        return total.to(output.dtype).view(output.shape)


@well_typed
def attach(model: LanguageModel, neurons: NeuronSet) -> "Deltas":
    """Puts a trainable delta beside every projection that has members of the set, and freezes all other
    parameters.

    The model computes what it did before until the deltas are changed. `model.model` can then be given to any
    training loop; its parameters that require gradients are the deltas. The adapters of this view of the
    model are active until `detach`.

    Args:
        model: plain, quantised or with adapters (the deltas are beside the adapted projection).
        neurons: what to train: rows of `q k v gate up`, columns of `o down`, without their bias entries.

    Returns:
        The deltas, which are also a context manager that detaches them at its end.

    Raises:
        NeuronError: the set is empty or out of range. ForeignModelError: it was found on another
        architecture. UsageError: the model has deltas already. UnsupportedModelError: a site that cannot be
        trained.

    Source: Zhao et al., ICLR 2025, section 3 (SN-Tune: only the safety neurons are trained). Differs: the
    published code keeps every weight trainable and zeroes gradients; here nothing else can move, whatever the
    optimizer does.
    """
    if not len(neurons):
        raise NeuronError(
            "0 neurons arrived, at least one was expected: there is nothing to train; select more "
            "(--top, --agreement)"
        )
    placed = neurons.on(model.table)
    refuse_attached(model)
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
        self.modules: dict[str, DeltaModule] = {}
        self._where: dict[str, tuple[str, str]] = {}
        self._experts: list[tuple[int, str]] = []
        self._hooks = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            stack.enter_context(model.active())
            stack.callback(
                _restore_flags,
                [(parameter, parameter.requires_grad) for parameter in model.model.parameters()],
            )
            for parameter in model.model.parameters():
                parameter.requires_grad_(False)
            self._wrap_projections(stack)
            self._join_experts(stack)
            if getattr(model.inner, "is_quantized", False):
                stack.enter_context(_said_to_have_adapters(model.inner))
            wrappers = {
                name: module for name, module in self.modules.items() if isinstance(module, NeuronDelta)
            }
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
                by_layer.setdefault(layer, []).append(
                    ExpertPart(expert, site, torch.from_numpy(members.copy()))
                )
        for layer, parts in by_layer.items():
            experts = self.model.anatomy.layers[layer].experts
            assert experts is not None
            kind, device = _type_and_device(experts.module)
            deltas = ExpertDeltas(experts.hidden, parts, kind, device)
            self.modules[f"{experts.module_name}.{CHILD}"] = deltas
            self._experts.append((layer, f"{experts.module_name}.{CHILD}"))
            for part in parts:
                self._where[experts.key(part.expert, part.site)] = (
                    f"{experts.module_name}.{CHILD}",
                    f"{part.expert}_{part.site}",
                )
            experts.module.add_module(CHILD, deltas)
            stack.callback(delattr, experts.module, CHILD)

    def _hook_experts(self) -> None:
        for layer, name in self._experts:
            deltas = self.modules[name]
            assert isinstance(deltas, ExpertDeltas)
            self._hooks.enter_context(acting(self.model.anatomy, layer, deltas))

    # The parameters

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameter of every key: `[n, in]` for rows, `[out, n]` for columns, members in the
        set's order.
        """
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
        return {
            key: full(parameter.detach()).to("cpu", copy=True).contiguous()
            for key, parameter in self.named_parameters().items()
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the deltas to given values.

        Raises:
            NeuronError: keys or shapes are not those of this set.
        """
        own = self.named_parameters()
        if own.keys() != tensors.keys():
            odd = sorted(own.keys() ^ tensors.keys())
            raise NeuronError(
                f"deltas for {len(tensors)} matrices arrived, {len(own)} of this set were expected "
                f"(first odd one: {odd[0]})"
            )
        for key, parameter in own.items():
            if parameter.shape != tensors[key].shape:
                raise NeuronError(
                    f"{key}: a delta {list(tensors[key].shape)} arrived, {list(parameter.shape)} was "
                    "expected for this set"
                )
        with torch.no_grad():
            for key, parameter in own.items():
                _fill(parameter, tensors[key])

    def norm(self) -> float:
        """L2 norm of all deltas together."""
        return total_norm(self.parameters())

    # Reference and end

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """The untouched base for a block, bit for bit: reference log-probabilities, "before" of a study."""
        return self._switched(on=False)

    def enabled(self) -> contextlib.AbstractContextManager[None]:
        """The deltas on again for a block inside `disabled`."""
        return self._switched(on=True)

    @contextlib.contextmanager
    def _switched(self, *, on: bool) -> Iterator[None]:
        before = [(wrapper, wrapper.enabled) for wrapper in self.modules.values()]
        try:
            for wrapper, _ in before:
                wrapper.enabled = on
            yield
        finally:
            for wrapper, enabled in before:
                wrapper.enabled = enabled

    def reference(self) -> Any:
        """The untouched base as a model of its own, for losses that compare with it: `ref_model` of TRL's
        DPOTrainer.

        All parameters and buffers are the model's own, so it costs no memory for weights; the deltas are not
        in it.
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
        """Takes the deltas off: the original modules are back, and which parameters require gradients is as
        it was.
        """
        self._stack.close()

    def __enter__(self) -> "Deltas":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def refuse_attached(model: LanguageModel) -> None:
    """Refuses a model with deltas attached.

    Raises:
        UsageError: it has some.
    """
    if any(isinstance(module, DeltaModule) for module in model.model.modules()):
        raise UsageError(
            f"{model.name} has deltas attached, a model without was expected; detach() them first"
        )


def positions_of(place: SitePlace, neurons: NeuronSet) -> Int[Tensor, " neuron"]:
    """Which features of the projection are the members of the set at this place, in the set's order."""
    features = take(torch.arange(place.features), place.index)
    return features[torch.from_numpy(neurons[place.key].copy())]


def weight_of(model: LanguageModel, key: str) -> Tensor:
    """The weight of a site, an expert's too, without attached deltas.

    Raises:
        UnsupportedModelError: it cannot be read (off-loaded, or quantised in an unknown way).
    """
    parsed = parse_key(key)
    if parsed.expert is not None:
        experts = model.anatomy.layers[parsed.layer].experts
        assert experts is not None
        return experts.weight(parsed.expert, parsed.site)
    place = model.anatomy.place(key)
    if isinstance(place.module, NeuronDelta):
        place = dataclasses.replace(
            place, projection=dataclasses.replace(place.projection, module=place.module.base_layer)
        )
    return place.weight()


def _wrapper(places: list[SitePlace], neurons: NeuronSet) -> NeuronDelta:
    part = places[0].projection
    kind, device = _type_and_device(part.base)
    parts = [
        TrainedSite(parse_key(place.key).site, place.side, positions_of(place, neurons)) for place in places
    ]
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
    parameter.copy_(
        distribute_tensor(values.to(local.device, local.dtype), local.device_mesh, local.placements)
    )


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
    """The model's anatomy with the wrappers in place of the projections, so that readers and editors see what
    the deltas do.
    """
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
        return dataclasses.replace(
            place, projection=dataclasses.replace(place.projection, module=modules[place.module_name])
        )

    def part(old: Any) -> Any:
        return old and dataclasses.replace(
            old, places={site: changed(place) for site, place in old.places.items()}
        )

    def whole(layer: LayerAnatomy) -> LayerAnatomy:
        return dataclasses.replace(
            layer, attention=part(layer.attention), mlp=part(layer.mlp), shared=part(layer.shared)
        )

    return dataclasses.replace(anatomy, layers=tuple(whole(layer) for layer in anatomy.layers))
