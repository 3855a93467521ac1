"""Patch neurons: overwrite their activations while the model runs, with another model's or with constants.

Caches. Patching keeps one history for the patched model and one for its donor. Either both live in one cache
whose rows are ``[patched; donor]``, or the donor has a cache of its own, the *twin*. Whatever a decoding mode
does to the first (reorder beams, repeat rows, cut rejected tokens off) must happen to the second, otherwise
generation goes on guided by another text. So a cache is *followed* from its first use: its surgery is
mirrored, and a cache whose history the donor has not seen is an error.

Two views of one model, `StackedPass`: one pass whose rows are ``[patched; donor]``. Two sets of adapters on
one base differ only inside the adapters. So the batch is doubled at the door of the decoder stack, every
adapted projection applies the patched view's adapters to the first half of the rows and the donor's to the
second, the chosen activations of the second half are copied over those of the first, and only the first half
leaves the stack, so the output head works on it alone. Weights are read once per step for both. PEFT's own
state is not touched: the adapted layers' ``forward`` is replaced while the context lasts.

Two models, `TwinPass`: the donor passes before every pass of the patched model, each with its own cache. So
it is for two separate models, and for two views of one model whose adapters cannot be applied to half of the
rows each (then the donor's pass runs through the same modules with the donor's adapters active).
"""

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from peft.tuners import ia3, lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import DynamicCache

from safety_neurons.arguments import well_typed
from safety_neurons.errors import DecodeError, MismatchError, UsageError
from safety_neurons.interventions.by_row import ByRow, by_row
from safety_neurons.interventions.columns import ChosenColumns, columns, indices
from safety_neurons.interventions.targets import (
    Subject,
    active,
    announce,
    constant_editors,
    dense_only,
    withdraw,
)
from safety_neurons.model.decoding import Whole, cache_in, cache_name, following, without_cache
from safety_neurons.model.hooks import around, editing, evaluating, with_forwards
from safety_neurons.model.room import with_room
from safety_neurons.neurons import NeuronSet

_FOLLOWED_LAYERS = frozenset(
    {
        "DynamicLayer",
        "DynamicSlidingWindowLayer",
        "RoomyLayer",
        "RoomySlidingWindowLayer",
        "LinearAttentionLayer",
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
        "DummyLayer",
    }
)
"""Layers of a cache whose surgery is mirrored: keys and values, recurrent states, and layers without
either.
"""


