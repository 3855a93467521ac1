"""Probe weights: which neurons a linear classifier of harmful requests leans on."""

import torch
from jaxtyping import Float
from torch import Tensor

from safety_neurons.detectors.methods import ProbeWeights
from safety_neurons.detectors.pooling import largest, pooled_activations, sorted_out, whole_rows
from safety_neurons.detectors.runner import Run, Scored

SAME = 1e-5
"""Share of its size below which a feature's spread is rounding: the largest activation is often that of a token all prompts begin with."""


def score(_: ProbeWeights, run: Run) -> Scored:
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
