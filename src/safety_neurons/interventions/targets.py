"""What an intervention acts on (a view's model, its neurons as index tensors, its rows of a pass), and edits
that need one model only.

Neurons are deactivated (the model acts as if their parameters were zero), scaled (as if these were
multiplied), or get a constant edit: mean, zero, noise, scale.
"""

import contextlib
import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from safety_neurons.arguments import well_typed
from safety_neurons.errors import DecodeError, NeuronError, UnsupportedModelError, UsageError
from safety_neurons.interventions.by_row import ByRow, by_row
from safety_neurons.interventions.columns import ChosenColumns, PerDevice, columns, indices
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import decoder_of
from safety_neurons.model.decoding import cache_in, following
from safety_neurons.model.hooks import around, editing, evaluating, rerouting
from safety_neurons.model.sites import Anatomy, ExpertRows, unwrapped
from safety_neurons.neurons import NeuronSet
from safety_neurons.neurons.experts import whole_experts

# Views of one model share its anatomy, so that a model is never probed while another view's intervention acts
# on it.
_KNOWN: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[Anatomy]]" = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model that an intervention acts on.

    Attributes:
        view: What the caller passed: a `LanguageModel` or a bare Hugging Face model.
        model: The Hugging Face (or PEFT) model.
        anatomy: Where its sites are.
        body: The decoder stack: the nearest module around all decoder layers that token ids come to. Every
            pass goes through it, whether started by ``generate``, by a call of the model or by a pass without
            the output head.
    """

    view: Any
    model: nn.Module
    anatomy: Anatomy
    body: nn.Module

    @classmethod
    def of(cls, view: Any) -> "Subject":
        """Resolves a `LanguageModel`, or a Hugging Face model as it is."""
        model = view if isinstance(view, nn.Module) else getattr(view, "model", None)
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"a {type(view).__name__} as the model; expected a LanguageModel, as sn.load(…) gives "
                "one, or a model of transformers"
            )
        known = _KNOWN.get(model)
        anatomy = None if known is None else known()
        if anatomy is None:
            anatomy = LanguageModel(view).anatomy if isinstance(view, nn.Module) else view.anatomy
            _KNOWN[model] = weakref.ref(anatomy)
        return cls(view, model, anatomy, _body(model, anatomy))

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which this view's own adapters act; nothing for a bare model."""
        return self.view.active() if hasattr(self.view, "active") else contextlib.nullcontext()

    def check_active(self) -> None:
        """Raises `DecodeError` where another view's adapters are the active ones, as when the donor itself is
        asked to answer.
        """
        if self.adapters is None or self.tuned is None:
            return
        layer = self.tuned
        names = () if layer.disable_adapters else tuple(layer.active_adapters)
        if names != self.adapters:
            raise DecodeError(
                f"adapters {list(names)} are active while the view with {list(self.adapters)} is being "
                "patched; leave the context first"
            )

    @functools.cached_property
    def tuned(self) -> BaseTunerLayer | None:
        """One adapted layer of the model, where there is one."""
        return next((module for module in self.body.modules() if isinstance(module, BaseTunerLayer)), None)

    @property
    def adapters(self) -> tuple[str, ...] | None:
        """The names of the view's adapters in order of application; None means whichever are active."""
        names = getattr(self.view, "adapters", None)
        return None if names is None else tuple(names)


def _body(model: nn.Module, anatomy: Anatomy) -> nn.Module:
    """The module that holds the list of decoder layers; in a model of text and more the one around it, since
    the text comes to the layers embedded.
    """
    config = unwrapped(model).config
    if config.get_text_config(decoder=True) is not config:
        return decoder_of(model)
    names = anatomy.layers[0].module_name.split(".")[:-2]
    return model.get_submodule(".".join(names))


