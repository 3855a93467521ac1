"""How one projection holds several sites: which of its output features are the query, key and value neurons, or the gate and up neurons."""

from collections.abc import Mapping
from enum import StrEnum

import torch

from safety_neurons.errors import UnsupportedModelError

Index = slice | torch.Tensor | None
"""Features of a projection that are a site's neurons, in order: all (`None`), a run of them, or a vector of positions."""


class Layout(StrEnum):
    """Order of the features inside a fused projection."""

    CONTIGUOUS = "contiguous"
    """All queries, then all keys, then all values; or all gates, then all ups."""
    GROUPED = "grouped"
    """Per key-value head: its queries, its key, its value. With one query head a group this is interleaving per head."""
    UP_FIRST = "up_first"
    """All ups, then all gates."""
    ALTERNATING = "alternating"
    """gate, up, gate, up …"""


QKV_LAYOUTS = (Layout.CONTIGUOUS, Layout.GROUPED)
GATE_UP_LAYOUTS = (Layout.CONTIGUOUS, Layout.UP_FIRST, Layout.ALTERNATING)


def split_qkv(layout: Layout, n_heads: int, n_kv_heads: int, head_dim: int) -> dict[str, Index]:
    """Positions of the `q`, `k` and `v` neurons in a fused projection of `(n_heads + 2·n_kv_heads)·head_dim` features."""
    if layout == Layout.CONTIGUOUS:
        queries, keys = n_heads * head_dim, n_kv_heads * head_dim
        return {"q": slice(0, queries), "k": slice(queries, queries + keys), "v": slice(queries + keys, queries + 2 * keys)}
    if layout == Layout.GROUPED and n_heads % n_kv_heads == 0:
        group = n_heads // n_kv_heads
        positions = torch.arange((n_heads + 2 * n_kv_heads) * head_dim).view(n_kv_heads, group + 2, head_dim)
        parts = {"q": positions[:, :group], "k": positions[:, group], "v": positions[:, group + 1]}
        return {site: simplified(part.reshape(-1)) for site, part in parts.items()}
    raise UnsupportedModelError(
        f"a fused query-key-value projection with layout {layout!r}, {n_heads} query heads and {n_kv_heads} key heads cannot be split; "
        f"pass layouts={{'qkv': one of {', '.join(QKV_LAYOUTS)}}}"
    )


def split_gate_up(layout: Layout, width: int) -> dict[str, Index]:
    """Positions of the `gate` and `up` neurons in a fused projection of `2·width` features."""
    first, second = slice(0, width), slice(width, 2 * width)
    if layout == Layout.CONTIGUOUS:
        return {"gate": first, "up": second}
    if layout == Layout.UP_FIRST:
        return {"gate": second, "up": first}
    if layout == Layout.ALTERNATING:
        return {"gate": slice(0, 2 * width, 2), "up": slice(1, 2 * width, 2)}
    raise UnsupportedModelError(
        f"a fused gate-up projection cannot have layout {layout!r}; pass layouts={{'gate_up': one of {', '.join(GATE_UP_LAYOUTS)}}}"
    )


def simplified(positions: torch.Tensor) -> Index:
    """The same positions as a slice where they are evenly spaced, which costs a view instead of a copy."""
    if positions.numel() == 1:
        return slice(int(positions[0]), int(positions[0]) + 1)
    steps = positions[1:] - positions[:-1]
    step = int(steps[0])
    if step > 0 and bool((steps == step).all()):
        return slice(int(positions[0]), int(positions[-1]) + 1, step)
    return positions


def length(index: Index, features: int) -> int:
    """How many of `features` features an index takes."""
    if index is None:
        return features
    return len(range(*index.indices(features))) if isinstance(index, slice) else int(index.numel())


def covers(indices: Mapping[str, Index], features: int) -> bool:
    """Whether the sites of a fused projection take every feature exactly once."""
    everything = torch.arange(features)
    taken = torch.cat([take(everything, index) for index in indices.values()])
    return bool(torch.equal(taken.sort().values, everything))


def take(values: torch.Tensor, index: Index, axis: int = -1) -> torch.Tensor:
    """The features of one site, a view wherever the index is a slice."""
    if index is None:
        return values
    if isinstance(index, slice):
        if axis in (-1, values.ndim - 1):
            return values[..., index]
        return values[(slice(None),) * axis + (index,)]
    return values.index_select(axis, index if index.device == values.device else index.to(values.device))
