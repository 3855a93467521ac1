"""What detectors are held against: random neurons, sizes, set differences of weights, probes and the refusal
direction.
"""

import copy

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from twins import PROMPTS, adapted, model, separate, untouched

from safety_neurons.detectors import (
    find_activation_magnitude,
    find_probe_weights,
    find_random,
    find_refusal_direction,
    find_snip,
    find_wanda,
    find_weight_change,
    find_weight_magnitude,
)
from safety_neurons.detectors.probe import probe
from safety_neurons.errors import MismatchError, UnsupportedModelError, UsageError
from safety_neurons.model import LanguageModel
from safety_neurons.neurons import NeuronSet
from safety_neurons.neurons.scores import kept_share
from safety_neurons.results import Checkpoint


def test_weight_change_is_the_norm_of_rows_with_bias_and_of_columns():
    base, aligned = separate(attention_bias=True, mlp_bias=True)
    found = find_weight_change(base, aligned).scores
    mine, theirs = (lm.model.model.layers[1] for lm in (aligned, base))
    row = torch.cat(
        [
            mine.mlp.up_proj.weight - theirs.mlp.up_proj.weight,
            (mine.mlp.up_proj.bias - theirs.mlp.up_proj.bias)[:, None],
        ],
        1,
    )
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
    np.testing.assert_allclose(
        found["layers.1.up"], up.get_delta_weight("a1").detach().norm(dim=1), rtol=1e-4
    )
    assert not found["layers.1.gate"].any()


def test_a_models_own_weights_are_measured_too_and_experts_with_them():
    from families import build
    from tiny import tiny_tokenizer

    lm = LanguageModel(build("mixtral"), tiny_tokenizer())
    found = find_weight_magnitude(lm, count=7)
    assert len(found.neurons) == 7
    experts = lm.anatomy.layers[0].experts
    np.testing.assert_allclose(
        found.scores["layers.0.experts.1.down"], experts.weight(1, "down").detach().norm(dim=0), rtol=1e-5
    )
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


HARMFUL, HARMLESS = PROMPTS[:3], PROMPTS[3:]


def answers(lm, prompts):
    """Ids of prompt and answer, and where the answer starts."""
    told = []
    for row, answer in zip(
        lm.encode(prompts), lm.complete(prompts, max_new_tokens=16, batch_size=1), strict=True
    ):
        ids = [token for token in answer.token_ids if token not in lm.eos_ids]
        if ids:
            told.append(([*row.ids, *ids], len(row.ids)))
    return told


def snip_twin(lm, prompts, name):
    weight = dict(lm.model.named_parameters())[name]
    total = 0.0
    for ids, start in answers(lm, prompts):
        lm.model.zero_grad()
        chances = lm.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        loss = -torch.stack([chances[place - 1, ids[place]] for place in range(start, len(ids))]).mean()
        loss.backward()
        total = total + (weight * weight.grad).abs().detach()
    lm.model.zero_grad(set_to_none=True)
    return total


def wanda_twin(lm, prompts, name):
    part = lm.model.get_submodule(name.removesuffix(".weight"))
    squares = 0.0
    for ids, start in answers(lm, prompts):
        seen = []
        handle = part.register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            lm.model(input_ids=torch.tensor([ids]))
        handle.remove()
        squares = squares + (seen[0][0, start:] ** 2).sum(0)
    return part.weight.detach().abs() * squares.sqrt()


def share_twin(safety, utility, share, other, columns):
    """Weight by weight, with sets."""
    flat = [
        {int(place) for place in values.flatten().argsort(descending=True)[:count]}
        for values, count in (
            (safety, round(share * safety.numel())),
            (utility, round(other * utility.numel())),
        )
    ]
    kept = torch.zeros(safety.numel())
    kept[list(flat[0] - flat[1])] = 1
    kept = kept.reshape(safety.shape)
    return kept.mean(0 if columns else 1).numpy()


