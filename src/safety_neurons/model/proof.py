"""Proof of an anatomy by algebra, on probe passes of random tokens through the loaded model, layer by layer.

1. Queries, keys and values are where they are said to be, without a formula of the attention, so that it
   holds for any rotary style, norm, scale or mask. With one token, attention is the value itself: what `o` is
   given must be the `v` slice, head by head. In a fused projection, a change of the first token's queries
   must change nothing (there is one key to look at); a change of the last token's queries of one head must
   change that token and that head only; a change of the first token's keys of one group must change later
   tokens and this group's heads only.
2. Weights and indices: `weight()` and `bias()` of every site, applied to what the projection was given, are
   what it put out; the slices of a fused projection, put together, are its output bit for bit; `down` and `o`
   applied to the captured activation give the sub-layer's output.
3. Feed-forward part: what `down` is given is act(gate)·up, or act(up).
4. Experts: each row of the gate step is the pair of token and expert it is said to be, and the rows add up to
    the module's output.
5. Decoding: a step behind a cache shows every site, as a whole pass does.
6. Effect: with the neurons of a site set to zero the logits change.

Where the guessed layout of a fused projection fails and another one passes, that one is taken, unless the
caller chose it.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from safety_neurons.errors import NumericalError, UnsupportedModelError
from safety_neurons.model.decoding import cache_in, cache_name
from safety_neurons.model.hooks import Editor, around, editing, evaluating, reading
from safety_neurons.model.sites import (
    GATE_UP_LAYOUTS,
    QKV_LAYOUTS,
    Anatomy,
    AttentionAnatomy,
    ExpertRows,
    ExpertsAnatomy,
    Index,
    LayerAnatomy,
    Layout,
    MlpAnatomy,
    SitePlace,
    covers,
    full_bias,
    full_weight,
    projections_of,
    split_gate_up,
    split_qkv,
    unwrapped,
)
from safety_neurons.neurons import MLP_SITES

SAY_SITES = (
    "the command line has no option for that; in Python say where they are: "
    "model.anatomy = prove(resolve(model.model, sites={'q': PATH, …})), of safety_neurons.model.anatomy"
)
"""What to do about a site whose place cannot be told."""

BOTH_WAYS = (
    "attention goes both ways over the whole text (a prefix language model, such as PaliGemma), and a causal "
    "language model, in which no token sees a later one, was expected; use another model"
)
"""Why perplexities, padded batches and importances of such a model would be wrong."""

TOKENS = 6
"""Tokens of a probe row."""


@dataclass(frozen=True)
class Seen:
    """What one pass showed: activations by key, and by module what it was given and what it put out."""

    values: dict[str, Any]
    boundaries: dict[nn.Module, tuple[tuple[Any, ...], Any]]
    logits: Tensor


class Probe:
    """Random tokens and passes over them. Nothing global is seeded."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        body: Any = unwrapped(model)
        vocabulary = int(body.config.get_text_config().vocab_size)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, vocabulary, (2, TOKENS), generator=generator).to(
            body.get_input_embeddings().weight.device
        )

    def rows(self, n: int) -> Int[Tensor, "row token"]:
        """The first row of tokens `n` times."""
        return self.ids[:1].expand(n, -1).contiguous()

    def run(
        self, ids: Int[Tensor, "batch token"] | None = None, *, last: bool = False
    ) -> Float[Tensor, "batch kept vocab"]:
        """Logits of a pass without cache.

        Args:
            ids: By default the probe's own.
            last: Of the last token alone, where the model can leave the others out.

        Raises:
            NumericalError: they are not finite.
        """
        ids = self.ids if ids is None else ids
        fewer = last and "logits_to_keep" in inspect.signature(unwrapped(self.model).forward).parameters
        logits = self.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            use_cache=False,
            **({"logits_to_keep": 1} if fewer else {}),
        ).logits
        if not bool(torch.isfinite(logits).all()):
            raise NumericalError(
                "the model gives NaN or infinity on random tokens, finite logits were expected; check "
                "weights and dtype"
            )
        return logits

    def step(self, anatomy: Anatomy, keys: Iterable[str]) -> None:
        """A decoding step behind a prefill, in which every site has to come by as in a whole pass.

        Nothing where there is no cache.
        """
        with reading(anatomy, {key: lambda _: None for key in keys}):
            prefill = self.model(
                input_ids=self.ids[:, :-1], attention_mask=torch.ones_like(self.ids[:, :-1]), use_cache=True
            )
            cache = cache_in(prefill)
            if cache is not None:
                ids, mask = self.ids[:, -1:], torch.ones_like(self.ids)
                remembered = {cache_name(self.model): cache, "use_cache": True}
                self.model(input_ids=ids, attention_mask=mask, **remembered)

    def see(
        self,
        anatomy: Anatomy,
        keys: Iterable[str],
        modules: Iterable[nn.Module] = (),
        edits: Mapping[str, Editor] | None = None,
        ids: Int[Tensor, "batch token"] | None = None,
        *,
        last: bool = False,
    ) -> Seen:
        """One pass; activations are kept after the edits acted."""
        values: dict[str, Any] = {}
        boundaries: dict[nn.Module, tuple[tuple[Any, ...], Any]] = {}
        with ExitStack() as stack:
            stack.enter_context(editing(anatomy, edits or {}))
            stack.enter_context(reading(anatomy, {key: _keep(values, key) for key in keys}))
            for module in dict.fromkeys(modules):
                before, after = _boundary(boundaries, module)
                stack.enter_context(around(module, before=before, after=after))
            logits = self.run(ids, last=last)
        return Seen(values, boundaries, logits)


