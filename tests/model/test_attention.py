"""Attention formulas are proved, and refused where they cannot be."""

import pytest
import torch
from transformers.models.llama import modeling_llama

import families
from safety_neurons.detectors.importance import prove_layers
from safety_neurons.errors import UnsupportedModelError
from safety_neurons.model import LanguageModel
from safety_neurons.model.attention import norm_candidates


def proved(family, **over):
    lm = LanguageModel(families.build(family, **over), None)
    return prove_layers(lm, list(lm.anatomy.layers))


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("kernel", ["eager", None])
def test_the_formula_of_every_family_reproduces_what_the_output_projection_reads(family, kernel):
    plans = proved(family, attn_implementation=kernel)
    assert sorted(plans) == [0, 1]
    assert all(plan.error < 1e-5 for plan in plans.values())


def test_facts_differ_by_layer_in_hybrids():
    assert [plan.rotary for plan in proved("smollm3").values()] == ["half", "none"]
    assert [plan.rotary for plan in proved("cohere2").values()] == ["interleaved", "none"]
    assert proved("gptj")[0].rotary == "interleaved"


def test_soft_caps_sinks_norms_and_scales_are_found():
    assert proved("gemma2", attn_implementation="eager")[0].softcap == 5.0
    assert proved("bloom")[0].alibi == 1.0
    assert proved("granite")[0].scale == pytest.approx(0.3)
    assert proved("gpt2", scale_attn_by_inverse_layer_idx=True, attn_implementation="eager")[
        1
    ].scale == pytest.approx(8**-0.5 / 2)
    assert proved("olmo2")[0].q_norm.across_heads
    assert proved("phi_qk_norm")[0].k_norm.centred
    assert not proved("qwen3")[0].q_norm.across_heads


def test_a_scaled_rotary_embedding_is_followed():
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    }
    assert proved("llama", rope_parameters=rope)[0].error < 1e-5


def test_an_attention_that_does_something_else_is_refused_by_layer_and_site(monkeypatch):
    lm = LanguageModel(families.build("llama", attn_implementation="eager"), None)
    layers = list(lm.anatomy.layers)
    monkeypatch.setattr(
        modeling_llama,
        "eager_attention_forward",
        lambda module, query, key, value, mask, **rest: (query, None),
    )
    with pytest.raises(UnsupportedModelError, match=r"layers.0: q, k, v are unsupported.*sites"):
        prove_layers(lm, layers)


@pytest.mark.parametrize(("centred", "biased"), [(False, False), (True, False), (True, True)])
def test_the_change_of_a_norm_equals_norming_the_changed_state(centred, biased):
    module = torch.nn.LayerNorm(8, bias=biased) if centred else torch.nn.RMSNorm(8, eps=1e-6)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(8, generator=torch.Generator().manual_seed(3)))
    module = module.double()
    formula = next(norm_candidates(module, 4, 8))
    raw = torch.randn(5, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    delta = 0.7 * raw
    moved = formula.change(raw, delta)
    for entry in range(8):
        after = raw.clone()
        after[..., entry] -= delta[..., entry]
        step = moved.along[..., entry, None] * formula.without_bias(raw)
        if moved.uniform is not None:
            step = step + moved.uniform[..., entry, None] * formula.weight
        step[..., entry] += moved.single[..., entry]
        torch.testing.assert_close(formula(raw) + step, module(after))


def test_a_module_that_is_no_norm_gives_no_formula():
    assert list(norm_candidates(torch.nn.Linear(8, 8), 4, 8)) == []
