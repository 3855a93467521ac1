"""The only file with hooks. Every hook goes on through a context manager and comes off with it, whatever
happens in between.

`reading` hands the activations of sites to functions, `editing` replaces them by what functions return,
`around` does both at the boundaries of any modules, `replacing` runs other functions in place of theirs.
Stock modules of the model are hooked, no parameter is touched, and reading leaves every number of the model's
output as it was.

Cost: one hook per projection, whatever the number of sites in it; views wherever the neurons are evenly
spaced.
"""

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from safety_neurons.errors import UnsupportedModelError, UsageError
from safety_neurons.model.batches import decoder_of
from safety_neurons.model.sites import (
    Anatomy,
    ExpertRows,
    ExpertsAnatomy,
    Index,
    Routing,
    SitePlace,
    take,
    unwrapped,
)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode (no dropout) for a block.

    Modules that were training train again afterwards.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


Reader = Callable[[Any], None]
"""Gets a site's activation `[batch, token, neuron]`, or `ExpertRows` for the key of an expert: never to be
written into, and to be copied if it is kept, since an edit may write into it afterwards.
"""

Editor = Callable[[Any], Tensor]
"""Gets the same and returns the new activation, of the same shape."""


@dataclass
class Firings:
    """What came by while hooks were on.

    Attributes:
        anatomy: of the model that runs.
        passes: forward passes through the first layer.
        shape: rows and tokens of the pass in progress.
        counts: how often each key came by.
    """

    anatomy: Anatomy
    passes: int = 0
    shape: tuple[int, int] = (0, 0)
    counts: dict[str, int] = field(default_factory=dict)

    def check(self, ran: bool = False) -> None:
        """Raise an error if the model ran and a site never came by (a compiled model, a captured graph, a
        replaced kernel).

        Args:
            ran: whether the model ran for certain, though nothing was seen of it.
        """
        silent = [key for key, count in self.counts.items() if count == 0]
        if silent and (self.passes or ran):
            raise skipped(
                silent, f"in {self.passes} forward passes through the first layer", self.blame(silent[0])
            )

    def blame(self, key: str) -> str:
        """What stands between a site and its hook."""
        layer = self.anatomy.layers[int(key.split(".")[1])]
        place = self.anatomy.places.get(key)
        return _in_the_way(self.anatomy.model, layer.module if place is None else place.hooked)


def skipped(keys: Sequence[str], when: str, blame: str = "") -> UnsupportedModelError:
    """The error that says which sites never came by, what stands in the way, and what to do."""
    remedy = "switch off torch.compile, CUDA graphs and replaced kernels or forwards for this model"
    if ".experts." in keys[0]:
        remedy = "call model.set_experts_implementation('grouped_mm')"
    return UnsupportedModelError(
        f"{keys[0]} never came by {when} ({len(keys)} such sites), each was expected to"
        f"{blame and ': '}{blame}; {remedy}"
    )


def _in_the_way(model: nn.Module, module: nn.Module) -> str:
    """The outermost module around a hooked one that does not run the `forward` of its class, or the one that
    the hooked one was left out of.
    """
    names = {id(part): name for name, part in model.named_modules(remove_duplicate=False)}
    path = names.get(id(module), "").split(".")
    around_it = [".".join(path[:length]) for length in range(len(path) + 1)]
    for name in around_it:
        part = model.get_submodule(name)
        if (how := _replaced(part)) and not hasattr(part, "_hf_hook"):
            return f"{name or 'the model'} {how}"
    parent = model.get_submodule(around_it[-2]) if len(around_it) > 1 else model
    return f"the {type(parent).__name__} around {around_it[-1] or 'it'} ran without calling it as a module"


def _replaced(module: nn.Module) -> str:
    """What runs in the place of a module's own `forward`; empty where nothing does."""
    facts = vars(module)
    forward = facts.get("forward")
    if (
        facts.get("_compiled_call_impl") is not None
        or "_orig_mod" in facts.get("_modules", ())
        or hasattr(forward, "_torchdynamo_orig_callable")
    ):
        return "is compiled"
    source = str(getattr(forward, "__module__", None) or type(forward).__module__)
    if forward is not None and source.startswith("torch.cuda"):
        return "replays a CUDA graph"
    named = getattr(forward, "__qualname__", type(forward).__name__)
    return "" if forward is None else f"runs {source}.{named} in the place of its forward"