def _keep(into: dict[str, Any], name: str) -> Callable[[Any], None]:
    def reader(values: Any) -> None:
        if isinstance(values, Tensor):
            into[name] = values.clone()
        else:
            into.setdefault(name, []).append(values)

    return reader


def _boundary(
    into: dict[nn.Module, tuple[tuple[Any, ...], Any]], module: nn.Module
) -> tuple[Callable[..., None], Callable[..., None]]:
    given: list[tuple[Any, ...]] = []

    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(
            tuple(
                value.clone() if isinstance(value, Tensor) else value for value in (*args, *kwargs.values())
            )
        )

    def after(output: Any) -> None:
        into[module] = (given[-1], output.clone() if isinstance(output, Tensor) else output)

    return before, after


def tolerance(dtype: torch.dtype) -> float:
    """How far two ways to the same numbers may be apart, relative to the largest of them."""
    return {torch.float64: 1e-6, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}.get(
        dtype, 1e-1
    )


def same(actual: Tensor, expected: Tensor) -> bool:
    """Whether two tensors agree within what their type can tell."""
    if actual.shape != expected.shape:
        return False
    difference = (actual.double() - expected.double()).abs().max()
    return bool(difference <= tolerance(expected.dtype) * expected.double().abs().max().clamp(min=1e-30))


_CHANGES = ("queries of the first token", "queries of the last token", "keys of the first token")