@pytest.mark.parametrize(("find", "twin"), [(find_snip, snip_twin), (find_wanda, wanda_twin)])
def test_rows_and_columns_hold_the_share_of_weights_that_the_twin_keeps(find, twin):
    lm, _ = separate()
    found = find(lm, HARMFUL, harmless=HARMLESS, safety=0.2, utility=0.1, count=5).scores
    for site, part in (
        ("q", "self_attn.q_proj"),
        ("o", "self_attn.o_proj"),
        ("up", "mlp.up_proj"),
        ("down", "mlp.down_proj"),
    ):
        name = f"model.layers.1.{part}.weight"
        expected = share_twin(
            twin(lm, HARMFUL, name), twin(lm, HARMLESS, name), 0.2, 0.1, site in ("o", "down")
        )
        # A tie at the cut may fall either way: at most one weight of a neuron.
        assert np.abs(found[f"layers.1.{site}"] - expected).max() <= 1.01 / 32
        assert np.abs(found[f"layers.1.{site}"] - expected).mean() < 1e-3
    assert untouched(lm)
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_adapters_on_the_input_count_with_the_scale_that_the_weights_see():
    """The same network with the scale merged into the columns has the same importances."""
    pair = adapted()
    with pair.aligned.active():
        merged = LanguageModel(copy.deepcopy(pair.aligned.model).merge_and_unload(), pair.aligned.tokenizer)
    for find in (find_snip, find_wanda):
        one, other = (
            find(lm, HARMFUL, harmless=HARMLESS, sites=("down",), safety=0.2, count=5).scores
            for lm in (pair.aligned, merged)
        )
        for key, values in one.items():
            assert np.abs(values - other[key]).mean() < 2e-3  # up to weights at the cut


def test_equal_texts_leave_nothing_and_one_share_bounds_the_score():
    lm = model(0)
    same = find_snip(lm, HARMFUL, harmless=HARMFUL, count=3).scores
    assert all(not values.any() for _, values in same.items())
    values = np.arange(20.0)
    assert kept_share(values, -values, 4, 0.25, 0.25).tolist() == [0.0, 0.0, 0.0, 1.0]
    assert kept_share(values, values, 4, 0.5, 0.25).tolist() == [0.0, 0.0, 1.0, 0.0]


def test_a_killed_run_goes_on_and_gives_the_same(tmp_path):
    lm = model(0)
    options = {"harmless": HARMLESS, "batch_size": 1, "count": 9}
    whole = find_snip(lm, HARMFUL, **options)
    checkpoint = Checkpoint(tmp_path / "state.safetensors")

    def die(done, total, tokens):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_snip(lm, HARMFUL, checkpoint=checkpoint, progress=die, **options)
    again = find_snip(lm, HARMFUL, checkpoint=checkpoint, **options)
    for key, values in whole.scores.items():
        np.testing.assert_array_equal(values, again.scores[key])


def test_what_cannot_be_weighed_is_refused():
    from families import build
    from tiny import tiny_tokenizer

    lm = model(0)
    with pytest.raises(UsageError, match="above 0 and below 1"):
        find_wanda(lm, HARMFUL, harmless=HARMLESS, safety=1.5)
    with pytest.raises(UsageError, match="no option 'agreement'"):
        find_snip(lm, HARMFUL, harmless=HARMLESS, count=3, agreement=0.5)
    with pytest.raises(UsageError, match="no option 'utilities'"):
        find_snip(lm, HARMFUL, harmless=HARMLESS, utilities=0.1)
    with pytest.raises(UnsupportedModelError, match="is an expert's, and wanda scores attention and dense"):
        find_wanda(
            LanguageModel(build("mixtral"), tiny_tokenizer()), HARMFUL, harmless=HARMLESS, sites=("down",)
        )


HARMFUL, HARMLESS = PROMPTS[:3], PROMPTS[3:]


def test_the_probe_is_the_logistic_regression_of_a_common_library():
    draws = np.random.default_rng(0)
    features, labels = draws.normal(size=(40, 12)), (draws.random(40) < 0.4).astype(float)
    features[:, 3] = 5.0  # a constant feature
    ours = probe(torch.tensor(features), torch.tensor(labels)).numpy()
    twin = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(
        StandardScaler().fit_transform(features), labels
    )
    np.testing.assert_allclose(ours, twin.coef_[0], atol=1e-5)
    assert ours[3] == 0


