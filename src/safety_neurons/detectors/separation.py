"""Methods that tell harmful from harmless prompts by activations: a probe's weights, and what neurons write along the refusal direction."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safety_neurons.detectors.methods import ProbeWeights, RefusalDirection
from safety_neurons.detectors.runner import PromptCounts, Run, Scored
from safety_neurons.errors import NumericalError, UnsupportedModelError, UsageError
from safety_neurons.model import Encoded, LanguageModel, hooks
from safety_neurons.model.batches import Batch, said_of_failed
from safety_neurons.model.passes import PassOptions, run_batches
from safety_neurons.model.sites import AttentionAnatomy
from safety_neurons.neurons import MLP_SITES, parse_key

Pool = Callable[[Tensor, Batch], Tensor]


def pooled_activations(
    run: Run, prompts: Sequence[Encoded], keys: Iterable[str], pool: Pool, name: str, *, residual: bool = False
) -> dict[str, Float[Tensor, "prompt neuron"]]:
    """Every site's activations, one row a prompt (`at_last` or `largest`), in float32 or wider, on the host; NaN where the model gives NaN.

    Args:
        run: whose aligned model's activations, and the state in which the rows of finished batches are kept.
        prompts: encoded.
        keys: of sites.
        pool: makes one row of a prompt's tokens.
        name: of these rows in the state.
        residual: also what every layer puts out, under `residual.{layer}`.

    Raises:
        UnsupportedModelError: a key of a routed expert.
    """
    model, stream = run.aligned, run.stream
    names = list(keys)
    routed = [key for key in names if ".experts." in key]
    if routed:
        raise UnsupportedModelError(f"{routed[0]} is an expert's, which does not see every token; use --sites q,k,v,o")
    seen: dict[str, Tensor] = {}
    found = {key: torch.from_numpy(values.copy()) for key, values in stream.named(name).items()}
    encoded = [row.ids for row in prompts]
    done = f"{name}/batches"

    def keep(key: str) -> Callable[[Any], None]:
        def reader(values: Any) -> None:
            seen[key] = values if isinstance(values, Tensor) else values[0]

        return reader

    def take(batch: Batch) -> None:
        for key in list(seen):
            values = pool(seen.pop(key), batch)
            if key not in found:
                found[key] = torch.zeros(len(encoded), values.shape[1], dtype=values.dtype)
            found[key][batch.indices] = values

    def prepare() -> None:
        stream.put(name, {key: values.numpy() for key, values in found.items()})

    def finished(count: int) -> None:
        stream.state[done] = count
        stream.went_on(prepare)

    layers = {layer.module: keep(f"residual.{layer.index}") for layer in model.anatomy.layers} if residual else {}
    with hooks.reading(model.anatomy, {key: keep(key) for key in names}), hooks.around(after=layers), stream.kept(prepare):
        run_batches(model, encoded, take, run.batch_size, options=PassOptions(int(stream.state.get(done, 0)), finished))
        prepare()
    return found


def largest(values: Float[Tensor, "batch token feature"], batch: Batch) -> Float[Tensor, "batch feature"]:
    """The largest over the real tokens of every row, in float32 or wider, on the host."""
    taken = torch.stack([row[:length].amax(0) for row, length in zip(values, batch.lengths, strict=True)]).cpu()
    return taken if taken.dtype == torch.float64 else taken.float()


def at_last(values: Float[Tensor, "batch token feature"], batch: Batch) -> Float[Tensor, "batch feature"]:
    """The last real token of every row, in float32 or wider, on the host."""
    last = batch.row_lengths.to(values.device) - 1
    taken = values[torch.arange(len(last), device=values.device), last].cpu()
    return taken if taken.dtype == torch.float64 else taken.float()


def whole_rows(parts: Iterable[Float[Tensor, "prompt _"]]) -> Bool[Tensor, " prompt"]:
    """Which prompts have finite numbers in all of these.

    Raises:
        NumericalError: none has.
    """
    whole = torch.stack([values.isfinite().all(1) for values in parts]).all(0)
    if not bool(whole.any()):
        raise NumericalError(f"none of {len(whole)} prompts gave finite numbers: check the model's weights, or use --dtype float32")
    return whole


def sorted_out(
    encoded: Sequence[Sequence[Encoded]], whole: Sequence[Bool[Tensor, " _"]]
) -> tuple[Sequence[Bool[Tensor, " _"]], PromptCounts, list[str]]:
    """Which prompts of two texts are used, what became of those of the first, and what has to be said.

    Args:
        encoded: the prompts of both texts.
        whole: which of them gave finite numbers.
    """
    notes: list[str] = []
    for name, kept in zip(("prompts", "harmless prompts"), whole, strict=True):
        notes += said_of_failed({int(index): "NaN or infinity" for index in (~kept).nonzero().flatten()}, len(kept), name)
    counts = PromptCounts(len(encoded[0]), 0, sum(row.truncated for row in encoded[0])).without(int((~whole[0]).sum()))
    return whole, counts, notes


SAME = 1e-5
"""Share of its size below which a feature's spread is rounding: the largest activation is often that of a token all prompts begin with."""


def score_probe(_: ProbeWeights, run: Run) -> Scored:
    """The weights of one probe a site; a probe that was fitted is not fitted again by a run that goes on."""
    model, stream = run.aligned, run.stream
    assert run.harmless is not None
    encoded = [model.encode(text) for text in (run.prompts, run.harmless)]
    names = ("harmful", "harmless")
    seen = [pooled_activations(run, text, run.sizes, largest, name) for name, text in zip(names, encoded, strict=True)]
    whole, counts, notes = sorted_out(encoded, [whole_rows(part.values()) for part in seen])
    run.notes += notes
    labels = torch.cat(
        [torch.full((int(kept.sum()),), float(label), dtype=torch.float64) for kept, label in zip(whole, (1, 0), strict=True)]
    )
    fitted = stream.named("probe")
    with stream.kept():
        for number, key in enumerate(run.sizes):
            if key not in fitted:
                weights = probe(torch.cat([part[key][kept] for part, kept in zip(seen, whole, strict=True)]).double(), labels)
                scores = (weights - weights.mean()) / weights.std(correction=0).clamp(min=1e-30)
                fitted[key] = (weights.sign() * scores.abs()).numpy()
                stream.put("probe", {key: fitted[key]})
                stream.went_on()
            if run.progress is not None:
                run.progress(number + 1, len(run.sizes), 0)
    return Scored({key: fitted[key] for key in run.sizes}, counts)


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
        loss = loss + ProbeWeights.PENALTY / 2 * values[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    return values.detach()[:-1]


SEARCHED_LAYERS = 0.8
"""Share of the layers, from the first, among which the direction is taken where no layer is named."""


def score_direction(method: RefusalDirection, run: Run) -> Scored:
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