def settle_attention(anatomy: Anatomy, probe: Probe) -> Anatomy:
    """The anatomy with the place of q, k and v proved in every layer.

    Other layouts are tried where the guess fails.

    Where none passes, q, k and v of that layer are refused, with the reason.

    Raises:
        UnsupportedModelError: a layout that the caller chose fails.
    """
    pending = {
        layer.index: layer.attention
        for layer in anatomy.layers
        if layer.attention is not None
        and not any(place.key in anatomy.refused for place in layer.attention.places.values())
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
                reasons.setdefault(layer, []).append(
                    f"{attention.layout}: {faults[layer]}" if attention.layout else str(faults[layer])
                )
        anatomy = _with_attention(
            anatomy, {layer: attention for layer, attention in tried.items() if layer not in pending}
        )
    return _refuse_rest(anatomy, pending, reasons)


def _refuse_rest(
    anatomy: Anatomy, pending: dict[int, AttentionAnatomy], reasons: dict[int, list[str]]
) -> Anatomy:
    refused, unknown = dict(anatomy.refused), dict(anatomy.unknown)
    for layer, attention in pending.items():
        reason = f"q, k and v could not be proved ({'; '.join(reasons[layer])})"
        if "qkv" in anatomy.chosen and attention.layout is not None:
            raise UnsupportedModelError(
                f"layers.{layer}: {reason}; leave layouts={{'qkv': ...}} out or pass another of "
                f"{', '.join(QKV_LAYOUTS)}"
            )
        unproved = "qkv"
        module = anatomy.layers[layer]
        holder = attention.module_name.removeprefix(f"{module.module_name}.")
        if any(path.startswith(f"{holder}.") for path in unknown.get(layer, ())):
            # Other maps beside q, k, v and o: a recurrent mixer that goes by the names of an attention.
            unproved = "qkvo"
            inside = [f"{holder}.{path}" for path in projections_of(attention.module)]
            unknown[layer] = tuple(dict.fromkeys((*inside, *unknown[layer])))
            reason = f"{module.module_name}.{holder} is no attention: {reason}"
        for site in unproved:
            refused[attention.places[site].key] = f"{reason}; {SAY_SITES}"
    return replace(anatomy, refused=refused, unknown=unknown)


def _candidate(attention: AttentionAnatomy, attempt: int) -> AttentionAnatomy | None:
    """The attention with its guessed layout first, then with the other ones."""
    if attempt == 0 or attention.layout is None:
        return attention if attempt == 0 else None
    layout: Layout = sorted(QKV_LAYOUTS, key=lambda each: each != attention.layout)[attempt]
    indices = split_qkv(layout, attention.n_heads, attention.n_kv_heads, attention.head_dim)
    places = {
        site: place.at(indices[site]) if site in indices else place
        for site, place in attention.places.items()
    }
    return replace(attention, places=places, layout=layout)


def _with_attention(anatomy: Anatomy, attentions: dict[int, AttentionAnatomy]) -> Anatomy:
    layers = [
        replace(layer, attention=attentions.get(layer.index, layer.attention)) for layer in anatomy.layers
    ]
    return replace(anatomy, layers=tuple(layers))


def _faults(anatomy: Anatomy, probe: Probe, attentions: dict[int, AttentionAnatomy]) -> dict[int, str | None]:
    """By layer, why its q, k and v indices cannot be right, or None.

    Two passes, whatever the number of layers.
    """
    keys = [attention.places["v"].key for attention in attentions.values()]
    outputs = [attention.places["o"].module for attention in attentions.values()]
    gated = [attention for attention in attentions.values() if attention.gate is not None]
    outputs += [attention.places["q"].module for attention in gated]
    alone = probe.see(anatomy, keys, outputs, ids=probe.ids[:, :1])
    faults: dict[int, str | None] = {}
    for layer, attention in attentions.items():
        value = alone.values[attention.places["v"].key]
        mixed = alone.boundaries[attention.places["o"].module][0][0].view(
            *value.shape[:2], -1
        )  # before an (IA)³ scale
        gate = None
        if attention.gate is not None:
            gate = attention.gate_values(alone.boundaries[attention.places["q"].module][1]).sigmoid()
        if not _is_value(attention, value, mixed, gate):
            faults[layer] = "with one token the input of o is not the value"
    fused = [
        layer
        for layer, attention in attentions.items()
        if (attention.layout is not None or attention.gate is not None) and layer not in faults
    ]
    if fused:
        faults.update(_fused_faults(anatomy, probe, {layer: attentions[layer] for layer in fused}))
    return faults


def _is_value(attention: AttentionAnatomy, value: Tensor, mixed: Tensor, gate: Tensor | None) -> bool:
    """Whether `o` is given the values of each head's group, times the output gate where there is one, up to a
    factor of at most one (an attention sink takes a share).
    """
    heads, groups = attention.n_heads, attention.n_kv_heads
    expected = value.double().unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, dim=2)
    found = mixed.double().unflatten(-1, (heads, -1))
    if gate is not None:
        expected = expected * gate.double().unflatten(-1, (heads, -1))
    if found.shape != expected.shape:
        return False
    factor = (found * expected).sum(-1, keepdim=True) / expected.square().sum(-1, keepdim=True).clamp(
        min=1e-30
    )
    close = (found - factor * expected).abs().max() <= tolerance(mixed.dtype) * expected.abs().max().clamp(
        min=1e-30
    )
    return bool(close and (factor <= 1.1).all() and (factor >= 0).all())


