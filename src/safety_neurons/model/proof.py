"""Proof of an anatomy by algebra, on short probe passes of random tokens through the loaded model, for every layer by itself.

1. Queries, keys and values are where they are said to be (`proof_attention`).
2. Weights and indices: `weight()` and `bias()` of every site, applied to what the projection was given, are what it put out; the slices of
   a fused projection, put together, are its output bit for bit; `down` and `o` applied to the captured activation give the sub-layer's
   output.
3. Feed-forward part: what `down` is given is act(gate)·up, or act(up).
4. Experts: each row of the gate step is the pair of token and expert it is said to be, and the rows add up to the module's output.
5. Decoding: a step behind a cache shows every site, as a whole pass does.
6. Effect: with the neurons of a site set to zero the logits change.

Where the guessed layout of a fused projection fails and another one passes, that one is taken, unless the caller chose it.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model.experts import ExpertRows, ExpertsAnatomy
from safety_neurons.model.layouts import GATE_UP_LAYOUTS, covers, split_gate_up
from safety_neurons.model.modes import evaluating
from safety_neurons.model.parts import Anatomy, AttentionAnatomy, LayerAnatomy, MlpAnatomy
from safety_neurons.model.places import SitePlace, full_bias, full_weight
from safety_neurons.model.probe import TOKENS, Probe, Seen, same
from safety_neurons.model.proof_attention import settle_attention
from safety_neurons.model.vocabulary import SAY_SITES
from safety_neurons.neurons import MLP_SITES

GATE_ROWS = 64
"""Rows of drawn values that the gate step of experts is tried on."""
GATE_SIZES = (1.0, 1e-1, 1e-2)
"""Their sizes."""
ROWS_AT_ONCE = 64
"""Rows of a pass in which each row has another site set to zero."""


def prove(anatomy: Anatomy, *, seed: int = 0, effects: bool = True) -> Anatomy:
    """The anatomy, proved on the model it was resolved from, with layouts settled and unprovable sites refused.

    Args:
        anatomy: what `resolve` found.
        seed: of the random tokens; nothing global is seeded.
        effects: whether to check that every site changes the logits (one row of a batch per site).

    Raises:
        UnsupportedModelError: a site that never came by, weights that do not give what the projection puts out, a layout chosen by the
            caller that fails, experts whose rows cannot be told, a site without effect. The message names layer and site.
        NumericalError: the model puts out NaN or infinity.
    """
    with torch.no_grad(), evaluating(anatomy.model):
        probe = Probe(anatomy.model, seed)
        anatomy = settle_attention(anatomy, probe)
        anatomy = _settle_feed_forward(anatomy, probe)
        _check_projections(anatomy, probe)
        _check_experts(anatomy, probe)
        probe.step(anatomy, _all_keys(anatomy))
        if effects:
            _check_effects(anatomy, probe)
    return anatomy


# Feed-forward parts


def _parts(layer: LayerAnatomy) -> dict[str, MlpAnatomy]:
    return {name: part for name, part in (("mlp", layer.mlp), ("shared", layer.shared)) if part is not None}


def _usable(anatomy: Anatomy, part: AttentionAnatomy | MlpAnatomy) -> list[SitePlace]:
    return [place for place in part.places.values() if place.key not in anatomy.refused]


def _settle_feed_forward(anatomy: Anatomy, probe: Probe) -> Anatomy:
    """Take for each part the layout with which down is given act(gate)·up; refuse gate and up where there is none."""
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
    if same(_gated(part, gate, up), down):
        return part
    if part.layout is not None and gate is not None:
        fused = _fused(part, gate, up)
        for layout in GATE_UP_LAYOUTS:
            indices = split_gate_up(layout, down.shape[-1])
            if same(_gated(part, fused[..., indices["gate"]], fused[..., indices["up"]]), down):
                if "gate_up" in anatomy.chosen:
                    raise UnsupportedModelError(
                        f"{places['gate'].key}: layout {part.layout.value!r} was asked for and fails, {layout.value!r} was found to hold; "
                        "leave layouts={'gate_up': ...} out"
                    )
                moved = {site: place.at(indices[site]) if site in indices else place for site, place in places.items()}
                return replace(part, layout=layout, places=moved)
    reason = "what down is given is not act(gate)·up of this layer, so gate and up neurons cannot be proved; use down alone (--sites down)"
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
            _check_partition(_usable(anatomy, part), seen)


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
        found = _linear(flat, weight, full_bias(part))
    else:
        found = place.hooked(flat)
    if not same(found.to(output.dtype), output.reshape(found.shape)):
        raise _fault(place, "its weight columns applied to its activation do not give the projection's output")


def _linear(given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In the weight's type: adapters of a half-precision model are often held in float32, its bias entries are not."""
    return nn.functional.linear(given.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))