def test_scores_are_signed_z_scores_of_each_sites_probe_on_the_largest_activation_of_a_prompt():
    lm = model(0, dtype=torch.float64)  # in float32 what is constant up to rounding is noise to the library
    found = find_probe_weights(lm, HARMFUL, harmless=HARMLESS, sites=("up", "down"), threshold=1.0)
    for key, values in found.scores.items():
        assert (values**2).mean() == pytest.approx(1, abs=0.01)  # a weight of exactly 0 scores 0
        assert set(found.neurons[key]) == set(np.flatnonzero(values >= 1.0))
    features = []
    for row in lm.encode(PROMPTS):
        seen = []
        handle = lm.anatomy.layers[1].mlp.module.up_proj.register_forward_hook(
            lambda _, __, out, seen=seen: seen.append(out)
        )
        with torch.no_grad():
            lm.model(input_ids=torch.tensor([row.ids]))
        handle.remove()
        features.append(seen[0][0].amax(0).numpy())
    scaled = StandardScaler().fit_transform(np.stack(features).astype(np.float64))
    weights = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(scaled, [1] * 3 + [0] * 3).coef_[0]
    scores = np.sign(weights) * np.abs((weights - weights.mean()) / weights.std())
    np.testing.assert_allclose(found.scores["layers.1.up"], scores, atol=1e-3)
    assert untouched(lm)


HARMFUL, HARMLESS = PROMPTS[:3], PROMPTS[3:]


def hidden_states(lm, prompts):
    """Per layer boundary (the embedding first), the mean over prompts at the last token, one prompt at a
    time.
    """
    each = []
    for row in lm.encode(prompts):
        seen = []

        def keep(_, __, out, seen=seen):
            seen.append(out if isinstance(out, torch.Tensor) else out[0])

        handles = [part.module.register_forward_hook(keep) for part in lm.anatomy.layers]
        with torch.no_grad():
            lm.model(input_ids=torch.tensor([row.ids]))
            embedded = lm.model.get_input_embeddings()(torch.tensor([row.ids]))
        for handle in handles:
            handle.remove()
        each.append(torch.stack([embedded[0, -1], *(out[0, -1] for out in seen)]))
    return torch.stack(each).mean(0)


def test_contributions_of_all_writers_add_up_to_what_the_layers_put_along_the_direction():
    lm, _ = separate()
    harmful, harmless = hidden_states(lm, HARMFUL), hidden_states(lm, HARMLESS)
    for layer in (0, 1):
        difference = harmful - harmless
        direction = difference[layer + 1] / difference[layer + 1].norm()
        expected = float((difference[layer + 1] - difference[0]) @ direction)
        found = find_refusal_direction(
            lm, HARMFUL, harmless=HARMLESS, layer=layer, sites=("o", "down"), layers=range(layer + 1)
        ).scores
        assert sum(float(values.sum()) for _, values in found.items()) == pytest.approx(expected, rel=1e-4)
    assert untouched(lm)


def test_rows_have_what_their_columns_write_and_queries_and_keys_nothing():
    lm = model(0)
    found = find_refusal_direction(
        lm, HARMFUL, harmless=HARMLESS, sites=("q", "k", "v", "o", "gate", "up", "down"), layer=0
    ).scores
    assert not found["layers.0.q"].any()
    assert not found["layers.1.k"].any()
    np.testing.assert_array_equal(found["layers.1.gate"], found["layers.1.down"])
    heads = found["layers.0.o"].reshape(2, 2, 8)  # two key-value heads of two query heads of eight features
    np.testing.assert_allclose(found["layers.0.v"], heads.sum(1).ravel(), rtol=1e-5, atol=1e-7)


def test_a_neuron_that_fires_for_harm_alone_and_writes_along_the_direction_comes_first():
    lm = model(0)
    place = lm.anatomy.layers[1].mlp
    plain = find_refusal_direction(lm, HARMFUL, harmless=HARMLESS, layer=1)
    k = int(np.abs(plain.scores["layers.1.down"]).argmax())
    with torch.no_grad():
        place.module.down_proj.weight[:, k] *= 5 * np.sign(plain.scores["layers.1.down"][k])
    louder = find_refusal_direction(lm, HARMFUL, harmless=HARMLESS, layer=1, count=1)
    assert list(louder.neurons) == [("layers.1.down", k)]


def test_the_layer_is_chosen_by_separation_and_one_that_is_not_there_is_refused():
    lm = model(0)
    found = find_refusal_direction(lm, HARMFUL, harmless=HARMLESS, count=3)
    assert found.neurons.provenance.config["layer"] == 0  # the only one among the first four fifths of two
    with pytest.raises(UsageError, match="expected 0 to 1"):
        find_refusal_direction(lm, HARMFUL, harmless=HARMLESS, layer=2)