def _fused_faults(
    anatomy: Anatomy, probe: Probe, attentions: dict[int, AttentionAnatomy]
) -> dict[int, str | None]:
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


GATE_ROWS = 64
"""Rows of drawn values that the gate step of experts is tried on."""

GATE_SIZES = (1.0, 1e-1, 1e-2)
"""Their sizes."""

ROWS_AT_ONCE = 64
"""Rows of a pass in which each row has another site set to zero."""


def prove(anatomy: Anatomy) -> Anatomy:
    """The anatomy, proved on the model it was resolved from, with layouts settled and unprovable sites
    refused.

    Args:
        anatomy: what `resolve` found.

    Raises:
        UnsupportedModelError: a token that reaches an earlier one, a site that never came by, weights that
            do not give what the projection puts out, a layout chosen by the caller that fails, experts whose
            rows cannot be told, a site without effect. The message names layer and site.
        NumericalError: the model puts out NaN or infinity.
    """
    with torch.no_grad(), evaluating(anatomy.model):
        probe = Probe(anatomy.model)
        _check_order(probe)
        anatomy = settle_attention(anatomy, probe)
        anatomy = _settle_feed_forward(anatomy, probe)
        _check_projections(anatomy, probe)
        _check_experts(anatomy, probe)
        probe.step(anatomy, _all_keys(anatomy))
        _check_effects(anatomy, probe)
    return anatomy


def _check_order(probe: Probe) -> None:
    """Of two texts that begin with one token the logits there are the same."""
    ids = probe.ids.clone()
    ids[1, 0] = ids[0, 0]
    logits = probe.run(ids)
    if not same(logits[1, 0], logits[0, 0]):
        raise UnsupportedModelError(BOTH_WAYS)


# Feed-forward parts


def _squared_relu(values: Tensor) -> Tensor:
    return nn.functional.relu(values).square()


KNOWN_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    nn.functional.silu,
    nn.functional.gelu,
    partial(nn.functional.gelu, approximate="tanh"),
    nn.functional.relu,
    _squared_relu,
)
"""Activation functions that are tried where a feed-forward part holds none, or another than it computes."""


def _parts(layer: LayerAnatomy) -> dict[str, MlpAnatomy]:
    return {name: part for name, part in (("mlp", layer.mlp), ("shared", layer.shared)) if part is not None}


def _usable(anatomy: Anatomy, part: AttentionAnatomy | MlpAnatomy) -> list[SitePlace]:
    return [place for place in part.places.values() if place.key not in anatomy.refused]


def _settle_feed_forward(anatomy: Anatomy, probe: Probe) -> Anatomy:
    """Take for each part the layout with which down is given act(gate)·up.

    Refuse gate and up where there is none.
    """
    parts = [part for layer in anatomy.layers for part in _parts(layer).values()]
    keys = [place.key for part in parts for place in _usable(anatomy, part)]
    seen = probe.see(anatomy, keys, [part.output_module for part in parts])
    refused = dict(anatomy.refused)
    layers = []
    for layer in anatomy.layers:
        settled = {name: _settled(anatomy, part, seen, refused) for name, part in _parts(layer).items()}
        layers.append(replace(layer, mlp=settled.get("mlp"), shared=settled.get("shared")))
    return replace(anatomy, layers=tuple(layers), refused=refused)


