"""Proof of where queries, keys and values are, without a formula of the attention: it holds for any rotary style, norm, scale or mask.

With one token, attention is the value itself: what `o` is given must be the `v` slice, head by head. In a fused projection, a change of the
first token's queries must change nothing (there is one key to look at); a change of the last token's queries of one head must change
that token and that head only; a change of the first token's keys of one group must change later tokens and this group's heads only.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model.layouts import QKV_LAYOUTS, Layout, split_qkv
from safety_neurons.model.parts import Anatomy, AttentionAnatomy
from safety_neurons.model.probe import Probe, tolerance
from safety_neurons.model.vocabulary import SAY_SITES

_CHANGES = ("queries of the first token", "queries of the last token", "keys of the first token")


def settle_attention(anatomy: Anatomy, probe: Probe) -> Anatomy:
    """The anatomy with the place of q, k and v proved in every layer; other layouts are tried where the guess fails.

    Where none passes, q, k and v of that layer are refused, with the reason.

    Raises:
        UnsupportedModelError: a layout that the caller chose fails.
    """
    pending = {
        layer.index: layer.attention
        for layer in anatomy.layers
        if layer.attention is not None and not any(place.key in anatomy.refused for place in layer.attention.places.values())
    }
    reasons: dict[int, list[str]] = {}
    for attempt in range(len(QKV_LAYOUTS)):
        trial = {layer: _candidate(attention, attempt) for layer, attention in pending.items()}
        tried = {layer: attention for layer, attention in trial.items() if attention is not None}
        if not tried or (attempt and "qkv" in anatomy.chosen):
            break
        proposed = _with_attention(anatomy, tried)
        faults = _faults(proposed, probe, tried)
        for layer, attention in tried.items():
            if faults.get(layer) is None:
                pending.pop(layer)
            else:
                reasons.setdefault(layer, []).append(f"{attention.layout}: {faults[layer]}" if attention.layout else str(faults[layer]))
        anatomy = _with_attention(anatomy, {layer: attention for layer, attention in tried.items() if layer not in pending})
    return _refuse_rest(anatomy, pending, reasons)


def _refuse_rest(anatomy: Anatomy, pending: dict[int, AttentionAnatomy], reasons: dict[int, list[str]]) -> Anatomy:
    refused = dict(anatomy.refused)
    for layer, attention in pending.items():
        reason = f"q, k and v could not be proved ({'; '.join(reasons[layer])})"
        if "qkv" in anatomy.chosen and attention.layout is not None:
            raise UnsupportedModelError(
                f"layers.{layer}: {reason}; leave layouts={{'qkv': ...}} out or pass another of {', '.join(QKV_LAYOUTS)}"
            )
        for site in "qkv":
            refused[attention.places[site].key] = f"{reason}; {SAY_SITES}"
    return replace(anatomy, refused=refused)


def _candidate(attention: AttentionAnatomy, attempt: int) -> AttentionAnatomy | None:
    """The attention with its guessed layout first, then with the other ones."""
    if attempt == 0 or attention.layout is None:
        return attention if attempt == 0 else None
    layout: Layout = sorted(QKV_LAYOUTS, key=lambda each: each != attention.layout)[attempt]
    indices = split_qkv(layout, attention.n_heads, attention.n_kv_heads, attention.head_dim)
    places = {site: place.at(indices[site]) if site in indices else place for site, place in attention.places.items()}
    return replace(attention, places=places, layout=layout)


def _with_attention(anatomy: Anatomy, attentions: dict[int, AttentionAnatomy]) -> Anatomy:
    layers = [replace(layer, attention=attentions.get(layer.index, layer.attention)) for layer in anatomy.layers]
    return replace(anatomy, layers=tuple(layers))


def _faults(anatomy: Anatomy, probe: Probe, attentions: dict[int, AttentionAnatomy]) -> dict[int, str | None]:
    """By layer, why its q, k and v indices cannot be right, or None. Two passes, whatever the number of layers."""
    keys = [attention.places["v"].key for attention in attentions.values()]
    outputs = [attention.places["o"].module for attention in attentions.values()]
    alone = probe.see(anatomy, keys, outputs, ids=probe.ids[:, :1])
    faults: dict[int, str | None] = {}
    for layer, attention in attentions.items():
        value = alone.values[attention.places["v"].key]
        mixed = alone.boundaries[attention.places["o"].module][0][0].view(*value.shape[:2], -1)  # before an (IA)³ scale
        if not _is_value(attention, value, mixed):
            faults[layer] = "with one token the input of o is not the value"
    fused = [layer for layer, attention in attentions.items() if attention.layout is not None and layer not in faults]
    if fused:
        faults.update(_fused_faults(anatomy, probe, {layer: attentions[layer] for layer in fused}))
    return faults


def _is_value(attention: AttentionAnatomy, value: Tensor, mixed: Tensor) -> bool:
    """Whether `o` is given the values of each head's group, up to a factor of at most one (an attention sink takes a share)."""
    heads, groups = attention.n_heads, attention.n_kv_heads
    expected = value.double().unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, dim=2)
    found = mixed.double().unflatten(-1, (heads, -1))
    if found.shape != expected.shape:
        return False
    factor = (found * expected).sum(-1, keepdim=True) / expected.square().sum(-1, keepdim=True).clamp(min=1e-30)
    close = (found - factor * expected).abs().max() <= tolerance(mixed.dtype) * expected.abs().max().clamp(min=1e-30)
    return bool(close and (factor <= 1.1).all() and (factor >= 0).all())