def _fault(place: SitePlace, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{place.key} ({place.module_name}) could not be proved: {what}; {SAY_SITES}")


def _check_partition(places: list[SitePlace], seen: Seen) -> None:
    """The slices of a fused projection, put together, are its output."""
    fused: dict[str, list[SitePlace]] = {}
    for place in places:
        if place.index is not None:
            fused.setdefault(place.module_name, []).append(place)
    for group in fused.values():
        if not covers({place.key: place.index for place in group}, group[0].features):
            raise _fault(group[0], "the sites of its fused projection do not take every feature once")
        output = seen.boundaries[group[0].module][1]
        whole = torch.empty_like(output)
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
        rows = {site: _joined(seen.values.get(f"layers.{part.layer}.experts.*.{site}", [])) for site in MLP_SITES}
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


def _check_rows(part: ExpertsAnatomy, rows: dict[str, ExpertRows], boundary: tuple[tuple[Any, ...], Any]) -> None:
    """Every row against the weights of its expert and the stream of its token, and their weighted sum against the output."""
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
            expected[site][mine] = nn.functional.linear(stream, part.weight(expert, site), part.bias(expert, site))
        out = nn.functional.linear(down.values[mine], part.weight(expert, "down"), part.output_bias(expert))
        total.index_add_(0, down.token_index[mine], (out * down.weight[mine, None]).double())
    faults = [site for site in ("gate", "up") if not same(rows[site].values, expected[site])]
    if faults or not same(part.apply_gate(part.fuse(rows["gate"].values, rows["up"].values)), down.values):
        raise part.unsupported(f"the rows of {' and '.join(faults) or 'down'} are not what the weights of the chosen experts give")
    _check_gate_step(part, down.values)
    if not same(total.to(output.dtype).reshape(output.shape), output):
        raise part.unsupported("the rows of down, weighted by the router, do not add up to the output of the experts")


def _check_gate_step(part: ExpertsAnatomy, like: Tensor) -> None:
    """A neuron's gate and up values reach its own down value alone, and that value is straight in up (and so not in gate).

    Asked of drawn values, since those of a pass may lie where the step clamps them; smaller and smaller ones, down to below any clamp.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = 2 * torch.rand(2, GATE_ROWS, part.width, generator=generator, dtype=torch.float64) - 1
    found = []
    for size in GATE_SIZES:
        gate, up = (drawn * size).to(like.device)
        found.append(_bends(part, gate, up, step=size))
    if not any(bends["up"] < 1e-6 < bends["gate"] for bends in found):
        raise part.unsupported(f"layout {part.layout.value!r} fails: what down is given is not act(gate) times up")


def _bends(part: ExpertsAnatomy, gate: Float[Tensor, "row neuron"], up: Float[Tensor, "row neuron"], step: float) -> dict[str, float]:
    """How far from straight the last neuron's down value is in its gate and in its up value, between a step down and a step up."""
    plain = part.apply_gate(part.fuse(gate, up))
    last = part.width - 1
    bends = {}
    for site, values in (("gate", gate), ("up", up)):
        moved = []
        for sign in (1, -1):
            changed = values.clone()
            changed[:, last] += sign * step
            moved.append(part.apply_gate(part.fuse(changed, up) if site == "gate" else part.fuse(gate, changed)) - plain)
        if any(bool(difference[:, :last].any()) for difference in moved):
            raise part.unsupported(f"layout {part.layout.value!r} fails: the {site} value of a neuron reaches other neurons")
        bends[site] = float((moved[0] + moved[1])[:, last].abs().median() / moved[0][:, last].abs().median().clamp(min=1e-30))
    return bends


# Effect on the logits


def _check_effects(anatomy: Anatomy, probe: Probe) -> None:
    """With a site set to zero in one row of the batch, that row's logits differ from those of an untouched row."""
    keys = _all_keys(anatomy)
    for start in range(0, len(keys), ROWS_AT_ONCE):
        group = keys[start : start + ROWS_AT_ONCE]
        edits = {key: _silence(row + 2) for row, key in enumerate(group)}
        logits = probe.see(anatomy, (), edits=edits, ids=probe.rows(len(group) + 2)).logits.double()
        noise = float((logits[1] - logits[0]).abs().max())
        effects = (logits[2:] - logits[0]).abs().amax((1, 2)).tolist()
        for key, effect in zip(group, effects, strict=True):
            if effect <= 2 * noise and not _idle(anatomy, key):
                raise UnsupportedModelError(
                    f"{key}: setting its neurons to zero changes no logit, a change was expected; "
                    "switch off torch.compile and replaced kernels, or leave the site out with --sites"
                )


def _all_keys(anatomy: Anatomy) -> list[str]:
    """Of every dense site, and of every site of all experts of a layer together."""
    routed = [f"layers.{layer.index}.experts.*.{site}" for layer in anatomy.layers if layer.experts for site in MLP_SITES]
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
    """Whether a site has no effect because weights on its way out are all zero, as in a layer that was added empty."""
    layer = anatomy.layers[int(key.split(".")[1])]
    if ".experts." in key:
        return layer.experts is not None and not bool(layer.experts.module.down_proj.any())  # type: ignore[operator]
    part = next(part for part in layer.parts if any(place.key == key for place in part.places.values()))
    return any(place.projection.readable and not bool(place.weight().any()) for place in part.places.values())
