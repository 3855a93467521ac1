"""Probe weights: which neurons a linear classifier of harmful requests leans on."""

from collections.abc import Sequence
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from safety_neurons.detectors.finishing import Choice, finish, searched
from safety_neurons.detectors.found import Found
from safety_neurons.detectors.pairs import comparing
from safety_neurons.detectors.pooling import largest, pooled_activations, sorted_out, whole_rows
from safety_neurons.detectors.streaming import Progress, Stream, stream_key
from safety_neurons.model import LanguageModel, as_prompts
from safety_neurons.model.language_model import Texts as Asked
from safety_neurons.model.passes import BatchSize
from safety_neurons.neurons import NeuronSet, Selection
from safety_neurons.results import Checkpoint

SAME = 1e-5
"""Share of its size below which a feature's spread is rounding: the largest activation is often that of a token all prompts begin with."""
PENALTY = 1.0
"""Weight of the squared norm: half of it is added to the summed loss, as C = 1 does in common libraries."""


def find_probe_weights(
    model: LanguageModel,
    prompts: Asked,
    *,
    harmless: Asked,
    sites: Sequence[str] = ("gate", "up"),
    layers: range | str | None = None,
    batch_size: BatchSize = "auto",
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
    subtract: NeuronSet | None = None,
    **choice: Unpack[Choice],
) -> Found:
    """|z-score| of each neuron's weight in a logistic regression of harmful against harmless prompts, with the sign of the weight.

    There is one regression per site of each layer; its features are the activations, the largest over a prompt's tokens, standardised;
    the z-score is over the site's neurons. Positive: fires for harmful requests.

    Args:
        model: usually the aligned model.
        prompts: harmful requests.
        harmless: harmless ones.
        sites: any of `q k v o gate up down`.
        layers: a range or "A:B"; None for all.
        batch_size: prompts a batch, or "auto".
        checkpoint: partial state; a killed run continues behind its last finished batch or probe.
        progress: called with (probes fitted, in all, 0).
        subtract: neurons taken away after selection.
        **choice: `top`, `count`, `top_per_matrix` or `threshold` (3 in the paper); the largest 5 % by default.

    Raises:
        NumericalError: NaN or infinity; the message names the site.
        UnsupportedModelError: routed experts at the searched sites.

    Source: NeuroStrike (Wu et al., NDSS 2026, arXiv 2509.11864), the probe of safety neurons: positive probe weights with |z| above 3, on
    the outputs of the gate and up projections.
    Differs: features are standardised and the penalty is fixed, so that the probe has one solution; any site can be searched.
    """
    asked, other = as_prompts(prompts), as_prompts(harmless)
    selection = Selection.of(**choice, default_top=0.05)
    keys = model.table.select(sites=sites, layers=layers).keys
    config = searched(sites, layers) | {"penalty": PENALTY, "harmless_sha256": other.sha256}
    stream = Stream(checkpoint, stream_key("probe-weights", [model], asked, config, selection, batch_size))
    with comparing(model, model):
        encoded = [model.encode(text) for text in (asked, other)]
        seen = [
            pooled_activations(model, text, keys, largest, stream=stream, name=name, batch_size=batch_size)
            for name, text in zip(("harmful", "harmless"), encoded, strict=True)
        ]
    whole, counts, notes = sorted_out(encoded, [whole_rows(part.values()) for part in seen])
    labels = torch.cat(
        [torch.full((int(kept.sum()),), float(label), dtype=torch.float64) for kept, label in zip(whole, (1, 0), strict=True)]
    )
    with stream.kept():
        for number, key in enumerate(keys):
            if f"scores/{key}" not in stream.arrays:
                weights = probe(torch.cat([part[key][kept] for part, kept in zip(seen, whole, strict=True)]).double(), labels)
                scores = (weights - weights.mean()) / weights.std(correction=0).clamp(min=1e-30)
                stream.put("scores", {key: (weights.sign() * scores.abs()).numpy()})
                stream.went_on()
            if progress is not None:
                progress(number + 1, len(keys), 0)
    values = {key: stream.arrays[f"scores/{key}"] for key in keys}
    names = (model.name,)
    return finish(
        "probe-weights",
        values,
        table=model.table,
        models=names,
        selection=selection,
        prompts=asked,
        config=config,
        counts=counts,
        notes=notes,
        subtract=subtract,
    )


def probe(features: Float[Tensor, "prompt neuron"], labels: Float[Tensor, " prompt"]) -> Float[Tensor, " neuron"]:
    """Weights of a logistic regression on standardised features (a constant feature is 0), with an intercept that is not penalised."""
    centred = features - features.mean(0)
    spread = centred.std(0, correction=0)
    varies = spread > SAME * features.abs().amax(0)
    scaled = torch.where(varies, centred / torch.where(varies, spread, 1.0), 0.0)
    values = torch.zeros(scaled.shape[1] + 1, dtype=scaled.dtype, requires_grad=True)
    solver = torch.optim.LBFGS([values], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        odds = scaled @ values[:-1] + values[-1]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(odds, labels, reduction="sum")
        loss = loss + PENALTY / 2 * values[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    return values.detach()[:-1]
