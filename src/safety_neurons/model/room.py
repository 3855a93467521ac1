"""Room in a dynamic cache: a decoding step writes its token's keys and values behind those of earlier tokens,
where transformers' layers copy all of them to make a longer tensor.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 64
"""Tokens that there is room for beyond those that are there, at least; a quarter of those, where that is
more.
"""


def appended(held: Tensor | None, new: Float[Tensor, "row head token feature"]) -> Tensor:
    """What is held, and the new states behind it along the tokens; nothing that is held moves while there is
    room.

    Only without gradients: what the result of an earlier call is a view of is written to, behind its end.

    Args:
        held: an earlier result, some rows or the first tokens of one; None, or no elements, at the beginning.
        new: of as many rows and heads.
    """
    if held is None or not held.numel():
        held = new[..., :0, :]
        room = 0
    else:
        # A tensor of all its memory is as long as the step from head to head says, a view of more is
        # shorter. Rows that were selected are a tensor of their own, without room.
        room = held.stride(-3) // held.stride(-2)
    length, total = held.shape[-2], held.shape[-2] + new.shape[-2]
    if total <= room:
        memory = held.as_strided((*held.shape[:-2], room, held.shape[-1]), held.stride())
    else:
        memory = new.new_empty((*new.shape[:-2], total + max(ROOM, total // 4), new.shape[-1]))
        memory[..., :length, :] = held
    memory[..., length:total, :] = new
    return memory[..., :total, :]


class RoomyLayer(DynamicLayer):
    """A layer's keys and values, with room behind them."""

    def update(
        self,
        key_states: Float[Tensor, "row head token key"],
        value_states: Float[Tensor, "row head token value"],
        *_: Any,
        **__: Any,
    ) -> tuple[Float[Tensor, "row head seen key"], Float[Tensor, "row head seen value"]]:
        """Adds the states of new tokens, gives those of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = appended(self.keys, key_states), appended(self.values, value_states)
        return self.keys, self.values


class RoomySlidingWindowLayer(DynamicSlidingWindowLayer):
    """The same of a layer that sees a window, until that is full."""

    def update(
        self,
        key_states: Float[Tensor, "row head token key"],
        value_states: Float[Tensor, "row head token value"],
        *_: Any,
        **__: Any,
    ) -> tuple[Float[Tensor, "row head seen key"], Float[Tensor, "row head seen value"]]:
        """Adds the states of new tokens, gives those that the tokens see."""
        total = self.cumulative_length + key_states.shape[-2]
        if total >= self.sliding_window or getattr(self, "record_past", False):
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length = total
        self.keys, self.values = appended(self.keys, key_states), appended(self.values, value_states)
        return self.keys, self.values


_WITH_ROOM: dict[type, type] = {
    DynamicLayer: RoomyLayer,
    DynamicSlidingWindowLayer: RoomySlidingWindowLayer,
}


def with_room(cache: Any) -> Any:
    """The cache, its ordinary dynamic layers with room from the next token on; others stay what they are."""
    for layer in getattr(cache, "layers", ()):
        layer.__class__ = _WITH_ROOM.get(type(layer), type(layer))
    made = getattr(cache, "layer_class_to_replicate", None)
    if made in _WITH_ROOM:
        cache.layer_class_to_replicate = _WITH_ROOM[made]
    return cache