def _settled(anatomy: Anatomy, part: MlpAnatomy, seen: Seen, refused: dict[str, str]) -> MlpAnatomy:
    places = part.places
    if any(place.key in anatomy.refused for place in places.values()):
        return part
    up = seen.values[places["up"].key]
    down = seen.boundaries[part.output_module][0][0].view(up.shape)  # before an (IA)³ scale
    gate = seen.values[places["gate"].key] if part.gated else None
    for activation in (part.activation, *KNOWN_ACTIVATIONS):
        tried = replace(part, activation=activation)
        if same(_gated(tried, gate, up), down):
            return tried
    if part.layout is not None and gate is not None:
        fused = _fused(part, gate, up)
        for layout in GATE_UP_LAYOUTS:
            indices = split_gate_up(layout, down.shape[-1])
            if same(_gated(part, fused[..., indices["gate"]], fused[..., indices["up"]]), down):
                if "gate_up" in anatomy.chosen:
                    raise UnsupportedModelError(
                        f"{places['gate'].key}: layout {part.layout.value!r} was asked for and fails, "
                        f"{layout.value!r} was found to hold; leave layouts={{'gate_up': ...}} out"
                    )
                moved = {
                    site: place.at(indices[site]) if site in indices else place
                    for site, place in places.items()
                }
                return replace(part, layout=layout, places=moved)
    reason = (
        "what down is given is not act(gate)·up of this layer, so gate and up neurons cannot be proved; "
        "use down alone (--sites down)"
    )
    refused.update({places[site].key: reason for site in ("gate", "up") if site in places})
    return part


def _gated(part: MlpAnatomy, gate: Tensor | None, up: Tensor) -> Tensor:
    return part.activation(up) if gate is None else part.activation(gate) * up


def _fused(part: MlpAnatomy, gate: Tensor, up: Tensor) -> Tensor:
    whole = gate.new_empty((*gate.shape[:-1], 2 * gate.shape[-1]))
    for site, values in (("gate", gate), ("up", up)):
        whole[..., part.places[site].index] = values
    return whole


# Projections


def _check_projections(anatomy: Anatomy, probe: Probe) -> None:
    """One pass: every projection's boundary against the activations and the weights of its sites."""
    places = list(anatomy.places.values())
    seen = probe.see(anatomy, [place.key for place in places], [place.module for place in places])
    for place in places:
        _check_place(place, seen.values[place.key], seen.boundaries[place.module])
    for layer in anatomy.layers:
        for part in layer.parts:
            _check_partition(_usable(anatomy, part), seen, getattr(part, "gate", None))


def _check_place(place: SitePlace, values: Tensor, boundary: tuple[tuple[Any, ...], Any]) -> None:
    part = place.projection
    (given, *_), output = boundary
    flat = values.reshape(-1, values.shape[-1])
    if place.side == "output":
        if part.readable:
            weight, bias = place.weight(), place.bias()
            expected = _linear(given.reshape(-1, given.shape[-1]), weight, bias)
            if not same(flat, expected.to(flat.dtype)):
                raise _fault(place, "its weight rows do not give its activation")
        return
    if part.readable:
        weight = full_weight(part, place.key)
        computed = _linear(flat, weight, full_bias(part))
    else:
        computed = place.hooked(flat)
    if not same(computed.to(output.dtype), output.reshape(computed.shape)):
        raise _fault(
            place, "its weight columns applied to its activation do not give the projection's output"
        )