def _fused_faults(anatomy: Anatomy, probe: Probe, attentions: dict[int, AttentionAnatomy]) -> dict[int, str | None]:
    """One pass with a clean row and three changed rows for each layer."""
    edits: dict[str, Callable[[Tensor], Tensor]] = {}
    for number, attention in enumerate(attentions.values()):
        row, size = 1 + 3 * number, attention.head_dim
        head, group = attention.n_heads - 1, attention.n_kv_heads - 1
        queries = [(row, 0, slice(None)), (row + 1, -1, slice(head * size, (head + 1) * size))]
        edits[attention.places["q"].key] = _changed(queries)
        edits[attention.places["k"].key] = _changed([(row + 2, 0, slice(group * size, (group + 1) * size))])
    outputs = [attention.places["o"].key for attention in attentions.values()]
    seen = probe.see(anatomy, outputs, edits=edits, ids=probe.rows(1 + 3 * len(attentions))).values
    return {
        layer: _leak(attention, seen[attention.places["o"].key], 1 + 3 * number)
        for number, (layer, attention) in enumerate(attentions.items())
    }


def _changed(changes: list[tuple[int, int, slice]]) -> Callable[[Tensor], Tensor]:
    """An edit that turns the given (row, token, features) into other numbers of the same size."""

    def edit(values: Tensor) -> Tensor:
        new = values.clone()
        for row, token, features in changes:
            part = values[row, token, features]
            new[row, token, features] = part.flip(-1) * 1.5 - part.abs().mean()
        return new

    return edit


def _leak(attention: AttentionAnatomy, mixed: Float[Tensor, "row token mixed"], first: int) -> str | None:
    """What changed that should not have, or did not change that should have."""
    heads, per_group = attention.n_heads, attention.n_heads // attention.n_kv_heads
    clean = mixed[0]
    scale = tolerance(mixed.dtype) * float(clean.abs().max())
    for number, what in enumerate(_CHANGES):
        changed = (mixed[first + number] - clean).abs().unflatten(-1, (heads, -1)).amax(-1)
        allowed = torch.zeros_like(changed, dtype=torch.bool)
        if number == 1:
            allowed[-1, heads - 1] = True
        elif number == 2:
            allowed[1:, heads - per_group :] = True
        if bool((changed[~allowed] > scale).any()):
            return f"a change of the {what} reaches other tokens or heads than it can"
        if number and not bool((changed[allowed] > 0).any()):
            return f"a change of the {what} reaches nothing"
    return None