def dense_only(chosen: Mapping[str, Any], anatomy: Anatomy, what: str) -> None:
    """Refuses keys of routed experts, which have no activation of their own at every token.

    Raises:
        UnsupportedModelError: A key names a routed expert.
    """
    routed = [key for key in chosen if key not in anatomy.places]
    if routed:
        raise UnsupportedModelError(
            f"{what} acts on neurons that are active at every token, and {routed[0]} is computed only "
            f"where the router chose its expert; leave out the {len(routed)} expert keys, or deactivate "
            "them"
        )


def per_site(values: Any, key: str, index: Int[Tensor, " neuron"], size: int) -> Tensor:
    """The value of each chosen neuron of a site, from one number, one per chosen neuron, or one per neuron of
    the site.

    Raises:
        NeuronError: No values for the site, or another number of them.
    """
    if isinstance(values, Mapping) or hasattr(values, "keys"):
        if key not in values.keys():  # noqa: SIM118  (scores files are not mappings)
            raise NeuronError(f"no values for {key}; give one per neuron of every site that is patched")
        values = values[key]
    vector = torch.as_tensor(values)
    if vector.ndim == 0:
        return vector.expand(len(index))
    if vector.shape == (size,):
        return vector[index]
    if vector.shape == index.shape:
        return vector
    raise NeuronError(
        f"{key}: {tuple(vector.shape)} values arrived, expected {size} (the site's neurons) or "
        f"{len(index)} (those chosen)"
    )


@runtime_checkable
class Sharing(Protocol):
    """A running patch whose passes may carry rows that are not the caller's."""

    def rows(self, subject: Subject) -> tuple[int, int, int] | None:
        """First and last (excluded) row of the batch that belong to a view, and the tokens of each row.

        None where all do.
        """


_RUNNING: "weakref.WeakKeyDictionary[nn.Module, Sharing]" = weakref.WeakKeyDictionary()


def own_rows(
    subject: Subject, activation: Float[Tensor, "batch token neuron"] | ExpertRows
) -> Bool[Tensor, "*rows 1"] | None:
    """Which rows of an activation belong to a view of the model; None stands for all of them."""
    running = _RUNNING.get(subject.body)
    span = None if running is None else running.rows(subject)
    if span is None:
        return None
    first, last, tokens = span
    if isinstance(activation, ExpertRows):
        token = activation.token_index[:, None]
        return (token >= first * tokens) & (token < last * tokens)
    row = torch.arange(activation.shape[0], device=activation.device)[:, None, None]
    return (row >= first) & (row < last)


def active(subject: Subject) -> contextlib.AbstractContextManager[Any]:
    """The context in which a view's own adapters act.

    Nothing while a patch on the model decides which of them act where.
    """
    return contextlib.nullcontext() if subject.body in _RUNNING else subject.active()


def announce(body: nn.Module, running: Sharing) -> None:
    """Announces a patch on a decoder stack.

    Raises:
        UsageError: One is running already.
    """
    if body in _RUNNING:
        raise UsageError("this model is being patched already; join the neuron sets (a | b) and patch once")
    _RUNNING[body] = running


def withdraw(body: nn.Module) -> None:
    """Takes the announcement back."""
    _RUNNING.pop(body, None)


Edit = Callable[[Tensor], Tensor]

MODES = ("mean", "zero", "noise", "scale")


def constant_editors(
    subject: Subject,
    chosen: Mapping[str, Int[Tensor, " neuron"]],
    mode: str,
    alpha: float,
    values: Any,
    seed: int,
) -> dict[str, Callable[[Tensor], Tensor]]:
    """One edit per site.

    Args:
        subject: The model.
        chosen: The neurons, one sorted index tensor per key.
        mode: `mean` (set to `values`), `zero`, `noise` (add `alpha` × `values` × a standard normal draw),
            `scale` (multiply by `alpha`).
        alpha: The factor of `noise` and `scale`.
        values: Means, or standard deviations for `noise`: one number, or per key one per neuron of the site
            or per chosen neuron.
        seed: Seed of the noise; draws depend on it, on the batch and on the order of passes, and on nothing
            outside.

    Raises:
        UsageError: A mode that does not exist, or one whose values are missing.
    """
    if mode not in MODES:
        raise UsageError(f"mode {mode!r} arrived; choose donor, {', '.join(MODES)}")
    if mode in ("mean", "noise") and values is None:
        raise UsageError(
            f"mode {mode!r} needs values ({'means' if mode == 'mean' else 'standard deviations'} per "
            "neuron); pass values=…"
        )
    sizes = subject.anatomy.table.sizes
    draws = _Draws(seed)
    editors: dict[str, Edit] = {}
    for key, index in chosen.items():
        given = (
            None if values is None or mode in ("zero", "scale") else per_site(values, key, index, sizes[key])
        )
        at, change = PerDevice(index, sizes[key]), _change(mode, alpha, given, draws)
        editors[key] = (
            _silencer(ChosenColumns([(0, at)]), subject) if change is None else _edit(subject, at, change)
        )
    return editors