def _linear(given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In the weight's type: adapters of a half-precision model are often held in float32, its bias entries
    are not.
    """
    return nn.functional.linear(
        given.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)
    )


def _fault(place: SitePlace, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{place.key} ({place.module_name}) could not be proved: {what}; {SAY_SITES}"
    )


def _check_partition(places: list[SitePlace], seen: Seen, gate: Index) -> None:
    """The slices of a fused projection, put together, are its output; an output gate is one beside the
    sites.
    """
    fused: dict[str, list[SitePlace]] = {}
    for place in places:
        if place.index is not None:
            fused.setdefault(place.module_name, []).append(place)
    for group in fused.values():
        indices = {place.key: place.index for place in group} | ({} if gate is None else {"gate": gate})
        if not covers(indices, group[0].features):
            raise _fault(group[0], "the sites of its fused projection do not take every feature once")
        output = seen.boundaries[group[0].module][1]
        whole = torch.empty_like(output) if gate is None else output.clone()
        for place in group:
            whole[..., place.index] = seen.values[place.key].reshape(*output.shape[:-1], -1)
        if not torch.equal(whole, output):
            raise _fault(group[0], "the slices of its fused projection do not give its output back")


# Experts


def _check_experts(anatomy: Anatomy, probe: Probe) -> None:
    parts = [layer.experts for layer in anatomy.layers if layer.experts is not None]
    if not parts:
        return
    keys = [f"layers.{part.layer}.experts.*.{site}" for part in parts for site in MLP_SITES]
    seen = probe.see(anatomy, keys, [part.module for part in parts])
    for part in parts:
        rows = {
            site: _joined(seen.values.get(f"layers.{part.layer}.experts.*.{site}", [])) for site in MLP_SITES
        }
        if rows["down"] is None:
            raise part.unsupported("the gate step never came by, so expert neurons cannot be reached")
        _check_rows(part, rows, seen.boundaries[part.module])  # type: ignore[arg-type]


def _joined(rows: Iterable[ExpertRows]) -> ExpertRows | None:
    rows = list(rows)
    if not rows:
        return None
    return ExpertRows(
        torch.cat([part.values for part in rows]),
        torch.cat([part.token_index for part in rows]),
        torch.cat([part.weight for part in rows]),
        torch.cat([part.expert_index for part in rows]),
    )


def _check_rows(
    part: ExpertsAnatomy, rows: dict[str, ExpertRows], boundary: tuple[tuple[Any, ...], Any]
) -> None:
    """Every row against the weights of its expert and the stream of its token, and their weighted sum against
    the output.
    """
    (hidden, chosen, weights, *_), output = boundary
    down = rows["down"]
    if len(down) != chosen.numel():
        raise part.unsupported(f"{len(down)} rows came by for {chosen.numel()} pairs of token and expert")
    total = torch.zeros_like(hidden, dtype=torch.float64)
    expected = {site: torch.empty_like(rows[site].values) for site in ("gate", "up")}
    for expert in down.expert_index.unique().tolist():
        mine = (down.expert_index == expert).nonzero().flatten()
        stream = hidden[down.token_index[mine]]
        for site in ("gate", "up"):
            expected[site][mine] = nn.functional.linear(
                stream, part.weight(expert, site), part.bias(expert, site)
            )
        out = nn.functional.linear(down.values[mine], part.weight(expert, "down"), part.output_bias(expert))
        total.index_add_(0, down.token_index[mine], (out * down.weight[mine, None]).double())
    faults = [site for site in ("gate", "up") if not same(rows[site].values, expected[site])]
    if faults or not same(part.apply_gate(part.fuse(rows["gate"].values, rows["up"].values)), down.values):
        raise part.unsupported(
            f"the rows of {' and '.join(faults) or 'down'} are not what the weights of the chosen "
            "experts give"
        )
    _check_gate_step(part, down.values)
    if not same(total.to(output.dtype).reshape(output.shape), output):
        raise part.unsupported(
            "the rows of down, weighted by the router, do not add up to the output of the experts"
        )


def _check_gate_step(part: ExpertsAnatomy, like: Tensor) -> None:
    """A neuron's gate and up values reach its own down value alone, and that value is straight in up (and so
    not in gate).

    Asked of drawn values, since those of a pass may lie where the step clamps them; smaller and smaller ones,
    down to below any clamp.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = 2 * torch.rand(2, GATE_ROWS, part.width, generator=generator, dtype=torch.float64) - 1
    outputs = []
    for size in GATE_SIZES:
        gate, up = (drawn * size).to(like.device)
        outputs.append(_bends(part, gate, up, step=size))
    if not any(bends["up"] < 1e-6 < bends["gate"] for bends in outputs):
        raise part.unsupported(
            f"layout {part.layout.value!r} fails: what down is given is not act(gate) times up"
        )


