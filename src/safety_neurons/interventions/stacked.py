"""Dynamic activation patching of two views of one model: one pass whose rows are ``[patched; donor]``.

Two sets of adapters on one base differ only inside the adapters. So the batch is doubled at the door of the decoder stack, every adapted
projection applies the patched view's adapters to the first half of the rows and the donor's to the second, the chosen activations of the
second half are copied over those of the first, and only the first half leaves the stack, so the output head works on it alone. Weights
are read once per step for both. PEFT's own state is not touched: the adapted layers' ``forward`` is replaced while the context lasts.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from peft.tuners import ia3, lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from safety_neurons.errors import DecodeError
from safety_neurons.interventions.caches import Follower
from safety_neurons.interventions.targets import PerDevice, Subject

Forward = Callable[..., Tensor]
_ROW_FIRST = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "token_type_ids")


def active_adapters(subject: Subject, layer: BaseTunerLayer) -> tuple[str, ...]:
    """The adapters that a view applies at a layer, in order."""
    if subject.adapters is not None:
        return subject.adapters
    return () if layer.disable_adapters else tuple(layer.active_adapters)


def can_stack(base: Subject, aligned: Subject) -> bool:
    """Whether both views are adapters on one model, of kinds whose share can be computed for each half of the rows."""
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
            forwards[layer] = _scaled(layer, names) if isinstance(layer, ia3.Linear) else _low_rank(layer, names)
    return forwards


def _scaled(layer: Any, names: Sequence[Sequence[str]]) -> Forward:
    """(IA)³: each half is multiplied by the product of its own vectors, as PEFT does, at the input or the output."""
    vectors = [[layer.ia3_l[name].detach().flatten() for name in half if name in layer.ia3_l] for half in names]
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


def _times(x: Float[Tensor, "*rows neuron"], both: Float[Tensor, "2 1 neuron"]) -> Float[Tensor, "*rows neuron"]:
    """Each half of the rows times its own vector, computed in the vectors' precision."""
    return (x.reshape(2, -1, x.shape[-1]) * both).view(x.shape).to(x.dtype)


def _low_rank(layer: Any, names: Sequence[Sequence[str]]) -> Forward:
    """LoRA: each half gets the sum of its own adapters' products, all of a half as one product of their joined factors."""
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
    shifts = [layer.lora_B[name].bias.detach() * layer.scaling[name] for name in names if layer.lora_B[name].bias is not None]
    return down, up, sum(shifts[1:], shifts[0]) if shifts else None


class StackedPass:
    """The state of a patched context whose passes carry both halves.

    Args:
        base: The view that is patched.
        aligned: The view that gives its activations, on the same model.
        chosen: The neurons, one sorted index tensor per key.
    """

    def __init__(self, base: Subject, aligned: Subject, chosen: Mapping[str, Int[Tensor, " neuron"]]) -> None:
        self.base, self.aligned = base, aligned
        self.follower = Follower(doubled=True)
        self._chosen = dict(chosen)
        self._names = list(inspect.signature(type(base.body).forward).parameters)[1:]
        self._shape: tuple[int, int] | None = None
        self._fired = 0

    def editors(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """For each site, the edit that copies the chosen activations from the second half of the rows to the first."""
        sizes = self.base.anatomy.table.sizes
        return {key: self._copier(PerDevice(index, sizes[key])) for key, index in self._chosen.items()}

    def _copier(self, index: PerDevice) -> Callable[[Tensor], Tensor]:
        def copy(activation: Float[Tensor, "*rows neuron"]) -> Float[Tensor, "*rows neuron"]:
            self._fired += 1
            patched, donor = activation.chunk(2)
            if activation.requires_grad:
                return torch.cat([index.copied(patched, index.taken(donor)), donor])
            index.move_(patched, donor)
            return activation

        return copy

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Doubles the inputs of a pass and follows its cache."""
        self.base.check_active()
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        source = given.get("input_ids")
        source = given.get("inputs_embeds") if source is None else source
        if not isinstance(source, Tensor):
            raise DecodeError("a patched pass needs input_ids or inputs_embeds; none arrived")
        if given.get("past_key_values") is not None:
            self.follower.check(given["past_key_values"], source.shape[0])
        for name in _ROW_FIRST:
            if name in given:
                given[name] = _doubled(given[name], source.shape[0])
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
            f"{fired} of {expected} sites were patched in this pass; compiled or replaced code skips hooks, run the model eagerly"
        )


def _doubled(value: Any, rows: int) -> Any:
    """A batch-first tensor (or a mapping of them) twice, one after the other; what is shared by all rows stays as it is."""
    if isinstance(value, Mapping):
        return {name: _doubled(one, rows) for name, one in value.items()}
    if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[0] == rows:
        return torch.cat([value, value])
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
