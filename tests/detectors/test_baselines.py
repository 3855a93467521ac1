"""Random neurons and those that are large or changed: against sums by hand."""

import numpy as np
import pytest
import torch
from twins import PROMPTS, adapted, model, separate, untouched

from safety_neurons.detectors import find_activation_magnitude, find_random, find_weight_change, find_weight_magnitude
from safety_neurons.errors import MismatchError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet


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


def test_the_root_mean_square_is_over_every_token_of_every_prompt():
    lm = adapted().aligned
    found = find_activation_magnitude(lm, PROMPTS, count=4)
    place = lm.anatomy.layers[1].mlp
    seen = []
    handle = place.places["down"].hooked.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), lm.running():
        for row in lm.encode(PROMPTS):
            lm.model(input_ids=torch.tensor([row.ids]))
    handle.remove()
    squares = torch.cat([values[0].double() ** 2 for values in seen])
    np.testing.assert_allclose(found.scores["layers.1.down"], squares.mean(0).sqrt().numpy(), rtol=1e-5)
    assert len(found.neurons) == 4
    assert untouched(lm)


def test_experts_count_the_tokens_that_reached_them():
    from families import build
    from safety_neurons.model import LanguageModel
    from tiny import tiny_tokenizer

    lm = LanguageModel(build("mixtral"), tiny_tokenizer())
    found = find_activation_magnitude(lm, PROMPTS[:2], batch_size=1, sites=("down",), count=2)
    assert set(found.scores.keys()) == set(lm.table.select(sites=("down",)).sizes)
    assert any(values.any() for _, values in found.scores.items())


def test_a_random_set_matches_counts_is_disjoint_and_seeded():
    table = model(0).table
    like = NeuronSet({"layers.0.down": range(10), "layers.1.q": [1, 2]}, table)
    one, same, other = (find_random(table, like=like, seed=seed) for seed in (3, 3, 4))
    assert one.neurons.counts() == like.counts()
    assert not len(one.neurons & like)
    assert one.neurons == same.neurons != other.neurons
    assert one.scores.count(len(like)) == one.neurons
    crowded = find_random(table, like=NeuronSet({"layers.0.down": range(40)}, table))
    assert "not disjoint" in crowded.notes[0]


def test_a_random_set_of_a_share_has_that_size_and_takes_no_selection_beside_a_set():
    table = model(0).table
    found = find_random(table, sites=("down",), top=0.25, seed=1)
    assert len(found.neurons) == 24
    assert set(found.scores.keys()) == {"layers.0.down", "layers.1.down"}
    with pytest.raises(UsageError, match="leave the selection out"):
        find_random(table, like=found.neurons, top=0.1)
    with pytest.raises(UsageError, match="no prompts to agree"):
        find_random(table, top=0.1, agreement=0.5)