@contextmanager
def reading(anatomy: Anatomy, readers: Mapping[str, Reader]) -> Iterator[Firings]:
    """Hand the activations of sites to functions, at every forward pass inside the context.

    Args:
        anatomy: of the model that will run.
        readers: function by key. An activation is `[batch, token, neuron]`: for `q k v gate up` the
            projection's output, before norm, rotary embedding and activation function; for `o down` the
            projection's input, an (IA)³ scale included. The key of an expert gets `ExpertRows`; the key
            `layers.{i}.experts.*.{site}` gets the rows of all experts of the layer in one.

    Yields:
        Counts of what came by.

    Raises:
        UnsupportedModelError: a site the anatomy refuses, a compiled model, or a site that does not come by
            in a call of its layer, be it a prefill or a decoding step.
    """
    with _hooked(anatomy, readers, edit=False) as firings:
        try:
            yield firings
        except LookupError:
            if not firings.passes:  # what is missing may be what never came by
                firings.check(ran=True)
            raise
    firings.check()


@contextmanager
def editing(anatomy: Anatomy, editors: Mapping[str, Editor]) -> Iterator[Firings]:
    """Replace the activations of sites by what functions return, at every forward pass inside the context.

    Arguments, yields and errors as for `reading`. Parameters are never written into. An editor may write into
    the activation that it is given and return it, which saves a copy: nothing of the model reads an edited
    activation from before the edit.
    """
    with _hooked(anatomy, editors, edit=True) as firings:
        yield firings
    firings.check()


