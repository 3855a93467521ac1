import numpy as np
import pytest
import torch
from twins import adapted, model, separate

from safety_neurons.detectors import find_weight_change, find_weight_magnitude
from safety_neurons.errors import MismatchError
from safety_neurons.model import LanguageModel


def test_weight_change_is_the_norm_of_rows_with_bias_and_of_columns():
    base, aligned = separate(attention_bias=True, mlp_bias=True)
    found = find_weight_change(base, aligned).scores
    mine, theirs = (lm.model.model.layers[1] for lm in (aligned, base))
    row = torch.cat([mine.mlp.up_proj.weight - theirs.mlp.up_proj.weight, (mine.mlp.up_proj.bias - theirs.mlp.up_proj.bias)[:, None]], 1)
    np.testing.assert_allclose(found["layers.1.up"], row.detach().norm(dim=1), rtol=1e-5)
    column = (mine.self_attn.o_proj.weight - theirs.self_attn.o_proj.weight).detach()
    np.testing.assert_allclose(found["layers.1.o"], column.norm(dim=0), rtol=1e-5)


def test_an_input_scale_counts_as_a_change_of_its_columns():
    pair = adapted()
    found = find_weight_change(pair.base, pair.aligned).scores
    down = pair.base.model.get_base_model().model.layers[0].mlp.down_proj
    first, second = (down.ia3_l[name].detach().flatten() for name in ("a0", "a1"))
    expected = down.base_layer.weight.detach().norm(dim=0) * (first * second - first).abs()
    np.testing.assert_allclose(found["layers.0.down"], expected, rtol=1e-5)
    assert not found["layers.0.up"].any()


def test_a_low_rank_adapter_counts_with_its_product():
    pair = adapted("lora", ("up_proj", "q_proj"))
    found = find_weight_change(pair.base, pair.aligned).scores
    up = pair.base.model.get_base_model().model.layers[1].mlp.up_proj
    np.testing.assert_allclose(found["layers.1.up"], up.get_delta_weight("a1").detach().norm(dim=1), rtol=1e-4)
    assert not found["layers.1.gate"].any()


def test_a_models_own_weights_are_measured_too_and_experts_with_them():
    from families import build
    from tiny import tiny_tokenizer

    lm = LanguageModel(build("mixtral"), tiny_tokenizer())
    found = find_weight_magnitude(lm, count=7)
    assert len(found.neurons) == 7
    experts = lm.anatomy.layers[0].experts
    np.testing.assert_allclose(found.scores["layers.0.experts.1.down"], experts.weight(1, "down").detach().norm(dim=0), rtol=1e-5)
    assert find_weight_change(lm, lm, count=1).scores["layers.0.experts.1.gate"].max() == 0


def test_models_of_other_shapes_are_refused():
    with pytest.raises(MismatchError, match="different shapes"):
        find_weight_change(model(0), model(0, intermediate_size=32))