def _bends(
    part: ExpertsAnatomy, gate: Float[Tensor, "row neuron"], up: Float[Tensor, "row neuron"], step: float
) -> dict[str, float]:
    """How far from straight the last neuron's down value is in its gate and in its up value, between a step
    down and a step up.
    """
    plain = part.apply_gate(part.fuse(gate, up))
    last = part.width - 1
    bends = {}
    for site, values in (("gate", gate), ("up", up)):
        moved = []
        for sign in (1, -1):
            changed = values.clone()
            changed[:, last] += sign * step
            moved.append(
                part.apply_gate(part.fuse(changed, up) if site == "gate" else part.fuse(gate, changed))
                - plain
            )
        if any(bool(difference[:, :last].any()) for difference in moved):
            raise part.unsupported(
                f"layout {part.layout.value!r} fails: the {site} value of a neuron reaches other neurons"
            )
        bends[site] = float(
            (moved[0] + moved[1])[:, last].abs().median() / moved[0][:, last].abs().median().clamp(min=1e-30)
        )
    return bends


# Effect on the logits


def _effects(
    anatomy: Anatomy, probe: Probe, edits: Mapping[str, Editor], rows: int, *, last: bool
) -> list[float]:
    """How far the logits of every row but the first are from the first one's, which is not edited."""
    logits = probe.see(anatomy, (), edits=edits, ids=probe.rows(rows), last=last).logits
    # Row by row: with a vocabulary of 262k, all rows in float64 would take more than the model.
    return [float((row.double() - logits[0].double()).abs().max()) for row in logits[1:]]


def _check_effects(anatomy: Anatomy, probe: Probe) -> None:
    """With a site set to zero in one row of the batch, that row's logits differ from those of an untouched
    row.
    """
    keys = _all_keys(anatomy)
    for start in range(0, len(keys), ROWS_AT_ONCE):
        group = keys[start : start + ROWS_AT_ONCE]
        edits = {key: _silence(row + 2) for row, key in enumerate(group)}
        noise, *effects = _effects(anatomy, probe, edits, len(group) + 2, last=True)
        for key, effect in zip(group, effects, strict=True):
            if effect <= 2 * noise and not _idle(anatomy, key):
                # What hardly moves the last token may move others; of all sites these would take too much.
                noise_, whole = _effects(anatomy, probe, {key: _silence(2)}, 3, last=False)
                if whole > 2 * noise_:
                    continue
                raise UnsupportedModelError(
                    f"{key}: setting its neurons to zero changes no logit, a change was expected; "
                    "switch off torch.compile and replaced kernels, or leave the site out with --sites"
                )


def _all_keys(anatomy: Anatomy) -> list[str]:
    """Of every dense site, and of every site of all experts of a layer together."""
    routed = [
        f"layers.{layer.index}.experts.*.{site}"
        for layer in anatomy.layers
        if layer.experts
        for site in MLP_SITES
    ]
    return [*anatomy.places, *routed]


def _silence(row: int) -> Callable[[Any], Tensor]:
    def edit(values: Any) -> Tensor:
        if isinstance(values, ExpertRows):
            return values.values.masked_fill((values.token_index // TOKENS == row)[:, None], 0)
        new = values.clone()
        new[row] = 0
        return new

    return edit


def _idle(anatomy: Anatomy, key: str) -> bool:
    """Whether a site has no effect because weights on its way out are all zero, as in a layer that was added
    empty.
    """
    layer = anatomy.layers[int(key.split(".")[1])]
    if ".experts." in key:
        return layer.experts is not None and not bool(layer.experts.module.down_proj.any())  # type: ignore[operator]
    part = next(part for part in layer.parts if any(place.key == key for place in part.places.values()))
    return any(place.projection.readable and not bool(place.weight().any()) for place in part.places.values())
