"""The refusal direction: what each neuron adds to the difference of harmful and harmless requests in the residual stream."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from safety_neurons.detectors.methods import RefusalDirection
from safety_neurons.detectors.pooling import at_last, pooled_activations, sorted_out, whole_rows
from safety_neurons.detectors.runner import Run, Scored
from safety_neurons.errors import UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.model.parts import AttentionAnatomy
from safety_neurons.neurons import MLP_SITES, parse_key

SEARCHED_LAYERS = 0.8
"""Share of the layers, from the first, among which the direction is taken where no layer is named."""


def score(method: RefusalDirection, run: Run) -> Scored:
    """What every searched neuron writes along the difference of the two kinds of prompts."""
    model, layer = run.aligned, method.layer
    assert run.harmless is not None
    n_layers = len(model.anatomy.layers)
    if layer is not None and not 0 <= layer < n_layers:
        raise UsageError(f"layer {layer}: expected 0 to {n_layers - 1}")
    writers = list(dict.fromkeys(_writer(key) for key in run.sizes if _writer(key)))
    with torch.no_grad():
        encoded = [model.encode(text) for text in (run.prompts, run.harmless)]
        names = ("harmful", "harmless")
        seen = [pooled_activations(run, text, writers, at_last, name, residual=True) for name, text in zip(names, encoded, strict=True)]
        whole, counts, notes = sorted_out(encoded, [whole_rows(part.values()) for part in seen])
        run.notes += notes
        seen = [{key: values[kept] for key, values in part.items()} for part, kept in zip(seen, whole, strict=True)]
        streams = [[part[f"residual.{number}"] for number in range(n_layers)] for part in seen]
        chosen = layer if layer is not None else _most_apart(streams[0], streams[1], max(1, int(SEARCHED_LAYERS * n_layers)))
        direction = streams[0][chosen].mean(0) - streams[1][chosen].mean(0)
        direction = direction / direction.norm().clamp(min=1e-30)
        written: dict[str, Tensor] = {}
        for number, key in enumerate(writers):
            with model.active():
                along = direction @ model.anatomy.place(key).weight().detach().cpu().to(direction)
            written[key] = (seen[0][key].mean(0) - seen[1][key].mean(0)).to(along) * along
            if run.progress is not None:
                run.progress(number + 1, len(writers), 0)
    return Scored({key: _of_site(model, key, written).double().numpy() for key in run.sizes}, counts, config={"layer": chosen})


def _most_apart(harmful: Sequence[Tensor], harmless: Sequence[Tensor], n_layers: int) -> int:
    apart = []
    for one, other in zip(harmful[:n_layers], harmless[:n_layers], strict=True):
        direction = one.mean(0) - other.mean(0)
        ours, theirs = one @ direction, other @ direction
        pooled = ((ours.var(correction=0) + theirs.var(correction=0)) / 2).sqrt().clamp(min=1e-30)
        apart.append(float((ours.mean() - theirs.mean()) / pooled))
    return max(range(len(apart)), key=apart.__getitem__)


def _writer(key: str) -> str:
    """The site that writes what a neuron of this site does to the residual stream; empty for `q` and `k`."""
    layer, site = key.rsplit(".", 1)
    if site in ("q", "k"):
        return ""
    return f"{layer}.down" if site in MLP_SITES else f"{layer}.o"


def _of_site(model: LanguageModel, key: str, written: Mapping[str, Tensor]) -> Tensor:
    parsed, writer = parse_key(key), _writer(key)
    if not writer:
        return torch.zeros(model.table.sizes[key])
    if parsed.site != "v":
        return written[writer]
    attention = model.anatomy.layers[parsed.layer].attention
    assert isinstance(attention, AttentionAnatomy)
    return written[writer].unflatten(0, (attention.n_kv_heads, -1, model.table[key].size // attention.n_kv_heads)).sum(1).flatten()