class Reading:
    """`reading` for readers that go on and off many times: what has to be looked up is looked up once.

    A context manager that may be entered again after it was left, never twice at a time. Whoever changes the
    model's modules in between (adapters put on) makes a new one.

    Args:
        anatomy: of the model that will run.
        readers: function by key, as for `reading`; but those of dense sites get every feature of the
            projection's side that the site is on, other sites' included (`place.index` says which are the
            site's), so that they copy only what they want.

    Raises:
        UnsupportedModelError: a site the anatomy refuses, a compiled model, or, on leaving, a site that never
        came by.
    """

    def __init__(self, anatomy: Anatomy, readers: Mapping[str, Reader]) -> None:
        refuse_compiled(anatomy.model)
        dense, self._experts = _sorted_out(anatomy, readers)
        self.firings = Firings(anatomy, counts=dict.fromkeys(readers, 0))
        self._registrations: list[tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = []
        if readers:
            first = anatomy.layers[0].module
            self._registrations.append(
                (first.register_forward_pre_hook, _note_shape(self.firings), {"with_kwargs": True})
            )
        for places in dense.values():
            self._registrations.append(
                (*_whole_reader([(place, readers[place.key]) for place in places], self.firings), {})
            )
        self._handles: list[Any] = []
        self._stack = ExitStack()

    def __enter__(self) -> Firings:
        firings = self.firings
        firings.passes = 0
        for key in firings.counts:
            firings.counts[key] = 0
        try:
            for register, hook, options in self._registrations:
                self._handles.append(register(hook, **options))
            for part, wanted in self._experts:
                self._stack.enter_context(_experts_hooked(part, wanted, firings, edit=False))
        except BaseException:
            self.off()
            raise
        return firings

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.off()
        if kind is None:
            self.firings.check()

    def off(self) -> None:
        """Leave without looking whether every site came by, for whoever looks at what was read."""
        while self._handles:
            self._handles.pop().remove()
        if self._experts:
            self._stack.close()


Before = Callable[[tuple[Any, ...], dict[str, Any]], Any]
"""Called with (args, kwargs) before a module runs; returns a new (args, kwargs), or None to leave them."""

After = Callable[[Any], Any]
"""Called with the output after a module ran; returns a new output, or None to leave it."""


@contextmanager
def around(
    module: nn.Module | None = None,
    *,
    before: Before | Mapping[nn.Module, Before] | None = None,
    after: After | Mapping[nn.Module, After] | None = None,
    each: bool = False,
) -> Iterator[None]:
    """Call functions at the boundaries of modules: to see inputs with their keywords, to run a donor beside a
    model, to cut its rows.

    Args:
        module: the module that plain functions are for.
        before: a function for `module`, or functions by module.
        after: the same.
        each: where one of the modules runs in the block, all do.

    Raises:
        UnsupportedModelError: with `each`, a module that ran without its hooks or not at all.
    """
    silent: dict[nn.Module, None] = {}
    with ExitStack() as stack:
        for part, enter in _by_module(module, before).items():
            silent[part] = None
            stack.callback(part.register_forward_pre_hook(_entering(enter, silent), with_kwargs=True).remove)
        for part, leave in _by_module(module, after).items():
            silent[part] = None
            stack.callback(part.register_forward_hook(_leaving(leave, silent)).remove)
        hooked = len(silent)
        yield
    if each and 0 < len(silent) < hooked:
        part = next(iter(silent))
        why = _replaced(part) or "its parent calls past its __call__"
        raise UnsupportedModelError(
            f"{len(silent)} of {hooked} modules ran without their hooks, each was expected to call them; of "
            f"the first, a {type(part).__name__}: {why}; switch off torch.compile, CUDA graphs and replaced "
            "kernels or forwards for this model"
        )


def _by_module(module: nn.Module | None, functions: Any) -> Mapping[nn.Module, Any]:
    if functions is None or isinstance(functions, Mapping):
        return functions or {}
    assert module is not None, "a plain function needs the module it is for"
    return {module: functions}


def _entering(function: Before, silent: dict[nn.Module, None]) -> Callable[..., Any]:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        silent.pop(module, None)
        return function(args, kwargs)

    return enter


def _leaving(function: After, silent: dict[nn.Module, None]) -> Callable[..., Any]:
    def leave(module: nn.Module, _: Any, output: Any) -> Any:
        silent.pop(module, None)
        return function(output)

    return leave


@contextmanager
def with_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Run functions in place of the `forward` of modules.

    Each module has its own back afterwards, hooks keep firing meanwhile.
    """
    with ExitStack() as stack:
        for module, function in forwards.items():
            stack.callback(_put_back, module, "forward", module.__dict__.get("forward"))
            module.forward = function
        yield


@contextmanager
def rerouting(anatomy: Anatomy, off: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """Set the router's logits of experts to −∞ for a block: other experts take their tokens, with the weights
    that the model gives to what is left.

    Args:
        anatomy: of the model that will run.
        off: experts by layer.

    Raises:
        UnsupportedModelError: a layer without routed experts; a router that is no linear map of the hidden
            state, or that chooses an expert without looking at its logit.
        UsageError: fewer experts are left than a token is sent to.
    """
    refuse_compiled(anatomy.model)
    with ExitStack() as stack:
        for layer, experts in off.items():
            part = anatomy.layers[layer].experts
            if part is None:
                raise UnsupportedModelError(f"layer {layer} has no routed experts, so none can be turned off")
            stack.enter_context(with_forwards({part.block: _closed(part, experts, part.block.forward)}))
            stack.enter_context(around(part.module, before=_closed_check(part, experts)))
        yield


class _ClosedRouter(TorchFunctionMode):
    """Puts −∞ into the columns of a linear map with one row of weights an expert, inside a block."""

    def __init__(self, part: ExpertsAnatomy, experts: Sequence[int]) -> None:
        super().__init__()
        self.shape, self.experts, self.seen = (part.n_experts, part.hidden), list(experts), 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not nn.functional.linear or len(args) < 2 or tuple(args[1].shape) != self.shape:
            return result
        self.seen += 1
        return result.index_fill(-1, torch.tensor(self.experts, device=result.device), float("-inf"))


def _closed(part: ExpertsAnatomy, experts: Sequence[int], own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _ClosedRouter(part, experts) as closed:
            output = own(*args, **kwargs)
        if closed.seen != 1:
            raise UnsupportedModelError(
                f"{part.module_name}: {closed.seen} linear maps look like its router, one was expected; "
                "deactivate the experts' neurons instead"
            )
        return output

    return forward


def _closed_check(part: ExpertsAnatomy, experts: Sequence[int]) -> Before:
    """No token goes to an expert that is off."""

    def check(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        chosen: Tensor = [*args, *kwargs.values()][1]
        if not bool(torch.isin(chosen, torch.tensor(list(experts), device=chosen.device)).any()):
            return
        left = part.n_experts - len(set(experts))
        if left < chosen.shape[-1]:
            raise UsageError(
                f"layer {part.layer}: {left} of {part.n_experts} experts are left on and every token is sent "
                f"to {chosen.shape[-1]}; turn fewer off"
            )
        raise UnsupportedModelError(
            f"{part.module_name}: its router chose an expert whose logit is −∞; deactivate the experts' "
            "neurons instead"
        )

    return check


def _put_back(module: nn.Module, name: str, earlier: Any) -> None:
    """Undo an override on an instance, down to what stood there before."""
    if earlier is None:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = earlier


@contextmanager
def _hooked(anatomy: Anatomy, functions: Mapping[str, Callable[[Any], Any]], edit: bool) -> Iterator[Firings]:
    refuse_compiled(anatomy.model)
    dense, experts = _sorted_out(anatomy, functions)
    firings = Firings(anatomy, counts=dict.fromkeys(functions, 0))
    with ExitStack() as stack:
        if functions:
            stack.callback(
                anatomy.layers[0]
                .module.register_forward_pre_hook(_note_shape(firings), with_kwargs=True)
                .remove
            )
            stack.enter_context(_uncompiled(anatomy.model))
        for places in dense.values():
            pairs = [(place, functions[place.key]) for place in places]
            stack.callback(_register(pairs, firings, edit))
        for part, wanted in experts:
            stack.enter_context(_experts_hooked(part, wanted, firings, edit))
        stack.enter_context(_counted(anatomy, firings))
        yield firings


@contextmanager
def _counted(anatomy: Anatomy, firings: Firings) -> Iterator[None]:
    """Every call of a layer is held to show each of its sites once, every call of the decoder and of the
    model to show all sites: a kernel may skip hooks only while decoding, or only for some shapes, and a
    captured step runs nothing that is hooked.
    """
    if not firings.counts:
        yield
        return
    by_layer: dict[int, list[str]] = {}
    for key in firings.counts:
        by_layer.setdefault(int(key.split(".")[1]), []).append(key)
    checks = {
        anatomy.layers[number].module: _Check(firings, keys, once=True) for number, keys in by_layer.items()
    }
    for whole in (decoder_of(anatomy.model), unwrapped(anatomy.model)):  # either may be called past the other
        checks.setdefault(whole, _Check(firings, list(firings.counts), once=False))
    with ExitStack() as stack:
        for module, check in checks.items():
            # Behind the hooks of others, which may run another model's pass here.
            stack.callback(module.register_forward_pre_hook(check.begin).remove)
            stack.callback(module.register_forward_hook(check.end).remove)
        yield


class _Check:
    """Counts how often sites come by between the beginning and the end of a module's call.

    Args:
        firings: of the block.
        keys: the sites.
        once: whether each dense one comes by exactly once; otherwise at least once.
    """

    ONLY_COUNTS = True
    """Its methods, as hooks, act on nothing (`batches.has_hooks`)."""

    def __init__(self, firings: Firings, keys: Sequence[str], *, once: bool) -> None:
        self.firings, self.keys, self.once = firings, list(keys), once
        self.seen = self._counts()

    def _counts(self) -> list[int]:
        return [self.firings.counts[key] for key in self.keys]

    def begin(self, *_: Any) -> None:
        """Note how often each site came by so far."""
        self.seen = self._counts()

    def end(self, *_: Any) -> None:
        """Raise an error for sites that did not come by, or came by too often."""
        times = list(map(operator.sub, self._counts(), self.seen))
        if min(times) == max(times) == 1:
            return
        when = f"in pass {self.firings.passes}, {self.firings.shape[1]} tokens a row"
        silent = [key for key, count in zip(self.keys, times, strict=True) if count == 0]
        if silent:
            raise skipped(silent, when, self.firings.blame(silent[0]))
        for key, count in zip(self.keys, times, strict=True):
            if self.once and count > 1 and ".experts." not in key:
                raise UnsupportedModelError(
                    f"{key} came by {count} times {when}, once was expected; switch off kernels or forwards "
                    "that run a projection again, such as checkpointing of activations"
                )


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """`generate` compiles no step while hooks are on, as it does for static caches on some devices: a
    captured step runs no hook.
    """
    holder: Any = unwrapped(model)
    if not hasattr(holder, _COMPILES):
        yield
        return
    earlier = vars(holder).get(_COMPILES)
    setattr(holder, _COMPILES, lambda *_, **__: False)
    try:
        yield
    finally:
        _put_back(holder, _COMPILES, earlier)


_COMPILES = "_valid_auto_compile_criteria"
"""Of transformers' generation: whether to compile the decoding step."""


def refuse_compiled(model: nn.Module) -> None:
    """Raise an error where a model, or a part of it, is compiled: hooks do not reach into it."""
    for name, module in model.named_modules():
        facts = vars(module)
        replaced = facts.get("forward")
        compiled = facts.get("_compiled_call_impl") is not None or "_orig_mod" in facts.get("_modules", ())
        if compiled or hasattr(replaced, "_torchdynamo_orig_callable"):
            where = f" ({name})" if name else ""
            raise UnsupportedModelError(
                f"a compiled model arrived{where}, hooks need the plain one; pass it before "
                "torch.compile or reload it"
            )


def _note_shape(firings: Firings) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        firings.passes += 1
        firings.shape = (hidden.shape[0], hidden.shape[1])

    return hook


def _sorted_out(
    anatomy: Anatomy, functions: Mapping[str, Callable[[Any], Any]]
) -> tuple[
    dict[tuple[int, str], list[SitePlace]], list[tuple[ExpertsAnatomy, dict[str, Callable[[Any], Any]]]]
]:
    """Dense sites by hooked module and side, and expert sites by layer."""
    places = anatomy.places
    dense: dict[tuple[int, str], list[SitePlace]] = {}
    routed: dict[int, dict[str, Callable[[Any], Any]]] = {}
    for key, function in functions.items():
        if key in places:
            dense.setdefault((id(places[key].hooked), places[key].side), []).append(places[key])
        elif ".experts." in key:
            layer = key.split(".")[1]
            anatomy.check([key.replace("*", "0")])
            routed.setdefault(int(layer), {})[key] = function
        else:
            anatomy.check([key])
    return dense, [(_experts_of(anatomy, layer), wanted) for layer, wanted in routed.items()]


def _experts_of(anatomy: Anatomy, layer: int) -> ExpertsAnatomy:
    experts = anatomy.layers[layer].experts
    assert experts is not None
    return experts


_Pairs = list[tuple[SitePlace, Callable[[Any], Any]]]


def _register(pairs: _Pairs, firings: Firings, edit: bool) -> Callable[[], None]:
    register, hook = _prepared(pairs, firings, edit)
    return register(hook).remove


def _prepared(pairs: _Pairs, firings: Firings, edit: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What registers the hook of one side of a projection, and the hook."""
    module, side = pairs[0][0].hooked, pairs[0][0].side
    act = (_edit if edit else _read)(pairs, firings)
    if side == "input":
        return module.register_forward_pre_hook, _input_hook(act) if edit else lambda _, args: act(args[0])
    return module.register_forward_hook, lambda _, __, output: act(output)


def _whole_reader(pairs: _Pairs, firings: Firings) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`_prepared` for readers of a whole side of a projection, in one call a pass: what it costs is what a
    guard adds to a prefill.
    """
    module, counts = pairs[0][0].hooked, firings.counts
    steps = tuple((place.key, function) for place, function in pairs)

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        values = args[0] if args[0].ndim == 3 else _shaped(args[0], firings)
        for key, function in steps:
            counts[key] += 1
            function(values)

    if pairs[0][0].side == "input":
        return module.register_forward_pre_hook, before
    return module.register_forward_hook, lambda _, __, output: before(_, (output,))


def _input_hook(act: Callable[[Tensor], Any]) -> Callable[..., Any]:
    return lambda _, args: (act(args[0]), *args[1:])


def _shaped(values: Tensor, firings: Firings) -> Tensor:
    """`[batch, token, neuron]`, also where the model flattened the batch."""
    return values if values.ndim == 3 else values.view(*firings.shape, values.shape[-1])


def _read(pairs: _Pairs, firings: Firings) -> Callable[[Tensor], None]:
    counts = firings.counts
    steps = [(place.key, _Taker(place.index), function) for place, function in pairs]

    def act(values: Tensor) -> None:
        shaped = values if values.ndim == 3 else _shaped(values, firings)
        for key, taker, function in steps:
            counts[key] += 1
            function(taker(shaped))

    return act


def _edit(pairs: _Pairs, firings: Firings) -> Callable[[Tensor], Tensor]:
    counts = firings.counts
    if len(pairs) == 1 and pairs[0][0].index is None:
        key, function = pairs[0][0].key, pairs[0][1]

        def whole(values: Tensor) -> Tensor:
            counts[key] += 1
            if values.ndim == 3:
                return function(values)
            return function(_shaped(values, firings)).reshape(values.shape)

        return whole
    steps = [(place.key, _Taker(place.index), function) for place, function in pairs]

    def act(values: Tensor) -> Tensor:
        shaped = _shaped(values, firings)
        new = shaped.clone()
        for key, taker, function in steps:
            counts[key] += 1
            taker.put(new, function(taker(shaped)))
        return new.reshape(values.shape)

    return act


class _Taker:
    """Takes a site's features from a fused projection and puts them back.

    A vector of positions is moved to a device once.
    """

    def __init__(self, index: Index) -> None:
        self.index = index

    def _here(self, values: Tensor) -> Index:
        if isinstance(self.index, Tensor) and self.index.device != values.device:
            self.index = self.index.to(values.device)
        return self.index

    def __call__(self, values: Tensor) -> Tensor:
        return take(values, self._here(values))

    def put(self, values: Tensor, new: Tensor) -> None:
        values[..., slice(None) if (index := self._here(values)) is None else index] = new


@contextmanager
def _experts_hooked(
    experts: ExpertsAnatomy, wanted: Mapping[str, Callable[[Any], Any]], firings: Firings, edit: bool
) -> Iterator[None]:
    """Step between the projections of the experts: the argument of the gate step and what it returns."""
    state = _ExpertCall(experts, wanted, firings, edit)
    module: Any = experts.module
    if experts.implementation not in ("eager", "grouped_mm", "batched_mm"):
        raise experts.unsupported(f"experts implementation {experts.implementation!r} hides the gate step")
    earlier = module.__dict__.get("_apply_gate")
    inner = module._apply_gate
    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(state.begin, with_kwargs=True).remove)
        stack.callback(_put_back, module, "_apply_gate", earlier)
        module._apply_gate = lambda gate_up: state.step(gate_up, inner)
        yield


class _ExpertCall:
    """One call of an experts module: remembers the routing, then handles the gate step, in one piece or
    expert by expert.
    """

    def __init__(
        self,
        experts: ExpertsAnatomy,
        wanted: Mapping[str, Callable[[Any], Any]],
        firings: Firings,
        edit: bool,
    ) -> None:
        self.experts, self.firings, self.edit = experts, firings, edit
        self.routing: Routing | None = None
        self.row = 0
        self.functions: dict[str, list[tuple[str, int | None, Callable[[Any], Any]]]] = {
            "gate": [],
            "up": [],
            "down": [],
        }
        for key, function in wanted.items():
            _, _, _, expert, site = key.split(".")
            self.functions[site].append((key, None if expert == "*" else int(expert), function))

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the routing that the experts module is given."""
        given = [*args, *kwargs.values()]
        self.routing, self.row = self.experts.routing(given[1], given[2]), 0

    def step(self, gate_up: Tensor, inner: Callable[[Tensor], Tensor]) -> Tensor:
        """The gate step with readers or editors on both sides of it."""
        assert self.routing is not None
        if self.row == 0:
            for functions in self.functions.values():
                for key, _expert, _function in functions:
                    self.firings.counts[key] += 1
        rows = slice(self.row, self.row + gate_up.shape[0])
        self.row = rows.stop
        routing = Routing(
            self.routing.token_index[rows], self.routing.weight[rows], self.routing.expert_index[rows]
        )
        for site in ("gate", "up"):
            if self.functions[site]:
                gate_up = self._act(site, gate_up, self.experts.index[site], routing)
        values = inner(gate_up)
        return self._act("down", values, None, routing) if self.functions["down"] else values

    def _act(self, site: str, values: Tensor, index: Index, routing: Routing) -> Tensor:
        part = take(values, index)
        new = part.clone() if self.edit else part
        for _, expert, function in self.functions[site]:
            where = slice(None) if expert is None else (routing.expert_index == expert).nonzero().flatten()
            rows = ExpertRows(
                part[where], routing.token_index[where], routing.weight[where], routing.expert_index[where]
            )
            result = function(rows)
            if self.edit and len(rows):
                new[where] = result
        if not self.edit:
            return values
        if index is None:
            return new
        whole = values.clone()
        whole[..., index] = new
        return whole
