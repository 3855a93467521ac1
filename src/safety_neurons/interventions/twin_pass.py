"""Dynamic activation patching with a pass of the donor before every pass of the patched model, each with its own cache.

For two separate models, and for two views of one model whose adapters cannot be applied to half of the rows each (then the donor's pass
runs through the same modules with the donor's adapters active).
"""

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safety_neurons.errors import DecodeError
from safety_neurons.interventions.caches import FollowedCache, Follower
from safety_neurons.interventions.stacked import check_fired
from safety_neurons.interventions.targets import PerDevice, Subject

Editor = Callable[[Tensor], Tensor]


class TwinPass:
    """The state of a patched context that runs the donor beside the patched model.

    Args:
        base: The model that is patched.
        aligned: The model that gives its activations; the same modules or others.
        chosen: The neurons, one sorted index tensor per key.
    """

    def __init__(self, base: Subject, aligned: Subject, chosen: Mapping[str, Int[Tensor, " neuron"]]) -> None:
        self.base, self.aligned = base, aligned
        self.shared = base.body is aligned.body
        self.follower = Follower(doubled=False)
        sizes = base.anatomy.table.sizes
        self._chosen = {key: PerDevice(index, sizes[key]) for key, index in chosen.items()}
        self._names = list(inspect.signature(type(base.body).forward).parameters)[1:]
        self._known = set(inspect.signature(type(aligned.body).forward).parameters)
        self._recorded: dict[str, Tensor] = {}
        self._recording = False
        self._fired = 0
        self._new_twin: Any = None

    def editors(self) -> dict[str, Editor]:
        """For each site, the edit that overwrites the chosen activations (and, on shared modules, records the donor's)."""
        return {key: self._editor(key) for key in self._chosen}

    def recorders(self) -> dict[str, Editor]:
        """For each site of a separate donor, a function that records the chosen activations and changes nothing."""
        return {key: self._recorder(key) for key in self._chosen}

    def _recorder(self, key: str) -> Editor:
        index = self._chosen[key]

        def record(activation: Float[Tensor, "*rows neuron"]) -> Float[Tensor, "*rows neuron"]:
            if self._recording:
                taken = index.taken(activation)
                self._recorded[key] = taken.clone() if index.whole else taken
            return activation

        return record

    def _editor(self, key: str) -> Editor:
        index = self._chosen[key]
        record = self._recorder(key)

        def overwrite(activation: Float[Tensor, "*rows neuron"]) -> Float[Tensor, "*rows neuron"]:
            if self._recording:
                return record(activation) if self.shared else activation
            self._fired += 1
            values = self._recorded.pop(key, None)
            if values is None:
                raise DecodeError(f"{key}: the donor gave no activation in this pass; run both models eagerly")
            values = values.to(device=activation.device, dtype=activation.dtype)
            if activation.requires_grad:
                return index.copied(activation, values)
            index.copied_(activation, values)
            return activation

        return overwrite

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Runs the donor on the inputs of the pass that is about to start."""
        if self._recording:
            return None
        self.base.check_active()
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        source = given.get("input_ids")
        source = given.get("inputs_embeds") if source is None else source
        if not isinstance(source, Tensor):
            raise DecodeError("a patched pass needs input_ids or inputs_embeds; none arrived")
        if given.get("inputs_embeds") is not None and not self.shared:
            raise DecodeError("two separate models embed tokens each on their own; pass input_ids instead of inputs_embeds")
        if given.get("use_cache") is None:
            given["use_cache"] = bool(getattr(getattr(self.base.body, "config", None), "use_cache", False))
        cache = given.get("past_key_values")
        if cache is not None:
            self.follower.check(cache, source.shape[0])
        self._fired, self._recorded, self._new_twin = 0, {}, None
        self._run_donor(given, cache)
        return (), given

    def _run_donor(self, given: Mapping[str, Any], cache: FollowedCache | None) -> None:
        passed = {name: _to(value, self._device()) for name, value in given.items() if name in self._known or "kwargs" in self._known}
        passed.update(past_key_values=None if cache is None else cache.twin, output_attentions=False, output_hidden_states=False)
        passed["return_dict"] = True
        active = self.aligned.active() if self.shared else contextlib.nullcontext()
        self._recording = True
        try:
            with active, torch.no_grad():
                output = self.aligned.body(**passed)
        finally:
            self._recording = False
        self._new_twin = getattr(output, "past_key_values", None)
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
        cache = getattr(output, "past_key_values", None)
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
