"""Room in a dynamic cache: a decoding step writes its token's keys and values behind those of earlier tokens,
where transformers' layers copy all of them to make a longer tensor.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 64
"""Tokens that there is room for beyond those that are there, where nobody says how many will come."""


def appended(held: Tensor, new: Tensor, room: int) -> Tensor:
    """What is held, and the new states behind it along the tokens; nothing that is held moves while there is
    room. Memory that gradients or another mode of autograd need is not written to: all is copied.

    Args:
        held: `[row, head, token, feature]`, made by a layer of transformers or by this function; or some
            rows, or the first tokens, of that.
        new: the same of other tokens.
        room: tokens to leave room for behind the new ones, where there was none.
    """
    if new.requires_grad or held.requires_grad or held.is_inference() != torch.is_inference_mode_enabled():
        return torch.cat([held, new], dim=-2)
    length, total = held.shape[-2], held.shape[-2] + new.shape[-2]
    # A tensor of all its memory is as long as the step from head to head says, its first tokens are shorter.
    # (Its last ones would be, too, and have no room: a window that slides is none of ours.) Rows that were
    # selected are a tensor of their own.
    places = held.stride(-3) // held.stride(-2)
    if total <= places:
        memory = held.as_strided((*held.shape[:-2], places, held.shape[-1]), held.stride())
    else:
        memory = new.new_empty((*held.shape[:-2], total + room, held.shape[-1]))
        memory[..., :length, :] = held
    memory[..., length:total, :] = new
    return memory[..., :total, :]


class RoomyLayer(DynamicLayer):
    """A layer's keys and values, with room behind them."""

    room: int

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Adds the states of new tokens, gives those of all."""
        if not self.get_seq_length():
            return super().update(key_states, value_states)
        return _grown(self, key_states, value_states)


class RoomySlidingWindowLayer(DynamicSlidingWindowLayer):
    """The same of a layer that sees a window, until that is full."""

    room: int

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Adds the states of new tokens, gives those that the tokens see."""
        total = self.cumulative_length + key_states.shape[-2]
        whole = total < self.sliding_window and not getattr(self, "record_past", False)
        if not self.cumulative_length or not whole:
            return super().update(key_states, value_states)
        self.cumulative_length = total
        return _grown(self, key_states, value_states)


def _grown(layer: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    room = getattr(layer, "room", ROOM)
    layer.keys, layer.values = appended(layer.keys, keys, room), appended(layer.values, values, room)
    return layer.keys, layer.values


_WITH_ROOM: dict[type, type] = {
    DynamicLayer: RoomyLayer,
    DynamicSlidingWindowLayer: RoomySlidingWindowLayer,
}


def with_room(cache: Any, room: int = ROOM) -> Any:
    """The cache, its ordinary dynamic layers with room from the next token on; others stay what they are.

    Args:
        cache: None stays None.
        room: tokens that will come.
    """
    for layer in getattr(cache, "layers", ()):
        layer.__class__ = _WITH_ROOM.get(type(layer), type(layer))
        if isinstance(layer, RoomyLayer | RoomySlidingWindowLayer):
            layer.room = room
    made = getattr(cache, "layer_class_to_replicate", None)
    if made in _WITH_ROOM:
        cache.layer_class_to_replicate = _WITH_ROOM[made]
    return cache
