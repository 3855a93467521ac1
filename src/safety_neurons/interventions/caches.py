"""Key-value caches of a patched generation: the cache that ``generate`` holds, and what follows it on the donor's side.

Patching keeps one history for the patched model and one for its donor. Either both live in one cache whose rows are
``[patched; donor]``, or the donor has a cache of its own, the *twin*. Whatever a decoding mode does to the first (reorder beams,
repeat rows, cut rejected tokens off) must happen to the second, otherwise generation goes on guided by another text. So a cache is
*followed* from its first use: its surgery is mirrored, and a cache whose history the donor has not seen is an error.
"""

import weakref
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache

from safety_neurons.errors import DecodeError

_FOLLOWED_LAYERS = frozenset({"DynamicLayer", "DynamicSlidingWindowLayer"})


class FollowedCache(DynamicCache):
    """A dynamic cache while a patch follows it. Instances are made by `Follower`, which lends this class to an ordinary cache."""

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
        """The cache's rows that belong to these rows of the batch: two each where it holds ``[patched; donor]``."""
        held = _n_rows(self)
        return torch.cat([indices, indices + held // 2]) if self.follower.doubled and held else indices


class Follower:
    """Follows the caches of one patched context.

    Args:
        doubled: Whether one cache holds both histories (rows ``[patched; donor]``) or the donor has a cache of its own.
    """

    def __init__(self, doubled: bool) -> None:
        self.doubled = doubled
        self._caches: list[weakref.ref[FollowedCache]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Follower":
        return self  # a copied cache is followed by the same context

    def check(self, cache: Any, batch: int) -> None:
        """Starts to follow a fresh cache, or checks that the history in a followed one is complete.

        Raises:
            DecodeError: The cache is of a kind that cannot be followed, or holds tokens that the donor has not seen.
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
            raise DecodeError("the cache belongs to another patched context; start from an empty cache inside this one")
        length = cache.get_seq_length()
        if cache.twin is not None and cache.twin.get_seq_length() != length:
            raise DecodeError(
                f"the patched model has read {length} tokens and its donor {cache.twin.get_seq_length()}; "
                "this decoding mode changes the cache in a way that cannot be followed, use greedy search or sampling"
            )
        held = _n_rows(cache)
        expected = 2 * batch if self.doubled else batch
        if held is not None and length > 0 and held != expected:
            raise DecodeError(f"the cache holds {held} rows where {expected} were expected; use greedy search or sampling")

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
    """Raises `DecodeError` unless the cache is a plain dynamic one, the only kind whose surgery can be mirrored."""
    kind = type(cache).__name__
    plain = type(cache) is DynamicCache and not getattr(cache, "offloading", False)
    if plain:
        others = {type(layer).__name__ for layer in cache.layers} - _FOLLOWED_LAYERS
        if not others:
            return
        kind = f"{kind} of {', '.join(sorted(others))}"
    elif type(cache) is DynamicCache:
        kind = "offloaded cache"
    raise DecodeError(f"patching cannot follow a {kind}; leave out cache_implementation, or pass use_cache=False")


def _n_rows(cache: DynamicCache) -> int | None:
    for layer in cache.layers:
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.ndim == 4:
            return keys.shape[0]
    return None
