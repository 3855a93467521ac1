"""The refusal direction: what each neuron adds to the difference of harmful and harmless requests in the residual stream."""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from safety_neurons.detectors.finishing import Choice, finish, searched
from safety_neurons.detectors.found import Found
from safety_neurons.detectors.pairs import comparing
from safety_neurons.detectors.pooling import at_last, pooled_activations, sorted_out, whole_rows
from safety_neurons.detectors.streaming import Progress, Stream, stream_key
from safety_neurons.errors import UsageError
from safety_neurons.model import LanguageModel, as_prompts
from safety_neurons.model.language_model import Texts as Asked
from safety_neurons.model.parts import AttentionAnatomy
from safety_neurons.model.passes import BatchSize
from safety_neurons.neurons import MLP_SITES, NeuronSet, Selection, parse_key
from safety_neurons.results import Checkpoint

SEARCHED_LAYERS = 0.8
"""Share of the layers, from the first, among which the direction is taken where no layer is named."""


def find_refusal_direction(
    model: LanguageModel,
    prompts: Asked,
    *,
    harmless: Asked,
    layer: int | None = None,
    sites: Sequence[str] = ("down",),
    layers: range | str | None = None,
    batch_size: BatchSize = "auto",
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
    subtract: NeuronSet | None = None,
    **choice: Unpack[Choice],
) -> Found:
    """Mean contribution of each neuron along the refusal direction, harmful minus harmless prompts, at the prompt's last token.

    The direction is the difference of the mean residual streams after a layer. An `o` or `down` neuron writes its activation times its
    column; a `v` row what the `o` columns it feeds write, `gate` and `up` rows what their `down` column writes; `q` and `k` rows write
    nothing and score 0. Over all writers up to the layer (no norm behind them), contributions add up to the length of the difference,
    less what the embedding brings.

    Args:
        model: usually the aligned model.
        prompts: harmful requests.
        harmless: harmless ones.
        layer: whose output the direction is taken from; None for the one, among the first 80 %, along whose direction the two kinds of
            prompts differ most, in pooled standard deviations.
        sites: any of `q k v o gate up down`.
        layers: a range or "A:B"; None for all.
        batch_size: prompts a batch, or "auto".
        checkpoint: partial state; a killed run continues behind its last finished batch.
        progress: called with (sites done, in all, 0).
        subtract: neurons taken away after selection.
        **choice: `top`, `count`, `top_per_matrix` or `threshold`; the largest 5 % by default.

    Raises:
        NumericalError: NaN or infinity; the message names the site.
        UsageError: a layer that the model does not have.

    Source: Arditi et al. (arXiv 2406.11717), section 2.3, the difference of means.
    Differs: the layer is chosen by separation instead of by trying every direction's ablation; the projection on neurons is ours.
    """
    asked, other = as_prompts(prompts), as_prompts(harmless)
    selection = Selection.of(**choice, default_top=0.05)
    n_layers = len(model.anatomy.layers)
    if layer is not None and not 0 <= layer < n_layers:
        raise UsageError(f"layer {layer}: expected 0 to {n_layers - 1}")
    keys = model.table.select(sites=sites, layers=layers).keys
    config = searched(sites, layers) | {"layer": layer, "harmless_sha256": other.sha256}
    stream = Stream(checkpoint, stream_key("refusal-direction", [model], asked, config, selection, batch_size))
    writers = list(dict.fromkeys(_writer(key) for key in keys if _writer(key)))
    with comparing(model, model), torch.no_grad():
        encoded = [model.encode(text) for text in (asked, other)]
        seen = [
            pooled_activations(model, text, writers, at_last, stream=stream, name=name, residual=True, batch_size=batch_size)
            for name, text in zip(("harmful", "harmless"), encoded, strict=True)
        ]
        whole, counts, notes = sorted_out(encoded, [whole_rows(part.values()) for part in seen])
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
            if progress is not None:
                progress(number + 1, len(writers), 0)
    values = {key: _of_site(model, key, written).double().numpy() for key in keys}
    made: dict[str, Any] = {"table": model.table, "models": (model.name,), "selection": selection, "prompts": asked}
    return finish("refusal-direction", values, config=config | {"layer": chosen}, counts=counts, notes=notes, subtract=subtract, **made)


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