def _change(mode: str, alpha: float, given: Tensor | None, draws: "_Draws") -> Edit | None:
    """The new values of the chosen columns, from their own; None for zeros."""
    if mode == "scale":
        return lambda own: own * alpha
    if mode == "zero" or given is None:
        return None
    if mode == "mean":
        return lambda own: given.to(own).expand_as(own)
    return lambda own: own + alpha * given.to(own) * draws.like(own)


def _edit(subject: Subject, index: PerDevice, change: Edit) -> Edit:
    def edit(activation: Float[Tensor, "batch token neuron"]) -> Float[Tensor, "batch token neuron"]:
        edited = index.copied(activation, change(index.taken(activation)))
        own = own_rows(subject, activation)
        return edited if own is None else torch.where(own, edited, activation)

    return edit


class _Draws:
    """Standard normal draws from a generator of one's own, the same on every device."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def like(self, values: Tensor) -> Tensor:
        return torch.randn(values.shape, generator=self._generator, dtype=torch.float32).to(values)


@well_typed
@contextlib.contextmanager
def deactivated(model: Any, *neuron_sets: NeuronSet | Mapping[str, Any] | ByRow) -> Iterator[Any]:
    """Runs the model as if the parameters of some neurons were zero, inside a ``with`` block.

    The activation of every chosen neuron is set to zero at every token, which gives the logits of a model
    whose weight row (``q k v gate up``, with its bias entry) or weight column (``o down``) is zero; the share
    that an applied adapter adds to it is zero as well. Values are filled in by index and never multiplied by
    a mask, so an infinite or undefined activation is silenced too. ``generate`` with its key-value cache,
    plain forward passes and `LanguageModel.complete` all act this way, in evaluation mode (no dropout);
    leaving the block restores the model bit for bit, modes included.

    Source: Zhao et al., ICLR 2025, section 2 (deactivation of a neuron). Differs: weights are not written;
    activations are masked, so quantised and shared weights work and nothing has to be restored.

    Args:
        model: A `LanguageModel` or a Hugging Face model.
        *neuron_sets: Sets to deactivate together (their union). Contexts may be nested.

    Yields:
        The model that was passed in.

    Raises:
        ForeignModelError: A set was found on another architecture.
        NeuronError: An index outside the model's sites.
    """
    subject = Subject.of(model)
    chosen = columns(subject.anatomy, *neuron_sets)
    with evaluating(subject.model), active(subject), contextlib.ExitStack() as stack:
        if chosen:
            editors = {key: _silencer(at, subject) for key, at in chosen.items()}
            stack.enter_context(by_row(*neuron_sets))
            stack.enter_context(editing(subject.anatomy, editors))
        yield model


@well_typed
@contextlib.contextmanager
def rerouted(model: Any, neurons: NeuronSet | Mapping[str, Any]) -> Iterator[Any]:
    """Runs a mixture with whole experts off at the router, inside a ``with`` block.

    The router's logits of these experts are −∞: their tokens go to the next experts, with the weights that
    the model gives to those. (`deactivated` on the same set leaves the routing as it is, and what the experts
    would have added is missing.)

    Source: expert deactivation of SteerMoE (arXiv 2509.09660), whose logits are put below the smallest one.

    Args:
        model: A `LanguageModel` or a Hugging Face model.
        neurons: A set that is made of all neurons of some experts.

    Yields:
        The model that was passed in.

    Raises:
        NeuronError: The set holds a part of an expert, or neurons that are no expert's.
        UnsupportedModelError: A router that cannot be closed.
        UsageError: Fewer experts are left than a token is sent to.
    """
    subject = Subject.of(model)
    chosen = neurons if isinstance(neurons, NeuronSet) else NeuronSet(neurons)
    chosen.check(subject.anatomy.table)
    off = whole_experts(chosen, subject.anatomy.table)
    with evaluating(subject.model), active(subject), rerouting(subject.anatomy, off):
        yield model


def _silencer(at: ChosenColumns, subject: Subject) -> Callable[[Any], Tensor]:
    def silence(
        activation: Float[Tensor, "batch token neuron"] | ExpertRows,
    ) -> Float[Tensor, "*rows neuron"]:
        own = own_rows(subject, activation)
        if own is None and isinstance(activation, Tensor) and not activation.requires_grad:
            # Nothing else reads it, and a copy costs a decoding step as much as the zeros.
            for rows, index in at.of(activation):
                rows.index_fill_(-1, index.on(rows.device), 0)
            return activation
        values = activation.values if isinstance(activation, ExpertRows) else activation
        silenced = values.index_fill(-1, at.of_all_rows.on(values.device), 0)
        return silenced if own is None else torch.where(own, silenced, values)

    return silence


@runtime_checkable
class Flags(Protocol):
    """What says for each request whether something holds of it: a guard, for one."""

    def flags(self, ids: Sequence[Sequence[int]]) -> Sequence[bool]:
        """One answer for each request, given as its token ids, template included."""


@well_typed
@contextlib.contextmanager
def scaled(
    model: Any,
    neurons: NeuronSet | Mapping[str, Any],
    factor: float | int,
    *,
    when: Flags | Callable[[Sequence[Sequence[int]]], Sequence[bool]] | None = None,
) -> Iterator[Any]:
    """Runs the model with the activations of some neurons multiplied by a factor, inside a ``with`` block.

    It is as if the parameters of every neuron were multiplied: its weight row and bias entry (``q k v gate
    up``) or its weight column (``o down``). 0 is `deactivated`, 1 leaves every bit as it is, more amplifies.
    A unit of which a set holds several neurons is scaled at each of them; keep ``down`` alone
    (``neurons.only(sites=["down"])``) to scale a unit's activation once. Parameters are never written into.

    Args:
        model: A `LanguageModel` or a Hugging Face model.
        neurons: Which are scaled, at every token.
        factor: What their activations are multiplied by.
        when: Scale only in rows whose request it says yes to: a guard (bound to this model), or a function
            from the requests' token ids to one answer each. It is asked once, when a request is first read,
            with nothing scaled; the rows keep its answer while they are continued. Rows of a beam share one
            request.

    Yields:
        The model that was passed in.

    Raises:
        ForeignModelError: The set was found on another architecture.
        NeuronError: An index outside the model's sites.
        UsageError: A factor that is no finite number.

    Source: none; steering by multiples of neurons' activations instead of by a direction.
    """
    if not math.isfinite(factor):
        raise UsageError(f"factor {factor} arrived; expected a finite number, such as 0, 0.5 or 2")
    subject = Subject.of(model)
    chosen, sizes = indices(subject.anatomy, neurons), subject.anatomy.table.sizes
    asked = None if when is None else Conditional(when.flags if isinstance(when, Flags) else when)
    with evaluating(subject.model), active(subject), contextlib.ExitStack() as stack:
        if chosen:
            editors = {
                key: _scaler(PerDevice(index, sizes[key]), float(factor), subject, asked)
                for key, index in chosen.items()
            }
            if asked is not None:
                stack.enter_context(around(subject.body, before=asked.begin))
                stack.enter_context(following(asked))
            stack.enter_context(editing(subject.anatomy, editors))
        yield model


def _scaler(
    index: PerDevice, factor: float, subject: Subject, asked: "Conditional | None"
) -> Callable[[Any], Tensor]:
    if factor == 0 and asked is None:
        return _silencer(ChosenColumns([(0, index)]), subject)
    change: Edit = torch.zeros_like if factor == 0 else lambda own: own * factor

    def scale(
        activation: Float[Tensor, "batch token neuron"] | ExpertRows,
    ) -> Float[Tensor, "*rows neuron"]:
        values = activation.values if isinstance(activation, ExpertRows) else activation
        if asked is not None and not asked.any():
            return values
        edited = index.copied(values, change(index.taken(values)))
        own = own_rows(subject, activation)
        if asked is not None:
            rows = asked.rows(activation)
            own = rows if own is None else own & rows
        return edited if own is None else torch.where(own, edited, values)

    return scale


class Conditional:
    """Which rows of the passes under way a condition holds of.

    Args:
        holds: From the token ids of requests to one answer each.
    """

    def __init__(self, holds: Callable[[Sequence[Sequence[int]]], Sequence[bool]]) -> None:
        self._holds = holds
        self._flags: Bool[Tensor, " row"] | None = None
        # Every cache has its own requests: two may be continued in turn.
        self._by_cache: weakref.WeakKeyDictionary[Any, Bool[Tensor, " row"]] = weakref.WeakKeyDictionary()
        self._read: list[list[int]] = []
        self._tokens = 0
        self._asking = False

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Asks about the requests of a pass, unless it continues those that were asked about."""
        if self._asking:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise DecodeError(
                "embeddings arrived without token ids; scaling by a condition reads the request; pass ids"
            )
        mask = kwargs.get("attention_mask")
        cache = cache_in(kwargs)
        self._tokens = ids.shape[1]
        if cache is not None and cache.get_seq_length() > 0:
            self._flags = self._by_cache.get(cache, self._flags)
            if self._flags is None or len(self._flags) != len(ids):
                raise DecodeError(
                    f"a cache of {cache.get_seq_length()} tokens arrived whose requests were not read here; "
                    "start from an empty cache inside this context"
                )
            return
        real = mask if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids)
        rows = [row[keep.bool()].tolist() for row, keep in zip(ids, real, strict=True)]
        before, self._read = self._read, rows
        if cache is None and self._flags is not None and [row[:-1] for row in rows] == before:
            return  # Without a cache every step reads the request again, with one more token.
        self._flags, self._asking = None, True
        try:
            self._flags = torch.tensor([bool(flag) for flag in self._holds(rows)], dtype=torch.bool)
        finally:
            self._asking = False
        if len(self._flags) != len(rows):
            raise UsageError(f"{len(self._flags)} answers about {len(rows)} requests; expected one for each")
        if cache is not None:
            self._by_cache[cache] = self._flags

    def alike(self) -> None:
        """Nothing is known of rows that were not read."""

    def keep(self, cache: Any, rows: Int[Tensor, " row"]) -> None:
        """Keeps the answers of some rows of a cache."""
        if cache in self._by_cache:
            self._by_cache[cache] = self._by_cache[cache][rows]

    def any(self) -> bool:
        """Whether there is anything to scale: never while requests are being asked about."""
        return not self._asking and self._flags is not None and bool(self._flags.any())

    def rows(self, activation: Float[Tensor, "batch token neuron"] | ExpertRows) -> Bool[Tensor, "*rows 1"]:
        """Which rows of an activation are to be scaled."""
        assert self._flags is not None
        if isinstance(activation, ExpertRows):
            token = activation.token_index
            return self._flags.to(token.device)[token // self._tokens][:, None]
        if activation.shape[0] != len(self._flags):
            raise UsageError(
                f"{activation.shape[0]} rows arrived where {len(self._flags)} requests were read; scale by a "
                "condition outside of a patch"
            )
        return self._flags.to(activation.device)[:, None, None]