class FollowedCache(DynamicCache):
    """A dynamic cache while a patch follows it.

    Instances are made by `Follower`, which lends this class to an ordinary cache.
    """

    follower: "Follower"
    twin: DynamicCache | None

    def reorder_cache(self, beam_idx: Int[Tensor, " row"]) -> None:
        """Reorders the rows of both histories: beam search."""
        super().reorder_cache(self._both(beam_idx))  # type: ignore[arg-type]
        if self.twin is not None:
            self.twin.reorder_cache(beam_idx)  # type: ignore[arg-type]

    def batch_select_indices(self, indices: Int[Tensor, " row"]) -> None:
        """Keeps some rows of both histories."""
        super().batch_select_indices(self._both(indices))
        if self.twin is not None:
            self.twin.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of both histories; ``[patched; donor]`` stays in that order."""
        super().batch_repeat_interleave(repeats)
        if self.twin is not None:
            self.twin.batch_repeat_interleave(repeats)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Cuts tokens off both histories: assisted decoding."""
        super().crop(*args, **kwargs)
        if self.twin is not None:
            self.twin.crop(*args, **kwargs)

    def reset(self) -> None:
        """Empties both histories."""
        super().reset()
        if self.twin is not None:
            self.twin.reset()

    def activate_past_recording(self) -> None:
        """Lets sliding-window layers keep what assisted decoding may need again."""
        super().activate_past_recording()
        if self.twin is not None:
            self.twin.activate_past_recording()

    def _both(self, indices: Int[Tensor, " row"]) -> Int[Tensor, " both"]:
        """The cache's rows that belong to these rows of the batch: two each where it holds both halves."""
        held = _n_rows(self)
        return torch.cat([indices, indices + held // 2]) if self.follower.doubled and held else indices


class Follower:
    """Follows the caches of one patched context.

    Args:
        doubled: Whether one cache holds both histories (rows ``[patched; donor]``) or the donor has a cache
            of its own.
    """

    def __init__(self, doubled: bool) -> None:
        self.doubled = doubled
        self._caches: list[weakref.ref[FollowedCache]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Follower":
        return self  # a copied cache is followed by the same context

    def check(self, cache: Any, batch: int) -> None:
        """Starts to follow a fresh cache, or checks that the history in a followed one is complete.

        Raises:
            DecodeError: The cache is of a kind that cannot be followed, or holds tokens that the donor has
            not seen.
        """
        if isinstance(cache, FollowedCache):
            self._check_followed(cache, batch)
            return
        refuse_other_caches(cache)
        if cache.get_seq_length() > 0:
            raise DecodeError(
                f"the cache passed in holds {cache.get_seq_length()} tokens that the donor has not seen; "
                "start from an empty cache inside the patched context"
            )
        self.follow(cache, None)

    def _check_followed(self, cache: FollowedCache, batch: int) -> None:
        if cache.follower is not self:
            raise DecodeError(
                "the cache belongs to another patched context; start from an empty cache inside this one"
            )
        length = cache.get_seq_length()
        if cache.twin is not None and cache.twin.get_seq_length() != length:
            raise DecodeError(
                f"the patched model has read {length} tokens and its donor {cache.twin.get_seq_length()}; "
                "this decoding mode changes the cache in a way that cannot be followed, use greedy search "
                "or sampling"
            )
        held = _n_rows(cache)
        expected = 2 * batch if self.doubled else batch
        if held is not None and length > 0 and held != expected:
            raise DecodeError(
                f"the cache holds {held} rows where {expected} were expected; use greedy search or sampling"
            )

    def follow(self, cache: Any, twin: DynamicCache | None) -> None:
        """Follows a cache from now on, with the donor's own cache as its twin where there is one."""
        if not isinstance(cache, FollowedCache):
            refuse_other_caches(cache)
            cache.__class__ = FollowedCache
            self._caches.append(weakref.ref(cache))
        cache.follower = self
        cache.twin = twin

    def release(self) -> None:
        """Gives every followed cache its own class back."""
        for reference in self._caches:
            cache = reference()
            if cache is not None:
                cache.__class__ = DynamicCache  # type: ignore[assignment]
                del cache.follower, cache.twin
        self._caches.clear()


def refuse_other_caches(cache: Any) -> None:
    """Raises `DecodeError` unless the cache is a plain dynamic one, the only kind whose surgery can be
    mirrored.
    """
    kind = type(cache).__name__
    plain = type(cache) is DynamicCache and not getattr(cache, "offloading", False)
    if plain:
        others = {type(layer).__name__ for layer in cache.layers} - _FOLLOWED_LAYERS
        if not others:
            return
        kind = f"{kind} of {', '.join(sorted(others))}"
    elif type(cache) is DynamicCache:
        kind = "offloaded cache"
    raise DecodeError(
        f"patching cannot follow a {kind}; leave out cache_implementation, or pass use_cache=False"
    )


def _n_rows(cache: DynamicCache) -> int | None:
    for layer in cache.layers:
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.ndim == 4:
            return keys.shape[0]
    return None


Forward = Callable[..., Tensor]

_ROW_FIRST = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "token_type_ids")


def active_adapters(subject: Subject, layer: BaseTunerLayer) -> tuple[str, ...]:
    """The adapters that a view applies at a layer, in order."""
    if subject.adapters is not None:
        return subject.adapters
    return () if layer.disable_adapters else tuple(layer.active_adapters)


def can_stack(base: Subject, aligned: Subject) -> bool:
    """Whether both views are adapters on one model, of kinds whose share can be computed for each half of the
    rows.
    """
    if base.model is not aligned.model and base.body is not aligned.body:
        return False
    for module in base.body.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return False
        if isinstance(module, BaseTunerLayer) and not _known(module):
            return False
    return True


def _known(layer: BaseTunerLayer) -> bool:
    if layer.merged:
        return False
    if type(layer) is ia3.Linear:
        return True
    if type(layer) is not lora.Linear:
        return False
    return not getattr(layer, "lora_variant", {})


def stacked_forwards(base: Subject, aligned: Subject) -> dict[nn.Module, Forward]:
    """For each adapted layer, a forward that applies one view's adapters to each half of the rows."""
    forwards: dict[nn.Module, Forward] = {}
    for layer in base.body.modules():
        if isinstance(layer, BaseTunerLayer):
            names = (active_adapters(base, layer), active_adapters(aligned, layer))
            forwards[layer] = (
                _scaled(layer, names) if isinstance(layer, ia3.Linear) else _low_rank(layer, names)
            )
    return forwards


def _scaled(layer: Any, names: Sequence[Sequence[str]]) -> Forward:
    """(IA)³: each half is multiplied by the product of its own vectors, as PEFT does, at the input or the
    output.
    """
    vectors = [
        [layer.ia3_l[name].detach().flatten() for name in half if name in layer.ia3_l] for half in names
    ]
    present = [vector for half in vectors for vector in half]
    linear = layer.base_layer
    if not present:
        return linear.__call__
    scales = []
    for half in vectors:
        scale = torch.ones_like(present[0])
        for vector in half:
            scale = scale * vector
        scales.append(scale)
    both = torch.stack(scales)[:, None, :]

    def at_input(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return linear(_times(x, both), *args, **kwargs)

    def at_output(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _times(linear(x, *args, **kwargs), both)

    return at_input if layer.is_feedforward else at_output


def _times(
    x: Float[Tensor, "*rows neuron"], both: Float[Tensor, "2 1 neuron"]
) -> Float[Tensor, "*rows neuron"]:
    """Each half of the rows times its own vector, computed in the vectors' precision."""
    return (x.reshape(2, -1, x.shape[-1]) * both).view(x.shape).to(x.dtype)


def _low_rank(layer: Any, names: Sequence[Sequence[str]]) -> Forward:
    """LoRA: each half gets the sum of its own adapters' products, all of a half as one product of their
    joined factors.
    """
    linear = layer.base_layer
    halves = [[name for name in half if name in layer.lora_A] for half in names]
    if not any(halves):
        return linear.__call__
    pairs = [_joined(layer, half) for half in halves]
    like = next(down for down, _, _ in pairs if down is not None)
    rank = max(down.shape[0] for down, _, _ in pairs if down is not None)
    downs = like.new_zeros(2, layer.in_features, rank)
    ups = like.new_zeros(2, rank, layer.out_features)
    shifts: Tensor | None = None
    for half, (down, up, shift) in enumerate(pairs):
        if down is None or up is None:
            continue
        downs[half, :, : down.shape[0]] = down.T
        ups[half, : up.shape[1]] = up.T
        if shift is not None:
            shifts = like.new_zeros(2, 1, layer.out_features) if shifts is None else shifts
            shifts[half, 0] = shift

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = linear(x, *args, **kwargs)
        wide = result.reshape(2, -1, result.shape[-1]).to(like.dtype)
        inner = torch.bmm(x.reshape(2, -1, x.shape[-1]).to(like.dtype), downs)
        wide = torch.baddbmm(wide, inner, ups)
        if shifts is not None:
            wide = wide + shifts
        return wide.view(result.shape).to(result.dtype)

    return forward


def _joined(layer: Any, names: Sequence[str]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Several adapters of one half as one: their factors side by side, the scaling inside the second."""
    if not names:
        return None, None, None
    down = torch.cat([layer.lora_A[name].weight.detach() for name in names], dim=0)
    up = torch.cat([layer.lora_B[name].weight.detach() * layer.scaling[name] for name in names], dim=1)
    shifts = [
        layer.lora_B[name].bias.detach() * layer.scaling[name]
        for name in names
        if layer.lora_B[name].bias is not None
    ]
    return down, up, sum(shifts[1:], shifts[0]) if shifts else None


def _inputs(
    names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], Tensor]:
    """The arguments of a pass by name, and the ids or embeddings among them."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    source = given.get("input_ids")
    source = given.get("inputs_embeds") if source is None else source
    if not isinstance(source, Tensor):
        raise DecodeError("a patched pass needs input_ids or inputs_embeds; none arrived")
    return given, source


class StackedPass:
    """The state of a patched context whose passes carry both halves.

    Args:
        base: The view that is patched.
        aligned: The view that gives its activations, on the same model.
        chosen: The columns of every site.
    """

    def __init__(self, base: Subject, aligned: Subject, chosen: Mapping[str, ChosenColumns]) -> None:
        self.base, self.aligned = base, aligned
        self.follower = Follower(doubled=True)
        self._chosen = dict(chosen)
        self._names = list(inspect.signature(type(base.body).forward).parameters)[1:]
        self._shape: tuple[int, int] | None = None
        self._fired = 0

    def editors(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """For each site, the edit that copies the chosen activations from the second half of the rows to the
        first.
        """
        return {key: self._copier(at) for key, at in self._chosen.items()}

    def _copier(self, at: ChosenColumns) -> Callable[[Tensor], Tensor]:
        def copy(activation: Float[Tensor, "*rows neuron"]) -> Float[Tensor, "*rows neuron"]:
            self._fired += 1
            patched, donor = activation.chunk(2)
            if activation.requires_grad:
                index = at.of_all_rows
                return torch.cat([index.copied(patched, index.taken(donor)), donor])
            for (rows, index), (source, _) in zip(at.of(patched), at.of(donor), strict=True):
                index.move_(rows, source)
            return activation

        return copy

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Doubles the inputs of a pass and follows its cache."""
        self.base.check_active()
        given, source = _inputs(self._names, args, kwargs)
        if (cache := cache_in(given)) is not None:
            self.follower.check(cache, source.shape[0])
        for name in _ROW_FIRST:
            if name in given:
                # Positions of text, height and width: [3, row, token].
                streams = name == "position_ids" and getattr(given[name], "ndim", 0) == 3
                given[name] = _doubled(given[name], source.shape[0], axis=int(streams))
        self._shape, self._fired = (source.shape[0], source.shape[1]), 0
        return (), given

    def after(self, output: Any) -> Any:
        """Keeps the patched half of everything that leaves the stack."""
        self._shape = None
        check_fired(self._fired, len(self._chosen))
        return _first_half(output, self.follower)

    def rows(self, subject: Subject) -> tuple[int, int, int] | None:
        """The half of the rows that belongs to a view, and the tokens of each row."""
        if self._shape is None:
            return None
        rows, tokens = self._shape
        if subject.view is self.base.view:
            return 0, rows, tokens
        return (rows, 2 * rows, tokens) if subject.view is self.aligned.view else None


def check_fired(fired: int, expected: int) -> None:
    """Raises `DecodeError` unless every chosen site was patched exactly once in a pass."""
    if fired != expected:
        raise DecodeError(
            f"{fired} of {expected} sites were patched in this pass; compiled or replaced code skips "
            "hooks, run the model eagerly"
        )


def _doubled(value: Any, rows: int, axis: int = 0) -> Any:
    """A tensor with rows along an axis (or a mapping of them) twice, one after the other.

    What is shared by all rows stays as it is.
    """
    if isinstance(value, Mapping):
        return {name: _doubled(one, rows) for name, one in value.items()}
    if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[axis] == rows:
        return torch.cat([value, value], axis)
    return value


def _first_half(output: Any, follower: Follower) -> Any:
    if isinstance(output, Tensor):
        return output[: output.shape[0] // 2]
    if isinstance(output, tuple | list):
        return type(output)(_first_half(one, follower) for one in output)
    if isinstance(output, dict):
        for name in list(output):
            output[name] = _first_half(output[name], follower)
        return output
    if hasattr(output, "get_seq_length") and getattr(output, "follower", None) is not follower:
        follower.follow(output, None)
    return output


Editor = Callable[[Tensor], Tensor]


class TwinPass:
    """The state of a patched context that runs the donor beside the patched model.

    Args:
        base: The model that is patched.
        aligned: The model that gives its activations; the same modules or others.
        chosen: The columns of every site.
    """

    def __init__(self, base: Subject, aligned: Subject, chosen: Mapping[str, ChosenColumns]) -> None:
        self.base, self.aligned = base, aligned
        self.shared = base.body is aligned.body
        self.follower = Follower(doubled=False)
        self._chosen = dict(chosen)
        self._names = list(inspect.signature(type(base.body).forward).parameters)[1:]
        self._known = set(inspect.signature(type(aligned.body).forward).parameters)
        self._recorded: dict[str, list[Tensor]] = {}
        self._recording = False
        self._fired = 0
        self._new_twin: Any = None

    def editors(self) -> dict[str, Editor]:
        """For each site, the edit that overwrites the chosen activations (and, on shared modules, records the
        donor's).
        """
        return {key: self._editor(key) for key in self._chosen}

    def recorders(self) -> dict[str, Editor]:
        """For each site of a separate donor, a function that records the chosen activations and changes
        nothing.
        """
        return {key: self._recorder(key) for key in self._chosen}

    def _recorder(self, key: str) -> Editor:
        at = self._chosen[key]

        def record(activation: Float[Tensor, "*rows neuron"]) -> Float[Tensor, "*rows neuron"]:
            if self._recording:
                taken = ((index.taken(rows), index.whole) for rows, index in at.of(activation))
                self._recorded[key] = [rows.clone() if whole else rows for rows, whole in taken]
            return activation

        return record

    def _editor(self, key: str) -> Editor:
        at = self._chosen[key]
        record = self._recorder(key)

        def overwrite(activation: Float[Tensor, "*rows neuron"]) -> Float[Tensor, "*rows neuron"]:
            if self._recording:
                return record(activation) if self.shared else activation
            self._fired += 1
            values = self._recorded.pop(key, None)
            if values is None:
                raise DecodeError(
                    f"{key}: the donor gave no activation in this pass; run both models eagerly"
                )
            values = [one.to(device=activation.device, dtype=activation.dtype) for one in values]
            if activation.requires_grad:
                return at.of_all_rows.copied(activation, values[0])
            for (rows, index), taken in zip(at.of(activation), values, strict=True):
                index.copied_(rows, taken)
            return activation

        return overwrite

    def before(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Runs the donor on the inputs of the pass that is about to start."""
        if self._recording:
            return None
        self.base.check_active()
        given, source = _inputs(self._names, args, kwargs)
        if given.get("inputs_embeds") is not None and not self.shared:
            raise DecodeError(
                "two separate models embed tokens each on their own; pass input_ids instead of inputs_embeds"
            )
        if given.get("use_cache") is None:
            given["use_cache"] = bool(_of_text(self.base, "use_cache"))
        cache = cache_in(given)
        if cache is not None:
            self.follower.check(cache, source.shape[0])
        self._fired, self._recorded, self._new_twin = 0, {}, None
        self._run_donor(given, cache)
        return (), given

    def _run_donor(self, given: Mapping[str, Any], cache: FollowedCache | None) -> None:
        passed = {
            name: _to(value, self._device())
            for name, value in without_cache(given).items()
            if name in self._known or "kwargs" in self._known
        }
        passed[cache_name(self.aligned.body)] = None if cache is None else cache.twin
        passed |= {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
        active = self.aligned.active() if self.shared else contextlib.nullcontext()
        self._recording = True
        try:
            with active, torch.no_grad():
                output = self.aligned.body(**passed)
        finally:
            self._recording = False
        self._new_twin = with_room(cache_in(output))
        if cache is not None:
            if self._new_twin is None:
                raise DecodeError("the donor keeps no cache of its own; pass use_cache=False")
            cache.twin = self._new_twin

    def _device(self) -> torch.device:
        return next(self.aligned.body.parameters()).device

    def after(self, output: Any) -> Any:
        """Checks that every site was patched, and follows a cache that the pass made."""
        if self._recording:
            return output
        check_fired(self._fired, len(self._chosen))
        cache = cache_in(output)
        if cache is None and isinstance(output, tuple):
            cache = next((one for one in output if hasattr(one, "get_seq_length")), None)
        if cache is not None and not isinstance(cache, FollowedCache):
            self.follower.follow(cache, self._new_twin)
        return output

    def rows(self, subject: Subject) -> tuple[int, int, int] | None:
        """All rows of a pass belong to the view whose pass it is, and none to the other."""
        owner, other = (self.aligned, self.base) if self._recording else (self.base, self.aligned)
        both = owner.view is other.view
        return (0, 0, 0) if self.shared and not both and subject.view is other.view else None


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return {name: _to(one, device) for name, one in value.items()} if isinstance(value, dict) else value


@well_typed
@contextlib.contextmanager
def patched(
    base: Any,
    aligned: Any,
    neurons: NeuronSet | Mapping[str, Any] | ByRow,
    *,
    mode: str = "donor",
    alpha: float = 1.0,
    values: Any = None,
    seed: int = 0,
) -> Iterator[Any]:
    """Overwrites activations of `base` inside a ``with`` block, at every position of every pass.

    With ``mode="donor"`` this is dynamic activation patching: the donor reads the text that the patched model
    writes (prompt and every token emitted so far, padding included), and the chosen activations of `base` are
    overwritten with the donor's. Each keeps its own history in its own key-value cache; the donor is never
    patched. Greedy search, sampling, beam search, assisted decoding, streaming, stopping criteria, logits
    processors and teacher-forced passes all go through it, by `LanguageModel.complete` or by
    ``base.model.generate``. Two views of one model (adapters on one base) run as one batch of twice the rows.
    Both models are in evaluation mode meanwhile.

    Source: Chen et al., arXiv 2406.14144, algorithm 1 (dynamic activation patching). Differs: sampling and
    beams are guided too; a decoding mode that cannot be followed raises instead of going on unguided; one
    doubled batch instead of two models where the two share their base.

    Args:
        base: The model to patch: a `LanguageModel` or a Hugging Face model.
        aligned: The donor; not used (and may be None) by the other modes. The same object as `base` patches
            it with itself.
        neurons: Which activations; or, from a donor, those of every row (`ByRow`). An empty set leaves `base`
            as it is, bit for bit.
        mode: `donor`, `mean` (set to `values`), `zero`, `noise` (add `alpha` × `values` × a standard normal
            draw), or `scale` (the neuron's own activation times `alpha`).
        alpha: The factor of `noise` and `scale`.
        values: Means or standard deviations: one number, or per key a vector (one per neuron of the site, or
            per chosen neuron).
        seed: Seed of the noise.

    Yields:
        The patched model, as passed in.

    Raises:
        MismatchError: The two models differ in their sites or their vocabulary.
        ForeignModelError: The neurons were found on another architecture.
        UnsupportedModelError: A key that is not active at every token (a routed expert).
        UsageError: A mode or values that do not fit; or `base` is being patched already.
        DecodeError: While running: a cache or decoding mode that the donor cannot follow.
    """
    subject = Subject.of(base)
    if isinstance(neurons, ByRow) and mode != "donor":
        raise UsageError(f"mode {mode!r} arrived; rows with neurons of their own are patched from a donor")
    chosen = columns(subject.anatomy, neurons)
    dense_only(chosen, subject.anatomy, "patching")
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(subject.model))
        stack.enter_context(active(subject))
        if not isinstance(neurons, ByRow) and mode != "donor":
            if mode == "noise":  # every row has draws of its own
                stack.enter_context(following(Whole()))
            one = indices(subject.anatomy, neurons)
            stack.enter_context(
                editing(subject.anatomy, constant_editors(subject, one, mode, alpha, values, seed))
            )
        else:
            donor = _donor(subject, aligned)
            if chosen:
                stack.enter_context(by_row(neurons))
                _follow(stack, subject, donor, chosen)
        yield base


def _donor(subject: Subject, aligned: Any) -> Subject:
    if aligned is None:
        raise UsageError(
            "mode 'donor' needs the model that gives its activations; pass it as `aligned`, or choose "
            "another mode"
        )
    donor = Subject.of(aligned)
    if donor.anatomy.table.sizes != subject.anatomy.table.sizes:
        raise MismatchError(
            f"base has {subject.anatomy.table.n_neurons} neurons in {len(subject.anatomy.table.keys)} "
            f"matrices, the donor {donor.anatomy.table.n_neurons} in {len(donor.anatomy.table.keys)}; pass "
            "two models of one architecture"
        )
    own, other = (_of_text(one, "vocab_size") for one in (subject, donor))
    if own != other:
        raise MismatchError(
            f"base has a vocabulary of {own} tokens and the donor of {other}; pass two models with one "
            "tokenizer"
        )
    readers = [getattr(one.view, "tokenizer", None) for one in (subject, donor)]
    if None not in readers and readers[0] is not readers[1]:
        ours, theirs = (reader.get_vocab() for reader in readers if reader is not None)
        differing = sorted(word for word in ours.keys() | theirs.keys() if ours.get(word) != theirs.get(word))
        if differing:
            raise MismatchError(
                f"base and donor read text with tokenizers of which {len(differing)} tokens differ, "
                f"{differing[0]!r} among them, and are fed the same ids; pass two models with one tokenizer"
            )
    return donor


def _of_text(subject: Subject, name: str) -> Any:
    """A field of the configuration of what reads text; None where there is none."""
    config = getattr(subject.body, "config", None)
    return None if config is None else getattr(config.get_text_config(decoder=True), name, None)


def _follow(
    stack: contextlib.ExitStack, base: Subject, donor: Subject, chosen: Mapping[str, ChosenColumns]
) -> None:
    """Puts the donor, in evaluation mode as the base model is, beside every pass of the base model until the
    stack closes.
    """
    stack.enter_context(evaluating(donor.model))
    running: StackedPass | TwinPass
    if can_stack(base, donor):
        running = StackedPass(base, donor, chosen)
        stack.enter_context(with_forwards(stacked_forwards(base, donor)))
    else:
        running = TwinPass(base, donor, chosen)
        if not running.shared:
            stack.enter_context(donor.active())
            stack.enter_context(editing(donor.anatomy, running.recorders()))
    announce(base.body, running)
    stack.callback(withdraw, base.body)
    stack.callback(running.follower.release)
    stack.enter_context(editing(base.anatomy, running.editors()))
    stack.enter_context(around(base.body, before=running.before, after=running.after))
