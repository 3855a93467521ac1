import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from twins import PROMPTS, adapted, untouched

from exact64 import Exact64
from families import FAMILIES, HYBRID_FAMILIES, MOE_FAMILIES, build, random_ids
from safety_neurons.detectors import find_relp, relevance
from safety_neurons.detectors.attribution import ScoredRow, mask_gradients, score_rows
from safety_neurons.detectors.relevance import feed_forward_parts, norms_of, propagating, slope_at_zero
from safety_neurons.errors import UnsupportedModelError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.model.batches import Batch, collate, forward, frozen
from safety_neurons.model.hooks import around
from tiny import tiny_llama, tiny_tokenizer


def without_biases(model: nn.Module) -> nn.Module:
    """The same model with every bias 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return model


def of_family(family: str, **over) -> LanguageModel:
    return LanguageModel(build(family, dtype=torch.float64, **over), tiny_tokenizer())


def logit_differences(n: int = 2) -> tuple[Batch, list[ScoredRow]]:
    """Rows whose score is a difference of two logits, which is linear in what the head puts out."""
    rows = [
        ScoredRow(tuple(int(token) for token in ids), 6 + number, 1.0 - 1.5 * number, rival=7 + number)
        for number, ids in enumerate(random_ids((n, 9)))
    ]
    return collate([row.ids for row in rows], range(n)), rows


def relevances(
    lm: LanguageModel, batch: Batch, rows: list[ScoredRow], sizes=None
) -> tuple[dict, torch.Tensor]:
    """Relevance of every neuron, by row, and the scores."""
    rules = rules_of(lm)
    return mask_gradients(lm, batch, rows, sizes or lm.table.sizes, mask=1.0, editing=rules)


def rules_of(lm: LanguageModel):
    slopes = {key: slope_at_zero(part) for key, part in feed_forward_parts(lm.anatomy).items()}
    norms = norms_of(lm)
    return lambda editors: propagating(lm.anatomy, norms, slopes, editors)


def relevance_of_layers(
    lm: LanguageModel, batch: Batch, rows: list[ScoredRow]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden state times gradient, summed, of what each layer is given; and the scores."""
    given = []

    def keep(args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        if not hidden.requires_grad:
            hidden.requires_grad_()
        given.append(hidden)

    layers = {layer.module: keep for layer in lm.anatomy.layers}
    with frozen(lm.model), torch.enable_grad(), rules_of(lm)({}), around(before=layers):
        scores = score_rows(forward(lm.model, batch, with_logits=True), batch, rows)
        slopes = torch.autograd.grad(scores.sum(), given)
    return [
        (hidden * slope).sum((1, 2)).detach() for hidden, slope in zip(given, slopes, strict=True)
    ], scores.detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_relevance_is_made_or_lost_on_the_way_down_of_any_dense_family(family):
    lm = of_family(family, **({"final_logit_softcapping": 1e6} if family == "gemma2" else {}))
    without_biases(lm.model)
    batch, rows = logit_differences()
    with Exact64():
        untreated = score_rows(forward(lm.model, batch, with_logits=True), batch, rows).detach()
        layers, scores = relevance_of_layers(lm, batch, rows)
    np.testing.assert_array_equal(scores, untreated)
    assert len(layers) == 2
    for layer in layers:  # What is left is the epsilon of norms, which is in their scale: nothing.
        np.testing.assert_allclose(layer, scores, rtol=1e-9)
    assert untouched(lm)


class Linearised(TorchFunctionMode):
    """A twin on stock code, linear around where it is: rsqrt, softmax and act(x)/x are constants."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.rsqrt, nn.functional.softmax):
            return result.detach()
        return args[0] * (result / args[0]).detach() if func is nn.functional.silu else result


def halved(mlp: nn.Module):
    """The gated product as a sum of two halves, one with either factor constant."""

    def forward(hidden):
        gate, up = mlp.act_fn(mlp.gate_proj(hidden)), mlp.up_proj(hidden)
        return mlp.down_proj((gate * up.detach() + gate.detach() * up) / 2)

    return forward


@pytest.mark.parametrize("biases", [False, True])
def test_relevance_is_the_plain_gradient_of_a_twin_made_linear(monkeypatch, biases):
    tiny = tiny_llama(0, attention_bias=biases, mlp_bias=biases, attn_implementation="eager").double()
    lm = LanguageModel(tiny, tiny_tokenizer())
    batch, rows = logit_differences()
    with Exact64():
        ours, _ = relevances(lm, batch, rows)
        for layer in tiny.model.layers:
            monkeypatch.setattr(layer.mlp, "forward", halved(layer.mlp))
        with Linearised():
            theirs, _ = mask_gradients(lm, batch, rows, lm.table.sizes, mask=1.0)
    for key, values in theirs.items():
        np.testing.assert_allclose(ours[key], values, rtol=1e-9, atol=1e-12)
        assert bool((values != 0).any()) == (key[-1] not in "qk"), key


def test_one_neuron_of_the_last_layer_equals_algebra():
    tiny = tiny_llama(0, attention_bias=False, mlp_bias=False).double()
    lm, seen = LanguageModel(tiny, tiny_tokenizer()), {}
    batch, rows = logit_differences()
    last, head = tiny.model.layers[-1].mlp, tiny.lm_head.weight
    parts = {"down": last.down_proj, "gate": last.gate_proj, "up": last.up_proj}
    keep = {
        part: lambda args, _, part=part: seen.__setitem__(part, args[0].detach())
        for part in (last.down_proj, tiny.model.norm)
    }
    with Exact64(), torch.no_grad(), around(before=keep):
        forward(tiny, batch, with_logits=True)
    with Exact64():
        found, _ = relevances(lm, batch, rows)
    prefix = f"layers.{len(tiny.model.layers) - 1}"
    for number, row in enumerate(rows):
        expected = torch.zeros(lm.table.sizes[f"{prefix}.down"], dtype=torch.float64)
        for place in range(row.start, len(row.ids)):
            stream = seen[tiny.model.norm][number, place - 1]
            scale = (stream.square().mean() + tiny.model.norm.variance_epsilon) ** -0.5
            direction = (head[row.ids[place]] - head[row.rival]) * tiny.model.norm.weight * scale
            per_token = seen[last.down_proj][number, place - 1] * (direction @ parts["down"].weight)
            expected += row.weight * per_token.detach() / (len(row.ids) - row.start)
        np.testing.assert_allclose(found[f"{prefix}.down"][number], expected, rtol=1e-9, atol=1e-14)
        for half in ("gate", "up"):
            np.testing.assert_allclose(found[f"{prefix}.{half}"][number], expected / 2, rtol=1e-9, atol=1e-14)


def test_the_detector_is_the_mean_over_prompts_and_reads_adapters_where_they_act():
    for lm in (adapted("ia3").aligned,):
        texts = {"refusal": "sorry i cannot help", "compliance": ["sure here is", "yes you can make"]}
        found = find_relp(lm, PROMPTS[:2], **texts, batch_size=1).scores
        each = [find_relp(lm, PROMPTS[n : n + 1], **texts).scores for n in (0, 1)]
        for key, values in found.items():
            np.testing.assert_allclose(values, (each[0][key] + each[1][key]) / 2, rtol=1e-4, atol=1e-7)
            if key.endswith(".down"):
                for half in ("gate", "up"):
                    np.testing.assert_allclose(
                        found[key.replace("down", half)], values / 2, rtol=1e-4, atol=1e-7
                    )
        assert untouched(lm)


def test_an_activation_of_exactly_zero_has_the_slope_there():
    part = feed_forward_parts(LanguageModel(tiny_llama(0), tiny_tokenizer()).anatomy)["layers.0.down"]
    product = relevance._LinearProduct(part, slope_at_zero(part), {})
    fed = torch.tensor([[[0.0, 1e-30, -2.0]]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(product._line(fed).sum(), fed)
    np.testing.assert_allclose(
        slope.numpy()[0, 0], [0.5, 0.5, float(torch.sigmoid(torch.tensor(-2.0).double()))]
    )


@pytest.mark.parametrize("family", [*MOE_FAMILIES, *HYBRID_FAMILIES])
def test_models_without_rules_are_refused_in_one_line(family):
    lm = LanguageModel(build(family), tiny_tokenizer())
    with pytest.raises(UnsupportedModelError, match="relp.*use attribution"):
        find_relp(lm, PROMPTS[:1])


def test_unknown_modules_and_functions_are_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(tiny_llama(0).config.hidden_size))

        def forward(self, hidden):
            return hidden.tanh() * self.weight

    odd = tiny_llama(0)
    odd.model.norm = Odd()
    with pytest.raises(UnsupportedModelError, match="norm .Odd."):
        find_relp(LanguageModel(odd, tiny_tokenizer()), PROMPTS[:1])
    shifted = tiny_llama(0)
    for layer in shifted.model.layers:
        layer.mlp.act_fn = nn.Sigmoid()
    with pytest.raises(UnsupportedModelError, match="0.5 at 0"):
        find_relp(LanguageModel(shifted, tiny_tokenizer()), PROMPTS[:1])
    with pytest.raises(UsageError, match="q,k.*expected some of v,o"):
        find_relp(LanguageModel(tiny_llama(0), tiny_tokenizer()), PROMPTS[:1], sites="q,k")
